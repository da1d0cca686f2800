"""Fine-tunes XGLM with PyTorch: a plain loop.

    python examples/finetune_torch.py --output out/torch

For the published models: `--checkpoint facebook/xglm-564M --learning-rate 1e-5`, on a GPU with `--bfloat16`.
"""

from __future__ import annotations

import contextlib

import torch
from finetune_data import Curve, arguments, batches

from xglm_core import XGLMTokenizer
from xglm_torch import XGLMForCausalLM


def main() -> None:
    """Trains, and saves what came out."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16; parameters stay float32")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    parser.add_argument("--compile", action="store_true", help="let torch.compile generate code first")
    options = parser.parse_args()

    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    tokenizer = XGLMTokenizer.from_pretrained(options.checkpoint)
    model = XGLMForCausalLM.from_pretrained(options.checkpoint).to(device).train()
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    forward = torch.compile(model) if options.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    mixed = torch.autocast(device.type, torch.bfloat16) if options.bfloat16 else contextlib.nullcontext()

    curve = Curve("torch", options.steps)
    for batch in batches(tokenizer, options.steps):
        tensors = {name: torch.from_numpy(array).to(device) for name, array in batch.items()}
        with mixed:
            loss = forward(**tensors, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.add(loss.detach())

    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    curve.save(options.output)


if __name__ == "__main__":
    main()
