"""The decoder as a layer of named tuples; the public call in front of it; the plain forms beside the fast ones."""

import keras
import numpy as np
import pytest

from tests.helpers.frameworks import backends_under_test

if "tf" not in backends_under_test():
    pytest.skip("XGLM_TEST_BACKENDS leaves tf out", allow_module_level=True)

import tensorflow as tf

from xglm_core import XGLMConfig
from xglm_core.calls import DecoderInputs, Wanted
from xglm_core.errors import InputError
from xglm_tf import TFXGLMForCausalLM, TFXGLMModel

CONFIG = XGLMConfig(vocab_size=131, max_position_embeddings=89, d_model=35, ffn_dim=53, num_layers=2, attention_heads=5)
IDS = np.random.RandomState(0).randint(4, CONFIG.vocab_size, (2, 11))
MASK = np.array([[0, 0, 0] + [1] * 8, [1] * 11])
SAME = {"rtol": 0, "atol": 1e-5}  # Two orders of the same float32 sums.


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    return TFXGLMForCausalLM(CONFIG)


class TestDecoder:
    @pytest.mark.parametrize("jit", [None, True])
    def test_it_returns_what_is_wanted(self, model, jit):
        decode = model.model
        if jit:
            decode = tf.function(lambda inputs: model.model(inputs, None, Wanted(cache=True)), jit_compile=True)
            results = decode(DecoderInputs(tf.constant(IDS), tf.constant(MASK)))
        else:
            results = decode(DecoderInputs(IDS, MASK), None, Wanted(cache=True))
        expected = model(IDS, MASK, output_hidden_states=True)
        np.testing.assert_allclose(results.last_hidden_state, expected.hidden_states[-1], **SAME)
        assert int(results.past_key_values.length) == 11
        assert results.hidden_states is results.attentions is results.cross_attentions is None
        # Nothing is held past these positions.
        held = results.past_key_values.mask.numpy()
        assert np.array_equal(held[:, :11], MASK != 0)
        assert not held[:, 11:].any()

    def test_a_cache_goes_on_without_a_mask(self, model):
        first = model.model(DecoderInputs(IDS[:, :7], MASK[:, :7]), None, Wanted(cache=True))
        second = model.model(DecoderInputs(IDS[:, 7:]), first.past_key_values, Wanted(attentions=True))
        expected = model(IDS, MASK, output_hidden_states=True, output_attentions=True)
        np.testing.assert_allclose(second.last_hidden_state, expected.hidden_states[-1][:, 7:], **SAME)
        np.testing.assert_allclose(second.attentions[1], expected.attentions[1][:, :, 7:], **SAME)
        assert second.past_key_values is None

    @pytest.mark.parametrize("model_class", [TFXGLMModel, TFXGLMForCausalLM])
    def test_checks_come_before_it(self, model_class):
        model = model_class(CONFIG)
        cache = model(IDS).past_key_values
        object.__setattr__(model.model, "call", lambda *args, **kwargs: pytest.fail("something was computed"))
        for arguments, message in (
            ({"input_ids": IDS + 200}, r"input_ids\[\d, \d+\] is"),
            ({"input_ids": np.resize(IDS, (1, 90))}, "position 89 is past the limit of 89 tokens"),
            ({"input_ids": np.resize(IDS, (2, 79)), "past_key_values": cache}, "position 89 is past the limit"),
            ({"input_ids": IDS, "position_ids": np.full((1, 11), 89)}, "position 89 is past the limit"),
            ({"input_ids": IDS, "attention_mask": MASK[:, :5]}, r"attention_mask is \[2, 5\], expected \[2, 11\]"),
            ({"input_ids": IDS[:1], "past_key_values": cache}, "past_key_values holds 2 rows, expected 1"),
        ):
            with pytest.raises(InputError, match=message):
                model(**arguments)


