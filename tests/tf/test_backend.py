"""What only the TensorFlow backend promises."""

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from conformance.random_weights import random_weights, write_checkpoint
from tests.helpers.commands import ROOT
from tests.helpers.traces import Traces, traces_of_tf
from xglm_core import XGLMConfig
from xglm_core.errors import InputError
from xglm_core.generation.compiled import device_rules
from xglm_core.generation.engine import NOTHING_LEFT
from xglm_core.generation.randomness import gumbel, noise_bits
from xglm_core.generation.rules import Rules
from xglm_core.weight_names import EMBEDDING, HEAD, weight_specs
from xglm_tf import TFXGLMForCausalLM, TFXGLMModel
from xglm_tf.selection import selection

CONFIG = XGLMConfig(vocab_size=131, max_position_embeddings=89, d_model=35, ffn_dim=53, num_layers=2, attention_heads=5)
IDS = np.random.RandomState(0).randint(4, CONFIG.vocab_size, (2, 11))
MASK = np.array([[0, 0, 0] + [1] * 8, [1] * 11])

# Two orders of the same float32 sums differ by rounding alone: a few units in the last place per layer.
SAME = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path, CONFIG, seed=1)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return TFXGLMForCausalLM.from_pretrained(folder)


class TestImport:
    def test_another_keras_backend_is_refused_by_name(self):
        # numpy is the one other backend of Keras that needs no further framework.
        done = subprocess.run(
            [sys.executable, "-c", "import xglm_tf"],
            env={**os.environ, "KERAS_BACKEND": "numpy"},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode != 0
        if "No module named 'jax'" in done.stderr:
            pytest.skip("the numpy backend of this version of Keras needs JAX")
        assert "xglm_core.errors.BackendError" in done.stderr
        assert "set the environment variable KERAS_BACKEND=tensorflow" in done.stderr


class TestWeights:
    @pytest.mark.parametrize("model_class", [TFXGLMModel, TFXGLMForCausalLM])
    @pytest.mark.parametrize("tied", [True, False])
    def test_variables_have_the_documented_paths_order_and_layout(self, model_class, tied):
        config = XGLMConfig(**{**CONFIG.to_dict(), "tie_word_embeddings": tied})
        specs = weight_specs(config, with_head=model_class.has_head and not tied)
        weights = model_class(config).weights
        assert [weight.path.partition("/")[2] for weight in weights] == [spec.keras for spec in specs]
        shapes = [spec.shape[::-1] if spec.transposed else spec.shape for spec in specs]
        assert [tuple(weight.shape) for weight in weights] == shapes

    def test_loading_draws_nothing_and_keeps_no_file_open(self, folder, monkeypatch):
        monkeypatch.setattr(TFXGLMForCausalLM, "init_weights", lambda self: pytest.fail("weights were drawn"))
        half = TFXGLMForCausalLM.from_pretrained(folder, dtype="float16")
        gc.collect()
        if sys.platform == "linux":  # Views of the file are only weights of its type.
            assert str(folder) not in Path("/proc/self/maps").read_text()
        assert half.model.embed_tokens.embeddings.dtype == "float16"
        model = TFXGLMForCausalLM.from_pretrained(folder)
        stored = random_weights(CONFIG, seed=1)
        for spec, weight in zip(weight_specs(CONFIG, with_head=False), model.weights, strict=True):
            array = stored[spec.name].T if spec.transposed else stored[spec.name]
            assert np.array_equal(weight.numpy(), array), spec.name

    def test_loaded_variables_can_be_written_and_the_file_stays(self, folder):
        model = TFXGLMForCausalLM.from_pretrained(folder)
        model.model.embed_tokens.embeddings.assign_add(np.ones((131, 35), np.float32))
        again = TFXGLMForCausalLM.from_pretrained(folder)
        assert np.array_equal(again.model.embed_tokens.embeddings.numpy(), random_weights(CONFIG, seed=1)[EMBEDDING])

    def test_untied_head_is_a_kernel(self, tmp_path):
        config = XGLMConfig(**{**CONFIG.to_dict(), "tie_word_embeddings": False})
        write_checkpoint(tmp_path, config, seed=2)
        model = TFXGLMForCausalLM.from_pretrained(tmp_path)
        assert np.array_equal(model.lm_head.kernel.numpy(), random_weights(config, seed=2)[HEAD].T)


class TestFunctions:
    @pytest.mark.parametrize("jit", [False, True])
    def test_traced_calls_give_what_eager_ones_give(self, model, jit):
        compiled = tf.function(model, jit_compile=jit)
        eager = model(IDS, MASK, output_hidden_states=True)
        traced = compiled(IDS, MASK, output_hidden_states=True)
        assert type(traced) is type(eager)
        assert traced.keys() == eager.keys()
        real = MASK != 0
        np.testing.assert_allclose(traced.logits.numpy()[real], eager.logits.numpy()[real], **SAME)
        for ours, theirs in zip(traced.hidden_states, eager.hidden_states, strict=True):
            np.testing.assert_allclose(ours.numpy()[real], theirs.numpy()[real], **SAME)
        # A cache goes in and out, and two lengths of it share one trace.
        expected = model(np.concatenate([IDS, IDS[:, :2]], axis=1), np.pad(MASK, ((0, 0), (0, 2)), constant_values=1))
        cache, traces = traced.past_key_values, traces_of_tf(compiled)
        for column in range(2):
            with traces.none("a longer cache") if column else traces.some("the first step"):
                step = compiled(tf.constant(IDS[:, column : column + 1]), past_key_values=cache)
            np.testing.assert_allclose(step.logits[:, 0].numpy(), expected.logits[:, 11 + column].numpy(), **SAME)
            cache = step.past_key_values

    def test_shapes_may_be_unknown_while_tracing(self, model):
        ids = tf.TensorSpec((None, None), tf.int64)
        compiled = tf.function(model, input_signature=[ids, ids])
        np.testing.assert_allclose(compiled(IDS, MASK).logits[1], model(IDS, MASK).logits[1], **SAME)
        shorter = compiled(IDS[:1, :5], np.ones((1, 5), np.int64))
        np.testing.assert_allclose(shorter.logits, model(IDS[:1, :5]).logits, **SAME)
        assert shorter.past_key_values[1][0].shape == (1, 5, 5, 7)

    @pytest.mark.parametrize("jit", [False, True])
    def test_what_does_not_fit_becomes_nan_while_tracing(self, model, jit):
        compiled = tf.function(model, jit_compile=jit)
        cache = model(np.resize(IDS, (1, 63))).past_key_values
        last = compiled(IDS[:1, :1], past_key_values=cache)
        assert np.isfinite(last.logits).all()
        assert np.isnan(compiled(IDS[:1, :1], past_key_values=last.past_key_values).logits).all()
        for position, finite in ((88, True), (89, False)):  # The last one that there is, and the next.
            logits = compiled(IDS[:1, :1], position_ids=np.array([[position]]), use_cache=False).logits
            assert np.isfinite(logits).all() == finite


class TestCache:
    def test_it_grows_by_blocks_and_leaves_the_old_one_alone(self, model):
        ids = np.resize(IDS, (2, 70))
        first = model(ids[:, :64]).past_key_values
        before = first[0][0].numpy()
        second = model(ids[:, 64:], past_key_values=first).past_key_values
        assert (first.capacity, int(first.length)) == (64, 64)
        assert (second.capacity, int(second.length)) == (128, 70)
        assert np.array_equal(first[0][0].numpy(), before)
        assert np.array_equal(second[0][0][:, :, :64].numpy(), before)

    @pytest.mark.parametrize("mode", ["eager", "graph", "jit"])
    def test_gradients_flow_through_new_and_given_positions(self, model, mode):
        """Into a projection that makes new keys, and into keys and values that the caller made: a learnt prefix."""
        past = [tuple(tf.constant(t.numpy()) for t in layer) for layer in model(IDS[:, :6]).past_key_values]
        kernel = model.model.layers[0].self_attn.v_proj.kernel.value
        directions = [np.random.RandomState(1).standard_normal(t.shape).astype(np.float32) for t in (*past[1], kernel)]

        def loss(key, value):
            return tf.reduce_sum(model(IDS[:, 6:], past_key_values=[past[0], (key, value)]).logits ** 2)

        def gradients():
            with tf.GradientTape() as tape:
                tape.watch(past[1])
                total = loss(*past[1])
            return tape.gradient(total, (*past[1], kernel))

        if mode != "eager":
            gradients = tf.function(gradients, jit_compile=mode == "jit")
        step, original = 1e-3, kernel.numpy()
        for index, (gradient, direction) in enumerate(zip(gradients(), directions, strict=True)):
            sums = []
            for sign in (step, -step):
                moved = [x + sign * direction if index == i else x for i, x in enumerate((*past[1], original))]
                kernel.assign(moved[2])
                sums.append(float(loss(*moved[:2])))
            kernel.assign(original)
            # The central difference is off by step^2 and by the rounding of a float32 sum, 1e-7 / step.
            slope = float(tf.reduce_sum(gradient * direction))
            assert slope == pytest.approx((sums[0] - sums[1]) / (2 * step), rel=1e-2)

    def test_gradients_flow_through_a_cache_as_through_one_pass(self, model):
        weights = model.trainable_weights
        with tf.GradientTape(persistent=True) as tape:
            past = model(IDS[:, :6]).past_key_values
            past = model(IDS[:, 6:8], past_key_values=past).past_key_values
            chunks = tf.reduce_mean(model(IDS[:, 8:], past_key_values=past).logits ** 2)
            whole = tf.reduce_mean(model(IDS).logits[:, 8:] ** 2)
        for both in zip(tape.gradient(chunks, weights), tape.gradient(whole, weights), strict=True):
            ours, theirs = map(tf.convert_to_tensor, both)
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * max(1, abs(theirs.numpy()).max()))

    def test_the_documented_form_of_tensorflow(self, model):
        """One tensor [2, batch, heads, length, head_dim] for each layer."""
        past = model(IDS[:, :6]).past_key_values
        expected = model(IDS[:, 6:], past_key_values=past).logits
        for stacked in ([tf.stack(layer) for layer in past], tuple(np.stack(layer) for layer in past)):
            assert np.array_equal(model(IDS[:, 6:], past_key_values=stacked).logits, expected)
        with pytest.raises(
            InputError, match=r"past_key_values has \[3\] tensors in a layer, expected 2 \(key, value\)"
        ):
            model(IDS[:, 6:], past_key_values=[tf.stack([*layer, layer[0]]) for layer in past])

    def test_compiled_code_makes_room_after_what_a_caller_made(self, model):
        past = tuple(model(IDS[:, :6]).past_key_values)
        ids = tf.TensorSpec((None, None), tf.int64)
        pair = (tf.TensorSpec((None, 5, None, 7)),) * 2

        def logits(ids, past):
            return model(ids, past_key_values=past).logits

        expected = model(IDS).logits[:, 6:]
        for compiled in (
            tf.function(logits, jit_compile=True),
            tf.function(logits, input_signature=[ids, (pair,) * 2]),
        ):
            np.testing.assert_allclose(compiled(tf.constant(IDS[:, 6:]), past), expected, **SAME)


