"""The tied head: one gradient as large as the vocabulary, where PyTorch would make two; and state dicts."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from xglm_core.calls import DecoderInputs
from xglm_core.weight_names import HEAD
from xglm_torch.decoder import XGLMScaledWordEmbedding
from xglm_torch.loss import has_plain_weight
from xglm_torch.recording import is_transformed

if TYPE_CHECKING:
    from xglm_torch.causal_lm import XGLMForCausalLM


def with_one_gradient(model: XGLMForCausalLM, inputs: DecoderInputs) -> tuple[DecoderInputs, nn.Module | torch.Tensor]:
    """The inputs and the head of a call with a loss, in which the tied matrix gets one gradient.

    The matrix is read twice, in a sparse lookup and as the head, and the gradient of the lookup is added in place to
    that of the loss. Each has a gradient of its own if they are not tied, one is adapted or hooked, or no gradient is
    recorded in the plain way.
    """
    embedding, head = model.model.embed_tokens, model.lm_head
    is_recorded = torch.is_grad_enabled() and not (torch.compiler.is_compiling() or is_transformed())
    if inputs.input_ids is None or not is_recorded or not _is_plain(embedding) or not has_plain_weight(head):
        return inputs, head
    weight = embedding.weight
    if head.weight is not weight or type(weight) is not nn.Parameter or not weight.requires_grad or weight.is_meta:
        return inputs, head
    for_lookup, for_loss = _BothUses.apply(weight)
    embeddings = F.embedding(inputs.input_ids, for_lookup, sparse=True) * embedding.embed_scale
    return inputs._replace(input_ids=None, inputs_embeds=embeddings), for_loss


def with_head_of_its_own(model: Any, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A hook for state dicts: a tied head is a copy, in the memory of the host.

    Only where transformers' Trainer is about: it saves a model that is not of transformers by its state dict alone, as
    safetensors, which refuse memory that is shared; it asks neither `save_pretrained` nor `_tied_weights_keys`.
    """
    head = state_dict.get(prefix + HEAD)
    if head is None or isinstance(head, nn.Parameter) or "transformers.trainer" not in sys.modules:
        return
    if model.lm_head.weight is model.model.embed_tokens.weight and not (head.is_meta or hasattr(head, "device_mesh")):
        state_dict[prefix + HEAD] = head.to("cpu", copy=True)


def _is_plain(embedding: nn.Module) -> bool:
    """Whether it is a lookup in its weight and nothing else: not adapted or hooked."""
    hooks = (embedding._forward_hooks, embedding._forward_pre_hooks, embedding._backward_hooks)
    is_ours = type(embedding).forward is XGLMScaledWordEmbedding.forward and "forward" not in vars(embedding)
    return is_ours and not any(hooks)


class _BothUses(torch.autograd.Function):
    """Returns a matrix twice. The backward pass overwrites the gradient of the second, which nobody else holds."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        return weight.detach(), weight.detach()

    @staticmethod
    def backward(ctx: Any, grad_table: torch.Tensor | None, grad_head: torch.Tensor | None) -> torch.Tensor | None:
        if grad_table is None or grad_head is None:  # A caller may have differentiated something else than the loss.
            return grad_head if grad_table is None else grad_table.to_dense()
        return grad_head.add_(grad_table)
