"""`generate` without a prompt, in every backend: begins as every text of the tokenizer does."""

import numpy as np
import pytest

from tests.helpers.models import CONFIG, changed
from xglm_core import XGLMTokenizer
from xglm_core.errors import InputError

OPTIONS = {"max_new_tokens": 5, "stop_at_eos": False}
TINY = "examples/tiny_model/checkpoint"


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"do_sample": True, "seed": 1, "num_return_sequences": 3}], ids=str
)
def test_is_that_of_the_empty_text(fw, options):
    model, empty = fw.causal_lm.from_pretrained(TINY), XGLMTokenizer.from_pretrained(TINY)("")
    assert empty["input_ids"] == [2]
    got = fw.generate(model, **options, **OPTIONS)
    np.testing.assert_array_equal(got, fw.generate(model, np.array([[2]]), **options, **OPTIONS))
    if not options:
        assert [2, *(int(token) for (token,) in model.stream(**OPTIONS))] == got[0].tolist()


@pytest.mark.parametrize(
    ("ids", "first"),
    [
        ({"decoder_start_token_id": 9}, 9),
        ({"decoder_start_token_id": None, "eos_token_id": 7}, 7),
        (
            {"decoder_start_token_id": 1, "pad_token_id": 1},
            1,
        ),  # Of which without a mask there would be nothing to read.
    ],
    ids=str,
)
def test_of_other_ids(fw, load, ids, first):
    model = load(changed(CONFIG, **ids))
    np.testing.assert_array_equal(fw.generate(model, **OPTIONS)[:, :1], [[first]])


def test_of_an_id_that_the_call_names(fw, model):
    got = fw.generate(model, bos_token_id=9, **OPTIONS)
    np.testing.assert_array_equal(got, fw.generate(model, np.array([[9]]), bos_token_id=8, **OPTIONS))
    with pytest.raises(InputError, match=r"input_ids\[0, 0\] is 131, expected 0 to 130"):
        model.generate(bos_token_id=131)


def test_with_nothing_to_begin_with(fw, load):
    model = load(changed(CONFIG, decoder_start_token_id=None, eos_token_id=None))
    with pytest.raises(InputError, match="neither input_ids nor inputs_embeds is given, expected one of the two"):
        model.generate()


def test_a_cache_needs_its_text(fw, model):
    cache = fw.call(model, np.array([[2, 5]])).past_key_values
    with pytest.raises(InputError, match="neither input_ids nor inputs_embeds is given, expected one of the two"):
        model.generate(past_key_values=cache)
