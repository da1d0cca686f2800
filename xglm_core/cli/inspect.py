"""`xglm inspect`: shows what a checkpoint holds, and whether anything is odd about it, without loading it."""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import asdict

from xglm_core.checkpoint.formats import FORMATS, shortened
from xglm_core.checkpoint.inspection import Inspection, inspect_checkpoint
from xglm_core.cli import add_checkpoint
from xglm_core.errors import CheckpointError

_MOST_COLUMNS = 120
_LABEL = 14  # The width of the labels.


def configure(parser: argparse.ArgumentParser) -> None:
    """Sets the arguments of `xglm inspect`."""
    parser.description = (
        "Show what a checkpoint holds, and whether anything is odd about it. Weights are not loaded, and no framework "
        "is needed. Of a repository, the files that loading needs are downloaded."
    )
    parser.epilog = "Exit code: 0 if the checkpoint can be loaded, 2 if it cannot."
    add_checkpoint(parser)
    parser.add_argument("--weights", metavar="FORMAT", help=f"one of {', '.join(FORMATS)} (the first that is there)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, for programs")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    found = inspect_checkpoint(arguments.checkpoint, arguments.weights, revision=arguments.revision)
    if arguments.json:
        print(json.dumps(asdict(found), indent=2, ensure_ascii=False))
    else:
        columns = min(shutil.get_terminal_size().columns, _MOST_COLUMNS)
        print("\n".join(_lines(found, columns)))
    if found.error is not None:
        raise CheckpointError(found.error)
    return 0


def _lines(found: Inspection, columns: int) -> Iterator[str]:
    """Yields the report in lines of at most `columns` columns, unless a name is longer."""
    yield found.checkpoint
    for title, facts in (("Model", _model(found)), ("Weights", _weights(found))):
        if facts:
            yield from ("", title)
            for label, fact in facts.items():
                yield from _wrapped(f"  {label:{_LABEL}}", fact, columns)
    yield from ("", "Files, in bytes")
    width = max(map(len, found.files), default=0)
    sizes = {name: "not fetched" if size is None else f"{size:,}" for name, size in found.files.items()}
    digits = max(map(len, sizes.values()), default=0)
    for name, size in sizes.items():
        yield f"  {name:{width}}  {size:>{digits}}"
    if found.notes:
        yield from ("", "Notes")
        for note in found.notes:
            yield from _wrapped("  - ", note, columns)


def _model(found: Inspection) -> dict[str, str]:
    """The facts about the configuration, by label."""
    config, parameters = found.config, found.parameters
    if not config:
        return {}
    known = found.tokenizer_length
    tokenizer = "" if known is None else f", {known:,} in the tokenizer"
    ids = {"begin": "bos_token_id", "pad": "pad_token_id", "end": "eos_token_id", "start": "decoder_start_token_id"}
    size = f"that of the published {found.published_size} model" if found.published_size else "not one of the published"
    facts = {"size": size}
    if parameters:
        head = f"{parameters['head']:,} in the head" if parameters["head"] else "which is the head, too"
        facts["parameters"] = (
            f"{parameters['total']:,}: {parameters['blocks']:,} in the blocks, "
            f"{parameters['embedding']:,} in the embedding, {head}"
        )
    facts |= {
        "layers": f"{config['num_layers']}, with {config['attention_heads']} heads each",
        "width": f"{config['d_model']:,}, feed-forward {config['ffn_dim']:,} with {config['activation_function']}",
        "positions": f"{config['max_position_embeddings']:,}",
        "vocabulary": f"{config['vocab_size']:,} tokens{tokenizer}",
        "special ids": ", ".join(f"{label} {config[key]}" for label, key in ids.items()),
    }
    if config["pruned_heads"]:
        facts["pruned heads"] = ", ".join(
            f"{heads} of layer {layer}" for layer, heads in config["pruned_heads"].items()
        )
    if config["add_cross_attention"]:
        facts["cross-attention"] = "in each layer"
    if not config["scale_embedding"]:
        facts["embedding"] = "not scaled"
    return facts


def _weights(found: Inspection) -> dict[str, str]:
    """The facts about the weights, by label."""
    facts = {}
    if found.format:
        others = f" (also here: {', '.join(found.other_formats)})" if found.other_formats else ""
        facts["format"] = found.format + others
    if found.tensor_bytes is not None:
        types = ", ".join(f"{count:,} in {dtype}" for dtype, count in found.tensors.items())
        facts["tensors"] = f"{types}; {found.tensor_bytes:,} bytes"
    if found.head:
        facts["head"] = {
            "none stored": "none stored" + (": it is the embedding" if found.config["tie_word_embeddings"] else ""),
            "equal": "stored, equal to the embedding bit for bit",
            "differs": "stored, different from the embedding",
        }[found.head]
    for label, names in (
        ("missing", found.missing),
        ("unexpected", found.unexpected),
        ("wrong shape", found.wrong_shape),
    ):
        if names:
            facts[label] = f"{len(names)}: {shortened(names)}"
    return facts


def _wrapped(begin: str, text: str, columns: int) -> list[str]:
    return textwrap.wrap(
        text,
        columns,
        initial_indent=begin,
        subsequent_indent=" " * len(begin),
        break_long_words=False,
        break_on_hyphens=False,
    )
