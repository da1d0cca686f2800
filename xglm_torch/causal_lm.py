"""The causal language model: the decoder and its head."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from xglm_core.config import XGLMConfig
from xglm_core.generation.config import GenerationConfig
from xglm_core.generation.engine import is_overridden
from xglm_core.generation.prompts import Prompts
from xglm_core.generation.surface import GenerationSurface
from xglm_core.inputs import inputs_as_given
from xglm_core.loss import LossOptions, wants_logits
from xglm_core.outputs import CausalLMOutputWithCrossAttentions
from xglm_core.resizing import check_embeddings
from xglm_core.weight_names import HEAD
from xglm_torch.cache import XGLMCache, as_cache
from xglm_torch.decoder import XGLMModel, XGLMScaledWordEmbedding
from xglm_torch.generation import TorchEngine, draw_seed
from xglm_torch.inputs import as_numpy, as_tensor, check_head_arguments, check_ids, check_trainable, is_traced
from xglm_torch.loss import causal_lm_loss, counted_labels
from xglm_torch.preparing import Preparation
from xglm_torch.pretrained import XGLMPreTrainedModel
from xglm_torch.products import with_fast_gradients
from xglm_torch.scoring import TorchScorer
from xglm_torch.tying import table_and_head


class XGLMForCausalLM(GenerationSurface, XGLMPreTrainedModel):
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
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.init_weights()
        self.tie_weights()
        self.register_state_dict_post_hook(_with_head_of_its_own)

    @inputs_as_given(as_tensor)
    @with_fast_gradients
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
            return_logits: whether to compute and return logits; None means no in training with labels, as the loss does
                not need them, unless `logits_to_keep` names some.

        Returns:
            The output, or the tuple of its results that are not None: logits are [batch, kept positions, vocab_size] in
            the parameters' type, the loss is a float32 scalar.

        Raises:
            InputError: see `XGLMModel.forward`; or labels outside the vocabulary, or labels in training with float16
                parameters that are to be trained.
        """
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        check_head_arguments(self.config, tokens, labels, logits_to_keep)
        if labels is not None and self.training:
            check_trainable(self)
        head: nn.Module | torch.Tensor = self.lm_head
        own = type(self.model.embed_tokens).forward is XGLMScaledWordEmbedding.forward
        if labels is not None and input_ids is not None and inputs_embeds is None and own:
            both = table_and_head(self.model.embed_tokens, self.lm_head)
            if both is not None:
                check_ids(self.config, input_ids)
                table, head = both
                inputs_embeds = F.embedding(input_ids, table, sparse=True) * self.model.embed_tokens.embed_scale
                input_ids = None
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            encoder_hidden_states,
            encoder_attention_mask,
            head_mask,
            cross_attn_head_mask,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            return_dict=True,
        )
        hidden_states = outputs.last_hidden_state
        loss = logits = None
        if labels is not None:
            labels = counted_labels(labels, attention_mask)
            loss = causal_lm_loss(hidden_states, head, labels, num_items_in_batch, options=self.loss_options).loss
        if wants_logits(
            return_logits, has_labels=labels is not None, training=self.training, logits_to_keep=logits_to_keep
        ):
            logits = self.lm_head(_kept(hidden_states, logits_to_keep))
        results = CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
        )
        return results if (self.config.return_dict if return_dict is None else return_dict) else results.to_tuple()

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """The arguments of the next call of a decoding loop: the tokens that the cache does not hold yet.

        A method that replaces this one, of a subclass or of the model, is what `generate` asks.

        Args:
            input_ids: all tokens so far [rows, length].
            past_key_values: the cache of the earlier ones, or None. If it holds more than those, such as a prefix that
                has no ids, the last token alone is taken for new.
            attention_mask: 1 for tokens, 0 for padding [rows, length], or None.
            inputs_embeds: the prompt's embeddings, which take the place of ids in the first call.
            options: passed on.
        """
        past = as_cache(past_key_values, self.config)
        if past is None and inputs_embeds is not None:
            tokens = {"inputs_embeds": inputs_embeds}
        else:
            read = 0 if past is None else min(past.length, input_ids.shape[1] - 1)
            tokens = {"input_ids": input_ids[:, read:]}
        return {**options, **tokens, "past_key_values": past_key_values, "attention_mask": attention_mask}

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear | nn.Embedding) -> None:
        """Shares the weight [vocab_size, d_model] of a head or an embedding.

        If it is not this model's embedding matrix, the two are not tied any more, and `config.tie_word_embeddings` is
        False.

        Raises:
            InputError: the weight has another shape.
        """
        check_embeddings(tuple(new_embeddings.weight.shape), self.config)
        self._share(new_embeddings.weight)
        self.config.tie_word_embeddings = new_embeddings.weight is self.model.embed_tokens.weight

    def tie_weights(self) -> None:
        """Makes head and embedding one parameter again, if the configuration ties them."""
        if self.config.tie_word_embeddings:
            self._share(self.model.embed_tokens.weight)

    def _share(self, weight: torch.Tensor) -> None:
        """Gives the head a weight, and tells it so: adapters on it ask for its sizes."""
        self.lm_head.weight = weight
        if isinstance(self.lm_head, nn.Linear):
            self.lm_head.out_features, self.lm_head.in_features = weight.shape

    def _engine(self, past: Any, prompts: Prompts, options: dict[str, Any], **own: Any) -> TorchEngine:
        """See `GenerationSurface._engine`."""
        preparation = None
        if is_overridden(self, XGLMForCausalLM):
            cached = torch.from_numpy(prompts.columns[:, : prompts.past]).to(self.device)
            preparation = Preparation(self, cached, options)
        return TorchEngine(self, past, preparation)

    def _scorer(self, **own: Any) -> TorchScorer:
        return TorchScorer(self)

    def _as_cache(self, past_key_values: Any) -> XGLMCache | None:
        return as_cache(past_key_values, self.config)

    def _to_numpy(self, array: Any) -> np.ndarray:
        return as_numpy(array)

    def _from_numpy(self, array: np.ndarray, like: Any) -> torch.Tensor:
        device = self.device if like is None else like.device if isinstance(like, torch.Tensor) else "cpu"
        return torch.from_numpy(array).to(device)

    def _is_traced(self, *values: Any) -> bool:
        return is_traced(*values)

    def _draw_seed(self) -> int:
        return draw_seed()


def _with_head_of_its_own(model: Any, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A hook for state dicts: a tied head is a copy, in the memory of the host.

    Only where transformers' Trainer is about: it writes state dicts as safetensors, which refuse memory that is shared.
    """
    head = state_dict.get(prefix + HEAD)
    if head is None or isinstance(head, nn.Parameter) or "transformers.trainer" not in sys.modules:
        return
    if model.lm_head.weight is model.model.embed_tokens.weight and not (head.is_meta or hasattr(head, "device_mesh")):
        state_dict[prefix + HEAD] = head.to("cpu", copy=True)


def _kept(states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The positions of [batch, length, width] that `logits_to_keep` asks for."""
    if isinstance(logits_to_keep, int):
        return states[:, -logits_to_keep:]
    return states[:, logits_to_keep]
