"""What a checkpoint holds, and what is odd about it, for `xglm inspect`.

Weights are not loaded: names, types and shapes are in the headers of the files. Only a head beside an embedding of the
same shape is read, up to the first difference: nothing else shows whether the model is tied.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Unpack

from xglm_core.checkpoint.folder import Checkpoint, open_source
from xglm_core.checkpoint.formats import Format, find_format, present_formats, read_index, shortened
from xglm_core.checkpoint.loading import MOST_LAYERS, compare_weights, is_tied
from xglm_core.config import CONFIG_FILE, PRESETS, XGLMConfig
from xglm_core.errors import CheckpointError, XGLMError
from xglm_core.hub import HubOptions, Source, find_source
from xglm_core.weight_names import EMBEDDING, HEAD, IGNORED, num_parameters

_SIZES = ("vocab_size", "d_model", "ffn_dim", "num_layers", "attention_heads")
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(\..+)")
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{8}")  # The temporary files of `replacing`.


@dataclass
class Inspection:
    """The facts about a checkpoint; unknown ones are None or empty.

    Attributes:
        checkpoint: the folder or the repository.
        error: why it cannot be loaded, in one line; None if it can.
        published_size: "564M", ... if the sizes are those of a published model.
        config: all keys of the configuration.
        parameters: the numbers of parameters of the causal language model: "total", "embedding", "blocks" (with the
            final norm) and "head", which is 0 if tied; a bare decoder has no "head".
        format: the format that is read.
        other_formats: further formats in the folder.
        tensors: the number of stored tensors by type.
        tensor_bytes: the size of their values.
        head: "none stored", "equal" to the embedding bit for bit, or "differs".
        missing, unexpected, wrong_shape: the weights that do not fit the configuration.
        tokenizer_length: the number of tokens that the tokenizer knows.
        files: the size of each file in bytes; None for files of a repository that loading does not need.
        notes: oddities that do not prevent loading.
    """

    checkpoint: str
    error: str | None = None
    published_size: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    format: str | None = None
    other_formats: list[str] = field(default_factory=list)
    tensors: dict[str, int] = field(default_factory=dict)
    tensor_bytes: int | None = None
    head: str | None = None
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong_shape: list[str] = field(default_factory=list)
    tokenizer_length: int | None = None
    files: dict[str, int | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def inspect_checkpoint(
    folder: str | os.PathLike[str], weights: str | None = None, **hub: Unpack[HubOptions]
) -> Inspection:
    """Inspects a checkpoint; see `open_checkpoint` for the arguments.

    Returns:
        The facts; for a damaged checkpoint, with an `error`.

    Raises:
        CheckpointError: there is no such folder or repository.
        BackendError: the hub needs a package that is not installed.
    """
    source = find_source(folder, **hub)
    result = Inspection(source.place)
    config = None
    try:
        found = find_format(source, weights)
        result.format = found.name if found else None
        checkpoint = open_source(source, weights)
        config = checkpoint.config
        if found is not None:
            _describe_leftovers(result, source, found)
        _describe_weights(result, checkpoint)
    except XGLMError as error:
        result.error = str(error)
    result.other_formats = [format.name for format in present_formats(source.names) if format.name != result.format]
    config = config or _config_alone(source)
    if config is not None:
        _describe_config(result, config)
    _describe_tokenizer(result, source)
    _describe_files(result, source)
    return result


def _config_alone(source: Source) -> XGLMConfig | None:
    """The configuration of a checkpoint whose weights cannot be opened; None if it is damaged, too."""
    try:
        return XGLMConfig.from_json_file(source.fetch([CONFIG_FILE]) / CONFIG_FILE)
    except XGLMError:
        return None


def _describe_config(result: Inspection, config: XGLMConfig) -> None:
    result.config = config.to_dict()
    for size in PRESETS:
        published = XGLMConfig.from_preset(size)
        if all(getattr(config, key) == getattr(published, key) for key in _SIZES):
            result.published_size = size
            if config.activation_function != published.activation_function:
                result.notes.append(
                    f"activation_function is {config.activation_function!r}, but the published {size} model has "
                    f"{published.activation_function!r}; with the wrong one a model loads, and writes worse texts"
                )
    if config.num_layers > MOST_LAYERS:  # No file has so many, and counting them takes too long.
        return
    tied = config.tie_word_embeddings and result.head != "differs"
    one = XGLMConfig.from_dict({**result.config, "tie_word_embeddings": tied})
    embedding = config.vocab_size * config.d_model
    total = num_parameters(one)
    head = 0 if tied else embedding
    result.parameters = {
        "total": total,
        "embedding": embedding,
        "blocks": total - embedding - head,
        "head": head,
    }


def _describe_weights(result: Inspection, checkpoint: Checkpoint) -> None:
    """Adds what the weights show.

    Raises:
        CheckpointError: they do not fit the configuration.
    """
    infos = [checkpoint.info(name) for name in sorted(checkpoint.names)]
    infos += [info for info in checkpoint.scale_infos.values() if info is not None]
    result.tensors = dict(Counter(info.dtype.name for info in infos).most_common())
    result.tensor_bytes = sum(info.nbytes for info in infos)
    if HEAD not in checkpoint.names or EMBEDDING not in checkpoint.names:
        result.head = "none stored" if HEAD not in checkpoint.names else None
    else:
        result.head = "equal" if is_tied(checkpoint) else "differs"
    config = XGLMConfig.from_dict(checkpoint.config.to_dict())
    if result.head == "differs" and config.tie_word_embeddings:
        config.tie_word_embeddings = False
        result.notes.append(
            f"tie_word_embeddings is true, but the stored {HEAD} differs from {EMBEDDING}: the two stay untied"
        )
    elif result.head == "equal" and not config.tie_word_embeddings:
        result.notes.append(f"tie_word_embeddings is false, but the stored {HEAD} equals {EMBEDDING}: there are two")
    if checkpoint.is_int8:
        result.notes.append("the matrices are int8, with a scale for each row: PyTorch computes with them as they are")
    elif len(result.tensors) > 1:
        types = ", ".join(f"{count} in {dtype}" for dtype, count in result.tensors.items())
        result.notes.append(f"the tensors are of different types: {types}")
    if stored := sorted(checkpoint.names & IGNORED):
        result.notes.append(f"{stored[0]} is stored; it is ignored, as positions are computed from the configuration")
    _, misfits = compare_weights(checkpoint, config, with_head=True)
    result.missing, result.unexpected, result.wrong_shape = misfits.values()
    if problems := [f"{kind}: {shortened(names)}" for kind, names in misfits.items() if names]:
        raise CheckpointError(f"{result.checkpoint}: the weights do not fit config.json; {'; '.join(problems)}")


def _describe_leftovers(result: Inspection, source: Source, format: Format) -> None:
    """Notes files that look like weights of the format but do not belong to the checkpoint."""
    parts = {format.file}
    if format.file not in source.names:
        parts = {format.index, *read_index(source.fetch([format.index]) / format.index).values()}
    leftovers = [
        name
        for name in sorted(source.names - parts)
        if name == format.index
        or _UNFINISHED.fullmatch(name)
        or ((shard := _SHARD.fullmatch(name)) and "".join(shard.groups()) == format.file)
    ]
    if leftovers:
        result.notes.append(f"no part of the checkpoint, left over from another one: {shortened(leftovers)}")


def _describe_tokenizer(result: Inspection, source: Source) -> None:
    from xglm_core.tokenization.base import TOKENIZER_FILE, VOCAB_FILE
    from xglm_core.tokenization.sentencepiece import XGLMTokenizer

    if not {VOCAB_FILE, TOKENIZER_FILE} & source.names:
        result.notes.append(f"there is no tokenizer: neither {VOCAB_FILE} nor {TOKENIZER_FILE}")
        return
    try:
        result.tokenizer_length = len(XGLMTokenizer.from_source(source))
    except XGLMError as error:
        result.notes.append(f"the tokenizer cannot be read: {error}")
        return
    rows = result.config.get("vocab_size", result.tokenizer_length)
    if result.tokenizer_length != rows:
        what = "some of which the model does not have" if result.tokenizer_length > rows else "fewer than the model has"
        result.notes.append(f"the tokenizer knows {result.tokenizer_length:,} tokens, {what}: vocab_size is {rows:,}")


def _describe_files(result: Inspection, source: Source) -> None:
    for name in sorted(source.names):
        path = source.folder / name if source.folder else None
        if path is None or not path.is_dir():
            result.files[name] = path.stat().st_size if path and path.is_file() else None
