"""Random calls of ours and of transformers' PyTorch classes: `python -m conformance.random_calls --count 500`.

Each call is drawn from a seed: a model, ids, padding, a form of the mask and of the labels, a type, options. What both
give is compared; a call that differs is made smaller, as long as it still differs, and printed so that it can be run
again. Needs transformers in the same environment.

Where the two differ on purpose (docs/differences-from-transformers.md), transformers is told what it does not do by
itself: positions that follow the mask, and labels without those that padding would predict.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from conformance.random_weights import random_weights
from xglm_core.config import XGLMConfig
from xglm_core.loss import counted_labels
from xglm_torch import XGLMForCausalLM

VOCAB, LENGTH, PAD, EOS = 53, 19, 1, 2
# Of float32 logits, relative to the largest: two orders of the same sums, through a few layers.
TOLERANCE = 2e-5
# In half precision both round, in another order: so many roundings of the largest number may lie between them.
ROUNDINGS = {"float32": 0.0, "bfloat16": 10 * 2.0**-8, "float16": 10 * 2.0**-11}
# Where two continuations are this close, rounding decides which comes first.
TIE = 1e-3


@dataclass(frozen=True)
class Call:
    """One call; everything in it prints as it is made."""

    seed: int
    kind: str = "forward"
    model: dict[str, Any] = field(default_factory=dict)
    rows: int = 1
    length: int = 5
    padding: str = "none"
    mask: str = "int64"
    labels: str = "none"
    dtype: str = "float32"
    options: dict[str, Any] = field(default_factory=dict)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask, int64 [rows, length]."""
        stream = np.random.RandomState(self.seed)
        ids = stream.randint(3, VOCAB, (self.rows, self.length))
        kept = (
            stream.randint(1, self.length + 1, self.rows) if self.padding != "none" else np.full(self.rows, self.length)
        )
        mask = np.arange(self.length) < kept[:, None]
        mask = mask[:, ::-1] if self.padding == "left" else mask
        return np.where(mask, ids, PAD), mask.astype(np.int64)


def drawn(seed: int) -> Call:
    """The call of a seed."""
    choose = random.Random(seed)
    model = {
        "activation_function": choose.choice(["gelu", "relu", "silu", "gelu_new"]),
        "scale_embedding": choose.random() < 0.8,
        "tie_word_embeddings": choose.random() < 0.8,
        "num_layers": choose.randint(1, 3),
    }
    common: dict[str, Any] = {
        "seed": seed,
        "model": model,
        "rows": choose.randint(1, 4),
        "length": choose.randint(1, LENGTH),
        "padding": choose.choice(["none", "left", "right"]),
        "mask": choose.choice(["int64", "int32", "bool", "float32"]),
    }
    if choose.random() < 0.5:
        return Call(**{**common, **_forward_choices(choose)})
    common["padding"] = choose.choice(["none", "left"])  # transformers continues padding on the right, with a warning.
    common["mask"] = "int64"
    return Call(**common, kind="generate", options=_generate_choices(choose, common["length"]))


def _forward_choices(choose: random.Random) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name, chance in (
        ("output_hidden_states", 0.3),
        ("output_attentions", 0.3),
        ("use_cache", 0.3),
        ("embeds", 0.3),
    ):
        if choose.random() < chance:
            options[name] = True
    if choose.random() < 0.3:
        options["logits_to_keep"] = choose.randint(0, 3)
    return {
        "labels": choose.choice(["none", "ids", "where the mask is 0, -100", "some -100"]),
        "dtype": choose.choice(["float32", "float32", "bfloat16", "float16"]),
        "options": options,
    }


