"""What users of JAX expect of a model: that it lives inside their transformations, and keeps to their conventions."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conformance.random_weights import write_checkpoint
from tests.helpers.commands import ROOT
from tests.helpers.models import CONFIG, CROSS_CONFIG, ENCODER, IDS, LEFT, ONE_BLOCK, SAME, changed
from tests.helpers.traces import CountedActivation
from xglm_flax import FlaxXGLMForCausalLM, FlaxXGLMForCausalLMModule, FlaxXGLMModel
from xglm_flax.cache import FlaxXGLMCache

TOKENS = IDS.astype(np.int32)
REAL = LEFT.astype(bool)
TWO_BLOCKS = changed(CONFIG, num_layers=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("two-blocks")
    write_checkpoint(path, TWO_BLOCKS, seed=1)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return FlaxXGLMForCausalLM.from_pretrained(folder)


def of_layer(params, name="0"):
    return params["model"]["layers"][name]


class TestInitialisation:
    @pytest.mark.slow
    def test_distribution_is_that_of_the_module(self):
        model = FlaxXGLMForCausalLM(
            changed(CROSS_CONFIG, vocab_size=1013, num_layers=1, tie_word_embeddings=False), seed=5
        )
        theirs = jax.jit(model.module.init)(jax.random.key(1), TOKENS, encoder_hidden_states=ENCODER)["params"]
        assert jax.tree.structure(model.params) == jax.tree.structure(theirs)
        for (path, ours), leaf in zip(jax.tree.leaves_with_path(model.params), jax.tree.leaves(theirs), strict=True):
            assert (ours.shape, ours.dtype) == (leaf.shape, leaf.dtype), path
            if ours.ndim == 1:
                assert np.array_equal(ours, leaf), path
            else:
                # 1225 numbers or more: their standard deviation is known to 2%.
                assert float(ours.std()) == pytest.approx(0.02, rel=0.1), path
                assert float(leaf.std()) == pytest.approx(0.02, rel=0.1), path
                assert not np.array_equal(ours, leaf)
        table = model.get_input_embeddings()
        assert not table[1].any()
        assert table[0].any()

    def test_all_matrices_differ(self):
        params = FlaxXGLMForCausalLM(CONFIG).params
        square = [leaf for leaf in jax.tree.leaves(params) if leaf.shape == (35, 35)]
        assert len(square) == 12
        assert len({float(leaf[0, 0]) for leaf in square}) == 12

    def test_fills_what_is_missing_and_keeps_the_rest(self, model):
        given = {"model": {**model.params["model"], "layers": {"1": of_layer(model.params, "1")}}}
        del given["model"]["embed_tokens"]
        filled = model.init_weights(jax.random.key(3), (1, 1), given)
        assert jax.tree.structure(filled) == jax.tree.structure(model.params)
        assert of_layer(filled, "1")["fc1"]["kernel"] is of_layer(model.params, "1")["fc1"]["kernel"]
        fresh = model.init_weights(jax.random.key(3), (1, 1))
        for get in (lambda p: of_layer(p)["fc1"]["kernel"], lambda p: p["model"]["embed_tokens"]["embedding"]):
            assert np.array_equal(get(filled), get(fresh))
        assert "embed_tokens" not in given["model"]
        assert given["model"]["layers"].keys() == {"1"}

    def test_signature_and_types(self):
        model = FlaxXGLMModel(changed(CONFIG, num_layers=1), (2, 3), 7, jnp.bfloat16, True)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {"float32"}
        assert model(TOKENS).last_hidden_state.dtype == jnp.bfloat16
        assert FlaxXGLMModel(CONFIG, _do_init=False).params is None


class TestCasting:
    @pytest.mark.parametrize(("method", "dtype"), [("to_bf16", "bfloat16"), ("to_fp16", "float16")])
    def test_new_trees(self, model, method, dtype):
        half = getattr(model, method)(model.params)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(half)} == {dtype}
        assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {"float32"}
        assert model(TOKENS, params=half).logits.dtype == jnp.float32
        back = model.to_fp32(half)
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(a, b.astype(dtype).astype("float32")), back, model.params
        )

    def test_mask(self, model, tmp_path):
        mask = jax.tree.map(lambda leaf: leaf.ndim == 2, model.params)
        mixed = model.to_bf16(model.params, mask)
        assert jax.tree.map(lambda leaf: leaf.dtype == jnp.bfloat16, mixed) == mask
        model.save_pretrained(tmp_path, params=mixed)
        again = FlaxXGLMForCausalLM.from_pretrained(tmp_path)
        np.testing.assert_allclose(again(TOKENS).logits, model(TOKENS, params=mixed).logits, **SAME)


class TestTransformations:
    def test_value_and_grad_with_labels(self, model):
        def loss(params, ids):
            return model(ids, LEFT, labels=ids, params=params).loss

        eager = jax.value_and_grad(loss)(model.params, TOKENS)
        compiled = jax.jit(jax.value_and_grad(loss))(model.params, TOKENS)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **SAME), eager, compiled)
        assert eager[0] == model(TOKENS, LEFT, labels=TOKENS).loss

    @pytest.mark.slow
    def test_checkpoint(self, model):
        def loss(params):
            return model(TOKENS, labels=TOKENS, params=params).loss

        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, **SAME),
            jax.grad(jax.checkpoint(loss))(model.params),
            jax.grad(loss)(model.params),
        )

    @pytest.mark.slow
    def test_forward_mode(self, model):
        def loss(params):
            return model(TOKENS, labels=TOKENS, params=params).loss

        gradient = jax.grad(loss)(model.params)
        _, slope = jax.jvp(loss, (model.params,), (gradient,))
        square = sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(gradient))
        assert float(slope) == pytest.approx(square, rel=1e-4)  # Sums of 20,000 float32 squares.

    def test_vmap_over_inputs_with_a_cache(self, model):
        def rows(ids, mask):
            past = model(ids[None, :6], mask[None, :6], use_cache=True).past_key_values
            return model(ids[None, 6:], mask[None], past_key_values=past).logits[0]

        logits = jax.vmap(rows)(TOKENS, LEFT)
        np.testing.assert_allclose(logits, model(TOKENS, LEFT).logits[:, 6:], **SAME)

    @pytest.mark.slow
    def test_vmap_over_dropout_keys(self, model):
        keys = jax.random.split(jax.random.key(0), 3)

        def run(key):
            return model(TOKENS, train=True, dropout_rng=key).logits

        many = jax.vmap(run)(keys)
        for key, logits in zip(keys, many, strict=True):
            np.testing.assert_allclose(logits, run(key), **SAME)
        assert abs(many[0] - many[1]).max() > 0.05

    def test_vmap_over_parameters(self, model):
        trees = [model.params, jax.tree.map(lambda leaf: leaf * 0.9, model.params)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
        both = jax.vmap(lambda params: model(TOKENS, params=params).logits)(stacked)
        for params, logits in zip(trees, both, strict=True):
            np.testing.assert_allclose(logits, model(TOKENS, params=params).logits, **SAME)

    def test_map_over_outputs_and_caches(self, model):
        outputs = model(TOKENS, output_hidden_states=True)
        same = jax.tree.map(lambda leaf: leaf, outputs)
        assert type(same) is type(outputs)
        assert same.keys() == ("logits", "past_key_values", "hidden_states")
        halves = jax.tree.map(lambda leaf: leaf[:1] if leaf.ndim else leaf, outputs.past_key_values)
        assert isinstance(halves, FlaxXGLMCache)
        assert [key.shape for key, _ in halves] == [(1, 5, 11, 7)] * 2
        np.testing.assert_allclose(
            model(TOKENS[:1, :2], past_key_values=halves).logits,
            model(TOKENS[:, :2], past_key_values=outputs.past_key_values).logits[:1],
            **SAME,
        )

    @pytest.mark.slow
    def test_pmap(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        code = f"""
