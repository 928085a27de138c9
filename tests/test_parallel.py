"""Two and four processes against one: the same numbers, one message from whichever rank fails, and nothing left over.

Each launch costs seconds, so there are few: what its ranks computed is written down by `rank_worker.py` and compared
here. `torchrun` is started with a time limit far above what a launch takes; a job that hangs fails there.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from llama import ModelArgs
from llama.loading import needed
from support.checkpoints import write_checkpoint
from support.launching import Job, launch, succeeded
from support.models import BASE_PARAMS, random_weights
from support.rank_worker import answers, build, gradients, gradients_of_an_input, gradients_of_copies

SIZES = BASE_PARAMS | {"n_heads": 8, "dim": 64, "vocab_size": 480}
MODELS = {
    "mha": SIZES,
    "gqa": SIZES | {"n_kv_heads": 2, "vocab_size": 483},  # fewer key-value heads than 4 ranks; 3 ids too many for both
    "mqa": SIZES | {"n_kv_heads": 1, "vocab_size": 481},  # one key-value head, on every rank
}
CHECKPOINTS = {"mha1": ("mha", 1), "mha8": ("mha", 8), "mqa2": ("mqa", 2)}
CHECKPOINTS |= {f"gqa{files}": ("gqa", files) for files in (1, 2, 4, 8)}
WHOLLY = ("mha8", "gqa4", "mqa2")  # compared in all that can be asked; the others in greedy ids and log-probabilities
ODD = SIZES | {"n_heads": 6, "n_kv_heads": 3, "dim": 48, "multiple_of": 6}  # 2 ranks divide all but 3 kv heads

REQUESTS = {
    "checkpoints": {name: name in WHOLLY for name in CHECKPOINTS},
    "bad": "odd",
    "prompts": [[1, 300, 17, 401], [1], [1, 260, 261, 262, 263, 264, 265], [1, 479]],
    "gradients": ["mha8", "gqa4", "mqa2"],
    "tokens": [[1, 300, 17, 401, 7], [1, 260, 300, 19, 402], [1, 1, 1, 479, 3]],
    "texts": ["Anna took the red cup", "", "日本"],
    "dialogs": [
        [{"role": "user", "content": "Where is the red cup?"}],
        [{"role": "user", "content": "[INST] no"}],
        [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Who?"}],
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_path) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "requests.json").write_text(json.dumps(REQUESTS))
    for name, (model, files) in CHECKPOINTS.items():
        params = MODELS[model] | ({"flavour": "vanilla"} if name == "mha1" else {})
        write_checkpoint(folder / name, params, random_weights(params), tokenizer_path, files)
    write_checkpoint(folder / "odd", ODD, random_weights(ODD), tokenizer_path)
    return folder


@pytest.fixture(scope="module")
def alone(folder) -> Job:
    return succeeded(launch(folder, "alone", 1), 1)


@pytest.fixture(scope="module")
def pair(folder) -> Job:
    return succeeded(launch(folder, "pair", 2), 2)


@pytest.fixture(scope="module")
def four(folder) -> Job:
    return succeeded(launch(folder, "four", 4), 4)


@pytest.fixture(params=["alone", "pair", "four"])
def job(request) -> Job:
    """Each launch in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["pair", "four"])
