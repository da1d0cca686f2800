"""Where the seed of sampling comes from: an option, the framework's own generator, or JAX's keys."""

import importlib

import numpy as np
import pytest

from tests.helpers.models import IDS, LEFT
from xglm_core.errors import InputError

SAMPLE = {"do_sample": True, "max_new_tokens": 11, "stop_at_eos": False, "temperature": 2.0, "top_k": 0}


def global_seeds(fw):
    """What sets the seed of the framework."""
    if fw.name == "torch":
        return [importlib.import_module("torch").manual_seed]
    if fw.name == "tf":
        tensorflow, keras = map(importlib.import_module, ("tensorflow", "keras"))
        return [tensorflow.random.set_seed, keras.utils.set_random_seed]
    return []


def test_of_the_framework_makes_texts_repeatable(fw, model):
    for set_seed in global_seeds(fw):
        texts = []
        for seed in (0, 0, 1):
            set_seed(seed)
            texts += [fw.generate(model, IDS, LEFT, **SAMPLE) for _ in range(2)]
        first, second, first_again, second_again, other, _ = texts
        assert np.array_equal(first, first_again)
        assert np.array_equal(second, second_again)
        assert not np.array_equal(first, second)
        assert not np.array_equal(first, other)


def test_of_the_framework_is_for_beams_and_streams_too(fw, model):
    for set_seed in global_seeds(fw):
        texts = []
        for _ in range(2):
            set_seed(3)
            streamed = np.stack(list(model.stream(fw.tensor(IDS), **SAMPLE)), axis=1)
            texts.append([*fw.generate(model, IDS, num_beams=2, **SAMPLE).tolist(), *streamed.tolist()])
        assert texts[0] == texts[1]


def test_of_the_framework_is_left_alone_where_nothing_is_drawn(fw, model):
    """By greedy search, and where a seed is given."""
    for set_seed in global_seeds(fw):
        texts = []
        for before in ({"max_new_tokens": 2}, {"max_new_tokens": 2, "do_sample": True, "seed": 5}, None):
            set_seed(7)
            if before is not None:
                fw.generate(model, IDS, **before)
            texts.append(fw.generate(model, IDS, **SAMPLE).tolist())
        assert texts[0] == texts[1] == texts[2]


def test_is_another_each_time(fw, model):
    assert not np.array_equal(fw.generate(model, IDS, **SAMPLE), fw.generate(model, IDS, **SAMPLE))


class TestKeysOfJax:
    @pytest.fixture
    def draw(self, fw, model):
        if fw.name != "flax":
            pytest.skip("a key is JAX's")
        return lambda **options: np.asarray(model.generate(IDS, **{**SAMPLE, **options}))

    def test_make_texts_repeatable(self, draw, model):
        jax = importlib.import_module("jax")
        first = draw(prng_key=jax.random.key(0))
        assert np.array_equal(first, draw(prng_key=jax.random.key(0)))
        assert np.array_equal(first, draw(prng_key=jax.random.PRNGKey(0)))
        assert not np.array_equal(first, draw(prng_key=jax.random.key(1)))
        streamed = list(model.stream(IDS, prng_key=jax.random.key(0), **SAMPLE))
        assert np.array_equal(first[:, 11:], np.stack(streamed, axis=1))

    def test_that_cannot_be_used(self, draw):
        jax = importlib.import_module("jax")
        key = jax.random.key(0)
        for options, message in (
            ({"prng_key": key, "seed": 1}, "seed and prng_key are both given, expected one of the two"),
            ({"prng_key": jax.random.split(key)}, r"prng_key is uint32 \[2, 2\], expected a single key, such as"),
            ({"prng_key": 3}, r"prng_key is int64 \[\], expected a single key, such as jax.random.key\(0\)"),
        ):
            with pytest.raises(InputError, match=message):
                draw(**options)
        with pytest.raises(InputError, match="prng_key has no effect without do_sample=True"):
            draw(prng_key=key, do_sample=False, temperature=None, top_k=None)
