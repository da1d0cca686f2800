"""What only the PyTorch backend promises."""

import copy

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import scatter_gather

from tests.helpers import models
from tests.helpers.models import CONFIG, ONE_BLOCK, SAME, changed
from xglm_core import open_checkpoint
from xglm_core.errors import InputError
from xglm_core.weight_names import EMBEDDING, weight_specs
from xglm_torch import XGLMForCausalLM, XGLMModel, attention

IDS, MASK = torch.from_numpy(models.IDS), torch.from_numpy(models.LEFT)


@pytest.fixture
def model(folder):
    return XGLMForCausalLM.from_pretrained(folder)


def test_parameters_have_the_published_names_and_shapes(model):
    published = {spec.name: spec.shape for spec in weight_specs(CONFIG, with_head=True)}
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == published
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_parameters_are_copy_on_write_views_of_the_file(model, folder):
    before = open_checkpoint(folder).read(EMBEDDING).copy()
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    assert np.array_equal(open_checkpoint(folder).read(EMBEDDING), before)


def test_position_table_survives_meta_emptying_and_casting(model, folder):
    expected = model.model.embed_positions.weights.clone()
    with torch.device("meta"):
        emptied = XGLMForCausalLM(CONFIG)
    emptied = emptied.to_empty(device="cpu")
    emptied.load_state_dict(model.state_dict(), assign=True)
    for other in (emptied, copy.deepcopy(model).half(), model.to("meta").to_empty(device="cpu")):
        table = other.model.embed_positions.weights
        assert table.dtype == torch.float32
        assert torch.equal(table, expected)


def test_assigning_a_state_dict_unties_and_tie_weights_mends_it(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_gradients_flow_with_and_without_a_cache(model):
    model(IDS, MASK, use_cache=False).logits.sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(IDS, MASK, use_cache=True).logits.sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


class TestStateDict:
    def test_published_ones_load_strictly(self, model):
        state = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
        other = XGLMForCausalLM(CONFIG).eval()
        assert other.load_state_dict(state, strict=True).missing_keys == []
        # Older ones hold the position table, which is computed here.
        table = model.model.embed_positions.weights.clone()
        state["model.embed_positions.weights"] = torch.full_like(table, 3)
        other.load_state_dict(state, strict=True)
        assert torch.equal(other.model.embed_positions.weights, table)
        for name, tensor in other.state_dict().items():
            assert torch.equal(tensor, state[name]), name
        with pytest.raises(RuntimeError, match="Unexpected key"):
            other.load_state_dict({**state, "model.embed_position.weights": table})

    def test_cross_attention(self):
        names = XGLMForCausalLM(changed(CONFIG, add_cross_attention=True)).state_dict().keys()
        assert {f"model.layers.1.encoder_attn.{p}_proj.weight" for p in ("q", "k", "v", "out")} < names
        assert "model.layers.1.encoder_attn_layer_norm.bias" in names


class TestSharedEmbedding:
    def test_the_model_uses_the_given_weight(self):
        embedding = torch.nn.Embedding(131, 35)
        decoder = XGLMModel(CONFIG, embedding).eval()
        assert decoder.embed_tokens.weight is embedding.weight
        with torch.no_grad():
            before = decoder(IDS).last_hidden_state
            embedding.weight.mul_(2)
            assert not torch.equal(decoder(IDS).last_hidden_state, before)

    def test_scale_and_gradient_are_those_of_any_other(self, model):
        decoder = XGLMModel(CONFIG, torch.nn.Embedding(131, 35)).eval()
        decoder.load_state_dict({name.removeprefix("model."): t for name, t in model.model.state_dict().items()})
        assert torch.equal(decoder(IDS).last_hidden_state, model.model(IDS).last_hidden_state)

    def test_of_another_size(self):
        with pytest.raises(InputError, match=r"embedding is \[137, 35\], expected \[131, 35\]"):
            XGLMModel(CONFIG, torch.nn.Embedding(137, 35))


def call(model, **arguments):
    return model(IDS, MASK, **{"use_cache": False, **arguments})


class TestCompile:
    """In one graph. `aot_eager` runs all of the compiler but the code generation, so that nothing may differ."""

    @pytest.fixture
    def model(self):
        torch.manual_seed(1)
        return XGLMForCausalLM(ONE_BLOCK).eval()

    @pytest.mark.parametrize(
        "arguments",
        [
            {},
            {"labels": IDS, "num_items_in_batch": 7},
            {"output_attentions": True, "output_hidden_states": True},
            {"head_mask": torch.rand(1, 5), "logits_to_keep": torch.tensor([3, 1])},
            {"return_dict": False},
        ],
        ids=lambda arguments: "+".join(arguments) or "plain",
    )
    def test_compiled_calls(self, model, arguments):
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        ours, expected = call(compiled, **arguments), call(model, **arguments)
        assert type(ours) is type(expected)
        for one, other in zip(ours, expected, strict=True):
            for tensor, reference in zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]:
                assert torch.equal(tensor, reference)

    def test_compiled_calls_with_a_cache(self, folder, monkeypatch):
        torch.compiler.reset()
        monkeypatch.setenv("XGLM_PLAIN", "1")  # Compiled code has the plain products, which round otherwise.
        model = XGLMForCausalLM.from_pretrained(folder)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            ours = expected = model(IDS[:, :6], MASK[:, :6])
            for end in range(7, 12):
                ours = compiled(IDS[:, end - 1 : end], MASK[:, :end], past_key_values=ours.past_key_values)
                expected = model(IDS[:, end - 1 : end], MASK[:, :end], past_key_values=expected.past_key_values)
                assert torch.equal(ours.logits, expected.logits)

    def test_training_with_everything_that_is_random(self, model):
        torch.compiler.reset()
        rates = {"dropout": 0.2, "attention_dropout": 0.2, "activation_dropout": 0.2, "layerdrop": 0.2}
        model = XGLMForCausalLM(changed(ONE_BLOCK, **rates)).train()
        loss = torch.compile(model, fullgraph=True, backend="aot_eager")(IDS, MASK, labels=IDS, use_cache=False).loss
        loss.backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())

    def test_other_values_need_no_other_graph(self, model):
        torch.compiler.reset()
        counter = CompileCounter()
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        for seed in range(4):
            ids = torch.randint(4, 131, (2, 11), generator=torch.Generator().manual_seed(seed))
            mask = MASK.roll(seed, 0) if seed % 2 else torch.ones_like(MASK)
            compiled(ids, mask, labels=ids, use_cache=False)
        assert counter.frame_count == 1


