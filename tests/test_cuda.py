"""The same numbers on an NVIDIA GPU as on the CPU. Run with `pytest -m cuda`."""

import pytest
import torch

from llama import Llama, ModelArgs, Transformer
from llama.loading import needed
from support.checkpoints import write_checkpoint
from support.models import random_weights

pytestmark = pytest.mark.cuda

ARGS = dict(dim=256, n_layers=3, n_heads=8, n_kv_heads=2, vocab_size=1000, multiple_of=64, norm_eps=1e-5)


@pytest.fixture
def models():
    """One model on the CPU and its copy on the GPU."""
    torch.manual_seed(0)
    cpu = Transformer(ModelArgs(**ARGS, max_seq_len=64, max_batch_size=3)).requires_grad_(False)
    gpu = Transformer(ModelArgs(**ARGS, max_seq_len=64, max_batch_size=3)).requires_grad_(False)
    gpu.load_state_dict(cpu.state_dict())
    return cpu, gpu.cuda()


def test_logits_agree(models):
    cpu, gpu = models
    tokens = torch.randint(0, 1000, (3, 40))
    torch.testing.assert_close(gpu(tokens.cuda()).cpu(), cpu(tokens), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gpu(tokens.cuda(), 0).cpu(), cpu(tokens, 0), atol=1e-4, rtol=1e-4)


def test_rows_at_their_own_positions_agree(models):
    cpu, gpu = models
    tokens, positions = torch.randint(0, 1000, (3, 20)), torch.tensor([19, 7, 12])
    for model, device in ((cpu, "cpu"), (gpu, "cuda")):
        model(tokens.to(device), 0)
    last = tokens.gather(1, positions[:, None])
    expected = cpu(last, positions=positions)
    torch.testing.assert_close(gpu(last.cuda(), positions=positions.cuda()).cpu(), expected, atol=1e-4, rtol=1e-4)


def test_greedy_and_sampled_ids_agree(models, tokenizer):
    cpu, gpu = models
    prompts = [[1, 5, 9], [1, 400, 17, 230, 8], [1]]
    for options in ({"temperature": 0}, {"temperature": 0.8, "top_p": 0.9, "seed": 4}):
        expected, expected_scores = Llama(cpu, tokenizer).generate(prompts, 20, logprobs=True, **options)
        ids, scores = Llama(gpu, tokenizer).generate(prompts, 20, logprobs=True, **options)
        assert ids == expected
        for row, expected_row in zip(scores, expected_scores, strict=True):
            assert row == pytest.approx(expected_row, abs=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near(models, dtype):
    cpu, gpu = models
    tokens = torch.randint(0, 1000, (2, 30))
    near = gpu.to(getattr(torch, dtype))(tokens.cuda(), 0).cpu()
    assert near.dtype == torch.float32
    torch.testing.assert_close(near, cpu(tokens), atol=0.05, rtol=0.05)


def test_build_chooses_the_gpu_and_holds_no_more_than_it_says(tmp_path, tokenizer_path):
    write_checkpoint(tmp_path, ARGS, random_weights(ARGS), tokenizer_path)
    before = torch.cuda.memory_allocated()
    llama = Llama.build(tmp_path, max_seq_len=32, max_batch_size=2)
    assert llama.device.type == "cuda"
    weights, cache = needed(llama.model.params, llama.model.norm.weight.dtype.itemsize)
    assert torch.cuda.memory_allocated() - before < weights + cache + 2**20
    assert llama.text_completion(["a b"], temperature=0, max_gen_len=4)[0]["finish_reason"]


@pytest.mark.parametrize("mode", ["default", "cudagraph"])
def test_compiled_steps_choose_the_same_ids(models, tokenizer, mode):
    prompts = [[1, 5, 9], [1, 400, 17, 230, 8], [1]]
    expected = Llama(models[1], tokenizer).generate(prompts, 20, temperature=0)
    assert Llama(models[1], tokenizer, compile=mode).generate(prompts, 20, temperature=0) == expected


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_quantized_logits_agree(tmp_path, tokenizer_path, kind, dtype):
    write_checkpoint(tmp_path, ARGS, random_weights(ARGS), tokenizer_path)
    tokens = torch.randint(0, 1000, (2, 12))
    options = {"max_seq_len": 32, "max_batch_size": 2, "quantize": kind}
    expected = Llama.build(tmp_path, device="cpu", dtype="float32", **options).model(tokens, 0)
    logits = Llama.build(tmp_path, dtype=dtype, **options).model(tokens.cuda(), 0).cpu()
    torch.testing.assert_close(logits, expected, atol=0.05, rtol=0.05)
