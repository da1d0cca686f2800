"""Layers in a scan: the same results from the same parameters, in the compile time of one layer."""

import itertools

import jax
import numpy as np
import pytest

from conformance.random_weights import write_checkpoint
from tests.helpers.models import CONFIG, CROSS_CONFIG, ENCODER, ENCODER_MASK, HEAD_MASK, IDS, LEFT, SAME, changed
from tests.helpers.traces import CountedActivation
from xglm_core.errors import ConfigError, InputError
from xglm_flax import FlaxXGLMForCausalLM, FlaxXGLMForCausalLMModule, FlaxXGLMModel, stack_layers, unstack_layers

TOKENS = IDS.astype(np.int32)
PRUNED = {0: [1], 1: [4], 2: [0]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cross")
    write_checkpoint(path, CROSS_CONFIG, seed=1)
    return path


@pytest.fixture(scope="module")
def plain(folder):
    return FlaxXGLMForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def scanned(folder):
    return FlaxXGLMForCausalLM.from_pretrained(folder, scan_layers=True)


def assert_same(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **SAME), ours, theirs)


class TestTrees:
    @pytest.mark.parametrize("model_class", [FlaxXGLMModel, FlaxXGLMForCausalLM])
    def test_round_trip(self, model_class):
        params = model_class(CONFIG).params
        stacked = stack_layers(params)
        layers = stacked.get("model", stacked)["layers"]
        assert layers["fc1"]["kernel"].shape == (3, 35, 53)
        assert stack_layers(stacked) is stacked
        assert unstack_layers(params) is params
        back = unstack_layers(stacked)
        assert jax.tree.structure(back) == jax.tree.structure(params)
        jax.tree.map(np.testing.assert_array_equal, back, params)

    def test_fresh_parameters_are_the_published_tree(self, scanned, plain):
        fresh = FlaxXGLMForCausalLM(CROSS_CONFIG, scan_layers=True)
        assert jax.tree.structure(fresh.params) == jax.tree.structure(plain.params)
        shapes = jax.eval_shape(fresh.module.init, jax.random.key(0), TOKENS, encoder_hidden_states=ENCODER)["params"]
        assert jax.tree.structure(shapes) == jax.tree.structure(plain.params)
        assert jax.tree.structure(scanned.params) == jax.tree.structure(plain.params)

    def test_stacked_parameters_are_the_models(self, folder, scanned, tmp_path):
        model = FlaxXGLMForCausalLM.from_pretrained(folder, scan_layers=True)
        model.params = stack_layers(model.params)
        assert_same(model(TOKENS).logits, scanned(TOKENS).logits)
        new = {"max_new_tokens": 5, "stop_at_eos": False}
        assert np.array_equal(model.generate(TOKENS, **new), scanned.generate(TOKENS, **new))
        model.save_pretrained(tmp_path)
        again = FlaxXGLMForCausalLM.from_pretrained(tmp_path)
        jax.tree.map(np.testing.assert_array_equal, again.params, scanned.params)
        model.resize_token_embeddings(140)
        model.prune_heads(PRUNED)
        assert model(TOKENS).logits.shape == (2, 11, 140)
        assert model.params["model"]["layers"]["self_attn"]["q_proj"]["kernel"].shape == (3, 35, 28)

    def test_stacked_parameters_need_a_scan(self, plain):
        with pytest.raises(InputError, match="the blocks of params are stacked, which takes scan_layers=True"):
            plain(TOKENS, params=stack_layers(plain.params))


