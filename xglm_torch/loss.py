"""The training loss, computed from the states below the head without ever holding all logits.

See `xglm_core.loss` for the contract.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import xglm_core.loss
from xglm_core.inputs import IGNORED_LABEL
from xglm_core.loss import LossOptions, LossOutput
from xglm_torch.chunked_loss import chunked_loss
from xglm_torch.fast.linear import FastLinear
from xglm_torch.recording import is_transformed
from xglm_torch.weights import is_native

_Losses = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# The logits of a head that is called exist about four times: in its type and in float32, and so do their gradients.
_COPIES = 4


def causal_lm_loss(
    hidden_states: torch.Tensor,
    head: nn.Module | torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: int | torch.Tensor | None = None,
    *,
    options: LossOptions,
    weights: torch.Tensor | None = None,
) -> LossOutput:
    """The loss of each next token, in chunks of the positions.

    Args:
        hidden_states: what the head reads [batch, length, d_model].
        head: gives logits [..., vocab_size]; or its matrix [vocab_size, d_model], which may be a DTensor that is split
            by the vocabulary. Of a plain linear layer without bias, only the matrix is read. Any other head, such as an
            adapted one, is called chunk by chunk, and again in the backward pass.
        labels: the tokens themselves, integers [batch, length]: position i is judged by label i + 1, the last by none;
            -100 does not count.
        num_items_in_batch: what to divide the sum by; None divides by the sum of the weights of the labels that count.
        options: smoothing and z-loss.
        weights: of each label, float [batch, length]; None means 1. They get no gradient.

    Returns:
        float32 scalars; the loss is 0 if no label counts.
    """
    labels = labels.to(hidden_states.device)
    # Labels are moved rather than states, which are larger.
    targets = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED_LABEL)], dim=1).flatten().long()
    label_weights = (targets != IGNORED_LABEL).float()
    if weights is not None:
        label_weights = label_weights * weights.detach().to(label_weights).roll(-1, dims=1).flatten()
    count = label_weights.sum()
    divisor = count if num_items_in_batch is None else num_items_in_batch
    divisor = torch.as_tensor(divisor, dtype=torch.float32, device=count.device)
    loss_weights = label_weights / torch.where(divisor > 0, divisor, 1)  # No 0 / 0 where nothing counts.
    states = hidden_states.flatten(0, 1)
    # A matrix that is split by the vocabulary; the hooks that gather its logits are passed by.
    is_split = _is_linear(head) and hasattr(head.weight, "device_mesh")
    if _is_linear(head) and (is_split or has_plain_weight(head)):
        head = head.weight
    if is_transformed() and not is_split:
        losses = _at_once(states, head, targets, loss_weights, options)
    elif isinstance(head, torch.Tensor):
        losses = _by_weight(states, head, targets, loss_weights, options)
    else:
        losses = _by_calls(states, head, targets, loss_weights, options)
    loss, surprisals, correct = losses
    return LossOutput(loss, (label_weights * surprisals).sum(), (label_weights * correct).sum(), count)


def counted_labels(labels: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """See `xglm_core.loss.counted_labels`."""
    if attention_mask is None:
        return labels
    padding = attention_mask[:, -labels.shape[1] :].to(labels.device) == 0
    return labels.masked_fill(F.pad(padding[:, :-1], (1, 0)), IGNORED_LABEL)


def has_plain_weight(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether the head is a product with its weight and nothing else: not adapted, quantized or hooked.

    Differs: the heads of TF and Flax are always plain.
    """
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    return _is_linear(head) and "forward" not in vars(head) and not any(hooks) and is_native(head.weight)


def _is_linear(head: nn.Module | torch.Tensor) -> TypeGuard[nn.Linear]:
    """Whether it is a linear layer without bias, of no other class."""
    return isinstance(head, nn.Linear) and type(head) in (nn.Linear, FastLinear) and head.bias is None