class TestReplacedWeights:
    """Keras has no way to give a variable another shape: it is another variable then."""

    def test_keep_path_place_and_trainability(self, folder):
        model = TFXGLMForCausalLM.from_pretrained(folder)
        model.model.layers[0].self_attn.k_proj.trainable = False
        before = [(weight.path, weight.trainable) for weight in model.weights]
        old = weakref.ref(model.model.embed_tokens.embeddings)
        model.resize_token_embeddings(137)
        model.prune_heads({0: [0, 3], 1: [2]})
        assert [(weight.path, weight.trainable) for weight in model.weights] == before
        specs = weight_specs(model.config, with_head=False)
        shapes = [spec.shape[::-1] if spec.transposed else spec.shape for spec in specs]
        assert [tuple(weight.shape) for weight in model.weights] == shapes
        model.model.layers[0].self_attn.k_proj.trainable = True
        assert len(model.trainable_weights) == len(before)
        assert model.model.embed_tokens.input_dim == 137
        assert model.model.layers[0].self_attn.k_proj.units == 21
        gc.collect()
        assert old() is None

    def test_a_head_comes_and_goes(self, folder):
        model = TFXGLMForCausalLM.from_pretrained(folder)
        tied = [weight.path for weight in model.weights]
        model.set_output_embeddings(np.ones((131, 35)))
        assert [weight.path for weight in model.weights] == [*tied, f"{model.name}/lm_head/kernel"]
        assert (model(IDS).logits.numpy().std(axis=-1) < 1e-4).all()  # All words are the same.
        head = weakref.ref(model.lm_head.kernel)
        model.set_output_embeddings(model.get_input_embeddings())
        assert model.config.tie_word_embeddings is True
        assert [weight.path for weight in model.weights] == tied
        gc.collect()
        assert head() is None

    @pytest.mark.slow
    def test_generation_follows(self, folder, tmp_path):
        model = TFXGLMForCausalLM.from_pretrained(folder)
        model.generate(IDS, max_new_tokens=3)
        model.prune_heads({0: [0, 3], 1: [2]})
        model.set_output_embeddings(np.random.RandomState(0).standard_normal((131, 35)))
        model.save_pretrained(tmp_path)
        again = TFXGLMForCausalLM.from_pretrained(tmp_path)
        for changed in (model, again):
            assert np.array_equal(
                changed.generate(IDS, MASK, max_new_tokens=9), again.generate(IDS, MASK, max_new_tokens=9)
            )
        assert again.compiled_engine.prefill.experimental_get_tracing_count() == 1

    def test_embeddings_given_to_the_constructor(self):
        other = TFXGLMForCausalLM(CONFIG).get_input_embeddings()
        model = TFXGLMModel(CONFIG, other)
        assert np.array_equal(model.get_input_embeddings().embeddings, other.embeddings)
        with pytest.raises(InputError, match=r"the embedding is \[131, 30\], expected \[131, 35\]"):
            TFXGLMModel(CONFIG, np.zeros((131, 30)))


