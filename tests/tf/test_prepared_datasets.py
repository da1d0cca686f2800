"""`prepare_tf_dataset`: a `datasets.Dataset` as batches for Keras."""

import importlib.util

import numpy as np
import pytest

if importlib.util.find_spec("datasets") is None:
    pytest.skip("needs datasets: pip install 'xglm[eval]'", allow_module_level=True)

import datasets
import keras

from xglm_core import XGLMTokenizer
from xglm_core.errors import InputError
from xglm_tf import TFXGLMForCausalLM, TFXGLMModel

TINY = "examples/tiny_model/checkpoint"
TEXTS = ["The little dog found a fish", "Every", "Каждое утро"]


@pytest.fixture(scope="module")
def tokenizer():
    return XGLMTokenizer.from_pretrained(TINY, padding_side="left")


@pytest.fixture(scope="module")
def model():
    model = TFXGLMForCausalLM.from_pretrained(TINY)
    model.compile(keras.optimizers.SGD(0.0))
    return model


@pytest.fixture(scope="module")
def rows(tokenizer):
    """As `dataset.map` makes them: the text stays beside the ids."""
    return datasets.Dataset.from_dict({"text": TEXTS, **tokenizer(TEXTS)})


def with_labels(tokenizer, rows):
    batch = tokenizer.pad(rows, return_tensors="np")
    return {**batch, "labels": np.where(batch["attention_mask"] == 1, batch["input_ids"], -100), "length": [1]}


def test_the_tokenizer_pads(tokenizer, model, rows):
    (batch,) = model.prepare_tf_dataset(rows, tokenizer=tokenizer, shuffle=False)
    expected = tokenizer(TEXTS, padding=True, return_tensors="np")
    assert {*batch} == {"input_ids", "attention_mask"}
    for name, array in expected.items():
        np.testing.assert_array_equal(batch[name], array)
    np.testing.assert_allclose(model(batch).logits, model(**expected).logits)


def test_a_collator_makes_labels(tokenizer, model, rows):
    batches = model.prepare_tf_dataset(
        rows,
        batch_size=2,
        collate_fn=lambda rows, **extra: with_labels(extra["by"], rows),
        collate_fn_args={"by": tokenizer},
    )
    assert len(batches) == 1  # Shuffled, so the rest is dropped; unless told otherwise:
    batches = model.prepare_tf_dataset(
        rows, batch_size=2, shuffle=False, collate_fn=lambda rows: with_labels(tokenizer, rows)
    )
    assert [labels.shape[0] for _, labels in batches] == [2, 1]
    expected = with_labels(tokenizer, tokenizer(TEXTS))
    del expected["length"]
    assert model.evaluate(batches, verbose=0, return_dict=True)["loss"] == pytest.approx(
        float(model(**expected).loss), rel=1e-5
    )
    model.fit(batches, verbose=0)


def test_columns_of_one_length(model):
    rows = datasets.Dataset.from_dict({"input_ids": [[2, 5, 6]] * 4, "labels": [[2, 5, 6]] * 4, "source": [0] * 4})
    inputs, labels = next(iter(model.prepare_tf_dataset(rows, batch_size=4)))
    assert inputs.shape == labels.shape == (4, 3)
    model.fit(model.prepare_tf_dataset(rows, batch_size=4), verbose=0)
    decoder = TFXGLMModel(model.config)
    states = decoder.predict(decoder.prepare_tf_dataset(rows, shuffle=False), verbose=0).last_hidden_state
    assert states.shape[:2] == (4, 3)


@pytest.mark.parametrize("dataset", [{"input_ids": [[2]]}, datasets.Dataset.from_dict({"text": TEXTS})], ids=type)
def test_what_has_no_ids(model, dataset):
    with pytest.raises(InputError, match=r"dataset has no rows of input_ids, expected a datasets.Dataset of encoded"):
        model.prepare_tf_dataset(dataset)