def shared(request) -> Job:
    """Each launch in which ranks share a model."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def expected(folder) -> dict[str, dict]:
    """What one process answers, here, to the same requests."""
    models = {model: name for name, (model, files) in CHECKPOINTS.items() if files <= 2}
    found = {model: answers(build(folder / name), REQUESTS) for model, name in models.items()}
    for model, name in models.items():
        found[model]["unseeded"] = build(folder / name).generate(REQUESTS["prompts"], 5, 0.9, 0.95)
    return json.loads(json.dumps(found))


def assert_same(found: object, expected: object, place: str = "") -> None:
    """Equal, but for the rounding of float32 sums in another order."""
    assert type(found) is type(expected), place
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key in expected:
            assert_same(found[key], expected[key], f"{place}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for index, pair in enumerate(zip(found, expected, strict=True)):
            assert_same(*pair, f"{place}/{index}")
    elif isinstance(expected, float):
        np.testing.assert_allclose(found, expected, atol=1e-4, err_msg=place)
    else:
        assert found == expected, place


# --- the same numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sampled", "text", "chat", "score", "stepped"])
@pytest.mark.parametrize("name", WHOLLY)
def test_any_number_of_ranks_answers_as_one(job, expected, name, kind):
    for results in job.ranks:
        assert_same(results["answers"][name][kind], expected[CHECKPOINTS[name][0]][kind])


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_any_number_of_files_gives_the_same_ids(job, expected, name):
    for results in job.ranks:
        assert_same(results["answers"][name]["greedy"], expected[CHECKPOINTS[name][0]]["greedy"])


@pytest.mark.parametrize("model", MODELS)
def test_what_is_compared_is_worth_comparing(expected, model):
    """Every row generates, choices vary, and other requests give other answers."""
    found = expected[model]
    ids = found["greedy"][0]
    assert all(len(row) > len(prompt) for row, prompt in zip(ids, REQUESTS["prompts"], strict=True))
    assert len({id for row in ids for id in row}) > 20
    assert len({json.dumps(found[kind][0]) for kind in ("greedy", "sampled", "unseeded")}) == 3
    assert [answer["finish_reason"] == "refused" for answer in found["chat"]] == [False, True, False]
    assert np.std(found["stepped"]) > 0.5


def test_ranks_given_other_requests_follow_the_first(shared, expected):
    """A rank with fewer prompts than the first had no place to put the rows that came."""
    kinds = ("sampled", "unseeded", "text", "chat", "score")
    for results in shared.ranks:
        assert_same(results["disagreeing"], {kind: expected["gqa"][kind] for kind in kinds})


def test_the_first_rank_chooses_for_all(shared, expected):
    """Ranks compute the same logits, so only a rank that would choose otherwise shows whether the choice is sent."""
    greedy, sampled = expected["gqa"]["greedy"][0], expected["gqa"]["sampled"][0]
    streamed = [ids[len(prompt) :] for ids, prompt in zip(greedy, REQUESTS["prompts"], strict=True)]
    for results in shared.ranks:
        assert results["contradicted"] == {"greedy": greedy, "sampled": sampled, "streamed": streamed}


def test_each_rank_holds_its_share(pair):
    """Half of every matrix, a whole head of a model that has only one, whole norms; as the estimate says."""
    for name, (model, _) in CHECKPOINTS.items():
        args = ModelArgs(**MODELS[model], max_seq_len=48, max_batch_size=4)
        for results in pair.ranks:
            assert tuple(results["held"][name]) == needed(args, 4, 2)
    assert [results["size"] for results in pair.ranks] == [[0, 2], [1, 2]]


def test_collectives_of_a_token(pair):
    """Two sums a layer, of attention and of feed-forward; embedding and logits gathered; the choice broadcast."""
    for results in pair.ranks:
        expected = {"all_reduce": 2 * SIZES["n_layers"], "all_gather": 2, "broadcast": 1}
        assert results["collectives"] == dict.fromkeys(WHOLLY, expected)


CUT_BY_COLUMNS = ("tok_embeddings", "wo", "w2")


def put_together(name: str, shares: list[list], shape: tuple[int, ...]) -> np.ndarray:
    """A tensor from its shares; one that is not cut has to be the same on every rank."""
    if np.shape(shares[0]) == shape:
        for share in shares[1:]:
            np.testing.assert_array_equal(share, shares[0])
        return np.array(shares[0])
    return np.concatenate(shares, axis=1 if name.split(".")[-2] in CUT_BY_COLUMNS else 0)


@pytest.mark.parametrize("name", REQUESTS["gradients"])
def test_gradients_of_shared_weights_are_those_of_one_rank(pair, folder, name):
    """`backward()` failed: a sum over ranks had overwritten what the layer before it needed."""
    expected = gradients(build(folder / name).model, REQUESTS["tokens"])
    found = [results["gradients"][name] for results in pair.ranks]
    for share in found:
        assert share["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert share["weights"].keys() == expected["weights"].keys()
    for weight, whole in expected["weights"].items():
        together = put_together(weight, [share["weights"][weight] for share in found], np.shape(whole))
        assert np.abs(whole).max() > 1e-3
        np.testing.assert_allclose(together[: len(whole)], whole, atol=1e-5, err_msg=weight)
        assert not together[len(whole) :].any(), f"{weight}: padding learns nothing"


def test_gradient_of_a_shared_input_is_whole_on_every_rank(pair):
    """Each rank had the part that came through its own share of the matrices."""
    expected = gradients_of_an_input()
    for results in pair.ranks:
        for rows, gradient in expected.items():
            assert np.abs(gradient).max() > 1e-4
            np.testing.assert_allclose(results["input gradients"][str(rows)], gradient, atol=1e-6)


def test_gradient_of_a_matrix_in_copies_is_the_sum_of_what_its_holders_find(pair):
    """So ranks that hold the same key-value head go on holding the same one after a step of training."""
    expected = gradients_of_copies()
    for results in pair.ranks:
        assert_same(results["copies"], expected)


def test_layers_equal_fairscales_bit_for_bit(job):
    for results in job.ranks:
        assert results["layers"] == {"column": True, "gathered": True, "row": True, "embedding": True}


# --- groups ------------------------------------------------------------------------------------------------------


def test_one_process_under_torchrun_makes_no_group(alone):
    assert alone.ranks[0]["group"] is False


def test_model_parallel_size_one_leaves_each_process_to_itself(pair, four, expected):
    assert [results["group apart"] for results in pair.ranks] == [False, False]
    for results in [*pair.ranks, *four.ranks]:
        assert_same(results["apart"] | {"unseeded": expected["gqa"]["unseeded"]}, expected["gqa"])


def test_two_groups_of_two_work_on_their_own_prompts(four, folder):
    assert [results["pair of"] for results in four.ranks] == [[0, 2], [1, 2], [0, 2], [1, 2]]
    llama = build(folder / "gqa2")
    for rank, results in enumerate(four.ranks):
        first = rank // 2
        prompts, seed = REQUESTS["prompts"][first:][:2], 2 * first
        ids, _ = llama.generate(prompts, 6 + first, 0.9, 0.95, seed=seed)
        assert results["halves"] == [ids, None]
    assert four.ranks[0]["halves"] != four.ranks[2]["halves"]


def test_groups_are_numbered_in_the_order_of_their_ranks(alone, pair, four):
    """All in one group, two groups of two, and each process on its own, with a process group and without."""
    for job in (alone, pair, four):
        assert {results["group of"] for results in job.ranks} == {0}
    assert [results["group of, in pairs"] for results in four.ranks] == [0, 0, 1, 1]
    assert [results["group of, apart"] for results in pair.ranks] == [0, 1]
    assert [results["group of, apart"] for results in four.ranks] == [0, 1, 2, 3]


def test_groups_draw_their_own_seeds(four, expected):
    """Groups that were given the same prompts wrote the same texts; the first group draws what one process draws."""
    drawn = [results["pairs unseeded"] for results in four.ranks]
    assert drawn[0] == drawn[1] and drawn[2] == drawn[3]
    assert drawn[0][0] == expected["gqa"]["unseeded"]
    assert len({json.dumps(answer) for answers in (drawn[0], drawn[2]) for answer in answers}) == 4


def test_a_group_made_by_build_is_destroyed_at_exit_and_anothers_is_not(pair, four):
    assert [results["group at exit"] for results in pair.ranks] == [False] * 2
    assert [results["group at exit"] for results in four.ranks] == [True] * 4


def test_another_size_in_the_same_process_is_refused(pair):
    for results in pair.ranks:
        assert re.search(r"over 2 ranks.*cannot now use 1", results["another size"])


# --- what reaches the terminal -----------------------------------------------------------------------------------


def test_nothing_is_printed_on_standard_output(job):
    """Neither fairscale's lines nor the collectives' library's."""
    assert job.out == ""