class TestExport:
    @pytest.fixture
    def model(self):
        torch.manual_seed(1)
        return XGLMForCausalLM(ONE_BLOCK).eval()

    @pytest.mark.parametrize("arguments", [{"use_cache": False}, {"use_cache": True}, {"output_attentions": True}])
    def test_any_batch_and_length(self, model, arguments):
        other = torch.from_numpy(np.random.RandomState(3).randint(4, 131, (3, 17)))
        mask = torch.ones_like(other)
        mask[1, :5] = 0
        exported = self.exported(model, arguments)(other, mask, **arguments)
        expected = model(other, mask, **arguments)
        assert exported.keys() == expected.keys()
        np.testing.assert_allclose(exported.logits.detach(), expected.logits.detach(), **SAME)
        if "past_key_values" in exported:
            step = model(other[:, :1], past_key_values=exported.past_key_values).logits
            np.testing.assert_allclose(
                step.detach(), model(other[:, :1], past_key_values=expected.past_key_values).logits.detach(), **SAME
            )

    def test_files(self, model, tmp_path):
        """Tuples, as a file cannot tell where the class of an output comes from."""
        arguments = {"use_cache": False, "return_dict": False}
        torch.export.save(self.program(model, arguments), tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        np.testing.assert_allclose(loaded(IDS, MASK, **arguments)[0].detach(), model(IDS, MASK).logits.detach(), **SAME)

    @staticmethod
    def program(model, arguments):
        sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=CONFIG.max_position_embeddings)}
        shapes = {"input_ids": sizes, "attention_mask": sizes, **dict.fromkeys(arguments)}
        return torch.export.export(model, (IDS, MASK), arguments, dynamic_shapes=shapes)

    def exported(self, model, arguments):
        return self.program(model, arguments).module()


