"""Reads and writes the files of a tokenizer beside its vocabulary."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from xglm_core.errors import CheckpointError
from xglm_core.files import replacing
from xglm_core.tokenization.special_tokens import ROLES

CONFIG_FILE = "tokenizer_config.json"
_ROLES_FILE = "special_tokens_map.json"
_ADDED_FILE = "added_tokens.json"
_MODEL_CONFIG_FILE = "config.json"
SETTINGS_FILES = (CONFIG_FILE, _ROLES_FILE, _ADDED_FILE, _MODEL_CONFIG_FILE)

# Means no limit, as in the files of transformers.
NO_LIMIT = int(1e30)


def read_settings(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a tokenizer's constructor arguments from the files of a folder.

    `special_tokens_map.json` takes precedence over a `tokenizer_config.json` that does not list the added tokens, as
    older versions of transformers wrote them. If no file has `model_max_length`, the model's configuration supplies it.

    Raises:
        CheckpointError: a file cannot be read.
    """
    folder = Path(folder)
    settings = _read_object(folder / CONFIG_FILE)
    roles = _read_object(folder / _ROLES_FILE)
    settings = {**roles, **settings} if "added_tokens_decoder" in settings else {**settings, **roles}
    # The name in version 5 of transformers.
    extra = settings.pop("extra_special_tokens", None)
    if extra and "additional_special_tokens" not in settings:
        settings["additional_special_tokens"] = [*extra.values()] if isinstance(extra, dict) else extra
    added = settings.get("added_tokens_decoder") or {}
    if not isinstance(added, dict):
        raise CheckpointError(f"{folder / CONFIG_FILE}: added_tokens_decoder is not an object")
    for token, number in _read_object(folder / _ADDED_FILE).items():
        added.setdefault(str(number), token)
    if added:
        settings["added_tokens_decoder"] = added
    if settings.get("model_max_length") is None:
        settings["model_max_length"] = _read_object(folder / _MODEL_CONFIG_FILE).get("max_position_embeddings")
    return settings


def settings_files(tokenizer: Any, *, added: bool = True) -> dict[str, bytes]:
    """The contents of the files by name, from which `read_settings` reads the same settings.

    Args:
        tokenizer: the tokenizer.
        added: whether to include special and added tokens.
    """
    values = {
        "additional_special_tokens": tokenizer.additional_special_tokens,
        **{name: value for name, value in tokenizer.init_kwargs.items() if name not in ROLES},
        **{role: getattr(tokenizer, role) for role in ROLES if role != "mask_token"},
        "tokenizer_class": type(tokenizer).__name__,
    }
    # Like the published files, leaves out values that equal the defaults.
    usual = {
        "mask_token": None,
        "padding_side": "right",
        "truncation_side": "right",
        "newline": "space",
        "model_max_length": NO_LIMIT,
        "model_input_names": type(tokenizer).model_input_names,
        "split_special_tokens": False,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": None,
    }
    for name, value in usual.items():
        if getattr(tokenizer, name) != value:
            values[name] = getattr(tokenizer, name)
    if not added:
        return {CONFIG_FILE: _as_json(values)}
    # Only here are the flags of special tokens; the other places have their names.
    values["added_tokens_decoder"] = {
        str(number): token.as_json() for number, token in tokenizer.added_tokens_decoder.items()
    }
    files = {_ROLES_FILE: tokenizer.special_tokens_map}
    if behind := tokenizer.vocabulary.added:
        files[_ADDED_FILE] = {token.content: number for number, token in behind.items()}
    return {name: _as_json(value) for name, value in {CONFIG_FILE: values, **files}.items()}


def write_files(folder: str | os.PathLike[str], files: dict[str, bytes], prefix: str | None = None) -> tuple[str, ...]:
    """Writes files into a folder, created if it is missing; returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, content in files.items():
        path = folder / (f"{prefix}-{name}" if prefix else name)
        with replacing(path) as file:
            file.write(content)
        paths.append(str(path))
    return tuple(paths)


def _read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if the file does not exist."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected a JSON object, but it cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found a {type(values).__name__}")
    return values


def _as_json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
