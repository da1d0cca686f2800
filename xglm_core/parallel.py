"""Tensor parallelism: which dimension of each weight is split among devices.

The scheme is that of Megatron-LM (Shoeybi et al., arXiv 1909.08053). Heads and inner units are split, so that a block
needs one sum over the devices for attention and one for the feed-forward layer. Embedding and head, which are half of
the small models, are split along the vocabulary.
"""

from __future__ import annotations

from xglm_core.config import XGLMConfig
from xglm_core.errors import InputError
from xglm_core.weight_names import WeightSpec

# By the name of the layer: the dimension of the canonical weight that is split, and whether the bias is split.
_SPLIT = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "fc1"), (0, True)),
    **dict.fromkeys(("out_proj", "fc2"), (1, False)),
    **dict.fromkeys(("embed_tokens", "lm_head"), (0, False)),
}


def split_dimension(spec: WeightSpec) -> int | None:
    """Which dimension of a weight's canonical shape is split among the devices of a tensor-parallel group, if any."""
    *_, layer, parameter = spec.name.split(".")
    dimension, bias = _SPLIT.get(layer, (None, False))
    return dimension if parameter == "weight" or bias else None


def check_tensor_parallel(config: XGLMConfig, devices: int) -> None:
    """Checks that each device gets a part of the same size.

    Args:
        config: the architecture.
        devices: the size of the tensor-parallel group.

    Raises:
        InputError: heads, ffn_dim or vocab_size are not divisible by the number of devices.
    """
    sizes = {name: getattr(config, name) for name in ("attention_heads", "ffn_dim", "vocab_size")}
    if odd := [f"{name}={size}" for name, size in sizes.items() if size % devices]:
        raise InputError(
            f"the model cannot be split evenly over {devices} devices: {', '.join(odd)}; choose a divisor of "
            "all of these, or for the vocabulary resize_token_embeddings(pad_to_multiple_of=...)"
        )
    if config.pruned_heads:
        raise InputError("heads were pruned, so the blocks cannot be split evenly; expected a model with all its heads")
