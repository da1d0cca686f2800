"""Fine-tunes adapters of XGLM in PyTorch (LoRA, by peft): the model stays as it is, and few parameters are trained.

    pip install peft
    python examples/finetune_torch_lora.py --output finetuned

Writes the adapter to OUTPUT/adapter, and the model with the adapter merged in to OUTPUT.
"""

from __future__ import annotations

import peft
import torch
from finetune_data import Curve, arguments, batches

from xglm_core import XGLMTokenizer
from xglm_torch import XGLMForCausalLM


def main() -> None:
    """Trains, and saves adapter and model."""
    parser = arguments(__doc__)
    parser.set_defaults(learning_rate=5e-3)  # Adapters want a larger one.
    parser.add_argument("--rank", type=int, default=8, help="of the adapters' matrices (%(default)s)")
    options = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = XGLMTokenizer.from_pretrained(options.checkpoint)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=options.rank,
        lora_alpha=2 * options.rank,
        # Not the head: it is the embedding, too.
        target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    )
    model = peft.get_peft_model(XGLMForCausalLM.from_pretrained(options.checkpoint), config).to(device).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    print(f"{sum(parameter.numel() for parameter in trained):,} parameters are trained")
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate)
    curve = Curve("PyTorch, LoRA", options.steps)
    for batch in batches(tokenizer, options.steps):
        inputs = {name: torch.from_numpy(array).to(device) for name, array in batch.items()}
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.add(loss.item())
    model.save_pretrained(str(options.output / "adapter"))
    model.merge_and_unload().save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    curve.save(options.output)


if __name__ == "__main__":
    main()
