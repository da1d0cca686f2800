"""transformers' Trainer takes the steps that a loop by hand takes, and goes on from its checkpoints."""

import functools
import json

import pytest

from tests.helpers.commands import ROOT

pytest.importorskip("transformers", reason="peft brings it")

import numpy as np
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from conformance.random_weights import write_checkpoint
from tests.helpers.models import CONFIG, changed
from xglm_core import XGLMTokenizer
from xglm_torch import XGLMForCausalLM, XGLMModel

BUNDLED = ROOT / "examples" / "tiny_model" / "checkpoint"
LENGTHS = (3, 9, 5, 2, 7, 4, 8, 6)


def rows():
    """Texts of different lengths, padded on the right, as lists."""
    random = np.random.RandomState(0)
    for length in LENGTHS:
        ids, padding = random.randint(4, CONFIG.vocab_size, length).tolist(), 9 - length
        yield {
            "input_ids": ids + [1] * padding,
            "attention_mask": [1] * length + [0] * padding,
            "labels": ids + [-100] * padding,
        }


OTHERS = ("data_collator", "processing_class", "compute_metrics")  # What is no option of the arguments.
ROWS = list(rows())
BATCH = {name: torch.tensor([row[name] for row in ROWS]) for name in ROWS[0]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("trainer") / "model"
    write_checkpoint(path, changed(CONFIG, dropout=0.0, attention_dropout=0.0), seed=1)
    return path


@pytest.fixture
def trainer(folder, tmp_path):
    """Makes a trainer of a fresh model: a batch has two rows, a step of SGD one batch, unless said otherwise."""

    def make(model=None, *, data=ROWS, **options):
        steps = {"max_steps": 4, "learning_rate": 0.5, "optim": "sgd", "lr_scheduler_type": "constant"}
        batches = {"per_device_train_batch_size": 2, "train_sampling_strategy": "sequential", "max_grad_norm": 0}
        outside = {"save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
        others = {name: options.pop(name) for name in OTHERS if name in options}
        model = model or XGLMForCausalLM.from_pretrained(folder)
        options = {**steps, **batches, **outside, **options}
        arguments = TrainingArguments(output_dir=str(tmp_path / "run"), **options)
        return Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:4], **others)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)  # It is global, and other tests ask for another one.


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def by_hand(folder, batches):
    """The losses and the model of plain steps."""
    model, found = XGLMForCausalLM.from_pretrained(folder).train(), []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.5 * parameter.grad
                parameter.grad = None
        found.append(loss.item())
    return found, model


def assert_same_weights(model, other, atol=0.0):
    for (name, value), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=atol, msg=name)


def batches(size):
    return [{name: value[i : i + size] for name, value in BATCH.items()} for i in range(0, len(ROWS), size)]


def test_steps_are_those_by_hand(trainer, folder):
    run = trainer()
    run.train()
    expected, model = by_hand(folder, batches(2))
    np.testing.assert_allclose(losses(run), expected, rtol=1e-4)  # The log has four digits.
    assert_same_weights(run.model, model, atol=1e-6)


def test_accumulated_batches_count_targets(trainer, folder):
    """Batches of four rows in two parts: each target has the same weight, though the parts have not as many of them."""
    run = trainer(gradient_accumulation_steps=2, max_steps=2)
    run.train()
    expected, model = by_hand(folder, batches(4))
    np.testing.assert_allclose(losses(run), expected, rtol=1e-4)
    assert_same_weights(run.model, model, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"use_reentrant": False, "every_n_layers": 2}, {"offload": True}])
def test_gradient_checkpointing(trainer, folder, options):
    run = trainer(gradient_checkpointing=True, gradient_checkpointing_kwargs=options, max_steps=2)
    run.train()
    assert_same_weights(run.model, by_hand(folder, batches(2)[:2])[1], atol=1e-6)


def test_checkpoints_are_gone_on_from(trainer, folder, tmp_path):
    whole = trainer(save_strategy="steps", save_steps=2)
    whole.train()
    stored = load_file(tmp_path / "run/checkpoint-4/model.safetensors")
    again = XGLMForCausalLM.from_pretrained(folder)
    again.load_state_dict(stored)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert_same_weights(again, whole.model)

    half = tmp_path / "run" / "checkpoint-2"
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(half))
    assert_same_weights(resumed.model, whole.model)
    # A file without the head, as `save_pretrained` writes it.
    stored = load_file(half / "model.safetensors")
    del stored["lm_head.weight"]
    save_file(stored, half / "model.safetensors", metadata={"format": "pt"})
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(half))
    assert_same_weights(resumed.model, whole.model)


