"""What `generate`, `stream` and `score` know of JAX: its arrays, its tracers and its keys.

Differs: Keras has this in causal_lm.py; neither PyTorch nor Keras has parameters or keys as arguments.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xglm_core.errors import InputError
from xglm_core.generation.config import GenerationConfig
from xglm_core.generation.surface import GenerationSurface
from xglm_core.inputs import inputs_as_given
from xglm_flax.weights import Params


class FlaxGenerationSurface(GenerationSurface):
    """The shared surface, with parameters and keys as arguments."""

    own_arguments = ("params", "prng_key")

    @inputs_as_given()
    def generate(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        generation_config: GenerationConfig | None = None,
        *,
        params: Params | None = None,
        prng_key: jax.Array | None = None,
        **arguments: Any,
    ) -> Any:
        """Continues each row; see `GenerationSurface.generate`.

        Args:
            input_ids, attention_mask, generation_config, arguments: see there.
            params: the parameters; None means the model's.
            prng_key: a key of JAX, to sample by in place of `seed`.
        """
        return super().generate(
            input_ids, attention_mask, generation_config, params=params, prng_key=prng_key, **arguments
        )

    @inputs_as_given()
    def score(  # type: ignore[override]  # `params` is all that `own` may be.
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        return_likeliest: bool = False,
        params: Params | None = None,
    ) -> Any:
        """The log-probability of each token; see `GenerationSurface.score`. Without `params`, the model's are used."""
        return super().score(input_ids, attention_mask, return_likeliest=return_likeliest, params=params)

    def _from_numpy(self, array: np.ndarray, like: Any) -> jax.Array:
        # In 32 bits unless JAX is told to have more.
        return jnp.asarray(array.astype(jax.dtypes.canonicalize_dtype(array.dtype)))

    def _is_traced(self, *values: Any) -> bool:
        return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))

    def _seeded(
        self, generation: GenerationConfig, options: dict[str, Any], *, prng_key: Any = None, **own: Any
    ) -> GenerationConfig:
        """The options, with the seed that a key of JAX stands for.

        Args:
            generation: the options of the call.
            options: those that were given beside the key.
            prng_key: a key of JAX, or its data, uint32 [any]; or None.
            own: has no effect.

        Raises:
            InputError: it is no key, a seed is given as well, or nothing is drawn.
        """
        if prng_key is None:
            return generation
        if options.get("seed") is not None:
            raise InputError("seed and prng_key are both given, expected one of the two")
        if not generation.do_sample:
            raise InputError("prng_key has no effect without do_sample=True")
        is_key = jnp.issubdtype(getattr(prng_key, "dtype", np.int64), jax.dtypes.prng_key)
        data = np.asarray(jax.random.key_data(prng_key) if is_key else prng_key)
        if data.dtype != np.uint32 or data.ndim != 1:
            raise InputError(
                f"prng_key is {data.dtype} {list(data.shape)}, expected a single key, such as jax.random.key(0)"
            )
        return dataclasses.replace(generation, seed=int.from_bytes(data.astype("<u4").tobytes(), "little"))