def _by_weight(
    states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, loss_weights: torch.Tensor, options: LossOptions
) -> _Losses:
    """The weighted sum of the losses; of all positions -ln p, and 1 where a target has the largest logit."""
    device, recording, group = states.device.type, torch.is_grad_enabled(), ""
    split: Any = weight
    if hasattr(split, "device_mesh"):  # A DTensor: of the logits, too, each device has a part.
        group, weight = split.device_mesh.get_group().group_name, split.to_local()
    # Differs from `xglm_flax.loss`: on a CPU, PyTorch cannot sum a product of 16-bit factors in float32 and keep that.
    factor_dtype = torch.float32
    if device == "cuda":
        factor_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    loss, surprisals, correct, *_ = chunked_loss(
        states,
        weight,
        targets,
        loss_weights,
        options.label_smoothing,
        options.z_loss,
        xglm_core.loss.chunk_positions(len(weight), accelerator=device != "cpu"),
        factor_dtype,
        group,
        recording and states.requires_grad,
        recording and weight.requires_grad,
    )
    return loss, surprisals, correct


def _by_calls(
    states: torch.Tensor, head: nn.Module, targets: torch.Tensor, loss_weights: torch.Tensor, options: LossOptions
) -> _Losses:
    """`_by_weight` for a head of which nothing is known."""

    def of_some(states: torch.Tensor, targets: torch.Tensor, loss_weights: torch.Tensor) -> _Losses:
        return _of_logits(head(states), targets, loss_weights, options)

    places = torch.arange(len(targets), device=targets.device)
    if not torch.compiler.is_compiling():
        # How many count is known. At least one, so that all parameters have gradients.
        places = places[targets != IGNORED_LABEL] if (targets != IGNORED_LABEL).any() else places[:1]
    with torch.no_grad():
        vocab_size = getattr(head, "out_features", None) or head(states[:1]).shape[1]
    accelerator = states.device.type != "cpu"
    chunk = max(1, xglm_core.loss.chunk_positions(vocab_size, accelerator=accelerator) // _COPIES)
    total = loss_weights.new_zeros(())
    surprisals, correct = torch.zeros_like(loss_weights), torch.zeros_like(loss_weights)
    for some in places.split(chunk):
        # Without reentrance, so that parameters inside the head get gradients though the states need none.
        loss, surprisals[some], correct[some] = checkpoint(
            of_some, states[some], targets[some], loss_weights[some], use_reentrant=False
        )
        total = total + loss
    return total, surprisals, correct


def _at_once(
    states: torch.Tensor,
    head: nn.Module | torch.Tensor,
    targets: torch.Tensor,
    loss_weights: torch.Tensor,
    options: LossOptions,
) -> _Losses:
    """`_by_weight` in operations that transforms of `torch.func` see through. All logits exist.

    Under `torch.vmap` the rows of a batch have different numbers of labels that count, but one shape.
    """
    if not isinstance(head, torch.Tensor):
        return _of_logits(head(states), targets, loss_weights, options)
    with torch.autocast(states.device.type, enabled=False):
        return _of_logits(F.linear(states.float(), head.float()), targets, loss_weights, options)


def _of_logits(
    logits: torch.Tensor, targets: torch.Tensor, loss_weights: torch.Tensor, options: LossOptions
) -> _Losses:
    """What `_by_weight` returns, from logits [positions, vocab_size]."""
    logits = logits.float()
    log_sum_exp = logits.logsumexp(dim=1)
    target_logit = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    losses = log_sum_exp - target_logit
    if options.label_smoothing:
        losses = losses + options.label_smoothing * (target_logit - logits.mean(dim=1))
    if options.z_loss:
        losses = losses + options.z_loss * log_sum_exp**2
    correct = target_logit == logits.amax(dim=1)
    return (losses * loss_weights).sum(), (log_sum_exp - target_logit).detach(), correct.float()
