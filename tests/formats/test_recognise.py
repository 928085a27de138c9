"""The wrong files that people have under the right names, met through `Llama.build`."""

from pathlib import Path

import pytest

from support.checkpoints import write_checkpoint
from support.folders import PARAMS, build, weights
from support.refusals import refusal

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 13476925163\n"
HTML = b"<!DOCTYPE html>\n<html><head><title>403 Forbidden</title></head></html>"
XML = b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>AccessDenied</Code></Error>'
FILES = ["consolidated.00.pth", "params.json", "tokenizer.model"]


@pytest.fixture
def folder(tmp_path, tokenizer_path) -> Path:
    return write_checkpoint(tmp_path / "model", PARAMS, weights(), tokenizer_path)


@pytest.mark.parametrize("content, word", [(LFS, "Git LFS"), (HTML, "HTML"), (XML, "XML"), (b"", "empty file")])
@pytest.mark.parametrize("name", FILES)
def test_recognise_what_stands_in_a_files_place(folder, name, content, word):
    (folder / name).write_bytes(content)
    refusal(lambda: build(folder), str(folder / name), word)


def test_recognise_a_tiktoken_tokenizer(folder):
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\nIw== 2\nJA== 3\n")
    refusal(lambda: build(folder), "tokenizer.model", "Llama 3")


@pytest.mark.parametrize("content", [b"hello", bytes(range(256)) * 9, b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00"])
def test_recognise_a_damaged_tokenizer(folder, content):
    (folder / "tokenizer.model").write_bytes(content)
    refusal(lambda: build(folder), str(folder / "tokenizer.model"), "sentencepiece")