class TestResults:
    ARGUMENTS = {  # noqa: RUF012
        "attention_mask": LEFT,
        "encoder_hidden_states": ENCODER,
        "encoder_attention_mask": ENCODER_MASK,
        "head_mask": HEAD_MASK,
        "cross_attn_head_mask": HEAD_MASK[::-1],
        "output_attentions": True,
        "output_hidden_states": True,
    }

    @pytest.mark.parametrize("stacked", [False, True])
    def test_all_outputs(self, plain, scanned, stacked):
        params = stack_layers(scanned.params) if stacked else None
        ours, theirs = scanned(TOKENS, params=params, **self.ARGUMENTS), plain(TOKENS, **self.ARGUMENTS)
        assert ours.keys() == theirs.keys()
        assert len(ours.attentions) == len(ours.cross_attentions) == len(ours.past_key_values) == 3
        for field in ("logits", "hidden_states", "attentions", "cross_attentions"):
            assert_same(ours[field], theirs[field])
        assert_same(tuple(ours.past_key_values), tuple(theirs.past_key_values))

    def test_chunks(self, plain, scanned):
        expected = plain(TOKENS, LEFT, encoder_hidden_states=ENCODER).logits
        first = scanned(TOKENS[:, :6], LEFT[:, :6], encoder_hidden_states=ENCODER)
        second = scanned(TOKENS[:, 6:7], past_key_values=first.past_key_values)
        third = scanned(TOKENS[:, 7:], LEFT, past_key_values=second.past_key_values)
        for outputs, positions in ((second, slice(6, 7)), (third, slice(7, None))):
            np.testing.assert_allclose(outputs.logits, expected[:, positions], **SAME)

    @pytest.mark.parametrize("kind", ["scanned", "plain", "tuple"])
    def test_caches_of_either_kind(self, plain, scanned, kind):
        maker = plain if kind == "plain" else scanned
        past = maker(TOKENS[:, :6], past_key_values=maker.init_cache(2, 11)).past_key_values
        past = tuple(past) if kind == "tuple" else past
        expected = plain(TOKENS).logits[:, 6:]
        for model in (scanned, plain):
            np.testing.assert_allclose(model(TOKENS[:, 6:], past_key_values=past).logits, expected, **SAME)

    def test_generation(self, plain, scanned):
        options = {"max_new_tokens": 20, "stop_at_eos": False}
        assert np.array_equal(scanned.generate(TOKENS, LEFT, **options), plain.generate(TOKENS, LEFT, **options))

    @pytest.mark.slow
    def test_gradients(self, plain, scanned):
        def loss(params, model):
            return model(TOKENS, LEFT, labels=TOKENS, encoder_hidden_states=ENCODER, params=params).loss

        expected = jax.grad(loss)(plain.params, plain)
        assert_same(jax.grad(loss)(scanned.params, scanned), expected)
        assert_same(unstack_layers(jax.grad(loss)(stack_layers(scanned.params), scanned)), expected)


class TestDropout:
    @pytest.mark.parametrize("switch", ["dropout", "attention_dropout", "activation_dropout", "layerdrop"])
    def test_acts(self, plain, switch):
        none = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0}
        model = FlaxXGLMForCausalLM(changed(CROSS_CONFIG, **{**none, switch: 0.5}), _do_init=False, scan_layers=True)

        def run(seed):
            key = jax.random.key(seed)
            return model(TOKENS, params=plain.params, train=True, dropout_rng=key).logits

        assert np.array_equal(run(1), run(1))
        assert any(abs(run(seed) - run(1)).max() > 0.05 for seed in range(2, 6))
        np.testing.assert_allclose(model(TOKENS, params=plain.params).logits, plain(TOKENS).logits, **SAME)

    def test_blocks_have_masks_of_their_own(self):
        """Equal blocks that add nothing but a bias, where dropout keeps it."""
        config = changed(CONFIG, dropout=0.5, attention_dropout=0.0)
        model = FlaxXGLMForCausalLM(config, scan_layers=True)
        params = jax.tree.map(lambda leaf: leaf * 0, stack_layers(model.params))
        params["model"]["layers"]["fc2"]["bias"] += 1
        options = {"train": True, "dropout_rng": jax.random.key(0), "output_hidden_states": True}
        states = [np.asarray(state) for state in model(TOKENS, params=params, **options).hidden_states]
        added = [(after - before).round(3) for before, after in itertools.pairwise(states[:3])]
        for one in added:
            assert set(np.unique(one)) == {0.0, 2.0}  # What is kept carries 1 / (1 - 0.5).
        assert not np.array_equal(*added)


class TestPrunedHeads:
    def test_as_many_in_each_block(self, plain, folder):
        model = FlaxXGLMForCausalLM.from_pretrained(folder, scan_layers=True)
        kept = np.ones((3, 5), np.float32)
        for layer, heads in PRUNED.items():
            kept[layer, heads] = 0
        model.prune_heads(PRUNED)
        expected = plain(TOKENS, LEFT, head_mask=HEAD_MASK * kept).logits
        np.testing.assert_allclose(model(TOKENS, LEFT, head_mask=HEAD_MASK).logits[:, 3:], expected[:, 3:], **SAME)

    def test_different_numbers(self, folder):
        model = FlaxXGLMForCausalLM.from_pretrained(folder, scan_layers=True)
        message = r"pruned_heads leaves \[4, 5, 5\] heads in the blocks, but scan_layers=True needs as many in each"
        with pytest.raises(ConfigError, match=message):
            model.prune_heads({0: [1]})
        assert model.config.pruned_heads == {}
        config = changed(CONFIG, pruned_heads={0: [1]})
        with pytest.raises(ConfigError, match=message):
            FlaxXGLMForCausalLM(config, scan_layers=True)
        with pytest.raises(ConfigError, match=message):
            FlaxXGLMForCausalLMModule(config, scan_layers=True).init(jax.random.key(0), TOKENS)


def test_is_compiled_once_for_all_layers():
    traces = CountedActivation(jax.nn.relu)
    model = FlaxXGLMForCausalLM(changed(CONFIG, activation_function=traces.activation, num_layers=7), scan_layers=True)
    text = jax.jit(lambda params: model(TOKENS, params=params).logits).lower(model.params).as_text()
    assert traces.count() == 1
    assert text.count("stablehlo.while") == 1
