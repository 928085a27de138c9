"""Compiled steps against eager ones, and how many of them there are."""

import pytest
import torch

from llama import compiling
from llama.compiling import compiled_step
from llama.generation import Llama
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


@pytest.fixture(scope="module")
def model():
    return build_model(PARAMS, random_weights(PARAMS, seed=3), max_batch_size=6, max_seq_len=CONTEXT)


def prompt(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(100 * length)
    return [1, *torch.randint(3, 480, (length - 1,), generator=generator).tolist()]


@pytest.mark.slow
@pytest.mark.parametrize("mode", compiling.MODES)  # without a GPU the same, but each has its own way through torch
def test_compiled_steps_choose_what_eager_ones_do(model, tokenizer, capfd, mode):
    prompts = [prompt(5), prompt(12)]
    eager = Llama(model, tokenizer)
    compiled = Llama(model, tokenizer, compile=mode)

    assert compiled.generate(prompts, 12, temperature=0) == eager.generate(prompts, 12, temperature=0)
    assert "llama: compiled a step of 2 rows and 16 positions in" in capfd.readouterr().err

    with torch._dynamo.config.patch(recompile_limit=1):
        assert compiled.generate(prompts[:1], 3, temperature=0) == eager.generate(prompts[:1], 3, temperature=0)
    pairs = zip(compiled.score(["a b"]), eager.score(["a b"]), strict=True)
    assert all(one["logprobs"] == pytest.approx(other["logprobs"], abs=1e-5) for one, other in pairs)


@pytest.mark.slow
def test_a_compiled_step_reads_the_cache_of_each_call(tokenizer):
    """A step that keeps the first call's cache goes on from the keys of another sequence, or of another model."""
    models = [build_model(PARAMS, random_weights(PARAMS, seed=seed), 2, CONTEXT) for seed in (3, 3)]
    step = compiled_step(models[0], "default")
    for model in models:
        model.own_cache()
    first, second = models[0].own_cache(), models[1].own_cache()

    for cache, ids in ((first, prompt(7)), (second, [*prompt(6)[::-1], 9])):
        tokens = torch.tensor([ids])
        with torch.no_grad():
            models[0](tokens[:, :-1], 0, cache=cache)
            cache.forget(2)
            logits = step(tokens[:, -1:], torch.tensor([6]), cache.window(0, 1, 8))
        torch.testing.assert_close(logits[0, 0], models[0](tokens).detach()[0, -1], atol=2e-4, rtol=0)


@pytest.mark.parametrize("rows", [1, 3, 6])
def test_compiled_shapes_are_few(model, tokenizer, rows):
    """Powers of two of rows and of positions, whatever rows run and wherever they sit."""
    shapes = set()
    llama = Llama(model, tokenizer)

    def step(tokens, positions, window):
        shapes.add((len(tokens), window.keys[0].shape[2]))
        return model(tokens, positions=positions, cache=window)

    expected = Llama(model, tokenizer).generate([prompt(n) for n in range(3, 3 + rows)], 70, temperature=0)
    for held in model.own_cache().ids:
        held.clear()
    llama.engine.compiled = step
    assert llama.generate([prompt(n) for n in range(3, 3 + rows)], 70, temperature=0) == expected
    assert {count for count, _ in shapes} <= {1, 2, 4, 6}
    assert {length for _, length in shapes} <= {4, 8, 16, 32, 64, 96}
    assert max(count for count, _ in shapes) >= rows


def test_an_unknown_way_to_compile(model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"compile is 'fast'.*default, cudagraph"):
        compiled_step(model, "fast")
    with pytest.raises(ValueError, match=r"compile is 'fast'.*default, cudagraph"):
        Llama.build(tmp_path, compile="fast")


def test_a_compiler_that_gives_up_ends_the_call_with_advice(model, tokenizer, monkeypatch):
    def broken(**options):
        def decorate(function):
            def fail(*args):
                raise torch._dynamo.exc.TorchDynamoException("no C++ compiler\nmore words")

            return fail

        return decorate

    monkeypatch.setattr(torch, "compile", broken)
    llama = Llama(model, tokenizer, compile="default")
    with pytest.raises(
        RuntimeError,
        match=r"cannot compile the model here \(no C\+\+ compiler\); leave compile out",
    ):
        llama.generate([prompt(4)], 5, temperature=0)
