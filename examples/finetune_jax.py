"""Fine-tunes the bundled model on sentences about the weather, in JAX.

    python examples/finetune_jax.py --output runs/jax
    python examples/finetune_jax.py --output runs/jax --mesh 4x2    # 4 groups, which divide the model between 2 devices

The run can be stopped at any time and goes on where its last checkpoint is. `--mesh` needs as many devices, and a model
that they divide; on a CPU, XLA_FLAGS=--xla_force_host_platform_device_count=8 makes eight of one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from finetune_data import Curve, arguments, batches

from xglm_core import XGLMTokenizer
from xglm_flax import FlaxXGLMForCausalLM, make_mesh, make_train_step


def main() -> None:
    """Trains, saves, and shows what the model says."""
    parser = arguments(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--mesh", help="groups of devices x devices of each, as in 4x2 (one device)")
    parser.add_argument("--accumulation-steps", type=int, default=1, help="parts of each batch (%(default)s)")
    parser.add_argument(
        "--remat", default="none", help="none, dots or full: compute again, to save memory (%(default)s)"
    )
    parser.add_argument("--save-every", type=int, default=20, help="steps between checkpoints (%(default)s)")
    options = parser.parse_args()

    tokenizer = XGLMTokenizer.from_pretrained(options.checkpoint)
    model = FlaxXGLMForCausalLM.from_pretrained(options.checkpoint, remat=options.remat)
    mesh = make_mesh(*map(int, options.mesh.split("x"))) if options.mesh else None
    optimizer = optax.adamw(options.learning_rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01)
    step, state = make_train_step(
        model, optimizer, params=model.params, mesh=mesh, accumulation_steps=options.accumulation_steps
    )

    curve = Curve("jax", options.steps)
    with ocp.CheckpointManager((options.output / "checkpoints").resolve()) as manager:
        state, done = resumed(manager, state, curve)
        for number, batch in enumerate(batches(tokenizer, options.steps), start=1):
            if number <= done:
                continue
            state, metrics = step(state, batch)
            curve.add(metrics["loss"])
            if number % options.save_every == 0 or number == options.steps:
                saved = ocp.args.Composite(state=ocp.args.StandardSave(state), losses=ocp.args.JsonSave(curve.losses))
                manager.save(number, args=saved)
    curve.save(options.output)

    model.params = jax.tree.map(np.asarray, state.params)
    model.save_pretrained(options.output)
    prompt = np.array([tokenizer("Tomorrow by the")["input_ids"]])
    print(tokenizer.decode(np.asarray(model.generate(prompt, max_new_tokens=12))[0], skip_special_tokens=True))


def resumed(manager: ocp.CheckpointManager, state: Any, curve: Curve) -> tuple[Any, int]:
    """The state of the last checkpoint and the number of its step; the one to begin with and 0 if there is none."""
    number = manager.latest_step()
    if number is None:
        return state, 0
    wanted = ocp.args.Composite(state=ocp.args.StandardRestore(state), losses=ocp.args.JsonRestore())
    found = manager.restore(number, args=wanted)
    curve.losses = list(found.losses)
    print(f"goes on after step {number}")
    return found.state, number


if __name__ == "__main__":
    main()