def _generate_choices(choose: random.Random, length: int) -> dict[str, Any]:
    possible: dict[str, Any] = {
        "repetition_penalty": lambda: choose.choice([0.7, 1.3]),
        "no_repeat_ngram_size": lambda: choose.randint(1, 3),
        "min_new_tokens": lambda: choose.randint(1, 6),
        "min_length": lambda: length + choose.randint(1, 6),
        "bad_words_ids": lambda: [
            [choose.randint(3, VOCAB - 1) for _ in range(choose.randint(1, 2))] for _ in range(3)
        ],
        "suppress_tokens": lambda: choose.sample(range(3, VOCAB), 9),
        "begin_suppress_tokens": lambda: choose.sample(range(3, VOCAB), 20),
        "forced_eos_token_id": lambda: EOS,
        "eos_token_id": lambda: [EOS, *choose.sample(range(3, VOCAB), 3)],
        "sequence_bias": lambda: [[[choose.randint(3, VOCAB - 1)], 3.0], [[choose.randint(3, VOCAB - 1), 9], -4.0]],
        "renormalize_logits": lambda: True,
    }
    options = {name: possible[name]() for name in choose.sample(sorted(possible), choose.randint(0, 3))}
    options["max_new_tokens"] = choose.randint(1, 9)
    if "min_new_tokens" in options:
        options["min_new_tokens"] = min(options["min_new_tokens"], options["max_new_tokens"])
    if "min_length" in options:  # More than can be is an error here.
        options["min_length"] = min(options["min_length"], length + options["max_new_tokens"])
    if choose.random() < 0.4:
        options["num_beams"] = choose.randint(2, 4)
        options["max_new_tokens"] += 2  # Where there are fewer ends than beams, each side fills up in its own way.
        options["length_penalty"] = choose.choice([0.0, 1.0, 2.0])
        options["early_stopping"] = choose.choice([True, False, "never"])
        options["num_return_sequences"] = choose.randint(1, options["num_beams"])
    return options


def difference(call: Call) -> str | None:
    """What differs between ours and theirs in a call; None if nothing does."""
    ours, theirs = _models(call)
    with torch.no_grad():
        if call.kind == "generate":
            return _generate_difference(call, ours, theirs)
        found, expected = _forward(call, ours, ours=True), _forward(call, theirs, ours=False)
    if found.keys() != expected.keys():
        return f"results: {sorted(found)} here, {sorted(expected)} there"
    for name, value in found.items():
        other = expected[name]
        if value.shape != other.shape:
            return f"{name}: {list(value.shape)} here, {list(other.shape)} there"
        allowed = (TOLERANCE + ROUNDINGS[call.dtype]) * max(1.0, np.abs(other).max(initial=0))
        far = np.abs(value - other).max(initial=0)
        if not far <= allowed:
            return f"{name}: {far:.2g} apart, at most {allowed:.2g} expected"
    return None


def _models(call: Call) -> tuple[Any, Any]:
    """Both models with the same random weights."""
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "max_position_embeddings": 61,
        "d_model": 28,
        "ffn_dim": 37,
        "attention_heads": 4,
    }
    config = XGLMConfig(**sizes, **call.model)
    weights = {name: torch.from_numpy(value) for name, value in random_weights(config, 5).items()}
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    dtype = getattr(torch, call.dtype)
    theirs_config = transformers.XGLMConfig(**sizes, **call.model, attn_implementation="eager")
    models = XGLMForCausalLM(config), transformers.XGLMForCausalLM(theirs_config)
    for model in models:
        model.load_state_dict(weights, strict=True)
        model.eval().to(dtype)
    return models


def _forward(call: Call, model: Any, *, ours: bool) -> dict[str, np.ndarray]:
    """The results of a call by name, float64, without what padding has."""
    ids, mask = call.arrays()
    arguments = {name: value for name, value in call.options.items() if name != "embeds"}
    given = torch.from_numpy(ids)
    if call.options.get("embeds"):
        arguments["inputs_embeds"] = model.get_input_embeddings()(given)
    else:
        arguments["input_ids"] = given
    if call.padding != "none" or call.seed % 2:
        arguments["attention_mask"] = torch.from_numpy(mask).to(getattr(torch, call.mask))
    if call.labels != "none":
        labels = ids.copy()
        if call.labels == "some -100":
            labels[np.random.RandomState(call.seed + 1).random_sample(labels.shape) < 0.4] = -100
        elif call.labels != "ids":
            labels[mask == 0] = -100
        labels = labels if ours else counted_labels(labels, mask)
        if (counted_labels(labels, mask)[:, 1:] != -100).any():  # Of nothing, transformers' mean is no number.
            arguments["labels"] = torch.from_numpy(labels)
            arguments["logits_to_keep"] = 0  # With labels, transformers would judge the kept positions alone.
    if not ours:
        arguments["position_ids"] = torch.from_numpy(np.maximum(mask.cumsum(axis=1) - 1, 0))
    outputs = model(**arguments)
    keep = mask[:, ids.shape[1] - outputs.logits.shape[1] :, None] != 0
    found = {"logits": _numpy(outputs.logits) * keep}
    if outputs.loss is not None:
        found["loss"] = _numpy(outputs.loss)
    for name in ("hidden_states", "attentions"):
        for index, value in enumerate(getattr(outputs, name) or ()):
            tokens = mask[:, :, None] if name == "hidden_states" else mask[:, None, :, None]
            found[f"{name}[{index}]"] = _numpy(value) * tokens
    return found


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def _generate_difference(call: Call, ours: Any, theirs: Any) -> str | None:
    ids, mask = call.arrays()
    options = {"pad_token_id": PAD, "eos_token_id": EOS, "do_sample": False, **call.options}
    found, expected = (
        model.generate(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), **options).numpy()
        for model in (ours, theirs)
    )
    if found.shape == expected.shape and (found == expected).all():
        return None
    if _is_tie(call, ours, found, expected):
        return None
    return f"sequences: {found.tolist()} here, {expected.tolist()} there"


