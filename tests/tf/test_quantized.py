"""What has changed in a model acts at once, compiled code or not; quantized models run, are saved and loaded."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from conformance.random_weights import write_checkpoint
from tests.helpers.models import CONFIG, IDS, changed
from xglm_core.errors import InputError
from xglm_tf import TFXGLMForCausalLM, TFXGLMModel

SMALL = changed(CONFIG, num_layers=1, dropout=0.0, attention_dropout=0.0)


@pytest.fixture
def model(tmp_path):
    write_checkpoint(tmp_path, SMALL, seed=1)
    return TFXGLMForCausalLM.from_pretrained(tmp_path)


def assert_compiled_code_agrees(model, *, all_of_it=False):
    """`score`, or `predict` and `generate`, too, do what a call does, which is not compiled."""
    logits = model(IDS).logits
    due = tf.gather(tf.nn.log_softmax(tf.cast(logits, tf.float32))[:, :-1], IDS[:, 1:], batch_dims=2)
    np.testing.assert_allclose(model.score(IDS), due, rtol=0, atol=2e-5)
    if all_of_it:
        np.testing.assert_allclose(model.predict(IDS, verbose=0).logits, logits, rtol=0, atol=2e-5)
        likeliest = model(IDS).logits[:, -1].numpy().argmax(axis=-1)
        assert np.array_equal(model.generate(IDS, max_new_tokens=1)[:, -1], likeliest)
    return logits.numpy()


def int8(model):
    model.quantize("int8")


def of_one_layer(model):
    model.model.layers[0].fc1.quantize("int4")


def adapter(model):
    """Keras' own, of a layer, with factors that are not 0."""
    for layer, factor in (
        (model.model.layers[0].fc1, "lora_kernel_b"),
        (model.model.embed_tokens, "lora_embeddings_b"),
    ):
        layer.enable_lora(4)
        getattr(layer, factor).assign(np.random.RandomState(0).standard_normal(getattr(layer, factor).shape))


def strength(model):
    model.model.layers[0].fc1.lora_alpha = 64


def another_block(model):
    model.model.layers[0] = TFXGLMModel(SMALL).model.layers[0]


@pytest.mark.parametrize(
    "changes",
    [pytest.param((int8,), marks=pytest.mark.slow), (of_one_layer, adapter, strength, another_block)],
)
def test_compiled_code_does_not_outlive_the_model(model, changes):
    before = assert_compiled_code_agrees(model, all_of_it=len(changes) == 1)
    for change in changes:
        change(model)
        after = assert_compiled_code_agrees(model, all_of_it=len(changes) == 1)
        assert abs(after - before).max() > 1e-3
        before = after


def test_compiled_code_is_kept_otherwise(model):
    engine, scorer = model.compiled_engine, model.compiled_scorer
    model.model.layers[0].trainable = False
    model.model.layer_norm.gamma.assign(2 * model.model.layer_norm.gamma)
    assert model.compiled_engine is engine
    assert model.compiled_scorer is scorer
    model.model.layers[0].fc1.dtype_policy = "mixed_bfloat16"
    assert model.compiled_engine is not engine
    assert model.compiled_scorer is not scorer


def test_fit_trains_what_is_trainable_now(model):
    model.compile(keras.optimizers.SGD(1.0))
    inputs = {"input_ids": IDS, "labels": IDS}
    model.train_on_batch(inputs)
    model.model.layers[0].trainable = False
    kernel, gamma = model.model.layers[0].fc1.kernel, model.model.layer_norm.gamma
    before = kernel.numpy(), gamma.numpy()
    model.train_on_batch(inputs)
    assert np.array_equal(kernel, before[0])
    assert not np.array_equal(gamma, before[1])
    model.model.layers[0].trainable = True
    model.train_on_batch(inputs)
    assert not np.array_equal(kernel, before[0])


@pytest.mark.parametrize(
    ("mode", "tied"),
    [("int8", False), *(pytest.param(mode, True, marks=pytest.mark.slow) for mode in ("int4", "float8"))],
)
def test_quantized_models(mode, tied, tmp_path):
    """Before the first call; embedding and head stay as they are, and a saved model is quantized as it was."""
    model = TFXGLMForCausalLM(changed(SMALL, tie_word_embeddings=tied))
    model.quantize(mode)
    outputs = model(IDS).logits
    integers = {weight.path.rpartition("/")[2] for weight in model.weights if weight.dtype == "int8"}
    assert integers == {"int8": {"kernel"}, "int4": {"kernel", "kernel_zero"}, "float8": set()}[mode]
    assert all(weight.dtype == "float32" for weight in model.weights if "lm_head" in weight.path)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert np.array_equal(again(IDS).logits, outputs)


def test_int8_is_close(model):
    before = model(IDS).logits
    model.quantize("int8")
    np.testing.assert_allclose(model(IDS).logits, before, rtol=0, atol=0.2)


@pytest.mark.slow
def test_adapters_of_a_quantized_model_are_trained(model):
    model.quantize("int8")
    model.enable_lora(2)
    model.compile(keras.optimizers.AdamW(1e-2))
    losses = model.fit({"input_ids": IDS, "labels": IDS}, epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


def test_the_vocabulary_of_a_quantized_model_changes(model):
    model.quantize("int8")
    before = model(IDS).logits
    model.resize_token_embeddings(137)
    np.testing.assert_allclose(model(IDS).logits[..., :131], before, rtol=0, atol=1e-5)


def test_what_cannot_be_done(model, tmp_path):
    model.quantize("int4")
    for refused in (lambda: model.save_pretrained(tmp_path / "saved"), lambda: model.prune_heads({0: [1]})):
        with pytest.raises(InputError, match=r"the model is quantized to int4, of which (save|prune)_\w+ can make no"):
            refused()
    assert not (tmp_path / "saved").exists()
    with pytest.raises(InputError, match="quantization is 'gptq', expected one of int8, int4, float8"):
        TFXGLMModel(SMALL).quantize(
            config=keras.quantizers.GPTQConfig(dataset=["a"], tokenizer=lambda text: IDS, weight_bits=4)
        )
    with pytest.raises(InputError, match="dtype is 'int8_from_float32', in which no weights are made or loaded"):
        TFXGLMForCausalLM(SMALL, dtype="int8_from_float32")


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_of_embedding_and_head(tied, tmp_path):
    """Loss, score and files have it, too."""
    model = TFXGLMForCausalLM(changed(SMALL, tie_word_embeddings=tied))
    for layer, name in ((model.model.embed_tokens, "embeddings"), (model.lm_head, "kernel"))[: 1 if tied else 2]:
        layer.enable_lora(2)
        getattr(layer, f"lora_{name}_b").assign(np.ones(getattr(layer, f"lora_{name}_b").shape))
    logits = assert_compiled_code_agrees(model)
    loss = keras.losses.sparse_categorical_crossentropy(IDS[:, 1:], logits[:, :-1], from_logits=True).numpy().mean()
    assert float(model(IDS, labels=IDS).loss) == pytest.approx(loss, rel=1e-5)
    model.compile(keras.optimizers.SGD(0.1))
    losses = model.fit({"input_ids": IDS, "labels": IDS}, epochs=3, verbose=0).history["loss"]
    assert losses[0] == pytest.approx(loss, rel=1e-5)
    assert losses[2] < losses[0]
    model.save_pretrained(tmp_path)
    again = TFXGLMForCausalLM.from_pretrained(tmp_path)
    np.testing.assert_allclose(again(IDS).logits, model(IDS).logits, rtol=0, atol=1e-4)
