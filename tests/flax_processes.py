"""Run by the tests as each of two processes: they go on together from a checkpoint that one process wrote."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp

from tests.models import CONFIG, IDS, changed
from xglm_flax import FlaxXGLMForCausalLM, make_mesh, make_train_step

ROWS = np.tile(IDS, (2, 1))
# The processes have different numbers of labels, so a mean of their means would be another loss.
BATCH = {"input_ids": ROWS, "labels": np.where(np.arange(11) < 2 * np.arange(4)[:, None], -100, ROWS)}


def start(mesh=None):
    """The step and the state that all processes begin with."""
    model = FlaxXGLMForCausalLM(changed(CONFIG, dropout=0.0, attention_dropout=0.0, num_layers=1))
    return make_train_step(model, optax.adamw(1e-2), mesh=mesh)


def main(rank: int, port: str, checkpoint: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
    step, state = start(make_mesh(2))
    with ocp.CheckpointManager(Path(checkpoint)) as manager:
        state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
        mine = {name: array[2 * rank : 2 * rank + 2] for name, array in BATCH.items()}
        for _ in range(2):
            state, metrics = step(state, mine)
            print("loss", float(metrics["loss"]), flush=True)
            manager.save(int(state.step), args=ocp.args.StandardSave(state))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