def _is_tie(call: Call, model: Any, found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether rounding may have decided where greedy sequences part: two logits there are as good as equal."""
    if found.shape[0] != expected.shape[0] or "num_beams" in call.options:
        return False
    ids, mask = call.arrays()
    width = min(found.shape[1], expected.shape[1])
    for row in np.flatnonzero((found[:, :width] != expected[:, :width]).any(axis=1)):
        place = int(np.argmax(found[row] != expected[row, : found.shape[1]])) if width else 0
        text = torch.from_numpy(np.concatenate([ids[row][mask[row] != 0], found[row, call.length : place]]))[None]
        logits = model(text).logits[0, -1]
        if abs(float(logits[found[row, place]] - logits[expected[row, place]])) > TIE:
            return False
    return found.shape == expected.shape


def smaller(call: Call) -> Iterator[Call]:
    """Calls with a little less in them."""
    for name in call.options:
        if name != "max_new_tokens":
            yield dataclasses.replace(call, options={key: call.options[key] for key in call.options if key != name})
    for name in call.model:
        yield dataclasses.replace(call, model={key: call.model[key] for key in call.model if key != name})
    plain = Call(call.seed)
    for name in ("padding", "mask", "labels", "dtype"):
        if getattr(call, name) != getattr(plain, name):
            yield dataclasses.replace(call, **{name: getattr(plain, name)})
    for name in ("rows", "length"):
        for value in {1, getattr(call, name) // 2, getattr(call, name) - 1} - {0, getattr(call, name)}:
            yield dataclasses.replace(call, **{name: value})
    if call.options.get("max_new_tokens", 1) > 1:
        yield dataclasses.replace(call, options={**call.options, "max_new_tokens": call.options["max_new_tokens"] - 1})


def shrunk(call: Call) -> Call:
    """The smallest call that still differs in the same thing, by steps of `smaller`."""
    what = _subject(call)
    return next((shrunk(candidate) for candidate in smaller(call) if _subject(candidate) == what), call)


def _subject(call: Call) -> str | None:
    """What differs, or the error, without the numbers."""
    found = outcome(call)
    return found and found[:20].partition("[")[0]


def outcome(call: Call) -> str | None:
    """`difference`, where an error of either side is a difference, too."""
    try:
        return difference(call)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main() -> int:
    """Draws and compares; the exit status says whether all calls agreed."""
    parser = argparse.ArgumentParser(
        prog="python -m conformance.random_calls", description=(__doc__ or "").partition(":")[0]
    )
    parser.add_argument("--count", type=int, default=500, help="calls to draw (%(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first call; each one after has the next (%(default)s)"
    )
    arguments = parser.parse_args()
    found = 0
    for seed in range(arguments.seed, arguments.seed + arguments.count):
        if outcome(drawn(seed)) is None:
            continue
        found += 1
        call = shrunk(drawn(seed))
        print(f"{call}\n    {outcome(call)}", flush=True)
    print(f"{arguments.count} calls from seed {arguments.seed} on: {found} differ")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
