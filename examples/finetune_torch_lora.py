"""Fine-tunes low-rank adapters of XGLM with PyTorch and peft, and saves them, and the model that they make.

    pip install peft
    python examples/finetune_torch_lora.py --output out/lora

Of the 564M model, 0.8 million parameters are trained; the rest stays as it is, and may be bfloat16.
"""

from __future__ import annotations

import peft
import torch
from finetune_data import Curve, arguments, batches

from xglm_core import XGLMTokenizer
from xglm_torch import XGLMForCausalLM


def main() -> None:
    """Trains, and saves what came out."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=8, help="of the adapters (%(default)s)")
    parser.set_defaults(learning_rate=1e-2)
    options = parser.parse_args()

    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    tokenizer = XGLMTokenizer.from_pretrained(options.checkpoint)
    model = XGLMForCausalLM.from_pretrained(options.checkpoint).to(device)
    adapters = peft.LoraConfig(
        task_type="CAUSAL_LM", r=options.rank, lora_alpha=2 * options.rank, target_modules=["q_proj", "v_proj"]
    )
    adapted = peft.get_peft_model(model, adapters).train()
    adapted.print_trainable_parameters()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate)

    curve = Curve("torch, LoRA", options.steps)
    for batch in batches(tokenizer, options.steps):
        tensors = {name: torch.from_numpy(array).to(device) for name, array in batch.items()}
        loss = adapted(**tensors, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.add(loss.detach())

    adapted.save_pretrained(options.output / "adapters")
    adapted.merge_and_unload().save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    curve.save(options.output)


if __name__ == "__main__":
    main()
