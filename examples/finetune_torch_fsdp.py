"""Fine-tunes XGLM in PyTorch on several devices, none of which holds the whole model (FSDP2).

    torchrun --nproc-per-node 2 examples/finetune_torch_fsdp.py --output finetuned

One process for each GPU, or as many as you like on a CPU. Run again with the same --output after a crash, and it goes
on from the last state that was saved, on any number of devices.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from finetune_data import Curve, arguments, batches
from torch.distributed.device_mesh import init_device_mesh

from xglm_core import XGLMTokenizer
from xglm_torch import XGLMForCausalLM
from xglm_torch.parallel import items_per_process, load_state, save_state, shard_parameters


def main() -> None:
    """Trains, and saves the model as one checkpoint."""
    parser = arguments(__doc__)
    parser.add_argument("--bfloat16", action="store_true", help="compute in mixed precision")
    parser.add_argument("--save-every", type=int, default=20, help="steps between states to resume from (%(default)s)")
    options = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    mesh = init_device_mesh(device.type, (int(os.environ["WORLD_SIZE"]),))
    rank, ranks = dist.get_rank(), dist.get_world_size()

    tokenizer = XGLMTokenizer.from_pretrained(options.checkpoint)
    model = XGLMForCausalLM.from_pretrained(options.checkpoint).train()
    shard_parameters(model, mesh, dtype=torch.bfloat16 if options.bfloat16 else None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    start = load_state(options.output / "states", model, optimizer)
    curve = Curve("PyTorch, FSDP2", options.steps - start)
    for step, batch in enumerate(batches(tokenizer, options.steps)):
        if step < start:
            continue
        inputs = {name: torch.from_numpy(array[rank::ranks]).to(device) for name, array in batch.items()}
        items = items_per_process(inputs["labels"], attention_mask=inputs["attention_mask"])
        loss = model(**inputs, use_cache=False, num_items_in_batch=items).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach() / ranks
        dist.all_reduce(total)
        if rank == 0:
            curve.add(total.item())
        if (step + 1) % options.save_every == 0:
            save_state(options.output / "states", step + 1, model, optimizer)
    model.save_pretrained(options.output)
    if rank == 0:
        tokenizer.save_pretrained(options.output)
        curve.save(options.output)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
