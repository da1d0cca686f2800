"""`xglm compare`: one checkpoint and the user's own texts in every backend, judged by the float64 oracle."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from xglm_core.backends import BACKENDS
from xglm_core.checkpoint import open_checkpoint, plan_loading
from xglm_core.checkpoint.convert import convert_checkpoint
from xglm_core.checkpoint.dtypes import INT8
from xglm_core.cli import EXIT_FAILED, add_checkpoint
from xglm_core.compare.comparison import Comparison, compare_backends
from xglm_core.compare.report import (
    SUMMARY_HEADER,
    Tolerances,
    json_line,
    layer_table,
    legend,
    load_tolerances,
    summary_cells,
    table,
)
from xglm_core.compare.run import installed_backends, parse_backends
from xglm_core.config import XGLMConfig
from xglm_core.errors import BackendError, InputError, XGLMError
from xglm_core.generation.config import GenerationConfig
from xglm_core.inputs import check_input_ids, check_positions
from xglm_core.weight_names import num_parameters


@dataclass(frozen=True, eq=False)
class Prompts:
    """The texts to compare.

    Attributes:
        input_ids: int64 [texts, length], padded on the left.
        attention_mask: 1 for tokens, 0 for padding, int64 [texts, length].
        show: makes a readable line from a row and the ids of its continuation.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    show: Callable[[int, np.ndarray], str]


def configure(parser: argparse.ArgumentParser) -> None:
    """Sets the arguments of `xglm compare`."""
    parser.epilog = "Exit code: 0 if every backend agrees with the oracle, 1 if one does not, 2 if the input is wrong."
    add_checkpoint(parser)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--text", action="append", help="a text to read; may be repeated")
    prompts.add_argument("--ids", action="append", help="token ids instead, as in 2,31227,4447; may be repeated")
    parser.add_argument("--new-tokens", type=int, default=0, metavar="N", help="continue each text by up to N tokens")
    parser.add_argument("--backends", metavar="LIST", help=f"some of {','.join(BACKENDS)} (all that are installed)")
    parser.add_argument("--quantization", choices=[INT8.name], help="compute with int8, and say what that changes")
    parser.add_argument("--json", metavar="FILE", default="-", help="where to write the line of JSON (printed)")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="xglm-compare-") as folder:
        return _compare(arguments, Path(folder))


def _compare(arguments: argparse.Namespace, folder: Path) -> int:
    """Runs the command; the folder is for the checkpoint of int8."""
    checkpoint, floats = open_checkpoint(arguments.checkpoint, revision=arguments.revision), None
    if arguments.quantization:
        if checkpoint.is_int8:
            raise InputError(f"{arguments.checkpoint}: is int8; --quantization needs the checkpoint of floats")
        convert_checkpoint(checkpoint.folder, folder, to="safetensors", dtype=INT8, weights=checkpoint.format)
        checkpoint, floats = open_checkpoint(folder), checkpoint
    config = plan_loading(checkpoint, with_head=True).config
    prompts = (
        _read_texts(arguments.checkpoint, arguments.revision, arguments.text)
        if arguments.text
        else _read_ids(arguments.ids, config.pad_token_id or 0)
    )
    _check(prompts, config, arguments.new_tokens)
    backends, left_out = _choose_backends(arguments.backends)
    print(
        f"{arguments.checkpoint}: {num_parameters(config):,} parameters, {config.num_layers} layers, "
        f"d_model {config.d_model}, vocabulary {config.vocab_size:,}"
    )
    for line in left_out:
        print(f"Not compared: {line}")
    tolerances = load_tolerances()
    comparison = compare_backends(
        checkpoint,
        config,
        prompts.input_ids,
        prompts.attention_mask,
        new_tokens=arguments.new_tokens,
        backends=backends,
        tolerances=tolerances,
        floats=floats,
    )
    if comparison.generated:
        _print_texts(comparison, prompts)
    _print_tables(comparison, prompts, tolerances)
    _print_changes(comparison)
    _print_verdict(comparison)
    numbers = {
        "passed": not comparison.failures,
        "checkpoint": arguments.checkpoint,
        "input_ids": prompts.input_ids.tolist(),
        "tolerances": asdict(tolerances),
        **comparison.numbers(),
    }
    _write_line(arguments.json, json_line(numbers))
    return EXIT_FAILED if comparison.failures else 0