class TestPublicDoor:
    """`model.model` and `get_decoder()` are called as `TFXGLMModel` is."""

    @pytest.mark.parametrize("kind", [TFXGLMModel, TFXGLMForCausalLM])
    def test_the_results_are_those_of_the_bare_decoder(self, kind):
        model = kind(CONFIG)
        bare = model if kind is TFXGLMModel else TFXGLMModel(CONFIG)
        bare.set_weights(model.get_weights())
        expected = bare(IDS, MASK, output_hidden_states=True)
        decoder = model.get_decoder()
        assert decoder is model.model
        for found in (
            decoder(IDS, MASK, output_hidden_states=True),
            decoder({"input_ids": IDS.tolist(), "attention_mask": MASK}, output_hidden_states=True),
            decoder(attention_mask=MASK, inputs_embeds=decoder.embed_tokens(IDS), output_hidden_states=True),
        ):
            assert found.keys() == expected.keys()
            np.testing.assert_allclose(found.last_hidden_state, expected.last_hidden_state, **SAME)
            np.testing.assert_allclose(found.hidden_states[1], expected.hidden_states[1], **SAME)
        states, cache = decoder(IDS[:, :7], MASK[:, :7], use_cache=True, return_dict=False)
        again = decoder(IDS[:, 7:], past_key_values=cache).last_hidden_state
        both, real = np.concatenate([states, again], axis=1), MASK == 1
        np.testing.assert_allclose(both[real], expected.last_hidden_state.numpy()[real], **SAME)

    def test_it_checks_and_says_so_in_one_line(self, model):
        with pytest.raises(InputError) as caught:
            model.model(IDS, MASK[:, :5])
        assert str(caught.value) == "attention_mask is [2, 5], expected [2, 11]"
        with pytest.raises(InputError, match="the argument 'ids' is unknown, expected some of input_ids"):
            model.model(ids=IDS)

    def test_dropout_acts_in_training(self, model):
        states = model.model(IDS).last_hidden_state
        assert np.array_equal(model.model(IDS).last_hidden_state, states)
        assert abs(model.model(IDS, training=True).last_hidden_state - states).numpy().max() > 0.1

    def test_inside_of_functions_and_functional_models(self, model):
        expected = model.model(IDS, MASK).last_hidden_state
        inside = tf.function(lambda ids: model.model(ids, MASK, return_dict=False)[0], jit_compile=True)
        np.testing.assert_allclose(inside(tf.constant(IDS)), expected, **SAME)
        inputs = keras.Input((None,), dtype="int32"), keras.Input((None,), dtype="int32")
        outer = keras.Model(inputs, model.get_decoder()(*inputs).last_hidden_state)
        np.testing.assert_allclose(outer([IDS, MASK]), expected, **SAME)
        assert len(outer.trainable_variables) == len(model.model.trainable_variables)

    def test_of_models_with_adapters_and_of_saved_ones(self, tmp_path):
        model = TFXGLMForCausalLM(CONFIG)
        model.enable_lora(2)
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model.model(IDS, MASK).last_hidden_state ** 2)
        gradients = tape.gradient(loss, model.trainable_variables)
        assert len(gradients) == 8  # Two projections in each of two blocks, of two factors each.
        assert all(gradient is not None for gradient in gradients)
        model.save(tmp_path / "model.keras")
        again = keras.saving.load_model(tmp_path / "model.keras")
        found, expected = again.model(IDS, MASK).last_hidden_state, model.model(IDS, MASK).last_hidden_state
        np.testing.assert_allclose(found, expected, **SAME)


class OwnLoss(TFXGLMForCausalLM):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return 7.0 + 0.0 * tf.reduce_sum(y_pred.logits)


def test_a_loss_of_a_subclass_is_what_fit_computes():
    model = OwnLoss(CONFIG)
    model.compile("sgd", jit_compile=False)
    before = model.model.layer_norm.gamma.numpy()
    model.fit(IDS, IDS, verbose=0)
    assert np.array_equal(model.model.layer_norm.gamma, before)  # Its gradient is 0.


@pytest.mark.slow
def test_plain_forms_give_the_same(monkeypatch):
    """Of few rows' logits, dropout and sums in place."""

    def results():
        keras.utils.set_random_seed(0)
        config = XGLMConfig(**{**CONFIG.to_dict(), "dropout": 0.0, "attention_dropout": 0.0})
        model = TFXGLMForCausalLM(config)
        logits = model(IDS, MASK).logits.numpy()
        tokens = model.generate(IDS, MASK, max_new_tokens=5, do_sample=False).numpy()
        model.compile(keras.optimizers.SGD(0.1))
        losses = [model.train_on_batch({"input_ids": IDS, "attention_mask": MASK}, IDS)[0] for _ in range(2)]
        return logits, tokens, losses

    fast = results()
    monkeypatch.setenv("XGLM_PLAIN", "1")
    plain = results()
    np.testing.assert_allclose(plain[0], fast[0], **SAME)
    assert np.array_equal(plain[1], fast[1])
    np.testing.assert_allclose(plain[2], fast[2], rtol=1e-5)
