"""Fine-tunes XGLM in PyTorch on a mesh of devices: groups of them share each layer, and the groups share the rows.

    torchrun --nproc-per-node 4 examples/finetune_torch_mesh.py --tensor 2 --output finetuned

The devices of a group, which should be close to each other, have a part of each block's heads and inner units and of
the vocabulary. The same parts of all groups are sharded among them (FSDP2).
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from finetune_data import Curve, arguments, batches
from torch.distributed.device_mesh import init_device_mesh

from xglm_core import XGLMTokenizer
from xglm_torch import XGLMForCausalLM
from xglm_torch.parallel import items_per_process, shard_parameters, split_layers


def main() -> None:
    """Trains, and saves the model as one checkpoint."""
    parser = arguments(__doc__)
    parser.add_argument("--tensor", type=int, default=2, help="devices that share a layer (%(default)s)")
    options = parser.parse_args()

    torch.manual_seed(0)  # The devices of a group draw the same numbers for dropout.
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    shape = int(os.environ["WORLD_SIZE"]) // options.tensor, options.tensor
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "tensor"))
    group, groups = mesh.get_local_rank("data"), shape[0]

    tokenizer = XGLMTokenizer.from_pretrained(options.checkpoint)
    model = XGLMForCausalLM.from_pretrained(options.checkpoint).to(device).train()
    split_layers(model, mesh["tensor"])
    shard_parameters(model, mesh["data"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    curve = Curve(f"PyTorch, a mesh of {shape[0]} x {shape[1]}", options.steps)
    for batch in batches(tokenizer, options.steps):
        inputs = {name: torch.from_numpy(array[group::groups]).to(device) for name, array in batch.items()}
        items = items_per_process(inputs["labels"], mesh.get_group("data"), attention_mask=inputs["attention_mask"])
        loss = model(**inputs, use_cache=False, num_items_in_batch=items).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach() / groups
        dist.all_reduce(total, group=mesh.get_group("data"))
        if dist.get_rank() == 0:
            curve.add(total.item())
    model.save_pretrained(options.output)
    if dist.get_rank() == 0:
        tokenizer.save_pretrained(options.output)
        curve.save(options.output)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
