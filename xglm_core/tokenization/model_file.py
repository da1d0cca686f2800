"""SentencePiece's model file, and the order of its pieces.

XGLM's ids are fairseq's: special tokens come first, and the ids of pieces are one higher than in the published file,
which begins with `<unk>`, `<s>`, `</s>`:

    id               0    1      2     3      4 ... len(pieces)        len(pieces) + 1 ... len(pieces) + 7
    token            <s>  <pad>  </s>  <unk>  piece 3 ... last piece   <madeupword0> ... <madeupword6>

The madeupwords made the size of the published vocabulary a multiple of 8; no text contains them.

Here, the pieces of a model are put in the order of the ids before SentencePiece loads it. So SentencePiece returns the
ids itself; adding one to each in Python would take a fifth of the time of encoding.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import NamedTuple

from xglm_core.tokenization.protobuf import bytes_field, fields, float_field, float_value, int_field

# Field numbers of sentencepiece_model.proto.
_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3
_TOKEN, _SCORE, _KIND = 1, 2, 3
_MODEL_TYPE, _SUFFIX, _BYTE_FALLBACK, _UNK_ID, _BOS_ID, _EOS_ID, _PAD_ID = 3, 24, 35, 40, 41, 42, 43
_CHARSMAP, _DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE_SPACES = 2, 3, 4, 5
_UNIGRAM = 1

MADEUP_WORDS = tuple(f"<madeupword{i}>" for i in range(7))
FIRST_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
_FIRST_PIECES = ("<unk>", "<s>", "</s>")


class Kind(enum.IntEnum):
    """The kind of a piece."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3  # Does not occur in texts.
    USER_DEFINED = 4  # Is never split.
    UNUSED = 5
    BYTE = 6


_NORMAL = int(Kind.NORMAL)  # A member of the enumeration would double the time per piece.


class Piece(NamedTuple):
    """A piece of the vocabulary; the score is its log-probability in float32."""

    token: str
    score: float
    kind: int


class Settings(NamedTuple):
    """The settings of a model that affect segmentation."""

    charsmap: bytes = b""  # The normalization rules, in SentencePiece's own form.
    dummy_prefix: bool = True
    remove_spaces: bool = True
    escape_spaces: bool = True
    unigram: bool = True
    spaces_at_ends: bool = False  # Whether "▁" ends words instead of beginning them.
    byte_fallback: bool = False


def in_order_of_ids(model: bytes) -> bytes:
    """Adds fairseq's special tokens to a published model, and puts the pieces in the order of their ids.

    Raises:
        ValueError: the model is not a SentencePiece model, or does not begin with `<unk>`, `<s>`, `</s>`.
    """
    first, rest = _cut(model, {0, 1, 2})
    found = [piece.token for piece in first]
    if found != [*_FIRST_PIECES]:
        raise ValueError(f"the pieces begin with {found}, expected <unk>, <s>, </s>, as fairseq's ids do")
    begin = (_special(token) for token in FIRST_TOKENS)
    return b"".join([*begin, rest, *map(_special, MADEUP_WORDS)])


def in_published_order(model: bytes, size: int) -> bytes:
    """The inverse of `in_order_of_ids`.

    Args:
        model: a model in the order of the ids.
        size: the number of its pieces.

    Raises:
        ValueError: the special tokens are not at fairseq's places.
    """
    count = len(FIRST_TOKENS)
    places = {*range(count), *range(size - len(MADEUP_WORDS), size)}
    special, rest = _cut(model, places)
    found = [piece.token for piece in special]
    if found != [*FIRST_TOKENS, *MADEUP_WORDS]:
        raise ValueError(
            f"a SentencePiece file holds vocabularies that begin with {', '.join(FIRST_TOKENS)} and end with "
            f"{MADEUP_WORDS[0]} to {MADEUP_WORDS[-1]}, but this one has {', '.join(found)} there"
        )
    return b"".join([*map(_special, _FIRST_PIECES), rest])