class TestTypes:
    @pytest.mark.parametrize(("dtype", "close"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
    def test_autocast_and_half_parameters(self, model, dtype, close):
        expected = call(model, labels=IDS)
        with torch.autocast("cpu", dtype):
            mixed = call(model, labels=IDS)
        half = call(copy.deepcopy(model).to(dtype), labels=IDS)
        for outputs in (mixed, half):
            assert outputs.logits.dtype == dtype
            assert outputs.loss.dtype == torch.float32
            # Logits of order 1 after three layers of numbers with 8 or 11 bits.
            assert (outputs.logits.float() - expected.logits)[:, 3:].abs().max() < close
        half.loss.backward()

    def test_half_attentions_and_head_masks(self, model):
        outputs = call(copy.deepcopy(model).half(), output_attentions=True, head_mask=torch.ones(3, 5))
        assert {layer.dtype for layer in outputs.attentions} == {torch.float16}

    def test_meta(self):
        with torch.device("meta"):
            model = XGLMForCausalLM(CONFIG)
        outputs = model(IDS.to("meta"), MASK.to("meta"), labels=IDS.to("meta"), return_logits=True)
        assert outputs.logits.shape == (2, 11, 131)
        assert outputs.logits.is_meta
        assert model.device.type == "meta"

    def test_deepcopy(self, model):
        twin = copy.deepcopy(model)
        assert twin.lm_head.weight is twin.model.embed_tokens.weight
        assert twin.lm_head.weight is not model.lm_head.weight
        assert torch.equal(call(twin).logits, call(model).logits)


class TestGradientCheckpointing:
    def gradients(self, model, **arguments):
        model.zero_grad()
        torch.manual_seed(0)
        model(IDS, MASK, labels=IDS, **arguments).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    @pytest.mark.parametrize("options", [None, {"use_reentrant": False}, {"use_reentrant": True}])
    def test_same_gradients_with_the_same_dropout(self, options):
        model = XGLMForCausalLM(changed(CONFIG, dropout=0.3, layerdrop=0.3)).train()
        expected = self.gradients(model)
        model.gradient_checkpointing_enable(options)
        assert model.is_gradient_checkpointing
        for ours, theirs in zip(self.gradients(model), expected, strict=True):
            assert torch.equal(ours, theirs)
        model.gradient_checkpointing_disable()
        assert not model.is_gradient_checkpointing

    def test_keeps_less(self, model):
        def kept():
            sizes = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
                model(IDS, MASK, labels=IDS, use_cache=False)
            return sum(sizes)

        plain = kept()
        model.train().gradient_checkpointing_enable()
        assert kept() < 0.6 * plain  # The head's share stays; a block keeps its input instead of some 15 tensors.

    def test_cache(self, model):
        model.gradient_checkpointing_enable()
        assert model(IDS).past_key_values is not None  # Nothing is kept for gradients outside training.
        model.train()
        assert model(IDS).past_key_values is None
        with pytest.raises(InputError, match="use_cache is True, but gradient checkpointing keeps no cache"):
            model(IDS, use_cache=True)


def test_head_masks_take_the_fast_path(model, monkeypatch):
    monkeypatch.setattr(attention, "_probabilities", None)
    assert call(model, head_mask=torch.rand(3, 5)).logits.shape == (2, 11, 131)
    with pytest.raises(TypeError):
        call(model, output_attentions=True)


def test_gradients_reach_keys_and_values_that_the_caller_made(model):
    past = tuple(tuple(t.detach().clone().requires_grad_() for t in layer) for layer in model(IDS).past_key_values)
    model(IDS[:, :3], past_key_values=past, labels=IDS[:, :3]).loss.backward()
    assert all(tensor.grad.abs().max() > 0 for layer in past for tensor in layer)


def test_data_parallel_gathers_outputs(model, monkeypatch):
    """With CPU tensors for those of two GPUs, which alone `Gather` accepts."""
    monkeypatch.setattr(scatter_gather.Gather, "apply", lambda device, dim, *tensors: torch.cat(tensors, dim))
    outputs = call(model, output_hidden_states=True)
    gathered = scatter_gather.gather([outputs, outputs], "cpu")
    assert gathered.keys() == ("logits", "hidden_states")
    assert gathered.logits.shape == (4, 11, 131)
    assert torch.equal(torch.nn.DataParallel(model)(IDS, MASK).logits, model(IDS, MASK).logits)


def test_tensors_pytree(model):
    outputs = model(IDS, output_hidden_states=True)
    doubled = torch.utils._pytree.tree_map(lambda tensor: tensor * 2, outputs)
    assert torch.equal(doubled.logits, outputs.logits * 2)
    assert torch.equal(doubled.past_key_values[2][1], outputs.past_key_values[2][1] * 2)


def test_inputs_of_a_decoding_loop(model):
    first = model(**model.prepare_inputs_for_generation(IDS[:, :6], attention_mask=MASK[:, :6], use_cache=True))
    second = model.prepare_inputs_for_generation(IDS, first.past_key_values, MASK)
    np.testing.assert_allclose(model(**second).logits.detach(), model(IDS, MASK).logits[:, 6:].detach(), **SAME)
    embeddings = model.get_input_embeddings()(IDS)
    arguments = model.prepare_inputs_for_generation(IDS[:, :0], inputs_embeds=embeddings)
    np.testing.assert_allclose(model(**arguments).logits.detach(), model(IDS).logits.detach(), **SAME)
