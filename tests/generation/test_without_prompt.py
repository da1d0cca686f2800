"""`generate` without a prompt, in every backend: begins as every text of the tokenizer does."""

import numpy as np
import pytest

from tests.helpers.models import CONFIG, changed
from xglm_core import XGLMTokenizer
from xglm_core.errors import InputError
from xglm_core.generation.prompts import Prompts

OPTIONS = {"max_new_tokens": 5, "stop_at_eos": False}
TINY = "examples/tiny_model/checkpoint"


def test_is_that_of_the_empty_text(fw, tiny_model):
    model, empty = tiny_model, XGLMTokenizer.from_pretrained(TINY)("")
    assert empty["input_ids"] == [2]
    due = fw.generate(model, np.array([[2]]), **OPTIONS)
    np.testing.assert_array_equal(fw.generate(model, **OPTIONS), due)
    assert [2, *(int(token) for (token,) in model.stream(**OPTIONS))] == due[0].tolist()


def test_of_drawn_copies(fw, model):
    options = {"do_sample": True, "seed": 1, "num_return_sequences": 3, **OPTIONS}
    got = fw.generate(model, **options)
    np.testing.assert_array_equal(got, fw.generate(model, np.array([[2]]), **options))
    assert got.shape == (3, 6)


@pytest.mark.parametrize(
    ("ids", "first"),
    [
        ({"decoder_start_token_id": 9}, 9),
        ({"decoder_start_token_id": None, "eos_token_id": 7}, 7),
        ({"decoder_start_token_id": None, "eos_token_id": [8, 7]}, 8),
        ({"decoder_start_token_id": 1, "pad_token_id": 1}, 1),
    ],
    ids=str,
)
def test_first_id(ids, first):
    config = changed(CONFIG, **ids)
    prompts = Prompts.of(config, None, None)
    assert prompts.without(config.pad_token_id).sequences == ([first],)  # Also of what would be padding without a mask.


def test_of_an_id_that_the_call_names(fw, model):
    got = fw.generate(model, bos_token_id=9, **OPTIONS)
    np.testing.assert_array_equal(got, fw.generate(model, np.array([[9]]), bos_token_id=8, **OPTIONS))
    with pytest.raises(InputError, match=r"input_ids\[0, 0\] is 131, expected 0 to 130"):
        model.generate(bos_token_id=131)


def test_with_nothing_to_begin_with():
    with pytest.raises(InputError, match="neither input_ids nor inputs_embeds is given, expected one of the two"):
        Prompts.of(changed(CONFIG, decoder_start_token_id=None, eos_token_id=None), None, None)


def test_a_cache_needs_its_text(fw, model):
    cache = fw.call(model, np.array([[2, 5]])).past_key_values
    with pytest.raises(InputError, match="neither input_ids nor inputs_embeds is given, expected one of the two"):
        model.generate(past_key_values=cache)
