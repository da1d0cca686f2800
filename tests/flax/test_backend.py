"""What only the Flax backend promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import models
from tests.helpers.models import CONFIG
from tests.helpers.traces import CountedActivation
from xglm_core import XGLMConfig
from xglm_core.errors import InputError
from xglm_core.weight_names import weight_specs
from xglm_flax import FlaxXGLMForCausalLM, FlaxXGLMModel, stack_layers

IDS, MASK = models.IDS.astype(np.int32), models.LEFT
REAL = MASK.astype(bool)

# Two orders of the same float32 sums differ by rounding alone: a few units in the last place per layer.
SAME = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def model(folder):
    return FlaxXGLMForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def expected(model):
    return np.asarray(model(IDS, MASK).logits)


def changed(**values):
    return XGLMConfig.from_dict({**CONFIG.to_dict(), **values})


def loss(logits):
    """Mean negative log-probability of each token given its past, without padding."""
    logs = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), IDS[:, 1:, None], axis=-1)[..., 0]
    return -(logs * MASK[:, :-1]).sum() / MASK[:, :-1].sum()


class TestParams:
    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("model_class", [FlaxXGLMModel, FlaxXGLMForCausalLM])
    def test_tree_is_the_published_one(self, model_class, tied):
        config = changed(tie_word_embeddings=tied)
        bare = model_class is FlaxXGLMModel
        module = model_class(config, _do_init=False).module
        params = jax.eval_shape(module.init, jax.random.key(0), IDS)["params"]
        found = {
            tuple(entry.key for entry in path): leaf.shape
            for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
        }
        assert found == {
            spec.flax[1:] if bare else spec.flax: spec.shape[::-1] if spec.transposed else spec.shape
            for spec in weight_specs(config, with_head=not (bare or tied))
        }

    def test_loaded_tree_is_that_of_init(self, model):
        fresh = jax.eval_shape(model.module.init, jax.random.key(0), IDS)["params"]
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), model.params) == jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype), fresh
        )

    def test_loaded_parameters_are_a_users_own(self, folder, model):
        """Even where they are views of the file: donated or not, it stays as it is."""
        loaded = FlaxXGLMForCausalLM.from_pretrained(folder)
        before = (folder / "model.safetensors").read_bytes()
        halve = jax.jit(lambda params: jax.tree.map(lambda leaf: leaf / 2, params), donate_argnums=0)
        halved = halve(loaded.params)
        assert (folder / "model.safetensors").read_bytes() == before
        for ours, theirs in zip(jax.tree.leaves(halved), jax.tree.leaves(model.params), strict=True):
            np.testing.assert_array_equal(ours, theirs / 2)

    def test_types_of_computation_and_parameters(self, folder, model):
        half = FlaxXGLMForCausalLM.from_pretrained(folder, dtype=jnp.bfloat16)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(half.params)} == {"float32"}
        outputs = half(IDS, output_hidden_states=True)
        assert outputs.logits.dtype == outputs.hidden_states[2].dtype == outputs.past_key_values[0][0].dtype
        assert outputs.logits.dtype == jnp.bfloat16
        stored = FlaxXGLMForCausalLM.from_pretrained(folder, param_dtype="bfloat16")
        assert {leaf.dtype.name for leaf in jax.tree.leaves(stored.params)} == {"bfloat16"}
        assert stored(IDS).logits.dtype == jnp.float32
        rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), model.params)
        np.testing.assert_allclose(stored(IDS).logits, model(IDS, params=rounded).logits, **SAME)
        with pytest.raises(InputError, match=r"dtype is 'int8', expected one of float32"):
            FlaxXGLMForCausalLM.from_pretrained(folder, dtype="int8")

    def test_given_parameters_win_and_are_needed_without_init(self, model, expected):
        bare = FlaxXGLMForCausalLM(CONFIG, _do_init=False)
        for call in (bare, bare.generate, bare.save_pretrained):
            with pytest.raises(InputError, match="params is None, and the model was made with _do_init=False"):
                call(IDS)
        assert np.array_equal(bare(IDS, MASK, params=model.params).logits, expected)
        new = {"max_new_tokens": 5, "stop_at_eos": False}
        assert np.array_equal(bare.generate(IDS, params=model.params, **new), model.generate(IDS, **new))
        scaled = jax.tree.map(lambda leaf: leaf * 1.5, model.params)
        assert abs(model(IDS, MASK, params=scaled).logits - expected).max() > 0.1

    def test_seed(self):
        first, again, other = (FlaxXGLMModel(changed(num_layers=1), seed=seed).params for seed in (3, 3, 4))
        kernels = [params["layers"]["0"]["fc1"]["kernel"] for params in (first, again, other)]
        assert np.array_equal(kernels[0], kernels[1])
        assert not np.array_equal(kernels[0], kernels[2])


class TestTransformations:
    def test_linen_module_alone(self, model, expected):
        logits = model.module.apply({"params": model.params}, IDS, MASK).logits
        np.testing.assert_allclose(np.asarray(logits)[REAL], expected[REAL], **SAME)

    def test_jit(self, model, expected):
        outputs = jax.jit(lambda params, ids, mask: model(ids, mask, params=params))(model.params, IDS, MASK)
        np.testing.assert_allclose(np.asarray(outputs.logits)[REAL], expected[REAL], **SAME)
        assert int(outputs.past_key_values.length) == 11

    def test_grad(self, model):
        def objective(params):
            return loss(model(IDS, MASK, params=params, use_cache=False).logits)

        gradient = jax.grad(objective)(model.params)
        leaves = jax.tree.leaves(gradient)
        # The slope along the gradient, by central differences, is its norm.
        norm = np.sqrt(sum(float((leaf**2).sum()) for leaf in leaves))
        step = 1e-2
        ahead, behind = (
            objective(jax.tree.map(lambda leaf, slope, s=sign * step / norm: leaf + s * slope, model.params, gradient))
            for sign in (1, -1)
        )
        # The loss is known to 1e-6 or so, hence the slope to 1e-4; the third derivative adds as much.
        assert float(ahead - behind) / (2 * step) == pytest.approx(norm, rel=1e-2)

    def test_gradients_reach_through_a_cache(self, model):
        def objective(params, cached):
            if not cached:
                return loss(model(IDS, MASK, params=params).logits)
            past = model(IDS[:, :6], MASK[:, :6], params=params)
            rest = model(IDS[:, 6:], params=params, past_key_values=past.past_key_values)
            return loss(jnp.concatenate([past.logits, rest.logits], axis=1))

        whole, chunked = (jax.grad(objective)(model.params, cached) for cached in (False, True))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **SAME), whole, chunked)

    def test_vmap(self, model, expected):
        logits = jax.vmap(lambda ids, mask: model(ids[None], mask[None]).logits[0])(IDS, MASK)
        np.testing.assert_allclose(np.asarray(logits)[REAL], expected[REAL], **SAME)

    def test_dropout(self, folder, model, expected):
        assert np.array_equal(model(IDS, MASK, dropout_rng=jax.random.key(0)).logits, expected)
        with pytest.raises(InputError, match="train is True but dropout_rng is None, expected a key"):
            model(IDS, MASK, train=True)
        rates = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
        none = FlaxXGLMForCausalLM(changed(**rates), _do_init=False)
        assert np.array_equal(none(IDS, MASK, params=model.params, train=True).logits, expected)
        for name in rates:
            some = FlaxXGLMForCausalLM(changed(**{**rates, name: 0.5}), _do_init=False)
            first, again, other = (
                some(IDS, MASK, params=model.params, train=True, dropout_rng=jax.random.key(seed)).logits
                for seed in (0, 0, 1)
            )
            assert np.array_equal(first, again), name
            assert not np.array_equal(first, other), name
            assert not np.array_equal(first, expected), name


class TestCache:
    def test_of_fixed_capacity_is_filled_and_never_grows(self, model, expected):
        cache = model.init_cache(2, 11)
        for begin, end in ((0, 5), (5, 6), (6, 11)):
            outputs = model(IDS[:, begin:end], MASK[:, :end], past_key_values=cache)
            cache = outputs.past_key_values
            real = REAL[:, begin:end]
            np.testing.assert_allclose(np.asarray(outputs.logits)[real], expected[:, begin:end][real], **SAME)
        assert cache.capacity == int(cache.length) == 11
        with pytest.raises(
            InputError, match=r"holds 11 of at most 11 positions, and 1 more do not fit; .*max_length=12"
        ):
            model(IDS[:, :1], past_key_values=cache)

    def test_traced_overflow_is_nan_rather_than_wrong(self, model):
        step = jax.jit(lambda ids, cache: model(ids, past_key_values=cache))
        full = step(IDS, model.init_cache(2, 11))
        assert np.isfinite(full.logits).all()
        assert np.isnan(step(IDS[:, :1], full.past_key_values).logits).all()

    def test_traced_position_past_the_limit_is_nan(self, model):
        positions = np.stack([np.arange(51, 62), np.arange(50, 61)])
        logits = jax.jit(lambda positions: model(IDS, position_ids=positions).logits)(positions)
        assert np.isnan(logits[0, 10]).all()
        assert np.isfinite(logits[1]).all()

    def test_steps_in_a_compiled_loop(self, model, expected):
        prompt = model(IDS[:, :6], MASK[:, :6]).past_key_values

        def step(cache, ids):
            outputs = model(ids[:, None], past_key_values=cache)
            return outputs.past_key_values, outputs.logits[:, 0]

        cache, logits = jax.jit(lambda cache, ids: jax.lax.scan(step, cache, ids))(prompt, IDS[:, 6:].T)
        np.testing.assert_allclose(logits.swapaxes(0, 1), expected[:, 6:], **SAME)
        assert int(cache.length) == 11
        assert int(prompt.length) == 6

    def test_traced_mask_covers_the_capacity(self, model, expected):
        step = jax.jit(lambda ids, mask, cache: model(ids, mask, past_key_values=cache))
        cache = step(IDS[:, :6], np.pad(MASK[:, :6], ((0, 0), (0, 7))), model.init_cache(2, 13)).past_key_values
        # What the mask says of positions to come is not remembered.
        np.testing.assert_allclose(model(IDS[:, 6:], past_key_values=cache).logits, expected[:, 6:], **SAME)
        with pytest.raises(InputError, match=r"attention_mask is \[2, 11\], expected \[2, 13\]"):
            step(IDS[:, 6:], MASK, cache)


class TestCompilation:
    @pytest.fixture
    def counted(self, model):
        """A model, and its traces."""
        traces = CountedActivation(functools.partial(jax.nn.gelu, approximate=False))
        model_ = FlaxXGLMForCausalLM(changed(activation_function=traces.activation), _do_init=False)
        model_.params = model.params
        return model_, traces

    def test_one_for_all_steps_of_a_cache(self, counted):
        model, traces = counted
        past = model(IDS[:, :2], MASK[:, :2]).past_key_values
        past = model(IDS[:, 2:3], MASK[:, :3], past_key_values=past).past_key_values
        for end in range(4, 12):
            with traces.none(f"step {end}"):
                past = model(IDS[:, end - 1 : end], MASK[:, :end], past_key_values=past).past_key_values

    def test_one_for_all_numbers_and_lengths_of_a_bucket(self, counted):
        model, traces = counted
        sample = {"do_sample": True, "stop_at_eos": False}
        options = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2}
        others = {"temperature": 1.7, "top_k": 50, "top_p": 0.4, "repetition_penalty": 0.9}
        model.generate(IDS, seed=1, max_new_tokens=20, **options, **sample)
        assert set(traces.shapes) == {(2, 64, 53), (2, 1, 53)}  # The prompt, and one step of a loop.
        with traces.none("other values of the options, a shorter prompt or a longer text"):
            model.generate(IDS[:, :5], seed=2, max_new_tokens=33, suppress_tokens=None, **others, **sample)
        # Token by token there is another program, for whatever comes after; four beams are rows of yet another one.
        assert len(list(model.stream(IDS, seed=1, **sample))) == 20
        with traces.none("stream without sampling"):
            assert len(list(model.stream(IDS, stop_at_eos=False))) == 20
        assert model.generate(IDS, num_beams=2, stop_at_eos=False).shape == (2, 31)
        with traces.none("other numbers of beams' options"):
            model.generate(IDS, num_beams=2, length_penalty=0.5, stop_at_eos=False)

    def test_layers_of_a_scan_run_one_by_one(self, counted):
        model, traces = counted
        scanned = FlaxXGLMForCausalLM(model.config, _do_init=False, scan_layers=True)
        expected = model.generate(IDS, max_new_tokens=5)
        traces.shapes.clear()
        for params in (model.params, stack_layers(model.params)):
            assert np.array_equal(scanned.generate(IDS, params=params, max_new_tokens=5), expected)
            assert set(traces.shapes) == {(2, 64, 53), (2, 1, 53)}
