"""The loss of a head that is a matrix, with its gradients, as one operation that holds the logits of few positions.

It overwrites the logits of a chunk with their gradients, and uses these up at once. So the forward pass has computed
all gradients that are wanted, and the backward pass only scales them. Compilers, `torch.export` and the meta device do
not look inside: how many positions count depends on the labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from xglm_core.errors import InputError
from xglm_core.inputs import IGNORED_LABEL
from xglm_torch.fast.linear import add_product, adds_in_place

# At a time: on a CPU of the gradient of the head, on a GPU of the head in another type. A GPU would wait for the host
# between products as small as a CPU's cache likes them.
_CPU_BLOCK_BYTES, _GPU_BLOCK_BYTES = 2**22, 2**28
_CACHED_ROWS = 4  # Rows of logits that stay in the cache of a CPU from one operation to the next.


@torch.library.custom_op("xglm::chunked_loss", mutates_args=())
def chunked_loss(
    states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    loss_weights: torch.Tensor,
    label_smoothing: float,
    z_loss: float,
    chunk: int,
    factor_dtype: torch.dtype,
    group: str,
    needs_grad_states: bool,
    needs_grad_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum of the losses of some targets, each times its weight, and the gradients of that sum.

    Args:
        states: [positions, d_model].
        weight: [vocab_size, d_model].
        targets: int64 [positions], or -100 where there is none.
        loss_weights: what the losses are multiplied by, float32 [positions].
        label_smoothing, z_loss: see `LossOptions`.
        chunk: positions whose logits exist at a time.
        factor_dtype: the type of the factors of a product; the products are summed, and kept, in float32.
        group: name of the process group that shares the vocabulary: each process has an equal part of the weight, in
            order; "" for none.
        needs_grad_states, needs_grad_weight: which gradients are wanted.

    Returns:
        float32: the sum; -ln p of each target, and 1 where it has the largest logit [positions]; the gradients by
        states and weight, of shape [0, d_model] where they are not wanted. Only the first can be differentiated.
    """
    part = _Part.of(group, len(weight))
    width = states.shape[1]
    loss = loss_weights.new_zeros(())
    surprisals, correct = torch.zeros_like(loss_weights), torch.zeros_like(loss_weights)
    grad_states = loss_weights.new_zeros(len(states) if needs_grad_states else 0, width)
    grad_weight = loss_weights.new_zeros(len(weight) if needs_grad_weight else 0, width)
    kept = (targets != IGNORED_LABEL).nonzero().flatten()
    memory = loss_weights.new_empty(min(chunk, len(kept)), len(weight))
    # float16 has no room for the gradients of single logits, which are divided by the number of targets: later, then.
    unit = loss_weights.abs().max().clamp(min=1e-30) if factor_dtype == torch.float16 and len(kept) else 1
    with torch.autocast(states.device.type, enabled=False):  # The types are chosen here.
        for places in kept.split(chunk) if len(kept) else ():  # oneDNN has no product of nothing.
            # Differs from `xglm_flax.loss`: the positions come first. So the logits of a few stay in a CPU's cache, see
            # `_become_gradients`.
            some, logits = states[places].to(factor_dtype), memory[: len(places)]
            for block, rows in _blocks(weight, factor_dtype):
                add_product(logits[:, block], some, rows.T, keep=False)
            losses, surprisals[places], correct[places] = _become_gradients(
                logits, targets[places], loss_weights[places] / unit, label_smoothing, z_loss, part
            )
            loss += (losses * loss_weights[places]).sum()
            grad_logits = logits.to(factor_dtype)
            if needs_grad_states:
                grad_some = grad_states.new_zeros(some.shape)
                for block, rows in _blocks(weight, factor_dtype):
                    add_product(grad_some, grad_logits[:, block], rows)
                grad_states[places] = grad_some
            if needs_grad_weight:
                for block, _ in _blocks(weight, factor_dtype):
                    add_product(grad_weight[block], grad_logits[:, block].T, some)
    if factor_dtype == torch.float16:
        grad_states *= unit
        grad_weight *= unit
    return loss, surprisals, correct, part.sum(grad_states), grad_weight


