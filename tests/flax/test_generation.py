"""What generation in JAX has to see to besides the contract: how tokens are selected, and whose caches are consumed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.models import CONFIG, CROSS_CONFIG, ENCODER, ENCODER_MASK, IDS, LEFT
from xglm_core.errors import InputError
from xglm_core.generation import randomness
from xglm_core.generation.compiled import device_rules
from xglm_core.generation.rules import Rules
from xglm_flax import FlaxXGLMForCausalLM
from xglm_flax.selection import selection

NEW = {"max_new_tokens": 5, "stop_at_eos": False}


@pytest.fixture(scope="module")
def model(folder):
    return FlaxXGLMForCausalLM.from_pretrained(folder)


class TestSelection:
    def test_noise_is_that_of_the_definition_bit_by_bit(self):
        keys = np.random.default_rng(0).integers(0, 2**32, (3, 2), dtype=np.uint32)
        index = np.stack([np.arange(256_008), np.arange(256_008) + 2**31 - 256_008, np.arange(256_008) * 7])
        expected = randomness.noise_bits(keys[:, None], index)
        assert np.array_equal(jax.jit(selection.noise_bits)(keys, index.astype(np.int32)), expected)
        # The logarithms of two libraries; of numbers near 1 they are near 0, where the units are those of the argument.
        noise = jax.jit(selection.gumbel)(keys, index.astype(np.int32))
        np.testing.assert_allclose(noise, randomness.gumbel(expected), rtol=2e-6, atol=1e-6)

    @pytest.mark.parametrize("top_k", [0, 3, 90])
    def test_the_first_of_equal_scores_wins(self, top_k):
        scores = np.zeros((2, 300), np.float32)
        scores[0, [70, 80, 299]] = 1
        greedy = Rules(np.zeros((2, 0), np.int32))
        assert np.array_equal(selection.choose(scores, device_rules(greedy), np.zeros((2, 2), np.uint32)), [70, 0])
        rules = Rules(np.zeros((2, 0), np.int32), sample=True, top_k=top_k, top_p=1.0 if top_k else 0.899)
        values, ids = selection.filter_logits(scores, device_rules(rules))
        kept = np.isfinite(values)
        count = top_k or 270  # Of three weights of e and 297 of 1, and of 300 equal ones.
        for row in range(2):
            expected = np.argsort(-scores[row], kind="stable")[:count]
            assert sorted(ids[row, kept[row]].tolist()) == sorted(expected.tolist())

    def test_scores_that_are_no_numbers_are_told_from_none(self):
        scores = np.zeros((3, 131), np.float32)
        scores[0, 5] = np.nan
        scores[1] = -np.inf
        for options in ({}, {"sample": True, "top_k": 5}, {"sample": True}):
            rules = device_rules(Rules(np.full((3, 8), 131, np.int32), **options))
            processed = selection.apply_penalties(jnp.asarray(scores), None, rules)
            chosen = selection.choose(processed, rules, np.zeros((3, 2), np.uint32))
            assert chosen[:2].tolist() == [-1, -2]
            assert chosen[2] >= 0


class TestCaches:
    def test_stay_as_they_are_with_encoder_states(self):
        cross_model = FlaxXGLMForCausalLM(CROSS_CONFIG, seed=3)
        encoder = {"encoder_hidden_states": ENCODER, "encoder_attention_mask": ENCODER_MASK}
        cache = cross_model(IDS[:, :6], LEFT[:, :6], use_cache=True, **encoder).past_key_values
        before = jax.tree.map(np.array, cache)
        for beams in (1, 2):
            text = np.asarray(cross_model.generate(IDS, LEFT, past_key_values=cache, num_beams=beams, **NEW))
            assert np.array_equal(text, cross_model.generate(IDS, LEFT, past_key_values=cache, num_beams=beams, **NEW))
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, cache), before)
        text = np.asarray(cross_model.generate(IDS, LEFT, past_key_values=cache, **NEW))
        mask = np.concatenate([LEFT, np.ones((2, 5), int)], axis=1)
        logits = cross_model(text, mask, **encoder).logits
        assert np.array_equal(text[:, 11:], logits[:, 10:-1].argmax(-1))

    @pytest.mark.parametrize("kind", ["fixed", "stacked", "tuple"])
    def test_of_any_kind_and_size(self, model, kind):
        """From a cache without room for what follows, of a single row."""
        expected = model.generate(IDS[:1], **NEW)
        maker = FlaxXGLMForCausalLM(CONFIG, _do_init=False, scan_layers=kind == "stacked")
        empty = maker.init_cache(1, 7)
        cache = maker(IDS[:1, :6], params=model.params, past_key_values=empty).past_key_values
        cache = tuple(cache) if kind == "tuple" else cache
        for _ in range(2):
            assert np.array_equal(model.generate(IDS[:1], past_key_values=cache, **NEW), expected)

    def test_of_other_rows(self, model):
        cache = model(IDS[:, :6], use_cache=True).past_key_values
        with pytest.raises(InputError, match="past_key_values holds 2 rows, expected 1, as many as the input has"):
            model.generate(IDS[:1], past_key_values=cache)
