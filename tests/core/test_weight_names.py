import math

import pytest

from xglm_core import XGLMConfig
from xglm_core.weight_names import EMBEDDING, HEAD, IGNORED, num_parameters, weight_specs

# Pairwise different sizes: a swapped dimension cannot pass. 11 layers, for an index of two digits.
CONFIG = XGLMConfig(vocab_size=131, d_model=35, ffn_dim=53, num_layers=11, attention_heads=5)
V, D, F = 131, 35, 53

# The state dict of transformers' XGLMForCausalLM, one block of it, with the shapes of `CONFIG`.
BLOCK = {
    "self_attn.k_proj.weight": (D, D),
    "self_attn.k_proj.bias": (D,),
    "self_attn.v_proj.weight": (D, D),
    "self_attn.v_proj.bias": (D,),
    "self_attn.q_proj.weight": (D, D),
    "self_attn.q_proj.bias": (D,),
    "self_attn.out_proj.weight": (D, D),
    "self_attn.out_proj.bias": (D,),
    "self_attn_layer_norm.weight": (D,),
    "self_attn_layer_norm.bias": (D,),
    "fc1.weight": (F, D),
    "fc1.bias": (F,),
    "fc2.weight": (D, F),
    "fc2.bias": (D,),
    "final_layer_norm.weight": (D,),
    "final_layer_norm.bias": (D,),
}
PUBLISHED = {
    "model.embed_tokens.weight": (V, D),
    **{f"model.layers.{i}.{suffix}": shape for i in range(11) for suffix, shape in BLOCK.items()},
    "model.layer_norm.weight": (D,),
    "model.layer_norm.bias": (D,),
    "lm_head.weight": (V, D),
}


def test_names_shapes_and_order_are_the_published_ones():
    assert len(BLOCK) == 16
    specs = weight_specs(CONFIG, with_head=True)
    assert [(spec.name, spec.shape) for spec in specs] == list(PUBLISHED.items())


def test_head_is_a_weight_only_on_request():
    with_head, without = weight_specs(CONFIG, with_head=True), weight_specs(CONFIG, with_head=False)
    assert with_head[:-1] == without
    assert with_head[-1].name == HEAD
    assert without[0].name == EMBEDDING


@pytest.mark.parametrize("path", ["name", "keras", "flax"])
def test_paths_are_a_bijection(path):
    specs = weight_specs(CONFIG, with_head=True)
    assert len({getattr(spec, path) for spec in specs}) == len(specs) == 16 * 11 + 4


@pytest.mark.parametrize(
    ("name", "keras", "flax", "transposed"),
    [
        ("model.embed_tokens.weight", "model/embed_tokens/embeddings", "model/embed_tokens/embedding", False),
        (
            "model.layers.10.self_attn.q_proj.weight",
            "model/layers.10/self_attn/q_proj/kernel",
            "model/layers/10/self_attn/q_proj/kernel",
            True,
        ),
        (
            "model.layers.1.self_attn.out_proj.bias",
            "model/layers.1/self_attn/out_proj/bias",
            "model/layers/1/self_attn/out_proj/bias",
            False,
        ),
        ("model.layers.0.fc2.weight", "model/layers.0/fc2/kernel", "model/layers/0/fc2/kernel", True),
        (
            "model.layers.0.self_attn_layer_norm.weight",
            "model/layers.0/self_attn_layer_norm/gamma",
            "model/layers/0/self_attn_layer_norm/scale",
            False,
        ),
        (
            "model.layers.2.final_layer_norm.bias",
            "model/layers.2/final_layer_norm/beta",
            "model/layers/2/final_layer_norm/bias",
            False,
        ),
        ("model.layer_norm.weight", "model/layer_norm/gamma", "model/layer_norm/scale", False),
        ("lm_head.weight", "lm_head/kernel", "lm_head/kernel", True),
    ],
)
def test_paths(name, keras, flax, transposed):
    (spec,) = [spec for spec in weight_specs(CONFIG, with_head=True) if spec.name == name]
    assert (spec.keras, spec.flax, spec.transposed) == (keras, tuple(flax.split("/")), transposed)


def test_exactly_the_dense_matrices_are_transposed():
    transposed = {spec.name for spec in weight_specs(CONFIG, with_head=True) if spec.transposed}
    assert transposed == {name for name, shape in PUBLISHED.items() if len(shape) == 2} - {EMBEDDING}


def test_flax_paths_form_a_tree():
    """No leaf is also a branch."""
    paths = [spec.flax for spec in weight_specs(CONFIG, with_head=True)]
    branches = {path[:depth] for path in paths for depth in range(len(path))}
    assert branches.isdisjoint(paths)


@pytest.mark.parametrize("tied", [True, False])
def test_number_of_parameters(tied):
    config = XGLMConfig.from_dict({**CONFIG.to_dict(), "tie_word_embeddings": tied})
    assert num_parameters(config) == sum(map(math.prod, PUBLISHED.values())) - tied * V * D


def test_ignored_names_are_no_weights():
    assert "model.embed_positions.weights" in IGNORED
    assert IGNORED.isdisjoint(PUBLISHED)
