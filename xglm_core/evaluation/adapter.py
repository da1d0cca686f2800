"""The harness's interface to a model, over `score` and `generate` of any backend.

The harness makes the requests and judges the answers. Its base class is mixed in when the harness is loaded, so this
module does not need the harness.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

from xglm_core import __version__
from xglm_core.cli.models import load, place_model
from xglm_core.errors import InputError
from xglm_core.evaluation.continuation import continued
from xglm_core.scoring.continuations import Pair, score_continuations
from xglm_core.scoring.texts import BATCH_TOKENS
from xglm_core.tokenization.base import Tokenizer
from xglm_core.tokenization.sentencepiece import XGLMTokenizer

Answer = tuple[float, bool]  # The log-probability of a continuation, and whether greedy generation would give it.


class Adapter:
    """A causal language model for the harness; `xglm_core.evaluation.register` makes it a model of the harness.

    Args:
        pretrained: a checkpoint, as everywhere in this package; or a loaded causal language model, with `tokenizer`.
        tokenizer: the tokenizer of a loaded model.
        name: the model's name in results; None means that of the checkpoint.
        backend: for a checkpoint: "torch", "tf", "flax", or "auto" for the first that is installed.
        revision, dtype: for a checkpoint; see `from_pretrained`.
        newline: what line breaks become, "space" or "eos"; None follows the tokenizer.
        batch_tokens: the largest number of tokens in a batch, including padding and tokens to generate.
        device: the device for PyTorch; None leaves the model where it is.
        batch_size, max_batch_size: arguments of the harness's command line without effect; see `batch_tokens`.

    Raises:
        InputError: the arguments contradict each other.
        XGLMError: the checkpoint cannot be loaded.
    """

    cache_hook: Any  # The harness's; can store answers in a file.

    def __init__(
        self,
        pretrained: Any,
        tokenizer: Tokenizer | None = None,
        *,
        name: str | None = None,
        backend: str = "auto",
        revision: str | None = None,
        dtype: str = "float32",
        newline: str | None = None,
        batch_tokens: int = BATCH_TOKENS,
        device: str | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
    ) -> None:
        super().__init__()
        if batch_tokens < 1:
            raise InputError(f"batch_tokens is {batch_tokens}, expected 1 or more")
        if newline not in (None, "space", "eos"):
            raise InputError(f"newline is {newline!r}, expected space or eos")
        self._name = name or (pretrained if isinstance(pretrained, str) else type(pretrained).__name__)
        if isinstance(pretrained, str):
            self.tokenizer = tokenizer or XGLMTokenizer.from_pretrained(pretrained, revision=revision)
            backend, self._model = load(pretrained, revision, backend, dtype, device)
        elif tokenizer is None:
            raise InputError("tokenizer is None, but pretrained is a loaded model; expected its tokenizer as well")
        else:
            self.tokenizer, self._model = tokenizer, pretrained
            backend = type(pretrained).__module__.partition(".")[0].removeprefix("xglm_")
            place_model(pretrained, backend, device)
        self._backend, self._newline, self._batch_tokens = backend, newline, batch_tokens

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self._end

    @property
    def prefix_token_id(self) -> int:
        """The id that precedes every text: `</s>`, as in XGLM's training."""
        return self._end

    @property
    def max_length(self) -> int:
        """The number of tokens that the model can read to predict one more; that one, too, must fit into the model."""
        return int(self._model.config.max_position_embeddings) - 1

    @property
    def max_gen_toks(self) -> int:
        """The default number of tokens to generate."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        """The name for the harness's files of requests."""
        return self._name.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Information about the model for the harness's results."""
        return {
            "pretrained": self._name,
            "backend": self._backend,
            "newline": self._newline or self.tokenizer.newline,
            "xglm_version": __version__,
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **ignored: Any) -> list[int]:
        """The ids of a text, after one `</s>` unless `add_special_tokens` is False; none follows it.

        So the ids of a text begin with those of its beginning, except for a token that crosses the end of that part.
        """
        options: dict[str, Any] = {"add_special_tokens": False, "newline": self._newline, "verbose": False}
        ids: list[int] = self.tokenizer(string, **options).input_ids
        wants = (not ids or ids[0] != self._end) if add_special_tokens is None else add_special_tokens
        return [self._end, *ids] if wants else ids

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        """The text of ids."""
        return self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens, newline=self._newline)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Answer]:
        """For each (context, continuation): the log-probability, and whether greedy generation would give it."""
        for request in requests:
            context, continuation = request.args
            if not context and not self.tok_encode(continuation, add_special_tokens=False):
                raise InputError(f"the continuation {continuation!r:.80} after no context has no tokens")
        answers: list[Answer] = super().loglikelihood(requests, disable_tqdm or not sys.stderr.isatty())  # type: ignore[misc]
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **ignored: Any
    ) -> list[Answer]:
        """The answers for (texts, ids of the context, ids of the continuation)."""
        for texts, _, ids in requests:
            if not 1 <= len(ids) <= self.max_length:
                context, continuation = texts
                raise InputError(
                    f"the continuation {continuation!r:.80} after {context!r:.80} has {len(ids):,} tokens of its own, "
                    f"expected 1 to {self.max_length:,}"
                )
        answers: list[Answer] = [(math.nan, False)] * len(requests)
        pairs = [(context, continuation) for _, context, continuation in requests]
        for number, score, greedy in self._scored(pairs, disable_tqdm):
            answers[number] = score, greedy
            self.cache_hook.add_partial("loglikelihood", requests[number][0], answers[number])
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text; longer texts are read in the harness's windows."""
        from lm_eval import utils

        pairs, numbers = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            for window in map(utils.make_disjoint_window, windows):
                pairs.append(window)
                numbers.append(number)
        parts: list[list[float]] = [[] for _ in requests]
        for place, score, _ in self._scored(pairs, disable_tqdm):
            parts[numbers[place]].append(score)
        answers = list(map(math.fsum, parts))
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each text, up to its first stop string or `</s>`."""
        answers = [""] * len(requests)
        arguments = [request.args for request in requests]
        with _progress("continuations", len(requests), disable_tqdm) as progress:
            for numbers, text in continued(self, self._model, arguments, self._batch_tokens):
                for number in numbers:
                    answers[number] = text
                self.cache_hook.add_partial("generate_until", arguments[numbers[0]], text)
                progress.update(len(numbers))
        return answers

    @property
    def _end(self) -> int:
        end: int | None = self.tokenizer.sep_token_id
        if end is None:
            raise InputError("every text begins with sep_token (</s>), but the tokenizer has none; set it")
        return end

    def _scored(self, pairs: Sequence[Pair], disable_tqdm: bool) -> Any:
        with _progress("log-probabilities", len(pairs), disable_tqdm) as progress:
            for answer in score_continuations(self._model, pairs, self._batch_tokens):
                yield answer
                progress.update()


def _progress(what: str, total: int, disabled: bool) -> Any:
    """A progress bar on stderr, like the harness's; only on a terminal."""
    from tqdm import tqdm

    return tqdm(total=total, desc=what, disable=disabled or None)
