"""What users of Keras expect of a model: its ways to give inputs, to connect, compile, predict, save and export."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from conformance.random_weights import write_checkpoint
from tests.helpers.models import CONFIG, CROSS_CONFIG, ENCODER, ENCODER_MASK, HEAD_MASK, IDS, LEFT, SAME, changed
from tests.helpers.traces import traces_of_tf
from xglm_core.errors import ConfigError, InputError
from xglm_core.tokenization.encoding import BatchEncoding
from xglm_tf import TFXGLMForCausalLM, TFXGLMModel

REAL = LEFT != 0
INPUTS = {"input_ids": IDS, "attention_mask": LEFT}


def assert_same(ours, theirs):
    """Equal where there are tokens."""
    np.testing.assert_allclose(np.asarray(ours)[REAL], np.asarray(theirs)[REAL], **SAME)


@pytest.fixture(scope="module")
def model(folder):
    return TFXGLMForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def logits(model):
    return model(input_ids=IDS, attention_mask=LEFT).logits.numpy()


class TestInputs:
    @pytest.mark.parametrize(
        "inputs",
        [
            [IDS, LEFT],
            (IDS, LEFT),
            [tf.constant(IDS), tf.constant(LEFT, tf.bool)],
            [IDS, LEFT, None],
            INPUTS,
            BatchEncoding(INPUTS),
            BatchEncoding({name: value.tolist() for name, value in INPUTS.items()}),
        ],
        ids=["list", "tuple", "tensors", "with None", "dict", "BatchEncoding", "BatchEncoding of lists"],
    )
    def test_all_in_the_first_argument(self, model, logits, inputs):
        assert_same(model(inputs).logits, logits)

    def test_alone_by_position_and_mixed(self, model, logits):
        plain = model(input_ids=IDS).logits.numpy()
        for inputs in (IDS, tf.constant(IDS), IDS.tolist(), [IDS], {"input_ids": IDS}):
            assert np.array_equal(model(inputs).logits, plain)
        assert_same(model(IDS, LEFT).logits, logits)
        assert_same(model([IDS], LEFT).logits, logits)
        assert_same(model({"input_ids": IDS}, attention_mask=LEFT).logits, logits)
        assert model(INPUTS, output_hidden_states=True).hidden_states is not None

    def test_of_the_bare_decoder(self, folder):
        decoder = TFXGLMModel.from_pretrained(folder)
        assert np.array_equal(decoder([IDS, LEFT])[0], decoder(INPUTS).last_hidden_state)

    def test_are_left_as_they_are(self, model):
        inputs = BatchEncoding(INPUTS)
        model(inputs)
        assert inputs == INPUTS

    @pytest.mark.parametrize(
        ("args", "kwargs", "message"),
        [
            (
                ({"input_ids": IDS, "token_type_ids": IDS},),
                {},
                "argument 'token_type_ids' is unknown, expected some of i",
            ),
            ((IDS,), {"mask": LEFT}, "the argument 'mask' is unknown, expected some of input_ids, attention_mask, "),
            (([IDS] * 16,), {}, "16 inputs are given, expected at most 15: input_ids, "),
            ((INPUTS,), {"attention_mask": LEFT}, "attention_mask is given twice, expected once"),
            (([IDS, LEFT],), {"attention_mask": LEFT}, "attention_mask is given twice, expected once"),
            ((INPUTS, LEFT), {}, "attention_mask is given twice, expected once"),
            (
                ([[5, 6], [7]],),
                {},
                "input_ids has rows of different lengths, which fit no tensor; pad them",
            ),
        ],
    )
    def test_wrong_inputs_of_keras(self, model, args, kwargs, message):
        with pytest.raises(InputError, match=message):
            model(*args, **kwargs)

    def test_errors_while_tracing_are_ours_too(self, model):
        with pytest.raises(InputError, match=r"attention_mask is \[2, 10\], expected \[2, 11\]"):
            tf.function(model)(IDS, LEFT[:, 1:])


class TestFunctionalModels:
    def test_of_one_tensor(self, model, tmp_path):
        ids = keras.Input((None,), dtype="int32")
        functional = keras.Model(ids, model(ids).logits)
        expected = model(IDS).logits
        np.testing.assert_allclose(functional(IDS), expected, **SAME)
        np.testing.assert_allclose(functional.predict(IDS, batch_size=1, verbose=0), expected, **SAME)
        np.testing.assert_allclose(functional.predict(IDS[:, :4], verbose=0), expected[:, :4], **SAME)
        functional.save(tmp_path / "functional.keras")
        again = keras.models.load_model(tmp_path / "functional.keras")
        np.testing.assert_allclose(again(IDS), functional(IDS), rtol=0, atol=0)

    def test_of_a_dictionary(self, model, logits, tmp_path):
        inputs = {name: keras.Input((None,), dtype="int32", name=name) for name in INPUTS}
        functional = keras.Model(inputs, model(inputs).logits)
        assert_same(functional.predict(INPUTS, verbose=0), logits)
        functional.save(tmp_path / "functional.keras")
        assert_same(keras.models.load_model(tmp_path / "functional.keras")(INPUTS), logits)

    def test_a_cache_connects_calls(self, folder):
        model = TFXGLMForCausalLM.from_pretrained(folder)
        first, second = keras.Input((None,), dtype="int32"), keras.Input((None,), dtype="int32")
        past = model(first, use_cache=True).past_key_values
        functional = keras.Model([first, second], model(second, past_key_values=past).logits)
        np.testing.assert_allclose(functional([IDS[:, :6], IDS[:, 6:]]), model(IDS).logits[:, 6:], **SAME)


class TestPredict:
    @pytest.mark.parametrize("inputs", [[IDS, LEFT], (IDS, LEFT), INPUTS, BatchEncoding(INPUTS)])
    def test_gives_outputs_in_numpy_without_a_cache(self, model, logits, inputs):
        outputs = model.predict(inputs, batch_size=1, verbose=0)
        assert outputs.keys() == ("logits",)
        assert isinstance(outputs.logits, np.ndarray)
        assert_same(outputs.logits, logits)

    def test_of_a_dataset_with_labels(self, model, logits):
        data = tf.data.Dataset.from_tensor_slices({**INPUTS, "labels": IDS}).batch(1)
        assert_same(model.predict(data, verbose=0).logits, logits)

    def test_what_the_configuration_asks_for(self, folder):
        model = TFXGLMForCausalLM.from_pretrained(folder)
        model.config.output_hidden_states = model.config.output_attentions = True
        outputs = model.predict(INPUTS, batch_size=1, verbose=0)
        expected = model(INPUTS)
        for name in ("hidden_states", "attentions"):
            assert len(outputs[name]) == len(expected[name])
            for ours, theirs in zip(outputs[name], expected[name], strict=True):
                # Rows and, for attentions, heads come first: positions are the second or the third axis.
                real = REAL if name == "hidden_states" else np.broadcast_to(REAL[:, None], ours.shape[:3])
                np.testing.assert_allclose(ours[real], theirs.numpy()[real], **SAME)

    def test_compiled_predict(self, folder, logits):
        model = TFXGLMForCausalLM.from_pretrained(folder)
        model.compile(jit_compile=True)
        assert_same(model.predict(INPUTS, verbose=0).logits, logits)

    def test_sees_a_changed_model(self, folder):
        model = TFXGLMForCausalLM.from_pretrained(folder)
        expected = model(IDS, head_mask=HEAD_MASK.round()).logits  # 0.5 becomes 0.
        model.predict(IDS, verbose=0)
        model.prune_heads({layer: np.flatnonzero(row == 0).tolist() for layer, row in enumerate(HEAD_MASK.round())})
        np.testing.assert_allclose(model.predict(IDS, verbose=0).logits, expected, **SAME)
        model.resize_token_embeddings(137)
        assert model.predict(np.full((1, 3), 136), verbose=0).logits.shape == (1, 3, 137)


class TestSaving:
    @pytest.fixture(
        params=["tied", "untied", "cross-attention", "pruned", "resized", "own head", "bfloat16", "mixed", "decoder"]
    )
    def saved(self, request):
        """A model, and the arguments of its call."""
        match request.param:
            case "untied" | "resized":
                model = TFXGLMForCausalLM(changed(CONFIG, tie_word_embeddings=False))
                model.resize_token_embeddings(139 if request.param == "resized" else None)
            case "cross-attention":
                encoder = {"encoder_hidden_states": ENCODER, "encoder_attention_mask": ENCODER_MASK}
                return TFXGLMForCausalLM(CROSS_CONFIG), encoder
            case "bfloat16":
                model = TFXGLMForCausalLM(CONFIG, dtype="bfloat16")
            case "mixed":
                model = TFXGLMForCausalLM(CONFIG, dtype="mixed_bfloat16", name="mixed")
            case "decoder":
                model = TFXGLMModel(CONFIG)
            case _:
                model = TFXGLMForCausalLM(changed(CONFIG))
        if request.param == "pruned":
            model.prune_heads({0: [1], 2: [0, 3]})
        if request.param == "own head":
            model.set_output_embeddings(np.random.RandomState(0).standard_normal((131, 35)))
        return model, {}

    def test_models_and_weights(self, saved, tmp_path):
        model, arguments = saved
        expected = model(IDS, **arguments)[0]
        model.save(tmp_path / "model.keras")
        again = keras.models.load_model(tmp_path / "model.keras")
        assert type(again) is type(model)
        assert again.config == model.config
        assert again.name == model.name
        assert again.dtype_policy == model.dtype_policy
        assert [weight.path for weight in again.weights] == [weight.path for weight in model.weights]
        assert tf.reduce_all(again(IDS, **arguments)[0] == expected)
        model.save_weights(tmp_path / "model.weights.h5")
        fresh = type(model).from_config(model.get_config())
        assert not tf.reduce_all(fresh(IDS, **arguments)[0] == expected)
        fresh.load_weights(tmp_path / "model.weights.h5")
        assert tf.reduce_all(fresh(IDS, **arguments)[0] == expected)
        assert fresh.config is not model.config

    def test_an_activation_that_cannot_be_saved(self, tmp_path):
        model = TFXGLMForCausalLM(changed(CONFIG, activation_function=tf.nn.relu))
        with pytest.raises(
            ConfigError, match=r"activation_function is a callable, which config.json cannot hold; name"
        ):
            model.save(tmp_path / "model.keras")


class TestDtypePolicies:
    def test_construction_follows_the_global_policy(self):
        before = keras.config.dtype_policy()
        try:
            keras.config.set_dtype_policy("mixed_bfloat16")
            model = TFXGLMForCausalLM(CONFIG)
        finally:
            keras.config.set_dtype_policy(before)
        assert {weight.dtype for weight in model.weights} == {"float32"}
        assert model(IDS).logits.dtype == "bfloat16"
        assert TFXGLMForCausalLM(CONFIG)(IDS).logits.dtype == "float32"

    # Numbers of 8 and 11 bits: a rounding is up to 2^-9 and 2^-12 of a number. Some 30 of them in a row add up as
    # chance has it: to 3.5 here, and hardly to more than 8.
    @pytest.mark.parametrize(("dtype", "bound"), [("mixed_bfloat16", 8 * 2**-9), ("mixed_float16", 8 * 2**-12)])
    @pytest.mark.parametrize("as_policy", [False, True])
    def test_mixed_precision(self, folder, model, logits, dtype, bound, as_policy):
        mixed = TFXGLMForCausalLM.from_pretrained(folder, dtype=keras.DTypePolicy(dtype) if as_policy else dtype)
        for ours, theirs in zip(mixed.weights, model.weights, strict=True):
            assert ours.dtype == "float32"
            assert np.array_equal(ours, theirs)
        outputs = mixed(IDS, LEFT, labels=IDS)
        assert outputs.logits.dtype == dtype.removeprefix("mixed_")
        ours = tf.cast(outputs.logits, tf.float32).numpy()[REAL]
        error = abs(ours - logits[REAL]).max() / abs(logits).max()
        assert 0 < error < bound
        assert outputs.loss.dtype == "float32"
        assert float(outputs.loss) == pytest.approx(float(model(IDS, LEFT, labels=IDS).loss), rel=bound)


class TestExport:
    RELOAD = """
