"""Run by the tests as each of two processes: they go on together from the last checkpoint, until one of them dies."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp

from tests.flax.run_on_a_mesh import SIZES
from tests.helpers.models import CONFIG, IDS, changed
from xglm_core.errors import CheckpointError
from xglm_flax import FlaxXGLMForCausalLM, make_mesh, make_train_step, place_params

ROWS = np.tile(IDS, (2, 1))
# The processes have different numbers of labels, so a mean of their means would be another loss.
BATCH = {"input_ids": ROWS, "labels": np.where(np.arange(11) < 2 * np.arange(4)[:, None], -100, ROWS)}
OPTIMIZER, STEPS = optax.adamw(1e-2), 3


def unfinished(folder: Path, number: int) -> list[Path]:
    """What is there of a checkpoint that is not complete."""
    return list(folder.glob(f"{number}.*"))


def main(rank: int, port: str, folder: Path, *, dies: bool) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
    model = FlaxXGLMForCausalLM(changed(CONFIG, dropout=0.0, attention_dropout=0.0, num_layers=1))
    step, state = make_train_step(model, OPTIMIZER, mesh=make_mesh(2))
    wait = ocp.multihost.get_barrier_sync_fn()

    def wait_or_die(*, key: str, timeout_ms: int) -> None:
        """How the processes wait for each other before a checkpoint counts as complete."""
        if dies and unfinished(folder, STEPS):
            os.kill(os.getpid(), signal.SIGKILL)
        wait(key=key, timeout_ms=timeout_ms)

    how = ocp.CheckpointManagerOptions(async_options=ocp.AsyncOptions(barrier_sync_fn=wait_or_die))
    with ocp.CheckpointManager(folder, options=how) as manager:
        state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
        mine = {name: array[2 * rank : 2 * rank + 2] for name, array in BATCH.items()}
        while (number := int(state.step) + 1) <= STEPS:
            state, metrics = step(state, mine)
            print("loss", number, float(metrics["loss"]), flush=True)
            manager.save(number, args=ocp.args.StandardSave(state))
            manager.wait_until_finished()
    save(folder.parent / "saved")


def save(folder: Path) -> None:
    """Each process has a half of the parameters; the first one writes all of them."""
    model = FlaxXGLMForCausalLM(changed(CONFIG, **SIZES, num_layers=1))
    model.params = place_params(model.params, model.config, make_mesh(1, 2))
    model.save_pretrained(folder, dtype="bfloat16")
    try:
        model.save_pretrained(folder / "config.json")
    except CheckpointError as error:
        print("not saved:", error, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), dies=sys.argv[4:] == ["dies"])
