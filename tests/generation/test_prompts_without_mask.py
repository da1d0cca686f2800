"""`generate` without an attention mask, in every backend: padding ids at the ends of a row are padding."""

import numpy as np
import pytest

from tests.helpers.models import CONFIG, IDS, LEFT, RIGHT
from xglm_core import XGLMTokenizer
from xglm_core.errors import InputError

PAD = CONFIG.pad_token_id
OPTIONS = {"max_new_tokens": 5, "stop_at_eos": False}
TINY = "examples/tiny_model/checkpoint"


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_padded_by_the_tokenizer(fw, tiny_model, side):
    tokenizer, model = XGLMTokenizer.from_pretrained(TINY), tiny_model
    texts = ["a", "После школы девочка кормит кошку и"]
    both = tokenizer(texts, padding=True, padding_side=side, return_tensors="np")
    options = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(**{name: fw.tensor(array) for name, array in both.items()}, **options)
    got = model.generate(fw.tensor(both["input_ids"]), **options)
    np.testing.assert_array_equal(fw.numpy(got.sequences), fw.numpy(expected.sequences))
    np.testing.assert_array_equal(fw.numpy(got.logits[0]), fw.numpy(expected.logits[0]))


@pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "seed": 1}], ids=str)
def test_rows_are_those_alone(fw, model, mask, options):
    ids = np.where(mask == 1, IDS, PAD)
    got = fw.generate(model, ids, **options, **OPTIONS)
    assert np.array_equal(got, fw.generate(model, ids, mask, **options, **OPTIONS))
    alone = fw.generate(model, IDS[:1, mask[0] == 1], **options, **OPTIONS)
    assert np.array_equal(got[0, 11:], alone[0, 8:])


def test_an_id_between_others_is_text(fw, model):
    ids = IDS.copy()
    ids[:, 4] = PAD
    assert np.array_equal(fw.generate(model, ids, **OPTIONS), fw.generate(model, ids, np.ones_like(ids), **OPTIONS))


def test_an_id_that_ends_texts_as_well_is_text(fw, model):
    ids = np.where(LEFT == 1, IDS, PAD)
    text = fw.generate(model, ids, np.ones_like(ids), **OPTIONS)
    # As the padding id in force; `stop_at_eos=False` does not change what the ids mean.
    config = model.generation_config.updated({"eos_token_id": [5, PAD]})
    assert np.array_equal(fw.generate(model, ids, generation_config=config, **OPTIONS), text)
    assert np.array_equal(fw.generate(model, ids, pad_token_id=IDS[1, 0].item(), **OPTIONS)[:1], text[:1])


def test_a_row_of_padding_alone_is_refused(fw, model):
    ids = np.array([[5, 6], [PAD, PAD]])
    with pytest.raises(InputError, match=r"input_ids\[1\] has nothing to read but pad_token_id=1, which"):
        fw.generate(model, ids)
    assert fw.generate(model, ids, np.ones_like(ids), **OPTIONS).shape == (2, 7)


def test_what_a_cache_holds_keeps_its_mask(fw, model):
    ids = np.where(LEFT == 1, IDS, PAD)
    masked = fw.call(model, ids[:, :6], LEFT[:, :6], use_cache=True).past_key_values
    expected = fw.generate(model, ids, LEFT, **OPTIONS)
    assert np.array_equal(fw.generate(model, ids, past_key_values=masked, **OPTIONS), expected)
    # Read as text, so it stays text; new padding is found.
    text = fw.call(model, ids[:, :6], use_cache=True).past_key_values
    wide = np.concatenate([ids, np.full((2, 2), PAD)], axis=1)
    got = fw.generate(model, wide, past_key_values=text, **OPTIONS)
    assert np.array_equal(got[:, 13:], fw.generate(model, ids, np.ones_like(ids), **OPTIONS)[:, 11:])
