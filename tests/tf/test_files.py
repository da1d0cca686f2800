"""What Keras keeps of a model, and makes of it: files, clones, types, exports, summaries."""

import dataclasses
import os
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from conformance.random_weights import write_checkpoint
from tests.helpers.commands import ROOT
from tests.helpers.models import CONFIG, IDS, LEFT, changed
from xglm_core.errors import InputError
from xglm_core.generation.config import GenerationConfig
from xglm_core.loss import LossOptions
from xglm_tf import TFXGLMForCausalLM, TFXGLMModel

SMALL = changed(CONFIG, num_layers=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path, SMALL, seed=1)
    return path


class TestKept:
    def test_options_of_generate_and_of_the_loss(self, tmp_path):
        model = TFXGLMForCausalLM(SMALL)
        model.generation_config = dataclasses.replace(
            model.generation_config, do_sample=True, top_k=0, suppress_tokens=[5, 7], other={"penalty_alpha": 0.5}
        )
        model.loss_options = LossOptions(z_loss=0.5)
        model.save(tmp_path / "model.keras")
        kept = (
            keras.models.load_model(tmp_path / "model.keras"),
            keras.models.clone_model(model),
            TFXGLMForCausalLM.from_config(model.get_config()),
        )
        for again in kept:
            assert again.generation_config == model.generation_config
            assert again.generation_config is not model.generation_config
            assert again.loss_options == model.loss_options
        kept[0].save_pretrained(tmp_path / "saved")
        with pytest.warns(UserWarning, match="has penalty_alpha, which generate does not offer"):
            again = TFXGLMForCausalLM.from_pretrained(tmp_path / "saved")
        assert again.generation_config == model.generation_config

    def test_files_that_do_not_have_them(self):
        config = TFXGLMForCausalLM(SMALL).get_config()
        del config["generation_config"], config["loss_options"]
        model = TFXGLMForCausalLM.from_config(config)
        assert model.generation_config == GenerationConfig.from_model(SMALL)
        assert model.loss_options == LossOptions()

    def test_policies_of_layers(self, tmp_path):
        model = TFXGLMForCausalLM(SMALL)
        model.model.layers[1].fc1.dtype_policy = "mixed_bfloat16"
        model.save(tmp_path / "model.keras")
        again = keras.models.load_model(tmp_path / "model.keras")
        assert again.model.layers[1].fc1.dtype_policy.name == "mixed_bfloat16"
        assert np.array_equal(again(IDS).logits, model(IDS).logits)

    @pytest.mark.parametrize("model_class", [TFXGLMForCausalLM, TFXGLMModel])
    def test_from_an_architecture(self, model_class):
        for make, config in ((model_class.from_config, SMALL.to_dict()), (model_class._from_config, SMALL)):
            model = make(config, dtype="mixed_bfloat16")
            assert model.config == SMALL
            assert model.dtype_policy.name == "mixed_bfloat16"


class TestGlobalPolicy:
    @pytest.fixture(autouse=True)
    def before(self):
        before = keras.config.dtype_policy()
        yield
        keras.config.set_dtype_policy(before)

    @pytest.mark.parametrize("model_class", [TFXGLMForCausalLM, TFXGLMModel])
    @pytest.mark.parametrize(
        ("policy", "held", "computed"),
        [("mixed_bfloat16", "float32", "bfloat16"), ("bfloat16", "bfloat16", "bfloat16"), ("float32",) * 3],
    )
    def test_is_that_of_models_without_a_type(self, folder, model_class, policy, held, computed):
        keras.config.set_dtype_policy(policy)
        for model in (model_class(SMALL), model_class.from_pretrained(folder)):
            assert {weight.dtype for weight in model.weights} == {held}
            assert model(IDS)[0].dtype == computed
        assert model_class.from_pretrained(folder, dtype="float32")(IDS)[0].dtype == "float32"

    def test_of_integers_is_refused(self, folder):
        keras.config.set_dtype_policy("int8_from_float32")
        for make in (TFXGLMForCausalLM.from_pretrained, lambda _: TFXGLMModel(SMALL)):
            with pytest.raises(InputError, match=r"'int8_from_float32', in .* and quantize\('int8'\) afterwards"):
                make(folder)