@pytest.mark.parametrize("name, count", [("alone", 7), ("pair", 1 + 7 + 2 + 7 + 3 + 3), ("four", 7 + 2 + 1 + 1)])
def test_only_the_first_rank_reports(request, name, count):
    lines = request.getfixturevalue(name).err.splitlines()
    assert len([line for line in lines if line.startswith("llama: ")]) == count


def test_a_warning_is_given_once(job):
    """Every rank warned of the keys that params.json should not have."""
    assert job.err.count("flavour") == 1


def test_standard_error_holds_nothing_else(job):
    expected = re.compile(r"llama: |.*UserWarning: params\.json|\s+\w+.*\(|\s*$|W\d.*torch/distributed/run\.py")
    assert not [line for line in job.err.splitlines() if not expected.match(line)]


# --- failures ----------------------------------------------------------------------------------------------------


def said(job: Job, message: str) -> int:
    """How often an error with this message was printed; the source line that raised it, in a traceback, is none."""
    return len(re.findall(rf"^.*\b\w+Error: .*{re.escape(message)}", job.out + job.err, re.MULTILINE))


@pytest.mark.parametrize(
    "task, ranks, message",
    [
        ("fail_in_build", 2, "the second disk is gone"),
        ("fail_in_generate", 2, "the second rank is tired"),
        ("fail_everywhere", 2, "2 ranks cannot share 6 heads, 3 key-value heads"),
    ],
)
def test_a_failure_ends_the_job_with_one_message(folder, task, ranks, message):
    """The ranks that wait for the one that failed fail too, in their next collective; they must not say so."""
    job = launch(folder, task, ranks)
    assert job.code != 0
    assert said(job, message) == 1
    assert len(re.findall(r"\[rank\d\]: Traceback", job.err)) == 1
    assert not re.search(r"gloo|Connection (closed|reset)|TCPStore", job.err)
    assert not job.ranks, "a rank went on to its end"
    if task == "fail_everywhere":
        assert "use one of [1, 3, 6]" in job.err


def test_a_failure_before_there_is_a_group_is_said_once(folder):
    """A folder without weights is missed by every rank, before they have met; each told its own traceback."""
    (folder / "nothing").mkdir(exist_ok=True)
    (folder / "requests.json").write_text(json.dumps(REQUESTS | {"bad": "nothing"}))
    try:
        job = launch(folder, "fail_everywhere", 2)
    finally:
        (folder / "requests.json").write_text(json.dumps(REQUESTS))
    assert job.code != 0
    assert said(job, "No consolidated.NN.pth") == 1


def test_rank_counts_are_those_that_divide():
    """Whole query heads, equal parts of the feed-forward layer, whole or repeated key-value heads."""
    assert ModelArgs(**ODD).rank_counts() == [1, 3, 6]
    assert ModelArgs(**(ODD | {"multiple_of": 9})).rank_counts() == [1, 3]  # a feed-forward layer of 135
    assert ModelArgs(**MODELS["gqa"]).rank_counts() == [1, 2, 4, 8]
    assert ModelArgs(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, multiple_of=4096, ffn_dim_multiplier=1.3,
                     vocab_size=32000).rank_counts() == [1, 2, 4, 8, 16, 32, 64]  # fmt: skip
