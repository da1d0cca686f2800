"""What chance does in training, in every backend, and that it does nothing elsewhere."""

import itertools

import numpy as np
import pytest

from conformance.random_weights import random_weights
from tests.helpers.models import CONFIG, ENCODER, IDS, LEFT, SAME, changed
from xglm_core.checkpoint import DTYPES, save_checkpoint
from xglm_core.weight_names import weight_specs

NONE = changed(CONFIG, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, layerdrop=0.0)
SHALLOW = changed(NONE, num_layers=1)
SWITCHES = ["dropout", "attention_dropout", "activation_dropout", "layerdrop"]


class TestOnlyInTraining:
    @pytest.mark.parametrize("switch", SWITCHES)
    def test_acts_in_training_alone(self, fw, load, switch):
        config = NONE if switch == "layerdrop" else SHALLOW
        plain = fw.logits(load(config), IDS)
        model = load(changed(config, **{switch: 0.5}))
        np.testing.assert_allclose(fw.logits(model, IDS), plain, **SAME)
        first = fw.numpy(fw.train_call(model, 1, IDS).logits)
        assert abs(first - plain).max() > 0.05
        assert np.array_equal(fw.numpy(fw.train_call(model, 1, IDS).logits), first)
        others = [fw.numpy(fw.train_call(model, seed, IDS).logits) for seed in range(2, 6)]
        assert any(abs(other - first).max() > 0.05 for other in others)
        np.testing.assert_allclose(fw.logits(model, IDS), plain, **SAME)

    def test_nothing_is_dropped_at_zero(self, fw, load):
        model = load(SHALLOW)
        np.testing.assert_allclose(
            fw.numpy(fw.train_call(model, 1, IDS, LEFT).logits), fw.logits(model, IDS, LEFT), **SAME
        )

    def test_reported_attentions_are_those_before_dropout(self, fw, load):
        model = load(changed(SHALLOW, attention_dropout=0.5))
        first = fw.train_call(model, 1, IDS, output_attentions=True).attentions[0]
        np.testing.assert_allclose(fw.numpy(first).sum(-1), 1, **SAME)


class TestMasks:
    def test_rows_have_masks_of_their_own(self, fw, load):
        twins = IDS[:1].repeat(2, 0)
        for switch in SWITCHES[:3]:
            model = load(changed(SHALLOW, **{switch: 0.5}))
            logits = fw.numpy(fw.train_call(model, 1, twins).logits)
            assert abs(logits[0] - logits[1]).max() > 0.05, switch

    def test_heads_have_masks_of_their_own(self, fw, tmp_path):
        """Five equal heads in a model that shows what each of them brings."""
        config = changed(NONE, attention_dropout=0.5, num_layers=1)
        weights = random_weights(config, seed=1)
        block = "model.layers.0"
        for projection in ("k_proj", "v_proj", "q_proj"):
            for parameter in ("weight", "bias"):
                head = weights[f"{block}.self_attn.{projection}.{parameter}"][:7]
                weights[f"{block}.self_attn.{projection}.{parameter}"] = np.concatenate([head] * 5)
        weights[f"{block}.self_attn.out_proj.weight"] = np.eye(35, dtype=np.float32)
        weights[f"{block}.fc2.weight"] = np.zeros_like(weights[f"{block}.fc2.weight"])
        weights[f"{block}.fc2.bias"] = np.zeros_like(weights[f"{block}.fc2.bias"])
        specs = weight_specs(config, with_head=False)
        save_checkpoint(tmp_path, config, specs, DTYPES["float32"], weights.__getitem__)
        decoder = fw.decoder.from_pretrained(tmp_path)
        # The norm that follows is undone by comparing what was equal before it: all heads of a position.
        bias = weights[f"{block}.self_attn.out_proj.bias"]
        weights_of_norm = weights["model.layer_norm.weight"], weights["model.layer_norm.bias"]

        def context(outputs):
            states = fw.numpy(outputs.hidden_states[0])
            normed = (fw.numpy(outputs.last_hidden_state) - weights_of_norm[1]) / weights_of_norm[0]
            # x = states + context + bias has the direction of `normed`, up to mean and scale, both per position: two
            # heads are equal exactly if the same mean and scale explain both. Solve for them from the first head.
            return states, normed, bias

        states, normed, bias = context(fw.call(decoder, IDS, output_hidden_states=True))
        assert _heads_agree(states, normed, bias)
        states, normed, bias = context(fw.train_call(decoder, 1, IDS, output_hidden_states=True))
        assert not _heads_agree(states, normed, bias)