class TestGeneration:
    @pytest.fixture
    def folder(self, tmp_path):
        write_checkpoint(tmp_path / "one-block", XGLMConfig(**{**CONFIG.to_dict(), "num_layers": 1}), seed=1)
        return tmp_path / "one-block"

    def test_one_compilation_serves_all_prompts_and_counts_of_a_shape(self, folder):
        model = TFXGLMForCausalLM.from_pretrained(folder)
        model.generate(IDS[:, :3], max_new_tokens=2, stop_at_eos=False)
        traces = _traces(model)
        for length, new in ((9, 31), (5, 21)):
            with traces.none(f"{new} tokens after {length}"):
                model.generate(IDS[:, :length], max_new_tokens=new, stop_at_eos=False)

    def test_one_compilation_serves_all_numbers_of_an_option(self, folder):
        model = TFXGLMForCausalLM.from_pretrained(folder)
        options = {"do_sample": True, "top_k": 0, "max_new_tokens": 9, "stop_at_eos": False}
        first = {"temperature": 1.0, "top_p": 0.5, "min_p": 0.05, "typical_p": 0.7, "seed": 1}
        other = {"temperature": 1.4, "top_p": 0.7, "min_p": 0.07, "typical_p": 0.9, "seed": 3}
        first |= {"repetition_penalty": 1.5, "suppress_tokens": [3]}
        other |= {"repetition_penalty": 1.7, "suppress_tokens": [5, 6, 7]}
        model.generate(IDS, **options, **first)
        traces = _traces(model)
        for name, value in other.items():
            with traces.none(name):
                model.generate(IDS, **options, **{**first, name: value})
        model.generate(IDS[:, :5], num_beams=3, length_penalty=0.5, max_new_tokens=5)
        for length, penalty in ((5, 1.5), (9, 0.5)):
            with traces.none(f"beams with length_penalty={penalty} after {length} tokens"):
                model.generate(IDS[:, :length], num_beams=3, length_penalty=penalty, max_new_tokens=length)

    def test_compiled_code_sees_new_values_of_the_variables(self, folder):
        model = TFXGLMForCausalLM.from_pretrained(folder)
        model.generate(IDS, max_new_tokens=3)
        # With a final state of ones, the likeliest token is the one with the largest embedding.
        model.model.layer_norm.gamma.assign(np.zeros(35, np.float32))
        model.model.layer_norm.beta.assign(np.ones(35, np.float32))
        largest = np.argmax(model.model.embed_tokens.embeddings.numpy().sum(axis=1))
        tokens = model.generate(IDS, max_new_tokens=3, stop_at_eos=False).numpy()[:, 11:]
        assert (tokens == largest).all()

    @pytest.mark.slow
    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_a_model_that_is_gone_frees_its_weights(self, tmp_path):
        # Compiled code, and TensorFlow's registries behind it, could keep them. 76 MiB show above all noise.
        config = XGLMConfig(**{**CONFIG.to_dict(), "d_model": 100, "vocab_size": 200_003})
        write_checkpoint(tmp_path, config, seed=1)
        model = TFXGLMForCausalLM.from_pretrained(tmp_path)
        model.generate(IDS, max_new_tokens=2)
        before = _resident_mebibytes()
        del model
        gc.collect()
        assert before - _resident_mebibytes() > 60


