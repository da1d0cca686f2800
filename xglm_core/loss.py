"""The training loss as data: its options, its results, and how many logits exist at a time.

The formula is in docs/numerics.md. Each backend computes the loss and its gradients from the states below the head:
with 256,008 tokens in the vocabulary, the logits of a batch would take more memory than the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from xglm_core.errors import InputError
from xglm_core.inputs import IGNORED_LABEL

# The size of the float32 logits of one chunk: 256 positions by 256,008 tokens. Each chunk reads and writes the gradient
# of the head once; with this size, that takes a twentieth of the time of the products.
LOGITS_BYTES = 2**28
# Larger on accelerators, where products are fast in relation to memory.
ACCELERATOR_LOGITS_BYTES = 2**30
_MULTIPLE = 32  # Chunks have a multiple of so many positions if there is room: products of round sizes are faster.


@dataclass(frozen=True)
class LossOptions:
    """Additions to the cross-entropy; none by default.

    Attributes:
        label_smoothing: the part of each target, 0 to 1, that is spread evenly over the vocabulary.
        z_loss: the factor of log(Z)^2, where Z is the sum of the exponentials of a token's logits. It keeps logits from
            growing (Chowdhery et al., PaLM, arXiv 2204.02311, section 5).

    Raises:
        InputError: a value is out of range.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        for name, highest in (("label_smoothing", 1.0), ("z_loss", math.inf)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= highest:
                raise InputError(f"{name} is {value!r}, expected a number from 0 to {highest}")


class LossOutput(NamedTuple):
    """The result of a backend's `causal_lm_loss`, all float32 scalars. Only the loss has gradients.

    Attributes:
        loss: the weighted mean of the losses of the labels that count, or their weighted sum divided by
            `num_items_in_batch`.
        surprisal: the weighted sum of -ln p(label), without smoothing and z-loss; its mean is ln(perplexity).
        correct: the weighted number of labels that have the largest logit.
        count: the sum of the weights; without weights, the number of labels that count.
    """

    loss: Any
    surprisal: Any
    correct: Any
    count: Any


def chunk_positions(vocab_size: int, *, accelerator: bool = False) -> int:
    """For how many positions logits are computed at a time.

    Args:
        vocab_size: the number of logits per position.
        accelerator: whether the model is on an accelerator, not a CPU.
    """
    positions = (ACCELERATOR_LOGITS_BYTES if accelerator else LOGITS_BYTES) // (4 * vocab_size)
    return positions // _MULTIPLE * _MULTIPLE or max(1, positions)


def labels_for(input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
    """Labels for training on all tokens of a padded batch.

    Args:
        input_ids: integers [batch, length].
        attention_mask: 1 for tokens, 0 for padding [batch, length]; None means no padding.

    Returns:
        int64 [batch, length]: the ids, with -100 for padding and for tokens right after padding, which nothing
        predicts.
    """
    labels = np.array(input_ids, np.int64)
    if attention_mask is not None:
        labels[np.asarray(attention_mask) == 0] = IGNORED_LABEL
    return counted_labels(labels, attention_mask)


def counted_labels(labels: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
    """Sets labels to -100 where padding would have to predict them: right after padding on the left, or a gap.

    Each backend does the same with the labels of a call.

    Args:
        labels: integers [batch, length], -100 where they do not count.
        attention_mask: 1 for tokens, 0 for padding [batch, length]. A longer mask also covers a cache; its last columns
            count. None means no padding.

    Returns:
        int64 [batch, length]. The first label stays; nothing predicts it in any case.
    """
    labels = np.array(labels, np.int64)
    if attention_mask is None:
        return labels
    padding = np.asarray(attention_mask)[:, -labels.shape[1] :] == 0
    return np.where(np.pad(padding[:, :-1], ((0, 0), (1, 0))), IGNORED_LABEL, labels)


def items_in_batch(labels: np.ndarray, attention_mask: np.ndarray | None = None) -> int:
    """How many labels count: the value of `num_items_in_batch` if these rows are split over several calls.

    Args:
        labels, attention_mask: see `counted_labels`.
    """
    return int((counted_labels(labels, attention_mask)[:, 1:] != IGNORED_LABEL).sum())


def wants_logits(return_logits: bool | None, *, has_labels: bool, training: bool, logits_to_keep: Any) -> bool:
    """Whether a call returns logits.

    Args:
        return_logits: the caller's choice; None leaves it to the other arguments.
        has_labels: whether the call returns a loss.
        training: whether the model is in training, where the logits would be the largest array by far.
        logits_to_keep: which logits; to name some is to ask for them.
    """
    if return_logits is not None:
        return return_logits
    return not (has_labels and training) or not (isinstance(logits_to_keep, int) and logits_to_keep == 0)


def check_trainable_type(dtype: str) -> None:
    """Raises `InputError` for parameters that common optimizers cannot train.

    Args:
        dtype: the name of the type of the trainable parameters.
    """
    if dtype == "float16":
        raise InputError(
            "the trainable parameters are float16, in which small updates and Adam's epsilon of 1e-8 are 0; load them "
            "with dtype='float32' or 'bfloat16', and compute in mixed precision"
        )
