"""Continues texts in batches; those of a batch have the same options."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from xglm_core.errors import InputError
from xglm_core.generation.config import FOR_SAMPLING
from xglm_core.generation.stopping import StopStrings
from xglm_core.scoring.windows import Window, batches

_SEED = 1234  # The default seed of sampling; the harness seeds PyTorch with it.


def continued(
    lm: Any, model: Any, requests: Sequence[tuple[str, dict[str, Any]]], batch_tokens: int
) -> Iterator[tuple[list[int], str]]:
    """Continues texts.

    Equal greedy requests are computed once. Equal requests that sample get consecutive seeds, so that no text depends
    on the composition of batches.

    Args:
        lm: the adapter of the model, which encodes and decodes, and knows the limits.
        model: the causal language model.
        requests: texts, and the options of the task.
        batch_tokens: the largest number of tokens in a batch, including padding and tokens to generate.

    Yields:
        The indices of equal requests, and their continuation.

    Raises:
        InputError: an option is unknown or impossible, or leaves no room for a text.
    """
    groups: dict[tuple[str, int], dict[str, list[int]]] = {}
    copies: Counter[tuple[str, str]] = Counter()
    for number, (text, given) in enumerate(requests):
        options = json.dumps(given, sort_keys=True)
        copy = copies[text, options] if _options(given, lm.max_gen_toks)["do_sample"] else 0
        copies[text, options] += 1
        groups.setdefault((options, copy), {}).setdefault(text, []).append(number)
    for (options, copy), texts in groups.items():
        yield from _group(lm, model, json.loads(options), copy, texts, batch_tokens)


def _group(
    lm: Any, model: Any, given: dict[str, Any], copy: int, texts: dict[str, list[int]], batch_tokens: int
) -> Iterator[tuple[list[int], str]]:
    """Continues texts with the same options; `copy` says how often they were continued so before."""
    from lm_eval.models.utils import postprocess_generated_text

    options = _options(given, lm.max_gen_toks)
    if options["do_sample"]:
        options["seed"] = options.get("seed", _SEED) + copy
    until = options.pop("until")
    stops = [stop for stop in until if _may_occur(stop, lm.tokenizer)]
    room = lm.max_length + 1 - options["max_new_tokens"]
    if room < 1:
        raise InputError(
            f"{options['max_new_tokens']} tokens to generate leave no room for a text in the {lm.max_length + 1} of "
            "the model; expected fewer (max_gen_toks)"
        )
    prompts = [np.array(lm.tok_encode(text)[-room:], np.int64) for text in texts]
    numbers = list(texts.values())
    # Windows include the tokens to generate, so that `batches` counts them.
    parts = [Window(n, 0, len(prompt) + options["max_new_tokens"], 1) for n, prompt in enumerate(prompts)]
    for batch in batches(parts, batch_tokens):
        rows = [prompts[window.sequence] for window in batch]
        longest = max(map(len, rows))
        ids = np.zeros((len(rows), longest), np.int64)
        mask = np.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, longest - len(row) :] = row
            mask[place, longest - len(row) :] = 1
        results = model.generate(ids, mask, stop_strings=stops or None, tokenizer=lm.tokenizer, **options)
        results = np.asarray(results.cpu() if hasattr(results, "detach") else results)  # It may be on a GPU.
        for window, result in zip(batch, results[:, longest:], strict=True):
            if options.get("stop_at_eos", True):
                result = _without_end(result, lm.eot_token_id)
            text = postprocess_generated_text(lm.tok_decode(result), until, None)
            yield numbers[window.sequence], text


def _options(given: dict[str, Any], most: int) -> dict[str, Any]:
    """The options of `generate` for those of a task, and "until"; `most` is the default number of tokens."""
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

    options: dict[str, Any] = dict(normalize_gen_kwargs(given, most))
    options["until"] = handle_stop_sequences(options["until"], eos=None)
    options["max_new_tokens"] = options.pop("max_gen_toks")
    for name in ("num_return_sequences", "return_dict_in_generate"):
        if name in options:
            raise InputError(
                f"{name}={options[name]!r} is among a task's options; one text is expected of each request"
            )
    if not options["do_sample"]:  # Some tasks set sampling options without sampling, and the harness temperature 0.
        options = {name: value for name, value in options.items() if name not in FOR_SAMPLING}
    return options


def _may_occur(stop: str, tokenizer: Any) -> bool:
    """Whether a text of the tokenizer can contain a string. It never contains a line break, which is `</s>`."""
    try:
        StopStrings([stop], tokenizer)
    except InputError:
        return False
    return bool(stop)


def _without_end(ids: np.ndarray, end: int) -> np.ndarray:
    """The ids before the first `end`, which would be decoded as a line break if newlines are "eos"."""
    ends = np.flatnonzero(ids == end)
    return ids[: ends[0]] if len(ends) else ids