class TestSelection:
    def test_noise_is_that_of_the_definition(self):
        """Bit by bit, and its logarithms up to rounding."""
        keys = np.random.RandomState(0).randint(0, 2**32, (3, 2), dtype=np.uint32)
        index = np.concatenate([np.arange(300_000), [2**31 - 1]]).astype(np.int32)[None].repeat(3, axis=0)
        bits = tf.function(selection.noise_bits, jit_compile=True)(keys, index)
        expected = noise_bits(keys[:, None], index)
        assert bits.dtype == tf.uint32
        assert np.array_equal(bits, expected)
        noise = tf.function(selection.gumbel, jit_compile=True)(keys, index)
        np.testing.assert_allclose(noise, gumbel(expected), rtol=0, atol=2e-6)  # An ulp of the largest, 22.9.

    def test_the_lower_id_comes_first_among_equal_scores(self):
        scores = np.random.RandomState(0).randint(0, 50, (3, 20_011)).astype(np.float32)
        scores[2] = -np.inf
        for limit in ({"top_k": 700}, {"top_p": 0.5}):
            rules = device_rules(Rules(np.zeros((3, 0), np.int32), sample=True, **limit))
            _, ids = tf.function(selection.filter_logits, jit_compile=True)(scores[:2], rules)
            assert np.array_equal(ids, np.argsort(-scores[:2], axis=1, kind="stable")[:, : ids.shape[1]])
        greedy = device_rules(Rules(np.zeros((3, 0), np.int32)))
        chosen = tf.function(selection.choose, jit_compile=True)(scores, greedy, np.zeros((3, 2), np.uint32))
        assert chosen.numpy().tolist() == [*scores[:2].argmax(axis=1), NOTHING_LEFT]


