"""The engine: rows that enter and leave between steps yield what each would alone, at the cost that is promised."""

import threading

import pytest
import torch

from llama import engine as engine_module
from llama.engine import Engine
from llama.generation import Llama
from llama.rows import Row
from llama.sampling import Sampling
from support.models import build_model, random_weights

PARAMS = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 480,
    "multiple_of": 16,
}
CONTEXT = 96


@pytest.fixture
def model():
    return build_model(PARAMS, random_weights(PARAMS, seed=3), max_batch_size=6, max_seq_len=CONTEXT)


@pytest.fixture
def llama(model, tokenizer) -> Llama:
    return Llama(model, tokenizer)


@pytest.fixture
def passes(model, monkeypatch) -> list[tuple[int, int]]:
    """(rows, positions) of every forward pass so far."""
    shapes = []
    forward = model.forward

    def counted(tokens, *args, **kwargs):
        shapes.append(tuple(tokens.shape))
        return forward(tokens, *args, **kwargs)

    monkeypatch.setattr(model, "forward", counted)
    return shapes


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(100 * length + seed)
    return [1, *torch.randint(3, 480, (length - 1,), generator=generator).tolist()]


def row(tokenizer, ids: list[int], max_gen_len: int = 6, **options) -> Row:
    """A greedy row that is not followed by anybody."""
    wishes = {"temperature": 0, "max_gen_len": max_gen_len} | options
    return Row(ids, Sampling(**wishes).checked(), tokenizer, room=CONTEXT - len(ids))


def run(engine: Engine, steps: int = 200) -> None:
    """Steps until nobody is left."""
    for _ in range(steps):
        if not engine.submitted and not engine.slots.everybody():
            return
        engine.step()
    raise AssertionError("rows are left")


def alone(model, ids: list[int], length: int) -> tuple[list[int], list[float]]:
    """Greedy ids and their log-probabilities, by passes that know nothing of caches and neighbours."""
    ids = list(ids)
    logprobs = []
    for _ in range(length):
        last = model(torch.tensor([ids])).detach()[0, -1]
        ids.append(int(last.argmax()))
        logprobs.append(float(last.log_softmax(-1)[ids[-1]]))
    return ids[-length:], logprobs


def assert_alone(model, ended: Row) -> None:
    """A row came to its end, and what it yielded is what it yields alone."""
    assert ended.error is None and ended.finish_reason is not None
    ids, logprobs = alone(model, ended.prompt, len(ended.generated))
    assert ended.generated == ids
    if ended.options.logprobs:
        assert ended.logprobs == pytest.approx(logprobs[: len(ended.logprobs)], abs=2e-4)


# --- prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(2, 60, 17, 60), (60, 17, 3, 2), (5,), (9, 9, 9), (64, 1, 63)])
@pytest.mark.parametrize("at_once", [2048, 20])
def test_ragged_rows_equal_rows_alone(model, tokenizer, passes, monkeypatch, lengths, at_once):
    """And they cost their own tokens, with a few of padding."""
    monkeypatch.setattr(engine_module, "SHORTEST_PASS", 4)
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", at_once)
    monkeypatch.setattr(engine_module, "PREFILL_BESIDE", at_once)
    engine = Engine(model, 480)
    rows = [row(tokenizer, prompt(length, n), logprobs=True) for n, length in enumerate(lengths)]
    engine.submit(rows)
    run(engine)

    of_prompts = sum(count * positions for count, positions in passes if positions > 1)
    assert of_prompts <= sum(lengths) + 4 * len(lengths)
    for ended in rows:
        assert_alone(model, ended)


