"""The methods `generate`, `stream` and `score` of a model, written once for all backends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from xglm_core.config import XGLMConfig
from xglm_core.generation.config import GenerationConfig, arguments, given_options
from xglm_core.generation.engine import Engine, Processor
from xglm_core.generation.loop import Request, Streamer, generate, stream
from xglm_core.generation.prompts import Prompts
from xglm_core.generation.randomness import drawn_seed
from xglm_core.generation.rules import PrefixFunction
from xglm_core.generation.stopping import Criterion
from xglm_core.generation.transitions import transition_scores
from xglm_core.inputs import check_not_traced, inputs_as_given
from xglm_core.outputs import GenerateOutput
from xglm_core.scoring.engine import ScoringEngine, score


class GenerationSurface:
    """A base class of the causal language models. Backends implement the methods that raise `NotImplementedError`.

    Attributes:
        config: the architecture.
        generation_config: the default options of `generate`.
        own_arguments: the names of arguments of `generate`, `stream` and `score` in this backend alone.
    """

    config: XGLMConfig
    generation_config: GenerationConfig
    own_arguments: ClassVar[tuple[str, ...]] = ()

    @inputs_as_given()
    def generate(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        generation_config: GenerationConfig | None = None,
        *,
        inputs_embeds: Any = None,
        past_key_values: Any = None,
        logits_processor: Sequence[Processor] = (),
        stopping_criteria: Sequence[Criterion] = (),
        prefix_allowed_tokens_fn: PrefixFunction | None = None,
        streamer: Streamer | None = None,
        tokenizer: Any = None,
        **options: Any,
    ) -> Any:
        """Continues each row: by its likeliest tokens, by sampling, or by beam search.

        Args:
            input_ids: prompts, integers [rows, length], padded on either side, including the ids that a cache holds.
                May also be given as `inputs`. Without prompts there is one row, which begins with the option
                `bos_token_id`, or with `</s>`.
            attention_mask: 1 for tokens, 0 for padding [rows, length]. None means that `pad_token_id` is padding where
                it begins or ends a row, unless it also ends texts.
            generation_config: the options, also as an object of transformers; options that are None follow
                `self.generation_config`.
            inputs_embeds: prompts as embeddings [rows, length, d_model], in place of `input_ids`.
            past_key_values: the cache of an earlier call, which is not modified; its positions are not read again. A
                cache of a single row serves all prompts that begin with its text.
            logits_processor: functions of ids [rows, length] and logits [rows, vocab_size] that return other logits.
            stopping_criteria: functions of ids [rows, length] and the scores so far (a tuple with `output_scores`, else
                None) that return whether to end, for all rows or for each.
            prefix_allowed_tokens_fn: a function of the number of a prompt and its ids so far [length] that returns the
                ids that may follow. Each copy by `num_return_sequences` counts as a prompt of its own.
            streamer: receives the prompt and each new token, as numpy arrays.
            tokenizer: the tokenizer for `stop_strings`.
            options: options of `GenerationConfig`, which take precedence. In JAX also `params`, the parameters, and
                `prng_key`, a key to sample by in place of `seed`. In PyTorch also the arguments of an overridden
                `prepare_inputs_for_generation`.

        Returns:
            [rows, length + new], in the type of `input_ids`: the given ids, then the new tokens; rows that have ended
            are filled with padding. With `return_dict_in_generate`, a `GenerateOutput`.

        Raises:
            InputError: before anything is computed: an option is unknown, impossible or contradicts another one, or the
                prompts do not fit the model or its window. Later: logits contain NaN.
        """
        engine, request = self._generation(
            input_ids,
            attention_mask,
            generation_config,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            tokenizer=tokenizer,
            **options,
        )
        output = generate(engine, request, streamer)
        results = {
            name: self._from_numpy(value, None) if isinstance(value, np.ndarray) else value
            for name, value in output.items()
        }
        return GenerateOutput(**results) if request.generation.return_dict_in_generate else results["sequences"]

    @inputs_as_given()
    def stream(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        generation_config: GenerationConfig | None = None,
        **arguments: Any,
    ) -> Iterator[np.ndarray]:
        """`generate` as an iterator: yields the next token of each row, int64 [rows], as soon as it is chosen.

        Args:
            input_ids, attention_mask, generation_config, arguments: see `generate`; without `streamer`.

        Raises:
            InputError: see `generate`; or a beam search is asked for, in which no token is final before the end.
        """
        return stream(*self._generation(input_ids, attention_mask, generation_config, **arguments))

    @inputs_as_given()
    def score(
        self, input_ids: Any, attention_mask: Any = None, *, return_likeliest: bool = False, **own: Any
    ) -> Any | tuple[Any, Any]:
        """The log-probability of each token given those before it, without gradients, and never holding all logits.

        Args:
            input_ids: integers [batch, length], a tensor or a numpy array, padded on either side.
            attention_mask: 1 for tokens, 0 for padding [batch, length]; None means no padding.
            return_likeliest: whether to return the likeliest ids, too.
            own: in JAX `params`, the parameters; None means the model's.

        Returns:
            float32 [batch, length - 1]: column i belongs to token i + 1. It is 0 if this token is padding, or has only
            padding before it. With `return_likeliest` also the likeliest id in its place, int32 [batch, length - 1]; -1
            where nothing is predicted.

        Raises:
            InputError: see `xglm_core.scoring.engine.score`.
        """
        check_not_traced("score", self._is_traced(input_ids, attention_mask, *own.values()))
        mask = None if attention_mask is None else self._to_numpy(attention_mask)
        found = score(self._scorer(**own), self._to_numpy(input_ids), mask, self.config)
        scores, likeliest = (self._from_numpy(array, input_ids) for array in found)
        return (scores, likeliest) if return_likeliest else scores

    def compute_transition_scores(
        self, sequences: Any, scores: Sequence[Any], beam_indices: Any = None, normalize_logits: bool = False
    ) -> Any:
        """The score of each new token in the output of `generate`.

        Args:
            sequences: ids [rows, prompt + new].
            scores: the scores of `output_scores=True`, or logits, one [rows or beams, vocab_size] for each step.
            beam_indices: for beam search, as `generate` returned them.
            normalize_logits: whether to turn the scores into log-probabilities.

        Returns:
            float32 [rows, new].

        Raises:
            InputError: the arguments do not fit together.
        """
        beams = None if beam_indices is None else self._to_numpy(beam_indices)
        of_steps = map(self._to_numpy, scores)
        found = transition_scores(self._to_numpy(sequences), of_steps, beams, normalize=normalize_logits)
        return self._from_numpy(found, sequences)

    def _generation(
        self,
        input_ids: Any,
        attention_mask: Any,
        generation_config: GenerationConfig | None,
        *,
        inputs: Any = None,
        inputs_embeds: Any = None,
        past_key_values: Any = None,
        logits_processor: Sequence[Processor] = (),
        stopping_criteria: Sequence[Criterion] = (),
        prefix_allowed_tokens_fn: PrefixFunction | None = None,
        tokenizer: Any = None,
        **options: Any,
    ) -> tuple[Engine, Request]:
        """Checks everything; returns the engine and the request."""
        own = {name: options.pop(name) for name in self.own_arguments if name in options}
        input_ids, attention_mask, generation_config = arguments(input_ids, attention_mask, generation_config, inputs)
        check_not_traced("generate", self._is_traced(input_ids, attention_mask, inputs_embeds, *own.values()))
        past = self._as_cache(past_key_values)
        length, rows = (0, None) if past is None else (int(past.length), past.batch)
        past_mask = None if past is None or past.mask is None else self._to_numpy(past.mask)[:, :length]
        ids, mask, embeddings = (
            None if given is None else self._to_numpy(given) for given in (input_ids, attention_mask, inputs_embeds)
        )
        prompts = Prompts.of(self.config, ids, mask, embeddings, length, rows, past_mask, options.get("bos_token_id"))
        engine = self._engine(past, prompts, options, **own)
        generation = given_options(generation_config, self.generation_config).updated(options)
        return engine, Request(
            self.config,
            self._seeded(generation, options, **own),
            prompts,
            logits_processor,
            tokenizer,
            stopping_criteria or (),
            prefix_allowed_tokens_fn,
            self._draw_seed,
        )

    def _engine(self, past: Any, prompts: Prompts, options: dict[str, Any], **own: Any) -> Engine:
        """Makes the engine of one call.

        Args:
            past: a cache to continue, or None.
            prompts: the prompts.
            options: the options of the call; those that are not for `GenerationConfig` are removed.
            own: see `own_arguments`.

        Raises:
            InputError: the model cannot generate in its present state.
        """
        raise NotImplementedError

    def _scorer(self, **own: Any) -> ScoringEngine:
        """Makes the engine of `score`."""
        raise NotImplementedError

    def _as_cache(self, past_key_values: Any) -> Any:
        """A cache in the backend's form, with `length`, `batch` and `mask` [batch, at least length]; None for None."""
        raise NotImplementedError

    def _to_numpy(self, array: Any) -> np.ndarray:
        """Converts an array of the framework, or anything that numpy takes, to a numpy array."""
        return np.asarray(array)

    def _from_numpy(self, array: np.ndarray, like: Any) -> Any:
        """Converts a numpy array to an array of the framework, on the device of `like`, or of the model for None."""
        raise NotImplementedError

    def _is_traced(self, *values: Any) -> bool:
        """Whether the framework traces or compiles, or some values are still unknown."""
        raise NotImplementedError

    def _seeded(self, generation: GenerationConfig, options: dict[str, Any], **own: Any) -> GenerationConfig:
        """The options, with a seed that was given in another form."""
        return generation

    def _draw_seed(self) -> int:
        """Draws a seed, from the framework's generator if it has one, else from the system."""
        return drawn_seed()
