"""The special tokens of a tokenizer, by the roles they play."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from xglm_core.errors import InputError
from xglm_core.tokenization.added_tokens import AddedToken
from xglm_core.tokenization.vocabulary import Vocabulary

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


class _Token:
    """The token in a role, e.g. `eos_token`; None if there is none."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._role = name

    def __get__(self, tokens: Any, owner: type | None = None) -> Any:
        return self if tokens is None else tokens._roles.get(self._role)

    def __set__(self, tokens: SpecialTokens, value: Any) -> None:
        token = None if value is None else AddedToken.of(value).content
        special = tokens.vocabulary.special_ids
        if token is not None and token not in special:
            raise InputError(
                f"tokenizer: {self._role} is {token!r}, expected None or one of {', '.join(special)}; "
                "add_special_tokens adds others"
            )
        tokens._roles[self._role] = token


class _Id:
    """The id of the token in a role, e.g. `eos_token_id`; None if there is none."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._role = name.removesuffix("_id")

    def __get__(self, tokens: Any, owner: type | None = None) -> Any:
        if tokens is None:
            return self
        token = tokens._roles.get(self._role)
        return None if token is None else tokens.vocabulary.special_ids[token]

    def __set__(self, tokens: SpecialTokens, value: int | None) -> None:
        token = next((token for token, number in tokens.vocabulary.special_ids.items() if number == value), value)
        setattr(tokens, self._role, token)


class SpecialTokens:
    """The part of a tokenizer that knows its special and its added tokens.

    Args:
        vocabulary: the vocabulary, which grows by tokens that it does not know.
        roles: the token in each role, or None.
        additional: special tokens without a role.
    """

    bos_token, eos_token, unk_token, sep_token, pad_token, cls_token = (_Token() for _ in ROLES)
    bos_token_id, eos_token_id, unk_token_id, sep_token_id, pad_token_id, cls_token_id = (_Id() for _ in ROLES)

    def __init__(self, vocabulary: Vocabulary, roles: Mapping[str, Any], additional: Iterable[Any]) -> None:
        self.vocabulary = vocabulary
        self._roles: dict[str, str | None] = dict.fromkeys(ROLES)
        self.additional_special_tokens: list[str] = []
        self.add_special_tokens({**roles, "additional_special_tokens": list(additional)})

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Adds tokens that are found in texts as they stand; the model's embeddings are to be resized to `len(self)`.

        Args:
            new_tokens: a token or a list of them, as strings or as objects with the attributes of `AddedToken`.
            special_tokens: whether `skip_special_tokens` drops them.

        Returns:
            How many were not in the vocabulary.
        """
        tokens = new_tokens if isinstance(new_tokens, list | tuple) else [new_tokens]
        return self.vocabulary.add([AddedToken.of(token, special=special_tokens) for token in tokens])

    def add_special_tokens(
        self, special_tokens_dict: Mapping[str, Any], replace_additional_special_tokens: bool = True
    ) -> int:
        """Gives roles to tokens, and adds those that are not in the vocabulary.

        Args:
            special_tokens_dict: tokens by role, such as "pad_token", and a list of "additional_special_tokens".
            replace_additional_special_tokens: whether that list takes the place of the earlier one.

        Returns:
            How many were not in the vocabulary.

        Raises:
            InputError: a role is unknown.
        """
        added = 0
        for role, value in special_tokens_dict.items():
            if role in ROLES:
                if value is not None:
                    added += self.add_tokens(value, special_tokens=True)
                setattr(self, role, value)
            elif role == "additional_special_tokens":
                added += self.add_tokens(value, special_tokens=True)
                earlier = [] if replace_additional_special_tokens else self.additional_special_tokens
                names = [*earlier, *(AddedToken.of(token).content for token in value)]
                self.additional_special_tokens = list(dict.fromkeys(names))
            else:
                raise InputError(f"{role!r} is no role, expected {', '.join(ROLES)} or additional_special_tokens")
        return added

    @property
    def special_tokens_map(self) -> dict[str, Any]:
        """The tokens by role, without empty ones."""
        tokens: dict[str, Any] = {role: token for role, token in self._roles.items() if token is not None}
        if self.additional_special_tokens:
            tokens["additional_special_tokens"] = self.additional_special_tokens
        return tokens

    @property
    def additional_special_tokens_ids(self) -> list[int]:
        """The ids of `additional_special_tokens`."""
        return [self.vocabulary.special_ids[token] for token in self.additional_special_tokens]

    @property
    def all_special_tokens(self) -> list[str]:
        """The tokens that `skip_special_tokens` drops, in the order of their ids."""
        return list(self.vocabulary.special_ids)

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of `all_special_tokens`."""
        return list(self.vocabulary.special_ids.values())

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """The tokens that follow those of the vocabulary file, by id."""
        return dict(self.vocabulary.added)

    def get_added_vocab(self) -> dict[str, int]:
        """The ids of the tokens that follow those of the vocabulary file."""
        return {token.content: number for number, token in self.vocabulary.added.items()}
