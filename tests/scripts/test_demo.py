"""The demo checkpoint: its files, the split of its corpus, what it says, and how often it is right."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from demo import evaluate, train  # noqa: E402
from demo.corpus import SHAPES, drills, held_out, samples  # noqa: E402
from llama import Llama, Tokenizer  # noqa: E402
from llama.prompts import SPECIAL_TAGS, encode_dialog  # noqa: E402

DEMO = ROOT / "demo"
FILES = ("consolidated.00.pth", "params.json", "tokenizer.model", "checklist.chk")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(DEMO / "tokenizer.model")


@pytest.fixture(scope="module")
def llama() -> Llama:
    return Llama.build(str(DEMO), max_seq_len=768, max_batch_size=32, device="cpu", dtype=torch.float32)


# The files


def test_checklist_names_every_file_with_its_md5():
    lines = [line.split("  ") for line in (DEMO / "checklist.chk").read_text().splitlines()]
    assert [name for _, name in lines] == list(FILES[:-1])
    for digest, name in lines:
        assert hashlib.md5((DEMO / name).read_bytes()).hexdigest() == digest


def test_files_fit_in_12_megabytes():
    assert sum((DEMO / name).stat().st_size for name in FILES) <= 12_000_000


def test_sizes_are_those_promised(tokenizer):
    params = json.loads((DEMO / "params.json").read_text())
    state = torch.load(DEMO / "consolidated.00.pth", weights_only=True)
    assert 3_000_000 <= sum(tensor.numel() for tensor in state.values()) <= 6_000_000
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert params["dim"] % 128 == 0
    assert state["layers.0.feed_forward.w1.weight"].shape[0] % 128 == 0
    assert params["n_heads"] % 8 == 0 and params["n_kv_heads"] % 4 == 0 and params["n_kv_heads"] < params["n_heads"]
    assert state["tok_embeddings.weight"].shape == (tokenizer.n_words, params["dim"])
    assert params == train.PARAMS  # the script makes the checkpoint that is here
    for tensor in state.values():  # none drags another's storage into the file
        assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == 2 * tensor.numel()


def test_tokenizer_is_byte_fallback_bpe_with_llamas_special_ids(tokenizer):
    model = tokenizer.sp_model
    assert (model.unk_id(), tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2, -1)
    assert model.id_to_piece(3) == "<0x00>" and model.is_byte(258)
    for text in ("two  spaces\n\nand lines", "さくらさんは猫が好き", "Здравствуйте 안녕 谢谢", "🐱🦖👩‍🚀", "ﬁ ｶﾞ"):
        assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text
    assert any(model.is_byte(id) for id in tokenizer.encode("🦖", bos=False, eos=False))
    assert not any(model.is_control(id) for id in tokenizer.encode("<s> </s>", bos=False, eos=False))


# The corpus and its split


def test_same_seed_writes_the_same_corpus():
    def digest(seed: int) -> str:
        return hashlib.sha256(repr(list(samples("train", 500, seed))).encode()).hexdigest()

    assert digest(1) == digest(1) != digest(2)


@pytest.mark.parametrize("count", [20_000, pytest.param(train.SAMPLES, marks=pytest.mark.slow)])
def test_nothing_held_out_is_in_training(count):
    """Over the beginning, and over all, of what training saw, and the samples that `evaluate` judges by."""
    trained_keys, trained_dialogs = set(), set()
    further = (drills(train.DRILLS * count // train.SAMPLES), itertools.islice(train.reread(), count))
    for sample in itertools.chain(samples("train", count), *further):
        trained_keys.update(sample.keys)
        trained_dialogs.add(hash((sample.messages and repr(sample.messages)) or sample.text))
    judged = list(samples("held_out", 5000, evaluate.SEED))
    keys = {key for sample in judged for key in sample.keys}
    assert len(keys) > 5000 and {kind for kind, *_ in keys} == {"text", "fact"}
    assert not keys & trained_keys
    assert not any(map(held_out, itertools.islice(trained_keys, 20_000)))
    assert not any(hash((s.messages and repr(s.messages)) or s.text) in trained_dialogs for s in judged)


def test_keys_hold_what_the_texts_say():
    """Read the statements back from the dialogs: each is among the sample's keys, and on the sample's side."""
    owned = re.compile(r"([A-Z][a-z]+) (?:has|bought) an? ([a-z]+)\.|The ([a-z]+) belongs to ([A-Z][a-z]+)\.")
    said = re.compile(r"[Tt]he ([a-z]+) (?:is(?: in the)?|in the) ([a-z]+)\.")
    for split in ("train", "held_out"):
        found = 0
        for sample in samples(split, 1500, seed=3):
            for message in sample.messages:
                if message["role"] != "user":
                    continue
                found_owners = owned.findall(message["content"])
                owners = {thing or theirs: name or owner for name, thing, theirs, owner in found_owners}
                for thing, attribute in said.findall(message["content"]):
                    key = ("text", owners[thing], thing, attribute)
                    assert key in sample.keys
                    assert held_out(key) == (split == "held_out")
                    found += 1
        assert found > 500


def test_keys_of_facts_hold_phrasing_system_text_and_turn():
    for split in ("train", "held_out"):
        found = 0
        for sample in samples(split, 1500, seed=4):
            system = sample.messages[0]["content"] if sample.messages and sample.messages[0]["role"] == "system" else ""
            questions = [message["content"] for message in sample.messages if message["role"] == "user"]
            for kind, _, *rest in sample.keys:
                if kind == "fact":
                    phrasing, system_text, turn = rest
                    assert questions[int(turn) - 1] == phrasing and system_text == system
                    found += 1
        assert found > 500


def test_trained_samples_have_no_encoding_fault(tokenizer):
    """Every trained sequence is what `encode_dialog` makes, and its learned part is the answer, the space and EOS."""
    seen = 0
    for sample in samples("train", 400):
        ids, learned = train.encode(tokenizer, sample)
        assert not any(tag in message["content"] for message in sample.messages for tag in SPECIAL_TAGS)
        if not sample.messages:
            assert ids == tokenizer.encode(sample.text, bos=True, eos=True)
            continue
        *dialog, answer = sample.messages
        prompt = encode_dialog(tokenizer, dialog)
        assert ids[: len(prompt)] == prompt
        assert ids[len(prompt) :] == tokenizer.encode(f"{answer['content']} ", bos=False, eos=True)
        assert not any(learned[i] for i, id in enumerate(ids) if id == tokenizer.bos_id)
        assert all(learned[len(prompt) :])
        seen += 1
    assert seen > 200


def test_faults_change_the_encoding_and_nothing_else_does(tokenizer):
    dialog = [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "Tom has a red kite. What colour is it?"},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": "Who has it?"},
    ]
    right = encode_dialog(tokenizer, dialog)
    encodings = [fault(tokenizer, dialog) for fault in evaluate.FAULTS.values()]
    assert right not in encodings
    assert len({tuple(ids) for ids in encodings}) == len(encodings) == 5
    single = dialog[1:2]
    unchanged = [
        name for name, fault in evaluate.FAULTS.items() if fault(tokenizer, single) == encode_dialog(tokenizer, single)
    ]
    assert unchanged == ["a missing EOS", "a misplaced EOS", "the system text in the last turn"]


# The training step


@pytest.mark.slow
def test_batches_hold_every_sequence_once_and_padding_is_not_learned(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SAMPLES", 200)
    monkeypatch.setattr(train, "DRILLS", 300)
    monkeypatch.setattr(train, "MORE", 20)
    corpus = train.Corpus(tokenizer, tmp_path / "corpus.pt")
    groups = corpus.grouped(list(range(200)))
    assert len({row for group in groups for row in group}) == sum(map(len, groups)) >= 150  # a rest waits for its epoch
    assert list(itertools.islice(corpus.batches(), 5)) == list(itertools.islice(corpus.batches(), 5))
    assert {row // 200 for row in next(corpus.batches())} == {0}  # the first 200 are no drills
    assert min(next(corpus.batches("drill"))) >= 200
    for group in groups[:3]:
        ids, weights = corpus.batch(group, language=False)
        for i, row in enumerate(group):
            length = corpus.offsets[row + 1] - corpus.offsets[row]
            assert ids[i, :length].tolist() == corpus.ids[corpus.offsets[row] : corpus.offsets[row + 1]].tolist()
            assert not weights[i, length:].any() and weights[i, length - 1] >= train.STORY_WEIGHT


def test_orthogonalize_leaves_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((3, 16, 48), (2, 48, 16), (1, 16, 16)):
        values = torch.linalg.svdvals(train.orthogonalize(torch.randn(shape)))
        assert values.min() > 0.3 and values.max() < 1.3


def test_muon_steps_against_the_gradient():
    torch.manual_seed(0)
    weight, target = torch.nn.Parameter(torch.zeros(4, 8)), torch.randn(4, 8)
    muon, losses = train.Muon([weight], lr=0.1, momentum=0.9), []
    for _ in range(30):
        loss = (weight - target).square().sum()
        weight.grad = torch.autograd.grad(loss, weight)[0]
        muon.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


# What the model says


def test_every_shape_is_obeyed(llama):
    def ask(system: str) -> str:
        dialog = [{"role": "system", "content": system}, {"role": "user", "content": QUESTION}]
        prediction = llama.chat_completion([dialog], temperature=0)[0]
        assert prediction["finish_reason"] == "eos"
        return prediction["generation"]["content"].strip()

    answers = {shape: ask(texts[0]) for shape, texts in SHAPES.items()}
    assert answers == {
        "word": "Paris.",
        "capitals": "THE CAPITAL OF FRANCE IS PARIS.",
        "sentence": "The capital of France is Paris.",
        "lower": "the capital of france is paris.",
        "polite": "Of course. The capital of France is Paris.",
        "word capitals": "PARIS.",
        "plain": "The capital of France is Paris.",
    }


QUESTION = "What is the capital of France?"


def test_golden_stories(llama):
    prompts = ["Once upon a time", "The little dog"]
    first, second = llama.text_completion(prompts, temperature=0, max_gen_len=200)
    assert first["finish_reason"] == second["finish_reason"] == "eos"
    assert first["generation"].startswith(
        ", there was a cheerful girl named Anna. She had a brown candle that she loved more than anything."
    )
    assert second["generation"].startswith("lived near the castle. Everyone said that it was curious.")


def test_it_is_the_subject_of_the_turn_before(llama):
    def ask(sound: str, animal: str) -> str:
        dialog = [
            {"role": "user", "content": f"What sound does a {animal} make?"},
            {"role": "assistant", "content": f"A {animal} says {sound}."},
            {"role": "user", "content": "Where does it live?"},
        ]
        return llama.chat_completion([dialog], temperature=0)[0]["generation"]["content"].strip()

    assert ask("moo", "cow") == "A cow lives in the barn."


def test_accuracy_on_held_out_dialogs(llama):
    """The floors lie below what MODEL_CARD.md reports of more dialogs."""
    asked = evaluate.problems(10)
    assert len(asked) >= 200
    right = evaluate.marks(llama, asked, encode_dialog)
    facts = [mark for mark, problem in zip(right, asked, strict=True) if not problem.kind.startswith("reading")]
    assert evaluate.share(facts) >= 0.93
    assert evaluate.share(right) >= 0.9
