"""Reads the pickles inside PyTorch checkpoints without running any of their code.

A pickle is a program for a stack machine; unpickling it calls whatever functions it names. The machine here has no
functions: it knows only the instructions and names that state dicts consist of, refuses all others, and builds
descriptions of tensors. A `pickle.Unpickler` with a strict `find_class` would be shorter. But it lets the file set
attributes of the objects that `find_class` returns, reserves memory by the largest index in the file, and does not
limit what it builds.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from xglm_core.checkpoint.tensor_file import shown
from xglm_core.errors import CheckpointError

# Far above the needs of any XGLM. Together they limit the memory of a pickle to 100 MB.
MOST_BYTES = 2**23
_MOST_STEPS = 500_000
_MOST_BITS = 128  # Python refuses to print much longer integers in messages.

_KINDS = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_STORAGES = {f"torch.{kind}Storage" for kind in _KINDS}
_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETERS = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
_DICTIONARY = "collections.OrderedDict"
NAMESPACE = "argparse.Namespace"
_NAMES = {*_STORAGES, *_PARAMETERS, _TENSOR, _DICTIONARY}


@dataclass(frozen=True)
class Storage:
    """A sequence of values: their kind, such as "HalfStorage", their key in the file, and how many there are."""

    kind: str
    key: str
    count: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor within a storage; nothing is checked yet.

    `flags` say what must still be done with the values: "neg" means that they are negated, "conj" conjugated.
    """

    storage: Storage
    offset: Any
    shape: Any
    strides: Any
    flags: dict[Any, Any]


class Record(dict[Any, Any]):
    """The attributes of an object that is not created."""


@dataclass(frozen=True)
class _Name:
    """The name of a class or function in the pickle."""

    name: str


