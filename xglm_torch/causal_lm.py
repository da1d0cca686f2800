"""The causal language model: the decoder and its head."""

from __future__ import annotations

import torch
from torch import nn

from xglm_core.config import XGLMConfig
from xglm_core.generation.config import GenerationConfig
from xglm_core.generation.loop import generate
from xglm_core.outputs import CausalLMOutputWithCrossAttentions
from xglm_torch.cache import XGLMCache
from xglm_torch.decoder import XGLMModel
from xglm_torch.generation import TorchEngine
from xglm_torch.pretrained import XGLMPreTrainedModel


class XGLMForCausalLM(XGLMPreTrainedModel):
    """Decoder and head: logits of the next token. The head is the embedding matrix if `config.tie_word_embeddings`.

    Args:
        config: the architecture; weights are drawn at random, see `from_pretrained` for trained ones.
    """

    has_head = True

    def __init__(self, config: XGLMConfig) -> None:
        super().__init__(config)
        self.model = XGLMModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.init_weights()
        self.tie_weights()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        *,
        past_key_values: XGLMCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithCrossAttentions:
        """Runs the decoder and the head.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, use_cache, output_hidden_states: see
                `XGLMModel.forward`.
            logits_to_keep: only this many last positions reach the head; 0 means all of them.

        Returns:
            The output; logits are [batch, kept positions, vocab_size] in the parameters' type.

        Raises:
            InputError: see `XGLMModel.forward`.
        """
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        return CausalLMOutputWithCrossAttentions(
            logits=self.lm_head(outputs.last_hidden_state[:, -logits_to_keep:]),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def tie_weights(self) -> None:
        """Makes head and embedding one parameter again, if the configuration ties them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        max_new_tokens: int = 20,
        stop_at_eos: bool = True,
    ) -> torch.Tensor:
        """Continues each row with the likeliest tokens.

        Args:
            input_ids: prompts, integers [rows, length], padded on either side.
            attention_mask: 1 for tokens, 0 for padding [rows, length]; None means no padding.
            max_new_tokens: most tokens to add.
            stop_at_eos: whether a row ends at `config.eos_token_id`.

        Returns:
            int64 [rows, length + new]: `input_ids` as given, then the new tokens; rows that ended are filled with
            padding.

        Raises:
            InputError: see `xglm_core.generation.loop.generate`.
        """
        tokens = generate(
            TorchEngine(self),
            input_ids.numpy(force=True),
            None if attention_mask is None else attention_mask.numpy(force=True),
            self.config,
            GenerationConfig.from_model(self.config, max_new_tokens=max_new_tokens, stop_at_eos=stop_at_eos),
        )
        return torch.from_numpy(tokens).to(input_ids.device)
