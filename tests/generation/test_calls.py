"""How `generate` is called and what type it returns, in every backend."""

import numpy as np
import pytest

from tests.helpers.models import CONFIG, IDS, ONE_BLOCK
from xglm_core import GenerationConfig
from xglm_core.errors import InputError

OPTIONS = {"max_new_tokens": 4, "stop_at_eos": False}


class TestType:
    def test_is_that_of_the_prompt(self, fw, model):
        for dtype in (np.int32, np.int64, np.int16, np.uint8):
            ids = fw.tensor(IDS.astype(dtype))
            for options in ({}, {"num_beams": 2}, {"do_sample": True}):
                assert model.generate(ids, **options, **OPTIONS).dtype == ids.dtype
            output = model.generate(ids, return_dict_in_generate=True, **OPTIONS)
            assert output.sequences.dtype == ids.dtype

    def test_holds_every_id(self, fw, load):
        """Of a type that is too narrow it is not the prompt's."""
        model = load(ONE_BLOCK)
        model.resize_token_embeddings(300)
        got = fw.numpy(model.generate(fw.tensor(IDS.astype(np.uint8)), **OPTIONS))
        np.testing.assert_array_equal(got, fw.generate(model, IDS, **OPTIONS))
        assert np.iinfo(got.dtype).max >= 299

    def test_fits_beside_the_prompt(self, fw, model):
        """As in `tf.concat` of both, which wants one type."""
        if fw.name == "tf":
            import tensorflow as tf

            ids = tf.constant(IDS, tf.int32)
            assert tf.concat([ids, model.generate(ids, **OPTIONS)], axis=1).shape == (2, 26)


class Foreign:
    """What is read of the configuration of another package."""

    def __init__(self, **values):
        self.values = values

    def to_diff_dict(self):
        return {"transformers_version": "5.23.0", "_from_model_config": False, "temperature": None, **self.values}


class TestConfiguration:
    def test_by_position(self, fw, model):
        expected = fw.generate(model, IDS, max_new_tokens=3, repetition_penalty=2.0)
        options = GenerationConfig(max_new_tokens=3, repetition_penalty=2.0)
        np.testing.assert_array_equal(fw.numpy(model.generate(fw.tensor(IDS), None, options)), expected)
        tokens = list(model.stream(fw.tensor(IDS), None, options))
        np.testing.assert_array_equal(np.stack(tokens, axis=1), expected[:, 11:])

    def test_leaves_to_the_model_what_is_not_set(self, fw, model):
        """Its end of text and its padding id."""
        free = fw.generate(model, IDS, **OPTIONS)
        eos = int(free[0, 12])
        given = GenerationConfig(max_new_tokens=4, eos_token_id=eos)
        assert fw.generate(model, IDS, generation_config=given)[0, 13:].tolist() == [CONFIG.pad_token_id] * 2
        assert given == GenerationConfig(max_new_tokens=4, eos_token_id=eos)

    def test_of_transformers(self, fw, model):
        given = Foreign(max_new_tokens=3, num_beams=2, eos_token_id=[3, 4])
        expected = fw.generate(model, IDS, max_new_tokens=3, num_beams=2, eos_token_id=[3, 4])
        np.testing.assert_array_equal(fw.generate(model, IDS, generation_config=given), expected)
        got = fw.generate(model, IDS, generation_config=Foreign(max_length=14), max_new_tokens=None)
        assert got.shape[1] <= 14
        with pytest.raises(InputError, match="generation_config has penalty_alpha, which is not offered here; take"):
            fw.generate(model, IDS, generation_config=Foreign(penalty_alpha=0.6, top_k=4))
        with pytest.raises(InputError, match="generation_config is a dict, expected a GenerationConfig"):
            fw.generate(model, IDS, generation_config={"max_new_tokens": 3})

    def test_none_switches_an_option_off(self, fw, model):
        """As people write it to be rid of warnings."""
        expected = fw.generate(model, IDS, max_new_tokens=3)
        nothing = dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "typical_p", "seed", "length_penalty"))
        nothing |= dict.fromkeys(("num_beams", "do_sample", "repetition_penalty", "num_return_sequences"))
        got = model.generate(fw.tensor(IDS), max_new_tokens=3, **nothing)
        np.testing.assert_array_equal(fw.numpy(got), expected)
        sample = {"do_sample": True, "max_new_tokens": 9, "seed": 2, "temperature": 2.0, "stop_at_eos": False}
        np.testing.assert_array_equal(
            fw.numpy(model.generate(fw.tensor(IDS), top_k=None, **sample)), fw.generate(model, IDS, top_k=0, **sample)
        )


def traced(fw, method):
    """Calls of a method inside of what the framework traces or compiles."""
    if fw.name == "tf":
        import tensorflow as tf

        return [tf.function(method), tf.function(method, jit_compile=True)]
    if fw.name == "flax":
        import jax

        return [jax.jit(method), jax.vmap(lambda ids: method(ids[None]))]
    import torch

    class Module(torch.nn.Module):
        def forward(self, ids):
            return method(ids)

    return [
        torch.vmap(lambda ids: method(ids[None])),
        lambda ids: torch.export.export(Module(), (ids,), strict=False),
        lambda ids: torch.jit.trace(lambda ids: method(ids), ids),
    ]


@pytest.mark.parametrize("name", ["generate", "stream", "score"])
def test_a_loop_of_the_host_is_not_traced(fw, model, name):
    for call in traced(fw, getattr(model, name)):
        what = "score" if name == "score" else "generate"
        with pytest.raises(
            InputError, match=f"{what} is a loop on the host, which cannot be traced or compiled: call"
        ) as caught:
            call(fw.tensor(IDS))
        assert "\n" not in str(caught.value)
