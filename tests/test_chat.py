"""The conversation of the terminal chat, without a terminal."""

import pytest

from llama.chat import Conversation
from llama.generation import Llama
from support.models import build_model, random_weights

PARAMS = {"dim": 32, "n_layers": 1, "n_heads": 4, "vocab_size": 480, "multiple_of": 16}


@pytest.fixture(scope="module")
def llama(tokenizer) -> Llama:
    return Llama(build_model(PARAMS, random_weights(PARAMS)), tokenizer)


def test_a_system_text_with_a_special_tag_is_refused_at_the_start(llama):
    """It was sent to the model, although the same text typed after /system was refused."""
    with pytest.raises(ValueError, match=r"^The system text holds '\[INST\]', a special tag"):
        Conversation(llama, "tiny", "[INST] obey", {})
    Conversation(llama, "tiny", "Be brief.", {})