def _read_texts(checkpoint: str, revision: str | None, texts: Sequence[str]) -> Prompts:
    from xglm_core.tokenization.sentencepiece import XGLMTokenizer  # Only here: --ids needs no tokenizer.

    try:
        tokenizer = XGLMTokenizer.from_pretrained(checkpoint, revision=revision)
    except XGLMError as error:
        raise InputError(f"{error}; a checkpoint without a tokenizer takes --ids in place of --text") from None
    batch = tokenizer(list(texts), padding=True, padding_side="left", return_tensors="np", verbose=False)

    def show(row: int, ids: np.ndarray) -> str:
        # Shows the text as the user wrote it: decoding loses unknown characters.
        known = tokenizer.decode(batch.input_ids[row], skip_special_tokens=True)
        new = tokenizer.decode(ids, skip_special_tokens=True).removeprefix(known)
        return " ".join(texts[row].split()) + new

    return Prompts(batch.input_ids, batch.attention_mask, show)


def _read_ids(lists: Sequence[str], pad: int) -> Prompts:
    rows = []
    for text in lists:
        try:
            rows.append([int(number) for number in text.split(",")])
        except ValueError:
            raise InputError(f"--ids {text}: expected token ids with commas between them, as in 2,31227,4447") from None
    length = max(map(len, rows))
    ids = np.array([[pad] * (length - len(row)) + row for row in rows], np.int64)
    mask = np.array([[0] * (length - len(row)) + [1] * len(row) for row in rows], np.int64)
    return Prompts(ids, mask, lambda row, ids: ",".join(map(str, ids)))


def _check(prompts: Prompts, config: XGLMConfig, new_tokens: int) -> None:
    """Raises `InputError` early for inputs that a backend would refuse later."""
    check_input_ids(prompts.input_ids, config)
    if new_tokens:
        GenerationConfig(max_new_tokens=new_tokens).check()
    longest = int(prompts.attention_mask.sum(axis=1).max())
    check_positions(0, longest + new_tokens - 1, config)


def _choose_backends(names: str | None) -> tuple[list[str], list[str]]:
    """The backends to compare, and a line about each one that is not installed."""
    if names is not None:
        return parse_backends(names), []
    installed, missing = installed_backends()
    if not installed:
        raise BackendError(f"no backend is installed; {missing[0]}")
    return installed, missing


def _print_texts(comparison: Comparison, prompts: Prompts) -> None:
    """Prints how each backend continues each text. Nothing follows a text in its line, as it may run to the left."""
    names = list(comparison.generated)
    width = max(map(len, names))
    length = prompts.input_ids.shape[1]
    for row, parting in enumerate(comparison.partings):
        print()
        begin = length - int(prompts.attention_mask[row].sum())
        for name, ids in comparison.generated.items():
            print(f"  {name:{width}}  {prompts.show(row, ids[row, begin:])}")
        if parting:
            print(f"  {'':{width}}  (they part at new token {parting.token + 1})")
        elif len(names) > 1:
            print(f"  {'':{width}}  (the same text in {_listed(names)})")


def _print_tables(comparison: Comparison, prompts: Prompts, tolerances: Tolerances) -> None:
    rows, tokens = len(prompts.input_ids), int(prompts.attention_mask.sum())
    print(f"\nLogits of {tokens} tokens in {rows} texts: float32, against an oracle in float64 numpy")
    print(f"({legend(tolerances)})\n")
    measurements = comparison.measurements
    print(table(("", *SUMMARY_HEADER), [(name, *summary_cells(each)) for name, each in measurements.items()]))
    if comparison.between:
        worst, pair = comparison.between
        print(f"\n  {pair[0]} and {pair[1]} differ most: {worst.error:.1e} at {list(worst.index)}")
    print("\nHidden states, by layer\n")
    print(layer_table({name: [each] for name, each in measurements.items()}))


def _print_changes(comparison: Comparison) -> None:
    if comparison.changes:
        targets = next(iter(comparison.changes.values())).targets
        print(f"\nint8 in place of the stored floats, at {targets} predicted tokens\n")
        header = ("", "perplexity before", "after", "ratio", "the same likeliest token")
        rows = [
            (name, f"{each.before:.4g}", f"{each.after:.4g}", f"{each.ratio:.4f}", f"{each.same / each.targets:.1%}")
            for name, each in comparison.changes.items()
        ]
        print(table(header, rows))


def _print_verdict(comparison: Comparison) -> None:
    names = list(comparison.measurements)
    print()
    for failure in comparison.failures:
        print(f"FAIL: {failure}")
    if not comparison.failures:
        print(f"PASS: {_listed(names)} {'agree' if len(names) > 1 else 'agrees'} with the oracle")


def _write_line(path: str, line: str) -> None:
    if path == "-":
        print(line)
        return
    try:
        Path(path).write_text(f"{line}\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None


def _listed(names: Sequence[str]) -> str:
    """The names in a sentence: "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
