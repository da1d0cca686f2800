"""The cases on which the backends are compared: small models and inputs, each for one reason.

The sizes of a case, where they are not 1, are pairwise different and mostly prime, so that swapped axes cannot pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from xglm_core.config import XGLMConfig


@dataclass(frozen=True, eq=False)
class Case:
    """A model and an input.

    Attributes:
        name: identifies the case in reports and file names.
        config: the architecture.
        seed: for `random_weights`.
        input_ids: int64 [batch, length].
        attention_mask: 1 for tokens, 0 for padding, int64 [batch, length]; None to pass none.
        chunks: how to cut the sequence for the chunked pass; they add up to length.
        why: what this case alone can show.
    """

    name: str
    config: XGLMConfig
    seed: int
    input_ids: np.ndarray
    attention_mask: np.ndarray | None
    chunks: tuple[int, ...]
    why: str


def _config(heads: int = 5, head_dim: int = 7, **others: Any) -> XGLMConfig:
    small = {"vocab_size": 131, "ffn_dim": 53, "num_layers": 3}
    return XGLMConfig(d_model=heads * head_dim, attention_heads=heads, **{**small, **others})


def _case(name: str, seed: int, chunks: tuple[int, ...], config: XGLMConfig, rows: int | list[str], why: str) -> Case:
    """A case with random ids; `rows` is their number, or draws the mask of each: "." is padding and "x" a token."""
    shape = (rows if isinstance(rows, int) else len(rows), sum(chunks))
    input_ids = np.random.RandomState(seed).randint(0, config.vocab_size, shape, dtype=np.int64)
    if isinstance(rows, int):
        return Case(name, config, seed, input_ids, None, chunks, why)
    mask = np.array([[character == "x" for character in row] for row in rows], np.int64)
    input_ids[mask == 0] = 0 if config.pad_token_id is None else config.pad_token_id
    return Case(name, config, seed, input_ids, mask, chunks, why)


CASES: tuple[Case, ...] = (
    _case("plain", 11, (5, 1, 1, 4), _config(), 2, "every formula once, with an odd d_model: the zero column"),
    _case(
        "left_padding",
        12,
        (6, 1, 1, 5),
        _config(),
        ["....xxxxxxxxx", "xxxxxxxxxxxxx", "...........xx", ".xxxxxxxxxxxx"],
        "positions follow the mask; the first chunk of the third row is padding alone",
    ),
    _case(
        "right_padding",
        13,
        (6, 1, 1, 5),
        _config(),
        ["xxxxxxxxx....", "xxxxxxxxxxxxx", "xx...........", "xxxxxxxxxxxx."],
        "padded queries come after the tokens and stay finite",
    ),
    _case(
        "mixed_padding",
        14,
        (7, 1, 1, 8),
        _config(),
        [
            "....xxxxxxxxxx...",
            "xxxxxxxxxxx......",
            "......xxxxxxxxxxx",
            "................x",
            "x................",
            "xx..xxxx.xxxxxxxx",
        ],
        "padding on both sides, rows of one token, and a mask with holes",
    ),
    _case(
        "relu",
        15,
        (5, 1, 1, 4),
        _config(head_dim=4, ffn_dim=8 * 20, activation_function="relu"),
        2,
        "the 4.5B model in small: ReLU and a feed-forward width of 8 x d_model",
    ),
    _case("silu", 16, (5, 1, 1, 4), _config(activation_function="silu"), 2, "activation x * sigmoid(x)"),
    _case("gelu_new", 17, (5, 1, 1, 4), _config(activation_function="gelu_new"), 2, "GELU's tanh approximation"),
    _case("even_width", 18, (5, 1, 1, 4), _config(head_dim=6), 2, "an even d_model: no zero column"),
    _case(
        "untied_head",
        20,
        (6, 1, 1, 5),
        _config(tie_word_embeddings=False, eos_token_id=99),
        ["....xxxxxxxxx", "xxxxxxxxxxxxx", "...........xx", ".xxxxxxxxxxxx"],
        "a head that is not the embedding; with it a random model does not just repeat itself when it generates",
    ),
    _case(
        "unscaled",
        19,
        (5, 1, 1, 4),
        _config(scale_embedding=False, pad_token_id=2),
        2,
        "no factor sqrt(d_model), and a zero row for position 0: a first state so small that LayerNorm's epsilon shows",
    ),
    _case(
        "other_pad",
        21,
        (6, 1, 1, 5),
        _config(pad_token_id=7),
        ["....xxxxxxxxx", "xxxxxxxxxxxxx", "xxxxxxxxxx...", "..........xxx"],
        "pad_token_id 7 is a real row of the position table, that of position 5: it is zero",
    ),
    _case(
        "no_pad",
        22,
        (6, 1, 1, 5),
        _config(pad_token_id=None),
        ["....xxxxxxxxx", "xxxxxxxxxxxxx", "xxxxxxxxxx...", "..........xxx"],
        "without pad_token_id no row of the position table is zero",
    ),
    _case(
        "full_vocabulary",
        23,
        (2, 1, 2),
        _config(heads=2, head_dim=4, vocab_size=256008, ffn_dim=19, num_layers=1),
        1,
        "the published vocabulary: 256,008 logits at a position",
    ),
    _case(
        "all_positions",
        24,
        (1021, 1, 1, 1025),
        _config(heads=3, head_dim=11, ffn_dim=61, num_layers=2, scale_embedding=False),
        1,
        "all 2,048 positions, whose embeddings outweigh the tokens': a table in float64 shows at the far end",
    ),
    _case(
        "all_positions_padded",
        25,
        (1031, 1, 1, 1015),
        _config(num_layers=1),
        ["x" * 2048, "." * 389 + "x" * 1659],
        "a long cache in which the rows are at different positions",
    ),
    _case(
        "raised_limit",
        26,
        (1151, 1, 1157),
        _config(num_layers=1, max_position_embeddings=2311),
        1,
        "positions past 2,048, which a larger max_position_embeddings allows",
    ),
)
