"""One backend, one task, one process: prints a JSON line with seconds and peak memory.

    xglm bench make-checkpoint --size 564M random-564M
    python bench/speed.py torch decode8 random-564M

The tasks: `load` (until every weight has been read), `prefill` (1 x 512 tokens, the last logits), `score` (4 x 256),
`decode1` and `decode8` (1 and 8 rows of 32 tokens, continued by 32), `train` (2 x 256 tokens: loss and all gradients).
The first call, which compiles, is reported by itself; then the best of `--repeat`. To compare with another program, run
both in turn on a quiet machine, and compare ratios.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

SHAPES = {"load": (1, 8), "prefill": (1, 512), "score": (4, 256), "decode1": (1, 32), "decode8": (8, 32)}
SHAPES["train"] = (2, 256)
NEW_TOKENS = 32
GREEDY = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}


def memory() -> int:
    """The largest resident set so far [MB], in which mapped pages of files count."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def torch_task(task: str, checkpoint: str, ids: np.ndarray) -> Callable[[], Any]:
    """Loads the model; returns what to time."""
    import torch

    from xglm_torch import XGLMForCausalLM

    model = XGLMForCausalLM.from_pretrained(checkpoint)
    tokens = torch.from_numpy(ids)

    def load() -> None:
        sum(float(parameter.sum()) for parameter in model.parameters())

    @torch.inference_mode()
    def prefill() -> Any:
        return model(tokens, logits_to_keep=1).logits[:, -1].argmax(-1)

    def train() -> None:
        model.train()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    score, decode = (lambda: model.score(tokens)), (lambda: model.generate(tokens, **GREEDY))
    return {"load": load, "prefill": prefill, "score": score, "train": train}.get(task, decode)


def tf_task(task: str, checkpoint: str, ids: np.ndarray) -> Callable[[], Any]:
    """Loads the model; returns what to time."""
    import tensorflow as tf

    from xglm_tf import TFXGLMForCausalLM

    model = TFXGLMForCausalLM.from_pretrained(checkpoint)
    tokens = tf.constant(ids, tf.int32)

    def load() -> None:
        sum(float(tf.reduce_sum(weight)) for weight in model.trainable_variables)

    @tf.function
    def last(tokens: tf.Tensor) -> tf.Tensor:
        return tf.argmax(model(tokens, logits_to_keep=1).logits[:, -1], -1)

    @tf.function
    def gradients(tokens: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            loss = model(tokens, labels=tokens, use_cache=False, training=True).loss
        return loss, tape.gradient(loss, model.trainable_variables)

    def prefill() -> Any:
        return last(tokens).numpy()

    def train() -> Any:
        return gradients(tokens)[0].numpy()

    score, decode = (lambda: model.score(tokens)), (lambda: model.generate(tokens, **GREEDY))
    return {"load": load, "prefill": prefill, "score": score, "train": train}.get(task, decode)


def flax_task(task: str, checkpoint: str, ids: np.ndarray) -> Callable[[], Any]:
    """Loads the model; returns what to time."""
    import jax
    import jax.numpy as jnp

    from xglm_flax import FlaxXGLMForCausalLM, make_loss_fn, stack_layers

    # As one trains where memory is short: scanned blocks, computed again in the backward pass but for three products,
    # and gradients that take the memory of those of the last step.
    keep = jax.checkpoint_policies.save_only_these_names("k_proj", "v_proj", "out_proj")
    training = {"scan_layers": True, "remat": keep} if task == "train" else {}
    model = FlaxXGLMForCausalLM.from_pretrained(checkpoint, **training)
    if task == "train":
        model.params = stack_layers(model.params)
    tokens = jnp.asarray(ids, jnp.int32)
    last = jax.jit(lambda params, tokens: model(tokens, params=params, logits_to_keep=1).logits[:, -1].argmax(-1))

    differentiated = jax.value_and_grad(make_loss_fn(model))
    batch, key = {"input_ids": tokens, "labels": tokens}, jax.random.key(0)
    gradients: list[Any] = []

    @functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
    def step(before: Any, *arguments: Any) -> Any:
        return differentiated(*arguments)

    def train() -> None:
        before = gradients.pop() if gradients else jax.tree.map(jnp.zeros_like, model.params)
        gradients.append(jax.block_until_ready(step(before, model.params, batch, key)[1]))

    tasks = {
        "load": lambda: sum(float(leaf.sum()) for leaf in jax.tree.leaves(model.params)),
        "prefill": lambda: jax.block_until_ready(last(model.params, tokens)),
        "score": lambda: jax.block_until_ready(model.score(tokens)),
        "train": train,
    }
    return tasks.get(task, lambda: jax.block_until_ready(model.generate(tokens, **GREEDY)))


BACKENDS = {"torch": torch_task, "tf": tf_task, "flax": flax_task}


def main() -> None:
    """Runs one task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", choices=BACKENDS)
    parser.add_argument("task", choices=SHAPES)
    parser.add_argument("checkpoint", help="a folder")
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    ids = np.random.default_rng(0).integers(10, 256000, size=SHAPES[arguments.task])

    seconds = []
    begin = time.perf_counter()
    run = BACKENDS[arguments.backend](arguments.task, arguments.checkpoint, ids)
    loading, loaded = time.perf_counter() - begin, memory()
    for _ in range(arguments.repeat + 1):
        begin = time.perf_counter()
        run()
        seconds.append(round(time.perf_counter() - begin, 3))
    result = {"backend": arguments.backend, "task": arguments.task, "load_s": round(loading, 2), "load_MB": loaded}
    print(
        json.dumps({**result, "first_s": seconds[0], "best_s": min(seconds[1:]), "all_s": seconds[1:], "MB": memory()})
    )


if __name__ == "__main__":
    main()
