"""Models with matrices of int8: what they compute, and which operations work on them or are refused."""

import copy
import warnings

import numpy as np
import pytest
import safetensors.numpy
import torch

from conformance.random_weights import write_checkpoint
from tests.helpers.models import CONFIG, CROSS_CONFIG, ENCODER, IDS, LEFT, changed
from xglm_core import convert_checkpoint, open_checkpoint
from xglm_core.checkpoint.dtypes import FLOAT32
from xglm_core.compare.oracle import checkpoint_reader, forward
from xglm_core.errors import InputError
from xglm_core.weight_names import EMBEDDING, HEAD
from xglm_torch import XGLMForCausalLM, XGLMModel
from xglm_torch.fast.int8 import Packed, int8_product, plain_product

UNTIED = changed(CONFIG, tie_word_embeddings=False)
TENSOR = torch.from_numpy(IDS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint, the same with matrices of int8, and what those stand for as floats."""
    folder = tmp_path_factory.mktemp("int8")
    write_checkpoint(folder / "before", CONFIG, seed=1)
    convert_checkpoint(folder / "before", folder / "int8", to="safetensors", dtype="int8")
    convert_checkpoint(folder / "int8", folder / "floats", to="safetensors", dtype="float32")
    return folder / "before", folder / "int8", folder / "floats"


@pytest.fixture
def model(folders):
    return XGLMForCausalLM.from_pretrained(folders[1])


def logits(model, **options):
    with torch.no_grad():
        return model(TENSOR, **options).logits.numpy()


class TestNumbers:
    def test_the_oracle_with_the_floats_that_it_stands_for(self, model, folders):
        expected = forward(CONFIG, checkpoint_reader(open_checkpoint(folders[2])), IDS, LEFT).logits
        found = logits(model, attention_mask=torch.from_numpy(LEFT))
        np.testing.assert_allclose(found[LEFT == 1], expected[LEFT == 1], rtol=0, atol=2e-5)

    def test_a_checkpoint_of_floats_becomes_the_same(self, model, folders):
        other = XGLMForCausalLM.from_pretrained(folders[0], quantization="int8")
        np.testing.assert_array_equal(logits(other), logits(model))
        assert other.config == model.config

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("rows", [1, 2, 5, 40])
    @pytest.mark.parametrize("shape", [(53, 35), (64, 1024), (3000, 512)])
    def test_products(self, rows, shape, dtype):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
        scale = torch.rand(shape[0], 1, generator=generator) / 1000
        states = torch.randn(2, rows, shape[1], generator=generator)
        expected = states.double() @ (weight.double() * scale.double()).T
        for product in (int8_product, plain_product):
            found = product(states.to(dtype), weight, scale.to(dtype))
            assert found.dtype == dtype
            error = (found - expected).abs().max() / expected.abs().max()
            assert error < {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]

    def test_untied_head_cross_attention_and_bare_decoder(self, tmp_path):
        config = changed(CROSS_CONFIG, tie_word_embeddings=False)
        write_checkpoint(tmp_path / "before", config, seed=1)
        convert_checkpoint(tmp_path / "before", tmp_path / "int8", to="safetensors", dtype="int8")
        convert_checkpoint(tmp_path / "int8", tmp_path / "floats", to="safetensors", dtype="float32")
        options = {"encoder_hidden_states": torch.from_numpy(ENCODER)}
        ours, floats = (XGLMForCausalLM.from_pretrained(tmp_path / name) for name in ("int8", "floats"))
        np.testing.assert_allclose(logits(ours, **options), logits(floats, **options), rtol=0, atol=2e-5)
        ours, floats = (XGLMModel.from_pretrained(tmp_path / name) for name in ("int8", "floats"))
        with torch.no_grad():
            found, expected = (each(TENSOR).last_hidden_state for each in (ours, floats))
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)

    def test_generation_and_scores(self, model, folders):
        floats = XGLMForCausalLM.from_pretrained(folders[2])
        options = {"max_new_tokens": 7, "min_new_tokens": 7}
        assert torch.equal(model.generate(TENSOR, **options), floats.generate(TENSOR, **options))
        for found, expected in zip(model.score(TENSOR), floats.score(TENSOR), strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)

    def test_exported_alike(self, model):
        with torch.no_grad():
            exported = torch.export.export(model, (TENSOR,), {"use_cache": False}).module()
            found = exported(TENSOR, use_cache=False).logits
        np.testing.assert_allclose(found, logits(model), rtol=0, atol=2e-5)


class TestTheModel:
    def test_memory(self, model, folders):
        before = XGLMForCausalLM.from_pretrained(folders[0])
        assert model.num_parameters() == before.num_parameters()
        assert (model.dtype, model.lm_head.weight.dtype) == (torch.float32, torch.int8)
        assert model.lm_head.weight is model.get_input_embeddings().weight
        matrices = sum(p.nbytes for p in model.parameters() if p.ndim == 2)
        assert matrices == sum(p.numel() for p in before.parameters() if p.ndim == 2)

    def test_save_pretrained_writes_the_same_file(self, model, folders, tmp_path):
        model.save_pretrained(tmp_path / "saved")
        for name in ("model.safetensors", "config.json"):
            assert (tmp_path / "saved" / name).read_bytes() == (folders[1] / name).read_bytes()

    def test_a_state_dict_to_save_and_to_load(self, model, folders, tmp_path):
        state = model.state_dict()
        assert state[EMBEDDING].dtype == torch.int8
        assert state[f"{EMBEDDING}_scale"].shape == (CONFIG.vocab_size, 1)
        model.save_pretrained(tmp_path / "saved", state_dict=state)
        assert (tmp_path / "saved" / "model.safetensors").read_bytes() == (
            folders[1] / "model.safetensors"
        ).read_bytes()
        other = XGLMForCausalLM.from_pretrained(folders[0], quantization="int8")
        with torch.no_grad():
            other.get_input_embeddings().weight.zero_()
        other.load_state_dict(state)
        np.testing.assert_array_equal(logits(other), logits(model))
        with pytest.raises(RuntimeError, match="weight_scale"):
            XGLMForCausalLM.from_pretrained(folders[0]).load_state_dict(state)

    def test_a_state_dict_as_a_checkpoint(self, model, tmp_path):
        model.config.save_pretrained(tmp_path)
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        np.testing.assert_array_equal(logits(XGLMForCausalLM.from_pretrained(tmp_path)), logits(model))

    def test_another_type(self, model, folders, tmp_path):
        expected = logits(model)
        half = copy.deepcopy(model).to(torch.bfloat16)
        assert half.dtype == half.get_input_embeddings().weight_scale.dtype == torch.bfloat16
        assert half.lm_head.weight.dtype == torch.int8
        loaded = XGLMForCausalLM.from_pretrained(folders[1], dtype="bfloat16")
        for each in (half, loaded):
            with torch.no_grad():
                found = each(TENSOR).logits
            assert found.dtype == torch.bfloat16
            np.testing.assert_allclose(found.float(), expected, rtol=0, atol=0.05 * np.abs(expected).max())
            assert each.generate(TENSOR, max_new_tokens=3).shape[0] == 2
        half.save_pretrained(tmp_path)
        stored = open_checkpoint(tmp_path)
        assert stored.info(EMBEDDING).dtype.name == "int8"
        assert stored.info("model.layer_norm.weight").dtype.name == "bfloat16"
        assert stored.scales(EMBEDDING).dtype == np.float32

    def test_copies_and_moves_stay_tied(self, model):
        other = copy.deepcopy(model)
        assert other.lm_head.weight is other.get_input_embeddings().weight
        assert other.lm_head.weight.data_ptr() != model.lm_head.weight.data_ptr()
        other.to(torch.bfloat16).float()
        assert other.lm_head.weight is other.get_input_embeddings().weight

    def test_training_trains_the_rest(self, model, folders):
        floats = XGLMForCausalLM.from_pretrained(folders[2])
        gradients = []
        for each in (model, floats):
            embeddings = each.get_input_embeddings()(TENSOR).detach().requires_grad_()
            each(inputs_embeds=embeddings, labels=TENSOR).loss.backward()
            name = "model.layers.0.fc1.bias"
            gradients.append((embeddings.grad, each.get_parameter(name).grad, each.model.layer_norm.weight.grad))
        for found, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert model.lm_head.weight.grad is None
        model = XGLMForCausalLM.from_pretrained(folders[1], dropout=0.0, attention_dropout=0.0).train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        losses = []
        for _ in range(5):
            loss = model(TENSOR, labels=TENSOR).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]

    @pytest.mark.parametrize(
        ("name", "call"),
        [
            ("resize_token_embeddings", lambda model: model.resize_token_embeddings(140)),
            ("prune_heads", lambda model: model.prune_heads({0: [1]})),
            ("set_input_embeddings", lambda model: model.set_input_embeddings(torch.nn.Embedding(131, 35))),
            ("set_output_embeddings", lambda model: model.set_output_embeddings(torch.nn.Linear(35, 131, bias=False))),
        ],
    )
    def test_refused(self, model, name, call):
        before = logits(model)
        with pytest.raises(InputError, match=f"^{name} needs floats, and the matrices of this model are int8"):
            call(model)
        np.testing.assert_array_equal(logits(model), before)

    def test_wrong_arguments(self, folders):
        with pytest.raises(InputError, match="quantization is 'int4', expected 'int8' or None"):
            XGLMForCausalLM.from_pretrained(folders[0], quantization="int4")
        with pytest.raises(InputError, match="quantization and state_dict are both given"):
            XGLMForCausalLM.from_pretrained(folders[0], quantization="int8", state_dict={})

    def test_a_bare_decoder_is_saved_and_loaded(self, folders, tmp_path):
        model = XGLMModel.from_pretrained(folders[1])
        model.save_pretrained(tmp_path)
        stored = open_checkpoint(tmp_path)
        assert stored.names == open_checkpoint(folders[1]).names - {HEAD}
        np.testing.assert_array_equal(
            stored.read(EMBEDDING, FLOAT32), open_checkpoint(folders[1]).read(EMBEDDING, FLOAT32)
        )

    def test_an_untied_head_is_saved(self, tmp_path):
        write_checkpoint(tmp_path / "floats", UNTIED, seed=1)
        XGLMForCausalLM.from_pretrained(tmp_path / "floats", quantization="int8").save_pretrained(tmp_path / "int8")
        found = safetensors.numpy.load_file(tmp_path / "int8" / "model.safetensors")
        assert found[HEAD].dtype == np.int8
        assert not np.array_equal(found[HEAD], found[EMBEDDING])


class TestPacked:
    """The form for few rows: three digits of 7 bits for each state."""

    @staticmethod
    def layer(rows, width):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randint(-127, 128, (rows, width), dtype=torch.int8, generator=generator)
        return weight, torch.rand(rows, 1, generator=generator) / 1000, generator

    @pytest.mark.parametrize("rows", [1, 2, 16])
    @pytest.mark.parametrize("shape", [(53, 35), (131, 35), (64, 1024), (1000, 4096), (9, 3)])
    def test_as_good_as_floats(self, rows, shape):
        weight, scale, generator = self.layer(*shape)
        states = torch.randn(rows, shape[1], generator=generator)
        states[:, 1] *= 20
        states[0, 0] = 0
        expected = states.double() @ (weight.double() * scale.double()).T
        found = int8_product(states, weight, scale, Packed(weight))
        assert (found - expected).abs().max() < 2e-5 * expected.abs().max()

    def test_extremes(self):
        weight = torch.full((8, 4096), 127, dtype=torch.int8)
        weight[1::2] *= -1
        states = torch.ones(2, 4096)
        states[1] = -1
        found = int8_product(states, weight, torch.ones(8, 1), Packed(weight))
        expected = states.double() @ weight.double().T
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert torch.equal(
            int8_product(torch.zeros(2, 4096), weight, torch.ones(8, 1), Packed(weight)), torch.zeros(2, 8)
        )
        tiny = int8_product(states * 1e-30, weight, torch.ones(8, 1), Packed(weight))
        np.testing.assert_allclose(tiny, expected * 1e-30, rtol=1e-5)

    def test_what_is_not_finite_is_seen(self):
        weight, scale, _ = self.layer(8, 16)
        states = torch.ones(2, 16)
        states[0, 3] = torch.nan
        found = int8_product(states, weight, scale, Packed(weight))
        assert found[0].isnan().all()
        assert found[1].isfinite().all()

    def test_in_parts(self, monkeypatch):
        monkeypatch.setattr("xglm_torch.fast.int8._PART_ELEMENTS", 350)
        weight, scale, generator = self.layer(53, 35)
        states = torch.randn(2, 3, 35, generator=generator)
        packed = Packed(weight)
        assert len(packed.parts) == 6
        torch.testing.assert_close(
            int8_product(states, weight, scale, packed), plain_product(states, weight, scale), rtol=0, atol=1e-5
        )

    def test_it_is_left_alone_once_the_matrix_has_changed(self, model):
        layer = model.model.layers[0].fc1
        assert layer.packed.is_of(layer.weight)
        states = torch.randn(1, 35)
        with torch.no_grad():
            before = layer(states)
            layer.weight.neg_()
            torch.testing.assert_close(layer(states) - layer.bias, layer.bias - before, rtol=0, atol=1e-5)
        assert not layer.packed.is_of(layer.weight)

    def test_copies_and_pickles(self, model, tmp_path):
        expected = logits(model)
        torch.save(model, tmp_path / "model.pt")
        for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
            np.testing.assert_allclose(logits(other), expected, rtol=0, atol=2e-5)
            assert other.generate(TENSOR, max_new_tokens=3).shape == (2, 14)

    def test_frozen(self, model, folders):
        expected = logits(model)
        frozen = XGLMForCausalLM.from_pretrained(folders[1], inference=True)
        assert frozen.lm_head.packed.is_of(frozen.lm_head.weight)
        np.testing.assert_allclose(logits(frozen), expected, rtol=0, atol=2e-5)

    def test_loading_leaves_the_filters_of_warnings_alone(self, folders):
        before = list(warnings.filters)
        XGLMForCausalLM.from_pretrained(folders[1])
        assert warnings.filters == before

    def test_plain_forms(self, folders, monkeypatch, model):
        monkeypatch.setenv("XGLM_PLAIN", "1")
        plain = XGLMForCausalLM.from_pretrained(folders[1])
        assert plain.lm_head.packed is None
        np.testing.assert_allclose(logits(plain), logits(model), rtol=0, atol=2e-5)
