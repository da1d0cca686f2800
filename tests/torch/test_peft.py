"""peft and accelerate take the PyTorch models for what they are."""

import copy

import accelerate
import peft
import pytest
import torch

from conformance.random_weights import write_checkpoint
from tests.helpers import models
from tests.helpers.models import CONFIG, changed
from xglm_torch import XGLMForCausalLM

IDS, MASK = torch.from_numpy(models.IDS), torch.from_numpy(models.LEFT)
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS}


@pytest.fixture
def model(tmp_path):
    # Without dropout, so that few steps show whether anything is learnt.
    write_checkpoint(tmp_path / "model", changed(CONFIG, dropout=0.0, attention_dropout=0.0), seed=1)
    torch.manual_seed(0)  # Adapters begin with random numbers.
    return XGLMForCausalLM.from_pretrained(tmp_path / "model")


def train(model, steps=5):
    """Some steps of AdamW; returns the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(**BATCH).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora(model, tmp_path, task_type, targets, checkpointing):
    plain = copy.deepcopy(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": True})
    config = peft.LoraConfig(r=4, target_modules=targets, task_type=task_type, exclude_modules=["lm_head"])
    adapted = peft.get_peft_model(model, config)
    assert torch.equal(adapted(**BATCH).logits, plain(**BATCH).logits)  # One factor starts as zero.
    frozen = {name: p.clone() for name, p in adapted.named_parameters() if not p.requires_grad}
    losses = train(adapted)
    assert losses[-1] < losses[0] - 0.05
    for name, parameter in adapted.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, frozen[name]), name
    expected = adapted(**BATCH).logits

    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
    assert torch.equal(again(**BATCH).logits, expected)
    new = adapted.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=3, stop_at_eos=False)
    assert new.shape == (2, 14)
    merged = adapted.merge_and_unload()
    assert type(merged) is XGLMForCausalLM
    # One product instead of two: float32 rounding.
    torch.testing.assert_close(merged(**BATCH).logits, expected, rtol=0, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    loaded = XGLMForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(loaded(**BATCH).logits, merged(**BATCH).logits)


def test_prompt_tuning(model):
    sizes = {"token_dim": 35, "num_layers": 3, "num_attention_heads": 5}
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, **sizes)
    adapted = peft.get_peft_model(model, config)
    losses = train(adapted)
    assert losses[-1] < losses[0]


class TestAccelerate:
    def test_blocks_stay_whole(self, model):
        with accelerate.init_empty_weights():
            empty = XGLMForCausalLM(CONFIG)
        empty.tie_weights()
        block = sum(p.nbytes for p in model.model.layers[0].parameters())
        table = model.lm_head.weight.nbytes
        devices = accelerate.infer_auto_device_map(
            empty,
            max_memory={0: table + int(2.5 * block), "cpu": 10**9},
            no_split_module_classes=empty._no_split_modules,
        )
        assert devices["model.embed_tokens"] == devices["lm_head"]
        assert {name for name in devices if name.startswith("model.layers.")} <= {f"model.layers.{i}" for i in range(3)}
        assert set(devices.values()) == {0, "cpu"}

    def test_offloaded_weights(self, model):
        expected = model(**BATCH).logits
        offloaded = accelerate.cpu_offload(model, execution_device="cpu")
        assert torch.equal(offloaded(**BATCH).logits, expected)

    def test_mixed_precision(self):
        accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
        model = XGLMForCausalLM(changed(CONFIG, dropout=0.0))
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
        losses = []
        for _ in range(4):
            loss = model(**BATCH).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