class TestTraining:
    def test_dropout_acts_in_training_alone(self, model):
        usual = model(IDS).logits.numpy()
        assert np.array_equal(model(IDS, training=False).logits.numpy(), usual)
        assert abs(model(IDS, training=True).logits.numpy() - usual).max() > 0.1

    @pytest.mark.parametrize("which", ["dropout", "attention_dropout", "activation_dropout"])
    def test_each_dropout_acts(self, folder, which):
        off = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
        config = XGLMConfig(**{**CONFIG.to_dict(), **off, which: 0.5})
        model = TFXGLMForCausalLM(config)
        assert abs(model(IDS, training=True).logits.numpy() - model(IDS).logits.numpy()).max() > 1e-3

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_rows_that_are_all_padding_stay_finite_forward_and_backward(self, folder, dtype):
        model = TFXGLMForCausalLM.from_pretrained(folder, dtype=dtype)
        with tf.GradientTape() as tape:
            logits = model(IDS, np.array([[0] * 11, [1] * 11])).logits
            loss = tf.reduce_mean(tf.cast(logits, tf.float32))
        assert logits.dtype == dtype
        assert np.isfinite(tf.cast(logits, tf.float32)).all()
        for weight, gradient in zip(model.weights, tape.gradient(loss, model.trainable_weights), strict=True):
            assert np.isfinite(tf.cast(tf.convert_to_tensor(gradient), tf.float32)).all(), weight.path


class TestErrors:
    def test_keras_does_not_rewrite_the_message(self, model):
        with pytest.raises(InputError) as caught:
            model(IDS, MASK[:, :5])
        assert str(caught.value) == "attention_mask is [2, 5], expected [2, 11]"


def _traces(model):
    """Those of all functions of its engine."""
    engine = model.compiled_engine
    functions = engine.prefill, engine.feed, engine.advance, engine.select, engine.candidates, engine.scores
    return Traces(lambda: sum(function.experimental_get_tracing_count() for function in functions))


def _resident_mebibytes():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024
