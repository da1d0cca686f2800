"""The training loss alone, at the width of the 564M model: time, and memory beyond what goes in and comes out.

    python bench/loss.py torch chunked 8 512
    python bench/loss.py torch plain 2 256

`chunked` is `causal_lm_loss` with its gradients by states and head; `plain` makes all logits first, as one would write
it in the framework. One process each, a JSON line: the first call, which compiles, then the best of `--repeat`.
"extra_MB" is the largest resident set less that before the first call, and less the gradients. A call for 16 positions
and 4,096 words comes before that, so that what the framework loads when it first computes does not count.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

from xglm_core.loss import LossOptions

WIDTH, WORDS, FEW_WORDS = 1024, 256_008, 4096


def torch_loss(kind: str, states: np.ndarray, matrix: np.ndarray, labels: np.ndarray) -> Callable[[], Any]:
    """What to time."""
    import torch
    import torch.nn.functional as F

    from xglm_torch.fast.linear import linear
    from xglm_torch.loss import causal_lm_loss

    given = [torch.from_numpy(array).requires_grad_() for array in (states, matrix)]
    targets = torch.from_numpy(labels)

    def run() -> None:
        if kind == "chunked":
            loss = causal_lm_loss(*given, targets, options=LossOptions()).loss
        else:
            logits = linear(*given)[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten())
        loss.backward()
        for tensor in given:
            tensor.grad = None

    return run


def tf_loss(kind: str, states: np.ndarray, matrix: np.ndarray, labels: np.ndarray) -> Callable[[], Any]:
    """What to time."""
    import tensorflow as tf

    from xglm_tf.loss import causal_lm_loss

    given, targets = [tf.Variable(array) for array in (states, matrix)], tf.constant(labels, tf.int32)

    @tf.function
    def gradients() -> Any:
        with tf.GradientTape() as tape:
            if kind == "chunked":
                hidden, head = map(tf.convert_to_tensor, given)
                loss = causal_lm_loss(hidden, head, targets, options=LossOptions(), training=True).loss
            else:
                rows = tf.reshape(given[0][:, :-1], (-1, WIDTH))
                logits = tf.matmul(rows, given[1], transpose_b=True)
                wanted = tf.reshape(targets[:, 1:], (-1,))
                loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(wanted, logits))
        return tape.gradient(loss, given)

    return lambda: [tf.reshape(gradient, (-1,))[0].numpy() for gradient in gradients()]  # `numpy()` copies.


def flax_loss(kind: str, states: np.ndarray, matrix: np.ndarray, labels: np.ndarray) -> Callable[[], Any]:
    """What to time."""
    import jax
    import jax.numpy as jnp
    import optax

    from xglm_flax.loss import causal_lm_loss

    # JAX copies arrays in the background; until that is done, both copies exist.
    given = jax.block_until_ready(tuple(map(jnp.asarray, (states, matrix))))
    targets = jnp.asarray(labels, jnp.int32)

    def loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
        if kind == "chunked":
            return causal_lm_loss(hidden, head, targets).loss
        logits = jnp.einsum("bld,vd->blv", hidden[:, :-1], head)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets[:, 1:]).mean()

    gradients = jax.jit(jax.grad(loss, (0, 1)))
    return lambda: jax.block_until_ready(gradients(*given))


BACKENDS = {"torch": torch_loss, "tf": tf_loss, "flax": flax_loss}


def main() -> None:
    """Runs one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", choices=BACKENDS)
    parser.add_argument("kind", choices=("chunked", "plain"))
    parser.add_argument("rows", type=int)
    parser.add_argument("length", type=int)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    stream = np.random.default_rng(0)
    states = stream.standard_normal((arguments.rows, arguments.length, WIDTH), np.float32)
    matrix = stream.standard_normal((WORDS, WIDTH), np.float32)
    matrix *= 0.02
    labels = stream.integers(0, WORDS, (arguments.rows, arguments.length))
    gradients = (states.nbytes + matrix.nbytes) / 1e6
    few = labels[:1, :16] % FEW_WORDS
    BACKENDS[arguments.backend]("chunked", states[:1, :16].copy(), matrix[:FEW_WORDS].copy(), few)()
    run = BACKENDS[arguments.backend](arguments.kind, states, matrix, labels)
    del states, matrix
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the largest resident set is counted anew.
    seconds, before = [], resident("VmRSS")
    for _ in range(arguments.repeat + 1):
        begin = time.perf_counter()
        run()
        seconds.append(round(time.perf_counter() - begin, 3))
    extra = resident("VmHWM") - before - gradients
    names = {name: getattr(arguments, name) for name in ("backend", "kind", "rows", "length")}
    print(json.dumps({**names, "first_s": seconds[0], "best_s": min(seconds[1:]), "extra_MB": round(extra)}))


def resident(what: str) -> float:
    """The resident set [MB]: VmRSS is that of now, VmHWM the largest so far."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{what}:")]
    return int(line.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    main()