@dataclass(frozen=True)
class _Part:
    """The part of the vocabulary whose logits this process has; reductions are over all parts, in place."""

    group: dist.ProcessGroup | None
    first: int
    vocab_size: int

    @classmethod
    def of(cls, name: str, size: int) -> _Part:
        if not name:
            return cls(None, 0, size)
        group = dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]
        return cls(group, size * group.rank(), size * group.size())

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.group is None else self._reduced(tensor, dist.ReduceOp.SUM)

    def largest(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.group is None else self._reduced(tensor, dist.ReduceOp.MAX)

    def _reduced(self, tensor: torch.Tensor, how: Any) -> torch.Tensor:
        dist.all_reduce(tensor, how, self.group)
        return tensor


def _become_gradients(
    logits: torch.Tensor,
    targets: torch.Tensor,
    loss_weights: torch.Tensor,
    label_smoothing: float,
    z_loss: float,
    part: _Part,
) -> tuple[torch.Tensor, ...]:
    """Overwrites the logits of some positions by the gradients of their losses, each times its weight.

    Args:
        logits: float32 [positions, part of the vocabulary].
        targets: int64 [positions].
        loss_weights: float32 [positions].
        label_smoothing, z_loss: see `LossOptions`.
        part: which part that is.

    Returns:
        float32 [positions]: the losses; -ln p of the targets; 1 where a target has the largest logit.
    """
    few = logits.device.type == "cpu" and part.group is None
    results = []
    groups = (tensor.split(_CACHED_ROWS if few else len(logits)) for tensor in (logits, targets, loss_weights))
    for rows, labels, loss_weight in zip(*groups, strict=True):
        here = (labels >= part.first) & (labels < part.first + rows.shape[1])
        columns = torch.where(here, labels - part.first, 0)[:, None]
        target_logit = part.sum(torch.where(here, rows.gather(1, columns)[:, 0], 0))
        max_logit = part.largest(rows.amax(dim=1))
        mean = part.sum(rows.sum(dim=1)) / part.vocab_size if label_smoothing else 0
        sum_exp = part.sum(rows.sub_(max_logit[:, None]).exp_().sum(dim=1))
        log_sum_exp = max_logit + sum_exp.log()
        rows *= (loss_weight * (1 + 2 * z_loss * log_sum_exp) / sum_exp)[:, None]
        rows.scatter_add_(1, columns, (loss_weight * (label_smoothing - 1) * here)[:, None])
        if label_smoothing:
            rows -= (loss_weight * (label_smoothing / part.vocab_size))[:, None]
        losses = log_sum_exp - (1 - label_smoothing) * target_logit - label_smoothing * mean + z_loss * log_sum_exp**2
        results.append((losses, log_sum_exp - target_logit, (target_logit == max_logit).float()))
    return tuple(torch.cat(pieces) for pieces in zip(*results, strict=True))


def _blocks(weight: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """Parts of the rows: where they are, and they themselves in a type. One part if products with it need no room."""
    size = _CPU_BLOCK_BYTES if weight.device.type == "cpu" else _GPU_BLOCK_BYTES
    step = max(1, size // (4 * weight.shape[1]))
    if weight.dtype == dtype and adds_in_place(len(weight), weight):
        step = len(weight)
    for begin in range(0, len(weight), step):
        block = slice(begin, min(begin + step, len(weight)))
        yield block, weight[block].to(dtype)


@chunked_loss.register_fake
def _(
    states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, loss_weights: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, ...]:
    sizes = [tensor.shape[0] if wanted else 0 for tensor, wanted in zip((states, weight), options[-2:], strict=True)]
    gradients = [loss_weights.new_empty(size, states.shape[1]) for size in sizes]
    return loss_weights.new_empty(()), torch.empty_like(loss_weights), torch.empty_like(loss_weights), *gradients


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # Zeros as large as the other outputs, for nothing.
    ctx.save_for_backward(*inputs[:4])
    ctx.options, ctx.gradients = inputs[4:], output[3:]
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype


def _backward(ctx: Any, grad_loss: torch.Tensor, *others: Any) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise InputError(
            "the loss has no second derivatives, but create_graph is True; "
            "compute the loss from the logits of a call without labels"
        )
    gradients = ctx.gradients
    if gradients is None:  # Another pass through a graph that was retained.
        gradients = chunked_loss(*ctx.saved_tensors, *ctx.options)[3:]
    if all(type(tensor) is torch.Tensor for tensor in (grad_loss, *gradients)):
        # Scaled in place and handed over: a copy would be the largest tensor of the whole pass.
        ctx.gradients = None
        if grad_loss.device.type != "cpu" or grad_loss != 1:  # On a GPU, looking costs more than multiplying.
            for gradient in gradients:
                gradient *= grad_loss
    else:
        gradients = [gradient * grad_loss for gradient in gradients]
    wanted = zip(gradients, ctx.dtypes, ctx.options[-2:], strict=True)
    results = [gradient.to(dtype) if is_wanted else None for gradient, dtype, is_wanted in wanted]
    return *results, *[None] * (2 + len(ctx.options))


chunked_loss.register_autograd(_backward, setup_context=_setup_context)