@pytest.mark.parametrize("at_once", [2048, 50])
def test_prompt_scores_of_ragged_rows(model, tokenizer, monkeypatch, at_once):
    monkeypatch.setattr(engine_module, "SHORTEST_PASS", 4)
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", at_once)
    engine = Engine(model, 480)
    rows = [row(tokenizer, prompt(length), 0, echo=True, logprobs=True, top_logprobs=2) for length in (3, 40, 12)]
    engine.submit(rows)
    run(engine)

    for ended in rows:
        ids = ended.prompt
        expected = model(torch.tensor([ids])).detach()[0].log_softmax(-1)
        of_ids = expected[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        assert ended.logprobs == pytest.approx([0.0, *of_ids.tolist()], abs=2e-4)
        assert ended.top_logprobs[0] == []
        values, likeliest = expected.topk(2, dim=-1)
        for position, top in enumerate(ended.top_logprobs[1:]):
            assert [id for id, _ in top] == likeliest[position].tolist()
            assert [logprob for _, logprob in top] == pytest.approx(values[position].tolist(), abs=2e-4)


def test_equal_prompts_are_computed_once(model, tokenizer, passes):
    engine = Engine(model, 480)
    prompts = [prompt(9), prompt(30), prompt(9), prompt(30), prompt(9)]
    rows = [row(tokenizer, ids, logit_bias={50 + n: 100.0}) for n, ids in enumerate(prompts)]  # each goes its own way
    engine.submit(rows)
    run(engine)
    assert [shape for shape in passes if shape[1] > 1] == [(2, 30)]
    for n, ended in enumerate(rows):
        assert ended.generated == [50 + n] * 6


def test_a_prompt_beside_running_rows_comes_in_short_passes(model, tokenizer, passes, monkeypatch):
    monkeypatch.setattr(engine_module, "PREFILL_BESIDE", 16)
    monkeypatch.setattr(engine_module, "SHORTEST_PASS", 4)
    engine = Engine(model, 480)
    rows = [row(tokenizer, prompt(8), 20), row(tokenizer, prompt(60), 5)]
    engine.submit(rows[:1])
    engine.step()
    engine.submit(rows[1:])
    del passes[:]
    run(engine)
    assert passes[:9] == [(1, 16), (1, 1), (1, 16), (1, 1), (1, 16), (1, 1), (1, 12), (1, 1), (2, 1)]
    for ended in rows:
        assert_alone(model, ended)


def test_a_pass_that_computes_a_neighbours_ids_again_loses_none(model, tokenizer, monkeypatch):
    """Two prompts share a pass that begins where the shorter is; the other's record must not shrink to its end."""
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", 8)
    engine = Engine(model, 480)
    rows = [row(tokenizer, prompt(70)), row(tokenizer, prompt(60, 1))]
    model.own_cache().ids[0] = []
    engine.submit(rows[:1])
    for _ in range(4):
        engine.step()
    engine.submit(rows[1:])
    held = []
    for _ in range(3):
        engine.step()
        held.append(len(model.own_cache().ids[0]))
    assert held == sorted(held) and held[0] >= 32
    run(engine)
    for ended in rows:
        assert_alone(model, ended)


def test_scores_stay_when_a_later_prompt_shares_the_pass(model, tokenizer, monkeypatch):
    """The pass begins where the later prompt is; what it computes again of the other is not all that it has."""
    monkeypatch.setattr(engine_module, "SCORED_LOGITS", 60 * 480)
    engine = Engine(model, 480)
    rows = [row(tokenizer, prompt(length), 0, echo=True, logprobs=True) for length in (90, 12)]
    engine.submit(rows[:1])
    engine.step()
    engine.submit(rows[1:])
    run(engine)

    for ended in rows:
        assert ended.error is None
        expected = model(torch.tensor([ended.prompt])).detach()[0].log_softmax(-1)
        of_ids = expected[torch.arange(len(ended.prompt) - 1), torch.tensor(ended.prompt[1:])]
        assert ended.logprobs == pytest.approx([0.0, *of_ids.tolist()], abs=2e-4)


def test_equal_prompts_get_as_many_alternatives_as_each_asked_for(model, tokenizer):
    engine = Engine(model, 480)
    rows = [row(tokenizer, prompt(9), 2, echo=True, logprobs=True, top_logprobs=count) for count in (1, 3, 0)]
    engine.submit(rows)
    run(engine)
    for ended, count in zip(rows, (1, 3, 0), strict=True):
        assert [len(top) for top in ended.top_logprobs] == [0] + [count] * (len(ended.ids) - 1)


# --- steps -------------------------------------------------------------------------------------------------------


def test_a_step_computes_the_span_of_running_slots(model, tokenizer, passes):
    """One row costs one row, wherever its slot is."""
    engine = Engine(model, 480)
    rows = [row(tokenizer, prompt(8 - n, n), 30 if n == 5 else 2) for n in range(6)]
    engine.submit(rows)
    run(engine)
    assert passes[0] == (6, 8)
    assert set(passes[-20:]) == {(1, 1)}
    assert_alone(model, rows[5])


def test_idle_slots_between_running_ones_keep_what_they_hold(model, tokenizer, passes):
    engine = Engine(model, 480)
    rows = [row(tokenizer, prompt(20 - n, n), 3 if n == 2 else 30) for n in range(5)]
    engine.submit(rows)
    for _ in range(12):
        engine.step()
    assert rows[2].ended and passes[-1] == (5, 1)  # one of five: not worth a move

    held = list(model.own_cache().ids[2])
    assert held == rows[2].context[:-1]
    again = row(tokenizer, [*held, 77], 8)
    engine.submit([again])
    del passes[:]
    engine.step()
    assert passes[0] == (1, 1)  # all but one id was there
    run(engine)
    for ended in (*rows, again):
        assert_alone(model, ended)


def test_rows_enter_as_others_leave(model, tokenizer):
    """Thirty rows of all lengths through six slots, arriving at all times."""
    engine = Engine(model, 480)
    rows = [row(tokenizer, prompt(1 + 7 * n % 40, n), 1 + 5 * n % 17, logprobs=True) for n in range(30)]
    for n in range(0, 30, 3):
        engine.submit(rows[n : n + 3])
        engine.step()
        assert len(model.own_cache().running) <= 6
    run(engine)
    for ended in rows:
        assert_alone(model, ended)
        assert ended.finish_reason == "eos" or len(ended.generated) == ended.budget
    assert model.own_cache().running == set()


def test_what_a_slot_holds_is_what_it_was_fed(model, tokenizer):
    engine = Engine(model, 480)
    ended = row(tokenizer, prompt(11), 9)
    engine.submit([ended])
    run(engine)
    (held,) = [ids for ids in model.own_cache().ids if ids]
    assert held == ended.context[:-1]  # the last id was chosen, and never fed


def test_a_step_that_is_interrupted_can_be_taken_again(model, tokenizer, monkeypatch):
    engine = Engine(model, 480)
    ended = row(tokenizer, prompt(11), 9)
    engine.submit([ended])
    engine.step()

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine, "choose", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    run(engine)
    assert_alone(model, ended)


def test_an_idle_slot_does_not_make_a_step_longer(model, tokenizer, monkeypatch):
    """However much it holds: only running rows decide how many positions are looked at."""
    engine = Engine(model, 480)
    rows = [row(tokenizer, prompt(5 + n), 2 if n == 2 else 40) for n in range(5)]
    rows[2] = row(tokenizer, prompt(70), 2)
    for arriving in (rows[:1], rows[1:2], rows[2:3], rows[3:]):
        engine.submit(arriving)
        engine.step()
    assert rows[2].ended and len(model.own_cache().ids[2]) > 70
    lengths = []
    window = model.own_cache().window

    def watched(first, count, length):
        lengths.append((first, count, length))
        return window(first, count, length)

    monkeypatch.setattr(model.own_cache(), "window", watched)
    longest = max(len(one.context) for one in rows if not one.ended)
    engine.step()
    assert lengths == [(0, 5, longest)]
    run(engine)
    for ended in rows:
        assert_alone(model, ended)


# --- leaving -----------------------------------------------------------------------------------------------------


def test_a_cancelled_row_frees_its_slot_at_once(model, tokenizer):
    engine = Engine(model, 480)
    rows = [row(tokenizer, prompt(5, n), 30) for n in range(8)]
    engine.submit(rows)
    engine.step()
    engine.cancel([rows[1], rows[7]])
    assert rows[1].finish_reason == rows[7].finish_reason == "cancelled"
    assert len(model.own_cache().running) == 5
    run(engine)
    assert [ended.finish_reason for ended in rows].count("cancelled") == 2
    for ended in rows[2:7]:
        assert_alone(model, ended)


def test_a_row_that_is_not_finite_ends_alone(model, tokenizer):
    engine = Engine(model, 480)
    with torch.no_grad():
        model.tok_embeddings.weight[200] = torch.nan
    rows = [row(tokenizer, prompt(9)), row(tokenizer, [1, 5, 200]), row(tokenizer, prompt(12))]
    engine.submit(rows)
    run(engine)
    assert rows[0].error is None and rows[2].error is None
    assert "not finite" in str(rows[1].error) and "position 2" in str(rows[1].error)
    assert not any(200 in ids for ids in model.own_cache().ids)
    for ended in (rows[0], rows[2]):
        assert_alone(model, ended)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_any_logits_that_are_not_finite_fail_the_row(model, tokenizer, value):
    """Infinite ones too: a plus would be chosen always, a minus never."""
    engine = Engine(model, 480)
    model.output.register_forward_hook(lambda module, inputs, output: output.index_fill(-1, torch.tensor(7), value))
    ended = row(tokenizer, prompt(9))
    engine.submit([ended])
    run(engine)
    assert "not finite" in str(ended.error)


def test_an_error_of_a_pass_fails_its_rows_and_no_others(model, tokenizer, monkeypatch):
    engine = Engine(model, 480)
    running = row(tokenizer, prompt(9), 20)
    engine.submit([running])
    engine.step()
    forward = model.forward

    def short_of_memory(tokens, *args, **kwargs):
        if tokens.shape[1] > 1:
            raise MemoryError("no room for 30 positions")
        return forward(tokens, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", short_of_memory)
        entering = row(tokenizer, prompt(30))
        engine.submit([entering])
        run(engine)
    assert isinstance(entering.error, MemoryError)
    assert_alone(model, running)


# --- callers -----------------------------------------------------------------------------------------------------


def test_two_streams_are_open_at_the_same_time(llama, model):
    first = llama.stream([prompt(9), prompt(5)], 20, temperature=0)
    begun = [next(first), next(first)]
    second = llama.stream([prompt(7)], 15, temperature=0)
    of_second = [next(second)]
    of_first = [*begun, next(first)]
    of_second += second
    of_first += first

    for pieces, prompts in ((of_first, (prompt(9), prompt(5))), (of_second, (prompt(7),))):
        for index, ids in enumerate(prompts):
            given = [id for piece in pieces if piece.row == index for id in piece.ids]
            assert given == alone(model, ids, len(given))[0] and given
    assert model.own_cache().running == set()


@pytest.mark.parametrize("begun", [0, 1, 3])
def test_a_stream_that_is_closed_frees_its_rows(llama, model, begun):
    stream = llama.stream([prompt(9), prompt(5)], 20, temperature=0)
    for _ in range(begun):
        next(stream)
    stream.close()
    assert not llama.engine.submitted
    assert llama.engine.slots.everybody() == [] and model.own_cache().running == set()
    model(torch.tensor([[1, 2]]), 0)


def test_a_stream_that_is_forgotten_frees_its_rows(llama, model):
    next(llama.stream([prompt(9)], 20, temperature=0))
    assert model.own_cache().running == set()


def test_an_abandoned_stream_blocks_nobody(llama, model):
    abandoned = llama.stream([prompt(9 + n) for n in range(6)], 20, temperature=0)
    next(abandoned)
    (ids,), _ = llama.generate([prompt(5)], 8, temperature=0)
    assert ids == alone(model, prompt(5), len(ids))[0]
    rest = list(abandoned)
    assert {piece.row for piece in rest} == set(range(6))


def test_a_direct_call_is_refused_while_a_stream_is_open(llama, model):
    stream = llama.stream([prompt(9)], 20, temperature=0)
    next(stream)
    with pytest.raises(RuntimeError, match="in use"):
        model(torch.tensor([[1, 2]]), 0)
    stream.close()
    assert model(torch.tensor([[1, 2]]), 0).shape == (1, 2, 480)


def test_a_processor_that_raises_ends_its_own_call(llama, model):
    other = llama.stream([prompt(9)], 12, temperature=0)
    begun = next(other)

    def broken(ids, logits):
        raise KeyError("no such state")

    with pytest.raises(KeyError, match="no such state"):
        llama.generate([prompt(5), prompt(6)], 5, logits_processor=broken)
    given = begun.ids + [id for piece in other for id in piece.ids]
    assert given == alone(model, prompt(9), 12)[0]


# --- threads -----------------------------------------------------------------------------------------------------


def test_eight_threads_get_what_each_would_get_alone(llama, tokenizer):
    """Mixed calls, streams, cancellations and errors; four threads once got 30 errors and 6 wrong texts in 40 calls."""
    texts = ["Anna took the red cup", "Where is the lamp?", "two", "日本の本"]

    def generates(n: int) -> object:
        return llama.generate([prompt(5 + n), prompt(20 + n)], 9, 0.8, seed=n)

    def completes(n: int) -> object:
        return llama.text_completion([texts[n % 4]] * 2, 0, max_gen_len=7, stop=["a", "e"])

    def scores(n: int) -> object:
        return [[round(x, 3) for x in one["logprobs"]] for one in llama.score([texts[n % 4], texts[(n + 1) % 4]])]

    def chats(n: int) -> object:
        dialogs = [[{"role": "user", "content": text}] for text in (texts[n % 4], "[INST]")]
        return llama.chat_completion(dialogs, 0.7, max_gen_len=6, seed=n, n=2)

    def streams(n: int) -> object:
        return "".join(piece.text for piece in llama.stream([prompt(8 + n)], 11, 0.9, seed=n))

    def leaves_early(n: int) -> object:
        stream = llama.stream([prompt(30 + n)], 30, temperature=0)
        pieces = [next(stream).ids for _ in range(2)]
        stream.close()
        return pieces

    def is_refused(n: int) -> object:
        with pytest.raises(ValueError, match=r"Prompt 1 has 97 tokens"):
            llama.generate([prompt(3), prompt(97)], 4)
        return "refused"

    calls = [generates, completes, scores, chats, streams, leaves_early, is_refused]
    expected = {(call, n): call(n) for call in calls for n in range(8)}
    found: dict = {}

    def work(n: int) -> None:
        for turn in range(2):
            for call in calls[n % len(calls) :] + calls[: n % len(calls)]:
                found[call, n, turn] = call(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {(call, n, turn): expected[call, n] for call, n in expected for turn in range(2)}
    assert llama.engine.slots.everybody() == []


def test_seeds_are_drawn_in_the_order_of_arrival(model, tokenizer):
    sequence = [Llama(model, tokenizer, seed=5).generate([prompt(9)], 8, 1.0)[0] for _ in range(2)]
    assert sequence[0] == sequence[1]
    llama = Llama(model, tokenizer, seed=5)
    alone = [llama.generate([prompt(9)], 8, 1.0)[0] for _ in range(4)]
    llama = Llama(model, tokenizer, seed=5)
    found = []
    threads = [threading.Thread(target=lambda: found.append(llama.generate([prompt(9)], 8, 1.0)[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted(alone)


@pytest.mark.parametrize("options", [{}, {"max_gen_len": 0, "echo": True, "logprobs": True}])
def test_a_row_has_ended_only_when_all_of_it_is_there(llama, monkeypatch, options):
    """Another thread, which follows the row, may look at any moment: the end is the last thing that it may see."""
    seen = []
    release = Row.release

    def watched(self, *args, **kwargs):
        seen.append(self.ended)
        release(self, *args, **kwargs)
        seen.append(self.ended)

    monkeypatch.setattr(Row, "release", watched)
    pieces = list(llama.stream([prompt(9)], **({"max_gen_len": 3, "temperature": 0} | options)))
    assert pieces[-1].finish_reason == "length"
    assert seen and not any(seen)


@pytest.mark.parametrize("kind", ["generate", "stream"])
def test_a_call_inside_a_step_is_refused(llama, model, kind):
    """It would wait for ever for the step that it is part of."""

    def asks_the_model(ids, logits):
        if kind == "generate":
            llama.generate([prompt(4)], 2, temperature=0)
        list(llama.stream([prompt(4)], 2, temperature=0))
        return logits

    errors = []

    def work() -> None:
        try:
            llama.generate([prompt(5)], 3, temperature=0, logits_processor=asks_the_model)
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert len(errors) == 1 and "inside its own step" in errors[0]
    (ids,), _ = llama.generate([prompt(5)], 3, temperature=0)
    assert ids == alone(model, prompt(5), 3)[0]
    assert llama.engine.slots.everybody() == []


def test_cancelling_inside_a_step_waits_for_its_end(llama, model):
    """A stream may be forgotten, and collected, in the thread that computes a step, or closed in any other."""
    streams = [llama.stream([prompt(20 + n)], 30, temperature=0) for n in range(2)]
    for stream in streams:
        next(stream)
    running = []

    def closes_them(ids, logits):
        streams[0].close()
        thread = threading.Thread(target=streams[1].close)
        thread.start()
        thread.join()
        running.append(len(model.own_cache().running))
        return logits

    (ids,), _ = llama.generate([prompt(5)], 3, temperature=0, logits_processor=closes_them)
    assert ids == alone(model, prompt(5), 3)[0]
    assert running == [3, 1, 1]
    assert llama.engine.slots.everybody() == [] and model.own_cache().running == set()


# --- another model than before -----------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["in place", "assigned", "through data"])
def test_keys_of_other_weights_are_not_gone_on_from(llama, model, change):
    llama.generate([prompt(30)], 5, temperature=0)
    weights = random_weights(PARAMS, seed=4)
    if change == "through data":
        for name, parameter in model.named_parameters():
            parameter.data = weights[name]
    else:
        model.load_state_dict(weights, assign=change == "assigned")
    (ids,), (logprobs,) = llama.generate([prompt(30)], 8, temperature=0, logprobs=True)
    expected, of_expected = alone(model, prompt(30), len(ids))
    assert ids == expected and logprobs == pytest.approx(of_expected, abs=2e-4)


def test_keys_of_other_weights_do_not_stay_with_rows_that_were_running(llama, model):
    stream = llama.stream([prompt(30)], 5, temperature=0)
    next(stream)
    model.load_state_dict(random_weights(PARAMS, seed=4))
    llama.generate([prompt(9)], 2, temperature=0)
    list(stream)
    (ids,), _ = llama.generate([prompt(30)], 8, temperature=0)
    assert ids == alone(model, prompt(30), len(ids))[0]


def test_a_prompt_is_still_gone_on_from_while_the_weights_stay(llama, passes):
    llama.generate([prompt(30)], 5, temperature=0)
    del passes[:]
    llama.generate([prompt(30)], 5, temperature=0)
    assert passes[0] == (1, 1)


def test_a_model_may_be_moved_between_calls(llama, model):
    llama.generate([prompt(30)], 5, temperature=0)
    model.double()
    (ids,), _ = llama.generate([prompt(30)], 5, temperature=0)
    assert ids == alone(model, prompt(30), 5)[0]


def test_a_model_that_is_moved_during_a_call_ends_the_call(llama, model):
    stream = llama.stream([prompt(30)], 9, temperature=0)
    next(stream)
    model.double()
    with pytest.raises(RuntimeError, match="moved during a call"):
        list(stream)
    (ids,), _ = llama.generate([prompt(30)], 5, temperature=0)
    assert ids == alone(model, prompt(30), 5)[0]


def test_another_thread_at_several_ranks_is_refused_before_ranks_meet(llama, monkeypatch):
    monkeypatch.setattr(engine_module.parallel, "size", lambda: 2)
    llama.engine.thread = threading.get_ident() + 1
    for call in (llama.generate, llama.stream):
        with pytest.raises(RuntimeError, match="one thread calls the model"):
            call([prompt(5)], 3)
