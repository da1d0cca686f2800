"""Fine-tunes XGLM in PyTorch: a plain loop on one device.

    python examples/finetune_torch.py --output finetuned

On a GPU if there is one. Weights stay float32; with --bfloat16, products are computed in bfloat16.
"""

from __future__ import annotations

import torch
from finetune_data import Curve, arguments, batches

from xglm_core import XGLMTokenizer
from xglm_torch import XGLMForCausalLM


def main() -> None:
    """Trains, and saves the model."""
    parser = arguments(__doc__)
    parser.add_argument("--compile", action="store_true", help="compile the model (needs a C++ compiler)")
    parser.add_argument("--bfloat16", action="store_true", help="compute in mixed precision")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    options = parser.parse_args()

    torch.manual_seed(0)  # For dropout.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = XGLMTokenizer.from_pretrained(options.checkpoint)
    model = XGLMForCausalLM.from_pretrained(options.checkpoint).to(device).train()
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    call = torch.compile(model) if options.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    curve = Curve("PyTorch", options.steps)
    for batch in batches(tokenizer, options.steps):
        inputs = {name: torch.from_numpy(array).to(device) for name, array in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bfloat16):
            loss = call(**inputs, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.add(loss.item())
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    curve.save(options.output)


if __name__ == "__main__":
    main()
