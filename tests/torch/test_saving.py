"""What `save_pretrained` of a PyTorch model writes, and what it refuses because it would be lost."""

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from conformance.random_weights import write_checkpoint
from tests.helpers import models
from tests.helpers.models import CONFIG, changed
from xglm_core.errors import InputError
from xglm_torch import XGLMForCausalLM, XGLMModel

IDS, MASK = torch.from_numpy(models.IDS), torch.from_numpy(models.LEFT)
LORA = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}


@pytest.fixture
def model(tmp_path):
    write_checkpoint(tmp_path / "model", changed(CONFIG, dropout=0.0, attention_dropout=0.0), seed=1)
    return XGLMForCausalLM.from_pretrained(tmp_path / "model")


class TestAdapters:
    @pytest.mark.parametrize("by_model", [True, False])
    def test_injected(self, model, by_model, tmp_path):
        config = peft.LoraConfig(**LORA)
        if by_model:
            adapted = peft.get_peft_model(model, config).get_base_model()
        else:
            adapted = peft.inject_adapter_in_model(config, model)
        message = r"no place for model.layers.0.self_attn.q_proj.base_layer.weight and 11 more; .*merge_and_unload"
        with pytest.raises(InputError, match=message):
            adapted.save_pretrained(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()

    def test_merged(self, model, tmp_path):
        adapted = peft.get_peft_model(model, peft.LoraConfig(**LORA))
        expected = adapted(IDS).logits
        adapted.merge_and_unload().save_pretrained(tmp_path / "saved")
        again = XGLMForCausalLM.from_pretrained(tmp_path / "saved")
        torch.testing.assert_close(again(IDS).logits, expected, rtol=0, atol=1e-4)  # One product instead of two.

    def test_a_module_of_ones_own(self, model, tmp_path):
        model.value_head = nn.Linear(35, 1)
        with pytest.raises(InputError, match=r"no place for value_head\.weight and 1 more"):
            model.save_pretrained(tmp_path / "saved")

    def test_computed_weights_are_written_as_they_are(self, model, tmp_path):
        nn.utils.parametrizations.weight_norm(model.model.layers[0].fc1)
        prune.l1_unstructured(model.model.layers[1].fc2, "weight", amount=0.5)
        expected = model(IDS).logits
        model.save_pretrained(tmp_path / "saved")
        torch.testing.assert_close(
            XGLMForCausalLM.from_pretrained(tmp_path / "saved")(IDS).logits, expected, **models.SAME
        )

    def test_a_head_that_would_be_lost(self, model, tmp_path):
        model.lm_head.weight = nn.Parameter(model.lm_head.weight * 2)
        with pytest.raises(InputError, match=r"lm_head\.weight differs from the embedding, but"):
            model.save_pretrained(tmp_path / "saved")
        model.config.tie_word_embeddings = False
        model.save_pretrained(tmp_path / "saved")
        assert torch.equal(XGLMForCausalLM.from_pretrained(tmp_path / "saved")(IDS).logits, model(IDS).logits)


class Quantized(torch.Tensor):
    """Stands for the tensors of a package that keeps numbers in its own way: only products are sure to work."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        return found.as_subclass(cls) if func.__name__ == "detach" else found

    def __getitem__(self, index):
        raise NotImplementedError


@pytest.mark.parametrize("weight", [torch.zeros(53, 35, dtype=torch.int8), torch.zeros(53, 35).as_subclass(Quantized)])
def test_quantized_weights(model, weight, tmp_path):
    model.model.layers[1].fc1.weight = nn.Parameter(weight, requires_grad=False)
    kind = "Quantized of torch.float32" if isinstance(weight, Quantized) else "Parameter of torch.int8"
    with pytest.raises(InputError, match=f"model.layers.1.fc1.weight is a {kind}, not plain numbers; save the model"):
        model.save_pretrained(tmp_path / "saved")


def test_a_quantized_head_scores_and_trains(model, tmp_path):
    plain = XGLMForCausalLM.from_pretrained(tmp_path / "model")
    weight = model.lm_head.weight.detach().clone().as_subclass(Quantized)
    model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    torch.testing.assert_close(model.score(IDS, MASK), plain.score(IDS, MASK), **models.SAME)
    loss, expected = (each.train()(IDS, MASK, labels=IDS).loss for each in (model, plain))
    torch.testing.assert_close(loss, expected, **models.SAME)
    loss.backward()
    assert model.model.layers[0].fc1.weight.grad.abs().sum() > 0


class TestStateDict:
    """As scripts with accelerate save."""

    @pytest.mark.parametrize("kind", [XGLMForCausalLM, XGLMModel])
    def test_the_weights_given_are_written(self, model, kind, tmp_path):
        model = kind.from_pretrained(tmp_path / "model")
        doubled = {name: value * 2 for name, value in model.state_dict().items()}
        model.save_pretrained(
            tmp_path / "saved", is_main_process=True, save_function=lambda *args: 1 / 0, state_dict=doubled
        )
        again = kind.from_pretrained(tmp_path / "saved")
        for name, value in again.named_parameters():
            assert torch.equal(value, doubled[name]), name

    def test_others_write_nothing(self, model, tmp_path):
        model.save_pretrained(tmp_path / "saved", is_main_process=False)
        model.save_pretrained(tmp_path / "saved", is_main_process=False, state_dict=model.state_dict())
        assert not (tmp_path / "saved").exists()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda found: found.pop("model.layer_norm.bias"), r"state_dict: model.layer_norm.bias is missing, exp"),
            (lambda found: found.update({"model.layer_norm.bias": torch.zeros(3)}), r"is \[3\], expected \[35\]"),
            (lambda found: found.update({"extra": torch.zeros(3)}), "a checkpoint has no place for extra;"),
            (lambda found: found.update({"lm_head.weight": torch.zeros(131, 35)}), "lm_head.weight differs from"),
        ],
    )
    def test_what_does_not_fit(self, model, change, message, tmp_path):
        found = dict(model.state_dict())
        change(found)
        with pytest.raises(InputError, match=message):
            model.save_pretrained(tmp_path / "saved", state_dict=found)


class TestSizes:
    """Modules say how large they are, which adapters ask."""

    @pytest.mark.parametrize("tied", [True, False])
    def test_lora_on_a_resized_head(self, tmp_path, tied):
        write_checkpoint(tmp_path / "model", changed(CONFIG, tie_word_embeddings=tied), seed=1)
        model = XGLMForCausalLM.from_pretrained(tmp_path / "model")
        model.resize_token_embeddings(140)
        assert model.lm_head.out_features == model.model.embed_tokens.num_embeddings == 140
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head"]))
        loss = adapted(IDS, labels=IDS).loss
        loss.backward()
        assert adapted.base_model.model.lm_head.lora_B["default"].weight.grad.shape == (140, 2)
        assert adapted(IDS).logits.shape == (2, 11, 140)

    def test_shared_heads(self, model):
        other = nn.Linear(35, 131, bias=False)
        model.set_output_embeddings(other)
        assert model.lm_head.weight is other.weight
        assert (model.lm_head.in_features, model.lm_head.out_features) == (35, 131)


class Doubling(nn.Embedding):
    """An embedding that does something of its own."""

    def forward(self, ids):
        return super().forward(ids) * 2


def test_an_embedding_with_a_forward_of_its_own(model, tmp_path):
    own = Doubling(131, 35)
    model.set_input_embeddings(own)
    assert model.get_input_embeddings() is own
    assert model.lm_head.weight is own.weight
    embeds = own.weight[IDS] * 2
    torch.testing.assert_close(model(IDS).logits, model(inputs_embeds=embeds).logits, rtol=0, atol=0)
    loss = model.train()(IDS, labels=IDS).loss
    torch.testing.assert_close(loss, model(inputs_embeds=embeds, labels=IDS).loss, **models.SAME)
    loss.backward()
    assert own.weight.grad.abs().sum() > 0
    new = model.eval().generate(IDS, max_new_tokens=2, stop_at_eos=False)
    assert torch.equal(new[:, 11], model(IDS).logits[:, -1].argmax(dim=-1))
    with pytest.raises(InputError, match=r"the embedding is \[\], expected \[131, 35\]"):
        model.set_input_embeddings(nn.Identity())


def test_adalora(model):
    """It adds to the loss of an output in place."""
    config = peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_r=4, target_r=2, total_step=20)
    adapted = peft.get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(5):
        outputs = adapted(input_ids=IDS, attention_mask=MASK, labels=IDS)
        outputs.loss.backward()
        optimizer.step()
        adapted.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(outputs.loss.item())
    assert losses[-1] < losses[0]
    plain = model(IDS, MASK, labels=IDS).loss
    regularized = adapted(input_ids=IDS, attention_mask=MASK, labels=IDS).loss
    assert regularized > plain  # By how far the factors are from orthogonal.


class TestGivenWeights:
    def test_in_place_of_a_checkpoint(self, model):
        made = XGLMForCausalLM.from_pretrained(None, config=model.config, state_dict=model.state_dict())
        torch.testing.assert_close(made(IDS, MASK).logits, model(IDS, MASK).logits, rtol=0, atol=0)
        assert not made.training

    def test_in_place_of_its_weights(self, model, tmp_path):
        model.config.save_pretrained(tmp_path / "without weights")
        made = XGLMForCausalLM.from_pretrained(tmp_path / "without weights", state_dict=model.state_dict())
        torch.testing.assert_close(made(IDS, MASK).logits, model(IDS, MASK).logits, rtol=0, atol=0)

    def test_nothing_to_load(self, model):
        with pytest.raises(InputError, match="the checkpoint is None, expected a folder or the id of a repository"):
            XGLMForCausalLM.from_pretrained(None, config=model.config)
        with pytest.raises(InputError, match="there is neither a checkpoint nor a config"):
            XGLMForCausalLM.from_pretrained(None, state_dict=model.state_dict())
