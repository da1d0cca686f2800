"""Adds special tokens around a text, and between the texts of a pair."""

from __future__ import annotations

from xglm_core.tokenization.special_tokens import SpecialTokens


class Templates(SpecialTokens):
    """The part of a tokenizer that joins sequences of ids with special tokens: `</s> X`, and `</s> A </s></s> B`."""

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """`</s> X` for one sequence of ids, `</s> A </s></s> B` for two; `</s>` is `sep_token`, if there is one."""
        prefix, middle = self._around(token_ids_1 is not None)
        return prefix + token_ids_0 if token_ids_1 is None else prefix + token_ids_0 + middle + token_ids_1

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 for special tokens, 0 for others.

        Args:
            token_ids_0: a sequence of ids.
            token_ids_1: a second one.
            already_has_special_tokens: whether the ids already include special tokens. If not, the mask is that for
                `build_inputs_with_special_tokens`.
        """
        if already_has_special_tokens:
            special = {*self.all_special_ids}
            return [int(number in special) for number in [*token_ids_0, *(token_ids_1 or [])]]
        prefix, middle = self._around(token_ids_1 is not None)
        return [1] * len(prefix) + [0] * len(token_ids_0) + [1] * len(middle) + [0] * len(token_ids_1 or [])

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """A 0 for each id of `build_inputs_with_special_tokens`: XGLM has one type of tokens."""
        return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """The number of tokens that `build_inputs_with_special_tokens` adds."""
        prefix, middle = self._around(pair)
        return len(prefix) + len(middle)

    def _around(self, pair: bool) -> tuple[list[int], list[int]]:
        """The ids before a text, and those between the texts of a pair."""
        sep = [] if self.sep_token_id is None else [self.sep_token_id]
        return sep, sep + sep if pair else []