def read_model(model: bytes) -> tuple[list[Piece], Settings]:
    """The pieces of a model, in its order, and its settings.

    Raises:
        ValueError: `model` is not a SentencePiece model.
    """
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for field in fields(model):
        if field.number == _PIECE:
            pieces.append(_read_piece(field.value))
        elif field.number == _TRAINER and isinstance(field.value, bytes):
            trainer |= {inner.number: inner.value for inner in fields(field.value)}
        elif field.number == _NORMALIZER and isinstance(field.value, bytes):
            normalizer |= {inner.number: inner.value for inner in fields(field.value)}
    charsmap = normalizer.get(_CHARSMAP, b"")
    return pieces, Settings(
        charsmap=charsmap if isinstance(charsmap, bytes) else b"",
        dummy_prefix=bool(normalizer.get(_DUMMY_PREFIX, True)),
        remove_spaces=bool(normalizer.get(_REMOVE_SPACES, True)),
        escape_spaces=bool(normalizer.get(_ESCAPE_SPACES, True)),
        unigram=trainer.get(_MODEL_TYPE, _UNIGRAM) == _UNIGRAM,
        spaces_at_ends=bool(trainer.get(_SUFFIX, False)),
        byte_fallback=bool(trainer.get(_BYTE_FALLBACK, False)),
    )


def unigram_model(pieces: Iterable[Piece], charsmap: bytes, *, dummy_prefix: bool, byte_fallback: bool) -> bytes:
    """Makes a unigram model of pieces, in the order of their ids, and normalization rules."""
    # Special tokens keep the ids of the published file; SentencePiece finds them by name and kind.
    special = ((_UNK_ID, 0), (_BOS_ID, 1), (_EOS_ID, 2))
    trainer = int_field(_MODEL_TYPE, _UNIGRAM) + int_field(_BYTE_FALLBACK, byte_fallback)
    trainer += b"".join(int_field(number, value) for number, value in special)
    normalizer = bytes_field(_CHARSMAP, charsmap) + int_field(_DUMMY_PREFIX, dummy_prefix)
    return b"".join([*map(_piece_field, pieces), bytes_field(_TRAINER, trainer), bytes_field(_NORMALIZER, normalizer)])


def with_dummy_prefix(model: bytes, dummy_prefix: bool | None) -> bytes:
    """A model that puts a space before each text, or does not; None changes nothing."""
    if dummy_prefix is None:
        return model
    return model + bytes_field(_NORMALIZER, int_field(_DUMMY_PREFIX, dummy_prefix))  # The last field counts.


def _cut(model: bytes, places: set[int]) -> tuple[list[Piece], bytes]:
    """The pieces at some places of a model, and the bytes of everything else."""
    pieces: list[Piece] = []
    kept: list[bytes] = []
    position = place = 0
    for field in fields(model):
        if len(pieces) == len(places):
            break
        if field.number == _PIECE:
            if place in places:
                pieces.append(_read_piece(field.value))
                kept.append(model[position : field.start])
                position = field.stop
            place += 1
    return pieces, b"".join([*kept, model[position:]])


def _read_piece(value: int | bytes) -> Piece:
    if not isinstance(value, bytes):
        raise ValueError("a piece is a number, expected a message")
    token, score, kind = "", 0.0, int(Kind.NORMAL)
    for field in fields(value):
        if field.number == _TOKEN and isinstance(field.value, bytes):
            token = field.value.decode()
        elif field.number == _SCORE:
            score = float_value(field.value)
        elif field.number == _KIND and isinstance(field.value, int):
            kind = field.value
    return Piece(token, score, kind)


def _piece_field(piece: Piece) -> bytes:
    message = bytes_field(_TOKEN, piece.token.encode()) + float_field(_SCORE, piece.score)
    if piece.kind != _NORMAL:
        message += int_field(_KIND, piece.kind)
    return bytes_field(_PIECE, message)


def _special(token: str) -> bytes:
    return _piece_field(Piece(token, 0.0, Kind.UNKNOWN if token == "<unk>" else Kind.CONTROL))