def test_the_best_model_comes_back(trainer, folder):
    run = trainer(
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, max_steps=3,
        load_best_model_at_end=True,
    )  # fmt: skip
    run.train()  # With steps so large, the loss of other texts is least after the first one.
    assert_same_weights(run.model, by_hand(folder, batches(2)[:1])[1], atol=1e-6)


def test_evaluation(trainer, folder):
    seen = {}

    def metrics(prediction):
        seen.update(logits=prediction.predictions, labels=prediction.label_ids)
        return {}

    run = trainer(compute_metrics=metrics)
    found = run.evaluate()
    model = XGLMForCausalLM.from_pretrained(folder)
    some = {name: value[:4] for name, value in BATCH.items()}
    assert found["eval_loss"] == pytest.approx(model(**some).loss.item(), rel=1e-5)
    np.testing.assert_allclose(seen["logits"], model(**some).logits.detach(), atol=1e-5)
    assert (seen["labels"] == some["labels"].numpy()).all()


def test_label_smoothing(trainer, folder):
    """transformers smooths by itself, from the logits of a call without labels."""
    run = trainer(label_smoothing_factor=0.1, max_steps=1)
    run.train()
    batch = batches(2)[0]
    logits = XGLMForCausalLM.from_pretrained(folder)(batch["input_ids"], batch["attention_mask"]).logits
    logs, labels = logits[:, :-1].log_softmax(dim=-1), batch["labels"][:, 1:]
    counts = labels != -100
    plain = -logs.gather(2, labels.clamp(min=0)[..., None])[..., 0][counts].mean()
    assert losses(run)[0] == pytest.approx((0.9 * plain - 0.1 * logs[counts].mean()).item(), rel=1e-4)


def test_texts_by_a_collator(trainer, tmp_path):
    tokenizer = XGLMTokenizer.from_pretrained(BUNDLED)
    texts = ["The little dog found a fish", "Каждое утро", "The children go to school by bus.", "Every"]
    model = XGLMForCausalLM.from_pretrained(BUNDLED)
    run = trainer(
        model, data=[dict(tokenizer(text)) for text in texts], processing_class=tokenizer, max_steps=1,
        per_device_train_batch_size=4, data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        learning_rate=0.0,
    )  # fmt: skip
    run.train()
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    expected = model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss
    assert losses(run)[0] == pytest.approx(expected.item(), rel=1e-4)

    run.save_model(tmp_path / "saved")  # The tokenizer, and a state dict; the model itself writes the rest.
    run.model.save_pretrained(tmp_path / "saved")
    assert_same_weights(XGLMForCausalLM.from_pretrained(tmp_path / "saved"), model)
    assert XGLMTokenizer.from_pretrained(tmp_path / "saved")(texts[0]) == tokenizer(texts[0])
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["d_model"] == model.config.d_model


def test_state_dicts_name_the_head(folder):
    """It is a copy, so that its file can be written, but no parameter, and `keep_vars` gives what there is."""
    model = XGLMForCausalLM.from_pretrained(folder)
    found, kept = model.state_dict(), model.state_dict(keep_vars=True)
    assert torch.equal(found["lm_head.weight"], model.lm_head.weight)
    assert kept["lm_head.weight"] is kept["model.embed_tokens.weight"] is model.lm_head.weight


def test_what_trainers_ask(folder):
    model, bare = XGLMForCausalLM.from_pretrained(folder), XGLMModel.from_pretrained(folder)
    assert model._tied_weights_keys == ("lm_head.weight",)
    assert bare._tied_weights_keys is None
    table, total = 131 * 35, sum(parameter.numel() for parameter in model.parameters())
    for either in (model, bare):
        assert either.num_parameters() == total
        assert either.num_parameters(exclude_embeddings=True) == total - table
    model.model.embed_tokens.weight.requires_grad = False
    assert model.num_parameters(only_trainable=True) == total - table


def test_checkpointing_in_the_configuration(folder, tmp_path):
    """The key that old configurations of models trained so have."""
    write_checkpoint(tmp_path / "model", changed(CONFIG, gradient_checkpointing=True), seed=1)
    model = XGLMForCausalLM.from_pretrained(tmp_path / "model").train()
    assert model.is_gradient_checkpointing
    counts = []
    for each in (model, XGLMForCausalLM.from_pretrained(folder).train()):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(functools.partial(_noted, kept), lambda tensor: tensor):
            each(**BATCH)
        counts.append(len(kept))
    assert counts[0] < counts[1] / 2


def _noted(kept, tensor):
    kept.append(tensor)
    return tensor


def test_gradients_of_inputs_end(folder):
    model = XGLMForCausalLM.from_pretrained(folder).requires_grad_(False)
    model.enable_input_require_grads()
    model.enable_input_require_grads()
    assert model(**BATCH).logits.requires_grad
    model.disable_input_require_grads()
    assert not model(**BATCH).logits.requires_grad
    model.disable_input_require_grads()