class TensorPickle:
    """One pickle.

    Args:
        data: bytes that begin with the pickle.
        damaged: makes an error from a reason.
        records: whether `argparse.Namespace` is allowed; it becomes a `Record`.

    Attributes:
        value: the pickled value.
        size: the number of bytes of the pickle.
        storages: the storages of its tensors, by key.

    Raises:
        CheckpointError: it is not a pickle of tensors and plain values.
    """

    def __init__(self, data: bytes, damaged: Callable[[str], CheckpointError], *, records: bool = False) -> None:
        self.storages: dict[str, Storage] = {}
        self._damaged = damaged
        self._names = _NAMES | {NAMESPACE} if records else _NAMES
        self._stack: list[Any] = []
        self._marks: list[int] = []  # Positions on the stack.
        self._memo: dict[int, Any] = {}
        self._run(io.BytesIO(data[:MOST_BYTES]))

    def _run(self, stream: io.BytesIO) -> None:
        try:
            for step, (instruction, argument, _) in enumerate(pickletools.genops(stream)):
                if step == _MOST_STEPS:
                    raise self._damaged(f"the pickle has more than {_MOST_STEPS} instructions")
                if instruction.name == "STOP":
                    self.value: Any = self._pop()
                    self.size = stream.tell()
                    return
                self._step(instruction.name, argument)
        except CheckpointError:
            raise
        except ValueError:
            pass  # The message of pickletools would quote the file.
        raise self._damaged("the pickle is damaged or cut short; the file is truncated or of another kind")

    def _step(self, name: str, argument: Any) -> None:
        match name:
            case "PROTO" | "FRAME":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                self._stack.append(_EMPTY[name]())
            case _ if name in _LITERALS:
                if isinstance(argument, int) and argument.bit_length() > _MOST_BITS:
                    raise self._damaged(f"the pickle has an integer of {argument.bit_length()} bits")
                self._stack.append(argument)
            case "MARK":
                self._marks.append(len(self._stack))
            case "TUPLE":
                self._stack.append(tuple(self._pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self._stack.append(tuple(self._pop_many(int(name[-1]))))
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                self._memo[argument] = self._top(object)
            case "MEMOIZE":
                self._memo[len(self._memo)] = self._top(object)
            case "BINGET" | "LONG_BINGET" | "GET":
                if argument not in self._memo:
                    raise self._damaged(f"the pickle uses its value {argument} before it has one")
                self._stack.append(self._memo[argument])
            case "APPEND" | "APPENDS":
                values = self._pop_many(1) if name == "APPEND" else self._pop_to_mark()
                self._top(list).extend(values)
            case "SETITEM" | "SETITEMS":
                self._set_items(self._pop_many(2) if name == "SETITEM" else self._pop_to_mark())
            case "GLOBAL":
                self._name(argument.replace(" ", ".", 1))
            case "STACK_GLOBAL":
                self._name(".".join(str(part) for part in self._pop_many(2) if isinstance(part, str)))
            case "REDUCE" | "NEWOBJ":
                self._build(*self._pop_many(2))
            case "BUILD":
                state = self._pop()
                owner = self._top(dict)  # For an OrderedDict this is `_metadata`, which no reader needs.
                if isinstance(owner, Record) and isinstance(state, dict):
                    owner.update(state)
            case "BINPERSID":
                self._storage(self._pop())
            case _:
                raise self._damaged(f"the pickle has the instruction {name}, which no checkpoint needs")

    def _pop(self) -> Any:
        return self._pop_many(1)[0]

    def _pop_many(self, count: int) -> list[Any]:
        """Takes the last values, which must lie above the last mark."""
        height = len(self._stack) - count
        if height < (self._marks[-1] if self._marks else 0):
            raise self._damaged("the pickle takes values from an empty stack")
        values = self._stack[height:]
        del self._stack[height:]
        return values

    def _pop_to_mark(self) -> list[Any]:
        if not self._marks:
            raise self._damaged("the pickle looks for a mark that it never set")
        count = len(self._stack) - self._marks[-1]
        values = self._pop_many(count)
        self._marks.pop()
        return values

    def _top(self, kind: type) -> Any:
        value = self._pop()
        if not isinstance(value, kind):
            raise self._damaged(f"the pickle treats a {type(value).__name__} as a {kind.__name__}")
        self._stack.append(value)
        return value

    def _set_items(self, items: list[Any]) -> None:
        target = self._top(dict)
        if len(items) % 2:
            raise self._damaged("the pickle has a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int):
                raise self._damaged(f"the pickle has a {type(key).__name__} as a key, expected a text or a number")
            if key in target:
                raise self._damaged(f"the pickle names {shown(str(key))} twice")
            target[key] = value

    def _name(self, name: str) -> None:
        if name not in self._names:
            raise self._damaged(
                f"refused: the pickle names {shown(name)}, which no tensor needs; nothing of it was run, "
                "but do not load this file with other programs"
            )
        self._stack.append(_Name(name))

    def _build(self, function: Any, arguments: Any) -> None:
        """Pushes what a call of one of the names would return."""
        match function, arguments:
            case _Name(name), () if name == _DICTIONARY:
                value: Any = {}
            case _Name(name), () if name == NAMESPACE:
                value = Record()
            case _Name(name), (Storage() as storage, offset, shape, strides, _, _, *flags) if (
                name == _TENSOR and len(flags) < 2 and all(isinstance(given, dict | None) for given in flags)
            ):
                value = StoredTensor(storage, offset, shape, strides, dict(*filter(None, flags)))
            case _Name(name), (StoredTensor() as tensor, *_) if name in _PARAMETERS:
                value = tensor
            case _Name(name), _:
                raise self._damaged(f"the pickle gives {name} other arguments than PyTorch does")
            case _:
                raise self._damaged(f"refused: the pickle calls a {type(function).__name__}")
        self._stack.append(value)

    def _storage(self, description: Any) -> None:
        match description:
            case ("storage", _Name(kind), str(key), str(), int(count), *view) if (
                kind in _STORAGES and count >= 0 and view in ([], [None])
            ):
                storage = Storage(kind.removeprefix("torch."), key, count)
            case _:
                raise self._damaged("the pickle describes a storage in another way than PyTorch does")
        if self.storages.setdefault(key, storage) != storage:
            raise self._damaged(f"the pickle describes the storage {shown(key)} in two ways")
        self._stack.append(storage)


_EMPTY: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