import sys
import numpy as np
import tensorflow as tf

module = tf.saved_model.load(sys.argv[1])
assert set(module.signatures) == {"serve", "serving_default"}, list(module.signatures)
for name in ("short", "long"):
    ids, mask = np.load(f"{sys.argv[1]}/{name}.npy")
    served = module.signatures["serving_default"](input_ids=tf.constant(ids), attention_mask=tf.constant(mask))
    (key,) = served
    assert np.array_equal(module.serve(ids, mask)[key], served[key])
    np.save(f"{sys.argv[1]}/{name}-{key}.npy", served[key])
assert not [name for name in sys.modules if name.startswith("xglm")]
"""

    @pytest.mark.parametrize("model_class", [pytest.param(TFXGLMForCausalLM, marks=pytest.mark.slow), TFXGLMModel])
    def test_tensorflow_alone_runs_it_at_any_shape(self, folder, tmp_path, model_class):
        model = model_class.from_pretrained(folder)
        model.export(tmp_path, verbose=False)
        batches = {"short": (IDS[:1, 3:8], LEFT[:1, 3:8]), "long": (IDS, LEFT)}
        for name, batch in batches.items():
            np.save(tmp_path / f"{name}.npy", np.array(batch, np.int32))
        subprocess.run([sys.executable, "-c", self.RELOAD, str(tmp_path)], check=True, cwd=tmp_path)
        key = "logits" if model_class.has_head else "last_hidden_state"
        for name, (ids, mask) in batches.items():
            expected = model(ids, mask)[key].numpy()[mask != 0]
            np.testing.assert_allclose(np.load(tmp_path / f"{name}-{key}.npy")[mask != 0], expected, **SAME)

    def test_another_signature(self, model, tmp_path):
        model.export(tmp_path, verbose=False, input_signature=[keras.InputSpec(shape=(None, 4), dtype="int64")])
        module = tf.saved_model.load(tmp_path)
        served = module.serve(IDS[:, :4])
        np.testing.assert_allclose(served["logits"], model(IDS[:, :4]).logits, **SAME)

    def test_other_formats_are_left_to_keras(self, model, tmp_path):
        with pytest.raises(ValueError, match="Unrecognized format=papyrus"):
            model.export(tmp_path, "papyrus")


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "jit"])
class TestTracing:
    def test_once_whatever_the_values(self, folder, jit):
        path = folder / f"cross-{jit}"
        write_checkpoint(path, CROSS_CONFIG, seed=1)
        model = TFXGLMForCausalLM.from_pretrained(path)
        compiled = tf.function(model, jit_compile=jit)
        arguments = {
            "input_ids": IDS,
            "attention_mask": LEFT,
            "labels": np.where(LEFT, IDS, -100),
            "encoder_hidden_states": ENCODER,
            "encoder_attention_mask": ENCODER_MASK,
            "head_mask": HEAD_MASK,
        }
        other = {
            **{name: value[::-1].copy() for name, value in arguments.items()},
            "encoder_hidden_states": -ENCODER,
        }
        traces = traces_of_tf(compiled)
        for values, allowed in ((arguments, traces.some("the first call")), (other, traces.none("other values"))):
            with allowed:
                outputs = compiled(**{name: tf.constant(value) for name, value in values.items()})
            expected = model(**values)
            assert float(outputs.loss) == pytest.approx(float(expected.loss), rel=1e-6)
            real = values["attention_mask"] != 0
            np.testing.assert_allclose(outputs.logits.numpy()[real], expected.logits.numpy()[real], **SAME)
        cache, eager = outputs.past_key_values, expected.past_key_values
        for column in range(3):
            ids = tf.constant(IDS[:, column : column + 1])
            with traces.none(f"step {column}") if column else traces.some("the first step"):
                ours = compiled(input_ids=ids, past_key_values=cache)
            theirs = model(ids, past_key_values=eager)
            np.testing.assert_allclose(ours.logits, theirs.logits, **SAME)
            cache, eager = ours.past_key_values, theirs.past_key_values

    def test_chance_is_drawn_anew(self, jit):
        keras.utils.set_random_seed(1)  # Else one of 2,048 runs would fail by chance.
        model = TFXGLMForCausalLM(changed(CONFIG, dropout=0.0, attention_dropout=0.0, layerdrop=0.5))
        compiled = tf.function(model, jit_compile=jit)
        states = [compiled(IDS, training=True, output_hidden_states=True).hidden_states for _ in range(12)]
        dropped = [np.array_equal(draw[0], draw[1]) for draw in states]
        assert {True, False} == set(dropped)

    def test_attentions_cover_all_that_a_cache_has_room_for(self, model, jit):
        past = model(IDS[:, :6], use_cache=True).past_key_values
        arguments = {"past_key_values": past, "output_attentions": True}
        traced = tf.function(model, jit_compile=jit)(tf.constant(IDS[:, 6:]), **arguments).attentions
        for ours, theirs in zip(traced, model(IDS[:, 6:], **arguments).attentions, strict=True):
            assert ours.shape == (2, 5, 5, 64)
            np.testing.assert_allclose(ours[..., :11], theirs, **SAME)
            assert not ours[..., 11:].numpy().any()
