"""A sentencepiece model trained on the spot, on a small made-up language."""

import random
from collections.abc import Iterator
from pathlib import Path

import sentencepiece as spm

CODE_PIECES = ["▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>"]  # in the order in which training gives them ids, from 3 on


def sentences() -> Iterator[str]:
    """A small language: enough repetition for merges, few enough words that most text falls back to bytes."""
    rng = random.Random(7)
    people = ["Anna", "Tom", "Maria", "Peter", "Lily", "Oskar", "Nina", "Paul", "Clara", "Hugo"]
    things = ["cup", "ball", "book", "lamp", "apple", "chair", "shoe", "clock"]
    colours = ["red", "green", "blue", "yellow", "black", "white"]
    places = ["kitchen", "garden", "school", "station", "forest", "market"]
    for _ in range(700):
        who, what, colour, where = (rng.choice(words) for words in (people, things, colours, places))
        yield f"{who} took the {colour} {what} to the {where}."
        yield f"[INST] Where is the {colour} {what}? [/INST] It is in the {where}, said {who}."
        yield f"<<SYS>>\nAnswer in one word.\n<</SYS>>\n\nWho has {rng.randrange(100)} {what}s?  {who}!"
        yield rng.choice(["  two spaces", "Привет, мир", "日本の本", "naïve café", '"quoted" and it\'s fine'])


def train_tokenizer(folder: Path, **options) -> Path:
    """A sentencepiece model with Llama's choices: BPE, byte fallback, no normalisation, a dummy prefix space."""
    spm.SentencePieceTrainer.train(
        sentence_iterator=sentences(),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=480,
        byte_fallback=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    return folder / "tokenizer.model"
