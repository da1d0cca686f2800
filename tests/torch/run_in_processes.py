"""What each process of test_parallel.py runs: `python -m tests.torch.run_in_processes TASK RANK FOLDER`."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tests.helpers import models
from tests.helpers.models import CONFIG, changed
from xglm_core.errors import InputError
from xglm_core.loss import LossOptions
from xglm_torch import XGLMForCausalLM
from xglm_torch.parallel import items_per_process, load_state, save_state, shard_parameters, split_layers

# Sizes that two devices can share.
EVEN = changed(CONFIG, vocab_size=134, d_model=36, ffn_dim=58, attention_heads=4, dropout=0.0, attention_dropout=0.0)
IDS = torch.from_numpy(models.IDS)
LABELS = torch.where(torch.arange(11) < torch.tensor([[2], [7]]), -100, IDS)  # Rows that differ in what counts.
MASK = torch.tensor([[0, 0] + [1] * 3 + [0] + [1] * 5, [1] * 11])  # Each before a label.
OPTIONS = LossOptions(label_smoothing=0.1, z_loss=0.01)
STEPS, LAST_SAVED = 5, 3


def load(folder):
    model = XGLMForCausalLM.from_pretrained(folder / "model").train()
    model.loss_options = OPTIONS
    return model


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def results(folder, name, model, rows, replicated):
    """The loss and gradients, the tie, scores and texts, and the exported checkpoint."""
    loss = model(IDS[rows], MASK[rows], labels=LABELS[rows], use_cache=False, num_items_in_batch=replicated).loss
    loss.backward()
    dist.all_reduce(loss.detach())
    gradients = {name: whole(p.grad) for name, p in model.named_parameters()}
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    logits = model(IDS).logits.detach()
    with torch.no_grad():
        loss_in_evaluation = model.eval()(IDS, MASK, labels=LABELS, use_cache=False, return_logits=False).loss
        scores = model.score(IDS, MASK)
        texts = model.generate(IDS, MASK, max_new_tokens=4) if name == "fsdp" else None
    model.save_pretrained(folder / name)
    if dist.get_rank() == 0:
        found = {"loss": loss.item() / 2, "evaluated": loss_in_evaluation.item(), "scores": scores, "texts": texts}
        torch.save({**found, "gradients": gradients, "tied": tied, "logits": logits}, folder / f"{name}.pt")


def check(folder, rank):
    """One device after another way of sharing the work."""
    mine = slice(rank, rank + 1)
    model = load(folder)
    shard_parameters(model)
    results(folder, "fsdp", model, mine, items_per_process(LABELS[mine], attention_mask=MASK[mine]))
    model = load(folder)
    shard_parameters(model)
    torch.save(model.score(IDS, MASK), folder / f"scored-first-{rank}.pt")  # No call before it gathers parameters.
    model = load(folder)
    split_layers(model, init_device_mesh("cpu", (2,)))
    results(folder, "tensor", model, slice(None), None)
    try:
        model(IDS, use_cache=True)
    except InputError as error:
        (folder / "cache.txt").write_text(str(error))
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    model = load(folder)
    split_layers(model, mesh["tensor"])
    shard_parameters(model, mesh["data"])
    results(folder, "mesh", model, slice(None), None)
    model = load(folder)
    shard_parameters(model, dtype=torch.bfloat16)
    results(folder, "bfloat16", model, mine, items_per_process(LABELS[mine], attention_mask=MASK[mine]))
    try:
        split_layers(XGLMForCausalLM(CONFIG), init_device_mesh("cpu", (2,)))
    except InputError as error:
        (folder / "error.txt").write_text(str(error))
    try:
        model.save_pretrained(folder / "model" / "config.json")  # No folder.
    except Exception as error:
        (folder / f"unwritable-{rank}.txt").write_text(f"{type(error).__name__}: {error}")


def train(folder, rank, *, killed):
    """Some steps of AdamW, from the last state that was saved on; of which the second process may die."""
    model = load(folder)
    shard_parameters(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(load_state(folder / "states", model, optimizer), STEPS):
        if killed and step == LAST_SAVED and rank == 1:
            os._exit(9)
        mine = slice(rank, rank + 1)
        loss = model(
            IDS[mine], labels=LABELS[mine], use_cache=False, num_items_in_batch=items_per_process(LABELS[mine])
        )
        loss.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        save = step + 1 <= LAST_SAVED
        total = loss.loss.detach().clone()
        dist.all_reduce(total)
        with (folder / f"losses-{rank}.txt").open("a") as file:
            file.write(f"{step} {total.item() / 2!r}\n")
        if save:
            save_state(folder / "states", step + 1, model, optimizer)


def main():
    task, rank, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{task}.rendezvous", rank=rank, world_size=2)
    if task == "check":
        check(folder, rank)
    else:
        train(folder, rank, killed=task == "killed")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # Threads that are not ours may abort a process that ends by itself while another one does.


if __name__ == "__main__":
    main()
