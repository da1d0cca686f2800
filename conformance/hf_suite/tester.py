"""The small model and the inputs that transformers' common tests ask a `model_tester` for."""

from __future__ import annotations

from typing import Any

import numpy as np


class ModelTester:
    """One for all frameworks.

    Args:
        config_class: `XGLMConfig`, ours or transformers'.
        tensor: makes the framework's tensor of a numpy array.
        use_cache: whether plain calls return a cache; transformers' Flax classes never do.
    """

    batch_size, seq_length = 3, 7
    encoder_seq_length = decoder_seq_length = key_length = seq_length
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads = 99, 32, 2, 4
    is_training = True

    def __init__(self, config_class: Any, tensor: Any, *, use_cache: bool = True) -> None:
        self._config_class, self._tensor, self._use_cache = config_class, tensor, use_cache

    def get_config(self) -> Any:
        """A configuration; the last two ids are no text."""
        return self._config_class(
            vocab_size=self.vocab_size,
            max_position_embeddings=512,
            d_model=self.hidden_size,
            ffn_dim=37,
            num_layers=self.num_hidden_layers,
            attention_heads=self.num_attention_heads,
            bos_token_id=self.vocab_size - 2,
            eos_token_id=self.vocab_size - 2,
            pad_token_id=self.vocab_size - 1,
            use_cache=self._use_cache,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        """A configuration and the arguments of a call."""
        ids = np.random.RandomState(0).randint(3, self.vocab_size - 2, (self.batch_size, self.seq_length))
        return self.get_config(), {
            "input_ids": self._tensor(ids),
            "attention_mask": self._tensor(np.ones_like(ids)),
        }