import jax, numpy as np
from tests.helpers.models import IDS, SAME
from xglm_flax import FlaxXGLMForCausalLM
assert jax.device_count() == 2
model = FlaxXGLMForCausalLM.from_pretrained({str(tmp_path)!r})
def loss(params, ids):
    return jax.lax.pmean(model(ids, labels=ids, params=params).loss, "devices")
copies = jax.device_put_replicated(model.params, jax.devices()) if hasattr(jax, "device_put_replicated") else (
    jax.tree.map(lambda leaf: np.stack([leaf, leaf]), model.params))
losses, gradients = jax.pmap(jax.value_and_grad(loss), axis_name="devices")(copies, IDS[:, None])
expected, gradient = jax.value_and_grad(lambda params: model(IDS, labels=IDS, params=params).loss)(model.params)
np.testing.assert_allclose(losses, [expected, expected], rtol=1e-6)
"""
        environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr


class TestLoss:
    def test_is_the_mean_over_labels_that_count(self, model):
        labels = np.where(LEFT == 0, -100, IDS)
        labels[1, 4:6] = -100
        logits = np.asarray(model(TOKENS, LEFT).logits, np.float64)[:, :-1]
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        counts = (labels[:, 1:] != -100) & (LEFT[:, :-1] == 1)  # Padding predicts nothing.
        total = -np.take_along_axis(logs, np.where(counts, labels[:, 1:], 0)[..., None], -1)[..., 0][counts].sum()
        # Float32 sums of 16 terms, each from 131 logits.
        assert float(model(TOKENS, LEFT, labels=labels).loss) == pytest.approx(total / counts.sum(), rel=1e-6)
        divided = jax.jit(lambda items: model(TOKENS, LEFT, labels=labels, num_items_in_batch=items).loss)(64)
        assert float(divided) == pytest.approx(total / 64, rel=1e-6)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_without_labels_that_count_all_is_zero(self, model, dtype):
        model = FlaxXGLMForCausalLM(ONE_BLOCK, dtype=dtype)
        labels = np.full_like(TOKENS, -100)
        labels[:, 0] = 5  # No position predicts the first token.
        loss, gradients = jax.value_and_grad(lambda params: model(TOKENS, labels=labels, params=params).loss)(
            model.params
        )
        assert loss.dtype == jnp.float32
        assert loss == 0
        assert not any(leaf.any() for leaf in jax.tree.leaves(gradients))


class TestLoops:
    """Decoding loops as users of Flax write them."""

    def test_compiled_with_fixed_shapes(self, model):
        expected = model.generate(TOKENS, LEFT, max_new_tokens=6, stop_at_eos=False)

        @jax.jit
        def decode(params, ids, mask):
            def step(state, _):
                token, options = state
                outputs = model(token, params=params, **options)
                following = outputs.logits[:, -1:].argmax(-1).astype(jnp.int32)
                return (following, model.update_inputs_for_generation(outputs, options)), token

            options = model.prepare_inputs_for_generation(ids, 17, mask)
            outputs = model(ids, params=params, **options)
            first = outputs.logits[:, -1:].argmax(-1).astype(jnp.int32)
            state = (first, model.update_inputs_for_generation(outputs, options))
            return jax.lax.scan(step, state, length=6)[1][..., 0].T

        assert np.array_equal(decode(model.params, TOKENS, LEFT), expected[:, 11:])

    def test_mask_of_all_the_capacity_outside_jit(self, model):
        options = model.prepare_inputs_for_generation(TOKENS[:, :6], 13, LEFT[:, :6])
        assert options["attention_mask"].shape == (2, 13)
        first = model(TOKENS[:, :6], **options)
        options = model.update_inputs_for_generation(first, options)
        second = model(TOKENS[:, 6:7], **options)
        np.testing.assert_allclose(second.logits, model(TOKENS, LEFT).logits[:, 6:7], **SAME)

    def test_donated_cache(self, model):
        step = jax.jit(lambda ids, cache: model(ids, past_key_values=cache), donate_argnames="cache")
        cache = step(TOKENS[:, :6], model.init_cache(2, 11)).past_key_values
        outputs = step(TOKENS[:, 6:7], cache)
        np.testing.assert_allclose(outputs.logits, model(TOKENS).logits[:, 6:7], **SAME)
        assert cache.keys[0].is_deleted()

    def test_attentions_cover_the_capacity_in_jit_alone(self, model):
        cache = model(TOKENS[:, :6], past_key_values=model.init_cache(2, 13)).past_key_values

        def ask(cache):
            return model(TOKENS[:, 6:8], past_key_values=cache, output_attentions=True).attentions

        outside, inside = ask(cache), jax.jit(ask)(cache)
        assert {layer.shape for layer in outside} == {(2, 5, 2, 8)}
        assert {layer.shape for layer in inside} == {(2, 5, 2, 13)}
        for short, long in zip(outside, inside, strict=True):
            np.testing.assert_allclose(long[..., :8], short, **SAME)
            assert not long[..., 8:].any()

    def test_encoder_states_fill_a_fresh_cache(self):
        model = FlaxXGLMForCausalLM(CROSS_CONFIG)
        expected = model(TOKENS, encoder_hidden_states=ENCODER).logits
        first = model(TOKENS[:, :6], encoder_hidden_states=ENCODER, past_key_values=model.init_cache(2, 13))
        assert first.past_key_values.encoder_length == 7
        step = jax.jit(lambda ids, cache: model(ids, past_key_values=cache).logits)
        np.testing.assert_allclose(step(TOKENS[:, 6:], first.past_key_values), expected[:, 6:], **SAME)


class TestTraces:
    @pytest.fixture
    def counted(self, model):
        """A model, and its traces."""
        traces = CountedActivation(functools.partial(jax.nn.gelu, approximate=False))
        counted = FlaxXGLMForCausalLM(
            changed(CONFIG, activation_function=traces.activation, num_layers=1), _do_init=False
        )
        counted.params = {"model": {**model.params["model"], "layers": {"0": of_layer(model.params)}}}
        return counted, traces

    def test_none_when_only_values_change(self, counted):
        model, traces = counted

        def arguments(shift):
            return {
                "input_ids": (IDS + shift) % 131,
                "attention_mask": np.roll(LEFT, shift, axis=1),
                "position_ids": np.arange(11)[None] + shift,
                "head_mask": np.ones((1, 5)) * shift,
                "labels": (IDS + shift) % 131,
                "num_items_in_batch": 5 + shift,
                "logits_to_keep": np.array([1, 2]) + shift,
                "dropout_rng": jax.random.key(shift),
            }

        model(**arguments(1), train=True)
        for name, value in arguments(2).items():
            with traces.none(name):
                model(**{**arguments(1), name: value}, train=True)
        model.config.output_hidden_states = True
        with traces.some("output_hidden_states"):
            model(**arguments(1), train=True)

    @pytest.mark.parametrize("mask", [None, LEFT])
    def test_none_between_steps(self, counted, mask):
        model, traces = counted
        past = model(IDS[:, :2], None if mask is None else mask[:, :2]).past_key_values

        def step(end, past):
            given = None if mask is None else mask[:, :end]
            return model(IDS[:, end - 1 : end], given, past_key_values=past).past_key_values

        past = step(3, past)
        for end in range(4, 12):
            with traces.none(f"step {end}"):
                past = step(end, past)

    def test_a_change_of_the_architecture_is_compiled_anew(self, counted):
        model, traces = counted
        config, before = model.config, model.module
        model(IDS)
        model.resize_token_embeddings(140)
        with traces.some("resize_token_embeddings"):
            assert model(IDS).logits.shape == (2, 11, 140)
        assert model.config is config
        assert model.module is not before
        assert (model.module.config.vocab_size, before.config.vocab_size) == (140, 131)


@pytest.mark.slow
class TestNNX:
    def test_bridge(self, model):
        bridged = nnx.bridge.ToNNX(FlaxXGLMForCausalLMModule(TWO_BLOCKS), rngs=nnx.Rngs(0)).lazy_init(TOKENS)
        expected = model(TOKENS, LEFT).logits
        assert abs(bridged(TOKENS, LEFT).logits - expected)[REAL].max() > 0.1
        nnx.update(bridged, nnx.State(model.params))
        np.testing.assert_allclose(bridged(TOKENS, LEFT).logits[REAL], expected[REAL], **SAME)