def _heads_agree(states: np.ndarray, normed: np.ndarray, bias: np.ndarray) -> bool:
    """Whether some mean and scale per position make `normed` * scale + mean - states - bias equal in all five heads."""
    residuals = []
    for n, s in zip(normed.reshape(-1, 35), (states + bias).reshape(-1, 35), strict=True):
        # context[h, d] = scale n[h, d] + mean - s[h, d]; equality over h is linear in scale.
        left = (n.reshape(5, 7) - n.reshape(5, 7)[:1])[1:].ravel()
        right = (s.reshape(5, 7) - s.reshape(5, 7)[:1])[1:].ravel()
        scale = left @ right / (left @ left)
        residuals.append(abs(scale * left - right).max())
    return max(residuals) < 1e-3  # Equal heads leave rounding, about 1e-5; half the probabilities dropped, about 1.


class TestLayerdrop:
    def test_a_dropped_block_passes_its_input_on(self, fw, load):
        model = load(changed(NONE, layerdrop=1.0))
        states = [fw.numpy(s) for s in fw.train_call(model, 1, IDS, LEFT, output_hidden_states=True).hidden_states]
        for state in states[1:-1]:
            assert np.array_equal(state, states[0])

    def test_the_cache_stays_consistent(self, fw, load):
        """Each block's keys are those of the state that it was given, dropped or not."""
        model = load(changed(NONE, layerdrop=1.0))
        outputs = fw.train_call(model, 1, IDS[:, :6], use_cache=True)
        assert len(outputs.past_key_values) == 3
        assert all(tuple(tensor.shape) == (2, 5, 6, 7) for layer in outputs.past_key_values for tensor in layer)
        assert all(abs(fw.numpy(key)).min(axis=(0, 1, 3)).all() for key, _ in outputs.past_key_values)
        on = fw.numpy(fw.call(model, IDS[:, 6:], past_key_values=outputs.past_key_values).logits)
        assert np.isfinite(on).all()
        kept = load(NONE)
        first = fw.call(kept, IDS[:, :6], use_cache=True).past_key_values
        np.testing.assert_allclose(fw.numpy(outputs.past_key_values[0][0]), fw.numpy(first[0][0]), **SAME)

    @pytest.mark.slow
    def test_how_often(self, fw, load):
        model = load(changed(NONE, layerdrop=0.3))
        dropped = 0
        for seed in range(40):
            states = fw.train_call(model, seed, IDS[:1, :3], output_hidden_states=True).hidden_states
            states = [fw.numpy(s) for s in states]
            # Not the last one, which is normed.
            dropped += sum(np.array_equal(a, b) for a, b in itertools.pairwise(states[:3]))
        # 80 draws at 0.3: 24, with a standard deviation of 4.1. Beyond five of them, something is wrong.
        assert 4 <= dropped <= 44

    def test_gradients_exist(self, fw, load):
        model = load(changed(SHALLOW, layerdrop=1.0))
        loss = fw.train_call(model, 1, IDS, labels=IDS).loss
        assert np.isfinite(fw.numpy(loss))

    def test_with_cross_attention(self, fw, load):
        model = load(changed(SHALLOW, layerdrop=1.0, add_cross_attention=True))
        outputs = fw.train_call(model, 1, IDS, encoder_hidden_states=ENCODER, use_cache=True)
        assert {len(layer) for layer in outputs.past_key_values} == {4}
