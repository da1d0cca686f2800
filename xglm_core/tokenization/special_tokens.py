"""The special tokens of a tokenizer, by role."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from xglm_core.errors import InputError
from xglm_core.tokenization.added_tokens import AddedToken
from xglm_core.tokenization.vocabulary import Vocabulary

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class _Token:
    """The token of a role, such as `eos_token`, or None."""

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
    """The id of the token of a role, such as `eos_token_id`, or None."""

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
    """The part of a tokenizer that manages special and added tokens.

    Args:
        vocabulary: the vocabulary; unknown tokens are added to it.
        roles: the token of each role, or None.
        additional: special tokens without a role.
    """

    bos_token, eos_token, unk_token, sep_token, pad_token, cls_token, mask_token = (_Token() for _ in ROLES)
    bos_token_id, eos_token_id, unk_token_id, sep_token_id = (_Id() for _ in ROLES[:4])
    pad_token_id, cls_token_id, mask_token_id = (_Id() for _ in ROLES[4:])

    def __init__(self, vocabulary: Vocabulary, roles: Mapping[str, Any], additional: Iterable[Any]) -> None:
        self.vocabulary = vocabulary
        self._roles: dict[str, str | None] = dict.fromkeys(ROLES)
        self._additional: list[str] | None = []
        self.add_special_tokens({**roles, "additional_special_tokens": list(additional)})

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Adds tokens that are matched literally in texts. Resize the model's embeddings to `len(self)` afterwards.

        Args:
            new_tokens: a token or a list of them, as strings or as objects with the attributes of `AddedToken`.
            special_tokens: whether `skip_special_tokens` drops them.

        A string keeps the flags of an existing token; an object replaces the flags of a special token.

        Returns:
            The number of tokens that were not in the vocabulary.
        """
        tokens = new_tokens if isinstance(new_tokens, list | tuple) else [new_tokens]
        return self.vocabulary.add([self._token(token, special_tokens) for token in tokens])

    def add_special_tokens(
        self, special_tokens_dict: Mapping[str, Any], replace_additional_special_tokens: bool = True
    ) -> int:
        """Assigns roles to tokens, and adds those that are not in the vocabulary.

        Args:
            special_tokens_dict: tokens by role, such as "pad_token", and a list of "additional_special_tokens".
            replace_additional_special_tokens: whether that list replaces the earlier one.

        Returns:
            The number of tokens that were not in the vocabulary.

        Raises:
            InputError: a role is unknown, or additional tokens are not a list.
        """
        added = 0
        for role, value in special_tokens_dict.items():
            if role in ROLES:
                if value is not None:
                    added += self.add_tokens(value, special_tokens=True)
                setattr(self, role, value)
            elif role == "additional_special_tokens":
                if not isinstance(value, list | tuple):
                    raise InputError(f"{role} is {value!r:.80}, expected a list of tokens")
                added += self.add_tokens(value, special_tokens=True)
                earlier = [] if replace_additional_special_tokens else self._additional or []
                self.additional_special_tokens = [*earlier, *value]
            else:
                raise InputError(f"{role!r} is not a role, expected {', '.join(ROLES)} or additional_special_tokens")
        return added

    def sanitize_special_tokens(self) -> int:
        """Does nothing and returns 0: all special tokens are already in the vocabulary."""
        return 0

    @property
    def special_tokens_map(self) -> dict[str, Any]:
        """The tokens by role; roles without a token are left out."""
        tokens: dict[str, Any] = {role: token for role, token in self._roles.items() if token is not None}
        if self._additional:
            tokens["additional_special_tokens"] = [*self._additional]
        return tokens

    @property
    def special_tokens_map_extended(self) -> dict[str, Any]:
        """`special_tokens_map` with `AddedToken`s."""
        extended = {token.content: token for token in self.added_tokens_decoder.values()}
        return {
            role: [extended[token] for token in tokens] if isinstance(tokens, list) else extended[tokens]
            for role, tokens in self.special_tokens_map.items()
        }

    _special_tokens_map = special_tokens_map_extended  # Code that was written for transformers uses this name.

    @property
    def additional_special_tokens(self) -> list[str] | None:
        """Special tokens without a role; None means none when they are set."""
        return None if self._additional is None else [*self._additional]

    @additional_special_tokens.setter
    def additional_special_tokens(self, tokens: Iterable[Any] | None) -> None:
        names = None if tokens is None else [AddedToken.of(token).content for token in tokens]
        for name in names or ():
            if name not in self.vocabulary.special_ids:
                raise InputError(
                    f"additional_special_tokens has {name!r}, which is not a special token; add_special_tokens adds it"
                )
        self._additional = names and list(dict.fromkeys(names))

    @property
    def additional_special_tokens_ids(self) -> list[int]:
        """The ids of `additional_special_tokens`."""
        return [self.vocabulary.special_ids[token] for token in self._additional or ()]

    @additional_special_tokens_ids.setter
    def additional_special_tokens_ids(self, ids: Iterable[int]) -> None:
        self.additional_special_tokens = [self.vocabulary.tokens[number] for number in ids]

    @property
    def all_special_tokens(self) -> list[str]:
        """The tokens that `skip_special_tokens` drops, in the order of their ids."""
        return list(self.vocabulary.special_ids)

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of `all_special_tokens`."""
        return list(self.vocabulary.special_ids.values())

    @property
    def all_special_tokens_extended(self) -> list[AddedToken]:
        """`all_special_tokens` as `AddedToken`s."""
        return [token for token in self.added_tokens_decoder.values() if token.special]

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """The special tokens, and the tokens that were added to the vocabulary file, by id."""
        return dict(sorted(self.vocabulary.found.items()))

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """The ids of the special and the added tokens."""
        return {token.content: number for number, token in self.added_tokens_decoder.items()}

    def get_added_vocab(self) -> dict[str, int]:
        """The ids of the special and the added tokens."""
        return self.added_tokens_encoder

    def _token(self, value: Any, special: bool) -> AddedToken:
        """Makes the token to add; see `add_tokens`."""
        if isinstance(value, str) and value:
            known = self.vocabulary.found.get(self.vocabulary.id_of(value))
            if known is not None and known.content == value:
                return replace(known, special=known.special or special)
        return AddedToken.of(value, special=special)