class TestExport:
    def test_litert(self, folder, tmp_path):
        model = TFXGLMForCausalLM.from_pretrained(folder)
        names = ("input_ids", "attention_mask")
        signature = [tf.TensorSpec(IDS.shape, tf.int32, name) for name in names]
        model.export(tmp_path / "model.tflite", "litert", input_signature=signature)
        interpreter = tf.lite.Interpreter(str(tmp_path / "model.tflite"))
        interpreter.allocate_tensors()
        for details in interpreter.get_input_details():
            value = IDS if "input_ids" in details["name"] else LEFT
            interpreter.set_tensor(details["index"], value.astype(np.int32))
        interpreter.invoke()
        (output,) = interpreter.get_output_details()
        real = LEFT != 0
        due = model(IDS, LEFT).logits.numpy()[real]
        np.testing.assert_allclose(interpreter.get_tensor(output["index"])[real], due, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("sizes", [None, (None, 8)])
    def test_litert_of_unknown_sizes(self, folder, tmp_path, sizes):
        signature = sizes and [tf.TensorSpec(sizes, tf.int32, "input_ids")]
        with pytest.raises(InputError, match="export to 'litert' needs the sizes of its inputs; expected"):
            TFXGLMModel.from_pretrained(folder).export(tmp_path / "x.tflite", "litert", input_signature=signature)

    @pytest.mark.parametrize("format", ["onnx", "openvino", "torch"])
    def test_other_formats(self, folder, tmp_path, format):
        with pytest.raises(InputError, match=f"export writes no '{format}'; .* (torch|openvino)"):
            TFXGLMForCausalLM.from_pretrained(folder).export(tmp_path / "model", format=format)


def test_summary_shows_the_parts():
    model = TFXGLMForCausalLM(changed(SMALL, tie_word_embeddings=False))
    lines = []
    model.summary(print_fn=lines.append)
    text = "\n".join(lines)
    block = sum(weight.shape.num_elements() for weight in model.model.layers[0].weights)
    for row in (
        ("embed_tokens", "(None, None, 35)", f"{131 * 35:,}"),
        ("layers.0", "(None, None, 35)", f"{block:,}"),
        ("layers.1", "(None, None, 35)", f"{block:,}"),
        ("layer_norm", "(None, None, 35)", "70"),
        ("lm_head", "(None, None, 131)", f"{131 * 35:,}"),
        ("Total params", f"{model.num_parameters():,}"),
    ):
        assert any(all(part in line for part in row) for line in text.splitlines()), (row, text)
    TFXGLMModel(SMALL).summary(print_fn=lines.append)
    assert "lm_head" not in lines[-1]


@pytest.mark.slow
def test_examples_of_the_page(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "keras.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "\n".join(blocks)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_tensorflow_may_call_another_keras_its_own(tmp_path):
    """transformers sets this variable where tf_keras is installed; `import keras` is Keras 3 all the same."""
    script = """
import keras
import numpy as np
import xglm_tf
from xglm_core import XGLMConfig
sizes = {"vocab_size": 61, "max_position_embeddings": 16, "d_model": 8, "ffn_dim": 8, "num_layers": 1}
model = xglm_tf.TFXGLMForCausalLM(XGLMConfig(**sizes, attention_heads=2))
ids = np.array([[2, 5, 7, 9]])
model.compile("sgd", jit_compile=False)
model.fit(ids, ids, verbose=0)
model.save("model.keras")
again = keras.models.load_model("model.keras")
assert np.array_equal(again.generate(ids, max_new_tokens=2), model.generate(ids, max_new_tokens=2))
"""
    environment = {**os.environ, "TF_USE_LEGACY_KERAS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
