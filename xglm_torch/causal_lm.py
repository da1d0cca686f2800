"""The causal language model: the decoder and its head."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from xglm_core.calls import DecoderInputs, Wanted, present, resolve
from xglm_core.config import XGLMConfig
from xglm_core.generation.config import GenerationConfig
from xglm_core.inputs import inputs_as_given
from xglm_core.loss import LossOptions, wants_logits
from xglm_core.outputs import CausalLMOutputWithCrossAttentions
from xglm_core.resizing import check_embeddings
from xglm_core.weight_names import HEAD
from xglm_torch.cache import XGLMCache, as_cache
from xglm_torch.decoder import XGLMModel, results_by_name
from xglm_torch.fast.linear import linear_layer
from xglm_torch.inputs import as_tensor, check_arguments, check_head_arguments, with_inner_door
from xglm_torch.int8 import refuse_int8
from xglm_torch.loss import causal_lm_loss, counted_labels
from xglm_torch.surface import TorchGeneration
from xglm_torch.tying import with_head_of_its_own, with_one_gradient


class LastLogits(NamedTuple):
    """What a step of generation needs: the logits [batch, 1, vocab_size] of the last position, and the cache.

    Differs: in TF and Flax, a step decodes and applies the head itself; here it is the module's own call.
    """

    logits: torch.Tensor
    past_key_values: XGLMCache | None


class XGLMForCausalLM(TorchGeneration):
    """Decoder and head: logits of the next token. The head is the embedding matrix if `config.tie_word_embeddings`.

    Args:
        config: the architecture; weights are drawn at random, see `from_pretrained` for trained ones.

    Attributes:
        loss_options: smoothing and z-loss of the training loss.
    """

    has_head = True
    _tied_weights_keys = _keys_to_ignore_on_save = (HEAD,)
    # To transformers' Trainer: `num_items_in_batch` is taken, and counts targets, which are shifted labels.
    accepts_loss_kwargs = True
    loss_type = "ForCausalLM"

    def __init__(self, config: XGLMConfig) -> None:
        super().__init__(config)
        self.generation_config = GenerationConfig.from_model(config)
        self.loss_options = LossOptions()
        self.model = XGLMModel(config)
        self.lm_head = linear_layer(config.d_model, config.vocab_size, bias=False)
        self.init_weights()
        self.tie_weights()
        self.register_state_dict_post_hook(with_head_of_its_own)

    @with_inner_door
    @inputs_as_given(as_tensor)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        head_mask: torch.Tensor | None = None,
        cross_attn_head_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
        return_logits: bool | None = None,
    ) -> CausalLMOutputWithCrossAttentions | tuple[Any, ...]:
        """Runs the decoder and the head.

        Args:
            input_ids, attention_mask, position_ids, encoder_hidden_states, encoder_attention_mask, head_mask,
                cross_attn_head_mask, past_key_values, inputs_embeds, use_cache, output_attentions,
                output_hidden_states, return_dict: see `XGLMModel.forward`.
            labels: the tokens to predict, integers [batch, length], not shifted; -100 does not count, nor what padding
                would have to predict. `labels=input_ids` trains on all tokens of rows without padding.
            logits_to_keep: only this many last positions reach the head, or those in this vector of positions; 0 means
                all of them. With labels, the loss is that of all positions.
            num_items_in_batch: what to divide the loss by, for batches in several parts; None counts the labels.
            return_logits: whether to compute and return logits. None: True, except in training with labels, where the
                loss does not need them, unless `logits_to_keep` names some.

        Returns:
            The output, or the tuple of its results that are not None: logits are [batch, kept positions, vocab_size] in
            the parameters' type, the loss is a float32 scalar.

        Raises:
            InputError: see `XGLMModel.forward`; or labels outside the vocabulary, or labels in training with float16
                parameters that are to be trained.
        """
        encoder, masks = (encoder_hidden_states, encoder_attention_mask), (head_mask, cross_attn_head_mask)
        inputs = DecoderInputs(input_ids, attention_mask, position_ids, *encoder, *masks, inputs_embeds)
        check_head_arguments(self, inputs, labels, logits_to_keep)
        cache = as_cache(past_key_values, self.config)
        check_arguments(self.config, inputs, cache)
        has_labels = labels is not None
        wanted = resolve(self.config, use_cache, output_attentions, output_hidden_states, uncached=self.uncached)
        head: nn.Module | torch.Tensor = self.lm_head
        if has_labels:
            inputs, head = with_one_gradient(self, inputs)
        results = results_by_name(self.model(inputs, cache, wanted), wanted, past_key_values)
        states, loss, logits = results.pop("last_hidden_state"), None, None
        if labels is not None:
            labels = counted_labels(labels, attention_mask)
            loss = causal_lm_loss(states, head, labels, num_items_in_batch, options=self.loss_options).loss
        if wants_logits(return_logits, has_labels=has_labels, training=self.training, logits_to_keep=logits_to_keep):
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(states[:, kept])
        return present(CausalLMOutputWithCrossAttentions, self.config, return_dict, loss=loss, logits=logits, **results)

    def decode(self, inputs: DecoderInputs, past: XGLMCache | None, wanted: Wanted) -> LastLogits:
        """The inner door of generation: the decoder, and the head of the last position. See `XGLMModel.decode`."""
        results = self.model(inputs, past, wanted)
        return LastLogits(self.lm_head(results.last_hidden_state[:, -1:]), results.past_key_values)

    def set_output_embeddings(self, new_embeddings: nn.Linear | nn.Embedding) -> None:
        """Shares the weight [vocab_size, d_model] of a head or an embedding.

        If it is not this model's embedding matrix, the two are not tied any more, and `config.tie_word_embeddings` is
        False.

        Raises:
            InputError: the weight has another shape, or the model is int8.
        """
        refuse_int8(self, "set_output_embeddings")
        check_embeddings(tuple(new_embeddings.weight.shape), self.config)
        self._share(new_embeddings.weight)
        self.config.tie_word_embeddings = new_embeddings.weight is self.model.embed_tokens.weight
