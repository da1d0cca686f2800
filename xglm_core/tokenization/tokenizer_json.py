"""Reads and writes `tokenizer.json`, the file of the `tokenizers` library."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from typing import Any

from xglm_core.tokenization.added_tokens import AddedToken
from xglm_core.tokenization.model_file import Kind, Piece, read_model, unigram_model

_BYTE = re.compile("<0x[0-9A-F]{2}>").fullmatch
# The steps after `Precompiled` in the published files; SentencePiece does them anyway.
_HARMLESS = ("Replace", "Strip", "WhitespaceSplit")


def read_tokenizer_json(content: bytes) -> tuple[bytes, dict[int, AddedToken]]:
    """Makes a SentencePiece model of the vocabulary, in the order of the ids; returns it and the added tokens.

    Raises:
        ValueError: the content is not a unigram tokenizer with SentencePiece's normalization.
    """
    try:
        data = json.loads(content)
        model = data["model"]
        if model["type"] != "Unigram":
            raise ValueError(f"the model is {model['type']}, expected Unigram")
        added = {int(token["id"]): AddedToken.of(token) for token in data.get("added_tokens") or []}
        byte_fallback = bool(model.get("byte_fallback"))
        normal = int(Kind.NORMAL)
        pieces = [Piece(str(token), float(score), normal) for token, score in model["vocab"]]
        for number, kind in _kinds(pieces, model["unk_id"], added, byte_fallback).items():
            pieces[number] = pieces[number]._replace(kind=kind)
        charsmap, dummy_prefix = b"", False
        for step in [*_steps(data.get("normalizer")), *_steps(data.get("pre_tokenizer"))]:
            if step["type"] == "Precompiled":
                charsmap = base64.b64decode(step["precompiled_charsmap"] or "", validate=True)
            elif step["type"] == "Metaspace":
                # It was a bool before version 0.15 of tokenizers.
                scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space") else "never")
                dummy_prefix = scheme != "never"
            elif step["type"] not in _HARMLESS:
                raise ValueError(f"{step['type']} is not part of SentencePiece's normalization")
        return unigram_model(pieces, charsmap, dummy_prefix=dummy_prefix, byte_fallback=byte_fallback), added
    except KeyError as error:
        raise ValueError(f"{error} is missing") from None
    except (TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from None


def write_tokenizer_json(model: bytes, found: dict[int, AddedToken], sep_token: str | None) -> bytes:
    """Makes `tokenizer.json` in the published form.

    The `tokenizers` library could do this, but would index the vocabulary first: a second for 256,000 tokens.

    Args:
        model: a SentencePiece model, in the order of the ids.
        found: the special tokens of the model, and further tokens, by id.
        sep_token: the one of these that precedes a text.

    Raises:
        ValueError: this form cannot express the model.
    """
    pieces, settings = read_model(model)
    kinds = [piece.kind for piece in pieces]
    for name, expressible in {
        "a model that is not a unigram model": settings.unigram,
        "remove_extra_whitespaces=false": settings.remove_spaces,
        "escape_whitespaces=false": settings.escape_spaces,
        "treat_whitespace_as_suffix=true": not settings.spaces_at_ends,
        "unused pieces": Kind.UNUSED not in kinds,
    }.items():
        if not expressible:
            raise ValueError(f"tokenizer.json cannot express {name}; save the SentencePiece model")
    whole_kind = int(Kind.USER_DEFINED)
    whole = {number: AddedToken(pieces[number].token) for number, kind in enumerate(kinds) if kind == whole_kind}
    tokens = whole | found
    normalizers: list[dict[str, Any]] = [
        {"type": "Strip", "strip_left": False, "strip_right": True},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
    ]
    if settings.charsmap:
        charsmap = base64.b64encode(settings.charsmap).decode()
        normalizers.insert(0, {"type": "Precompiled", "precompiled_charsmap": charsmap})
    scheme = "always" if settings.dummy_prefix else "never"
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": True}
    fallback = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, metaspace]}
    values = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, **token.as_json()} for number, token in sorted(tokens.items())],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": metaspace,
        "post_processor": None if sep_token is None else _template(sep_token, tokens),
        "decoder": fallback if settings.byte_fallback else metaspace,
        "model": {
            "type": "Unigram",
            "unk_id": kinds.index(Kind.UNKNOWN),
            "vocab": [(piece.token, piece.score) for piece in pieces],
            "byte_fallback": settings.byte_fallback,
        },
    }
    return json.dumps(values, ensure_ascii=False).encode()


def _template(sep_token: str, tokens: dict[int, AddedToken]) -> dict[str, Any]:
    """The special tokens around a text, and between the texts of a pair."""
    number = next(number for number, token in tokens.items() if token.content == sep_token)
    sep = {"SpecialToken": {"id": sep_token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [sep, first],
        "pair": [sep, first, sep, sep, second],
        "special_tokens": {sep_token: {"id": sep_token, "ids": [number], "tokens": [sep_token]}},
    }


def _kinds(
    pieces: list[Piece], unknown: int | None, added: dict[int, AddedToken], byte_fallback: bool
) -> dict[int, Kind]:
    """The kinds of the pieces that are not normal, by id."""
    kinds = {number: Kind.BYTE for number, piece in enumerate(pieces) if byte_fallback and _BYTE(piece.token)}
    for number, token in added.items():
        if 0 <= number < len(pieces):
            kinds[number] = Kind.CONTROL if token.special else Kind.USER_DEFINED
    if unknown is None or not 0 <= unknown < len(pieces):
        raise ValueError(f"unk_id is {unknown}, expected the id of a token")
    return kinds | {unknown: Kind.UNKNOWN}


def _steps(step: Any) -> Iterator[Any]:
    """Yields the steps of a normalizer or pre-tokenizer: None, one step, or nested sequences."""
    if step is not None and step["type"] == "Sequence":
        for inner in step.get("normalizers") or step.get("pretokenizers") or []:
            yield from _steps(inner)
    elif step is not None:
        yield step
