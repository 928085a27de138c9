"""The whole model against an independent implementation: transformers' LlamaForCausalLM with the same weights."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from support.models import build_model
from support.transformers_names import renamed

PARAMS = {"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 89, "multiple_of": 16, "norm_eps": 1e-5}
MODELS = {
    "multi_head": PARAMS,
    "grouped": PARAMS | {"n_kv_heads": 2},
    "multi_query_deep": PARAMS | {"n_kv_heads": 1, "n_layers": 4, "dim": 48},
    "far_context": PARAMS | {"rope_theta": 1e6, "multiple_of": 32},
    "wide_ffn": PARAMS | {"n_kv_heads": 4, "ffn_dim_multiplier": 1.3, "multiple_of": 8, "norm_eps": 1e-2},
}


@pytest.fixture(scope="module", params=MODELS, ids=str)
def pair(request):
    """The same random model twice: theirs, ours."""
    params = MODELS[request.param]
    heads, kv_heads = params["n_heads"], params.get("n_kv_heads") or params["n_heads"]
    hidden = int(8 * params["dim"] / 3)
    hidden = int(hidden * params.get("ffn_dim_multiplier", 1.0))
    hidden = -(-hidden // params["multiple_of"]) * params["multiple_of"]
    config = LlamaConfig(
        vocab_size=params["vocab_size"],
        hidden_size=params["dim"],
        intermediate_size=hidden,
        num_hidden_layers=params["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=params["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": params.get("rope_theta", 10000.0)},
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sorted(MODELS).index(request.param))
        theirs = LlamaForCausalLM(config).eval().float()
        for name, parameter in theirs.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return theirs, build_model(params, renamed(theirs.state_dict(), heads, kv_heads))


@torch.no_grad()
def test_logits_equal(pair):
    theirs, ours = pair
    tokens = torch.randint(PARAMS["vocab_size"], (3, 50), generator=torch.Generator().manual_seed(0))
    expected = theirs(tokens).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(ours(tokens), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours(tokens, 0), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_greedy_ids_equal(pair):
    """Stepped by hand through the cache against `generate` with its own cache."""
    theirs, ours = pair
    prompt = torch.randint(PARAMS["vocab_size"], (1, 7), generator=torch.Generator().manual_seed(1))
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False)
    ids = prompt
    logits = ours(prompt, 0)
    while ids.shape[1] < expected.shape[1]:
        ids = torch.cat([ids, logits[:, -1:].argmax(dim=-1)], dim=1)
        logits = ours(ids[:, -1:], ids.shape[1] - 1)
    assert expected.shape[1] == 47
    assert ids.tolist() == expected.tolist()
