"""The loss without logits, in every backend: values, gradients, options, and that no array holds all logits."""

import numpy as np
import pytest

from conformance.gradients import loss_and_gradients
from conformance.random_weights import random_weights
from tests.helpers.gradients import LOSS, assert_gradients_equal
from tests.helpers.models import CONFIG, IDS, LEFT, ONE_BLOCK, RIGHT, changed
from xglm_core.errors import InputError
from xglm_core.inputs import IGNORED_LABEL
from xglm_core.loss import LossOptions, chunk_positions, labels_for, wants_logits

SOME = np.where(np.random.RandomState(2).random_sample(IDS.shape) < 0.4, IGNORED_LABEL, IDS)
# A row with nothing to predict, and one whose first tokens are given, as in instruction tuning.
FEW = np.where(np.arange(11) < np.array([[11], [8]]), IGNORED_LABEL, IDS)

CASES = {
    "all": {"labels": IDS},
    "some": {"labels": SOME},
    "few": {"labels": FEW},
    "left": {"labels": labels_for(IDS, LEFT), "attention_mask": LEFT},
    "right": {"labels": labels_for(IDS, RIGHT), "attention_mask": RIGHT},
    "items": {"labels": SOME, "num_items_in_batch": 29},
}
OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.125},
    "z": {"z_loss": 0.01},
    "both": {"label_smoothing": 0.3, "z_loss": 0.02},
}
READ = random_weights(ONE_BLOCK, 1).__getitem__


@pytest.fixture
def small_chunks(chunk_of):
    """Chunks of three positions, so that every case has several, and a last one that is not full."""
    chunk_of(3)


@pytest.mark.parametrize("name", CASES)
def test_in_chunks(fw, load, small_chunks, name):
    loss, gradients = fw.loss_and_gradients(load(ONE_BLOCK), input_ids=IDS, **CASES[name])
    expected_loss, expected = loss_and_gradients(ONE_BLOCK, READ, IDS, **CASES[name])
    assert loss == pytest.approx(expected_loss, rel=LOSS)
    assert_gradients_equal(gradients, expected)


def test_untied_in_chunks(fw, load, small_chunks):
    config = changed(ONE_BLOCK, tie_word_embeddings=False)
    loss, gradients = fw.loss_and_gradients(load(config), input_ids=IDS, labels=SOME)
    expected_loss, expected = loss_and_gradients(config, random_weights(config, 1).__getitem__, IDS, SOME)
    assert loss == pytest.approx(expected_loss, rel=LOSS)
    assert_gradients_equal(gradients, expected)


@pytest.mark.parametrize("name", OPTIONS)
def test_label_smoothing_and_z_loss(fw, load, name):
    model = load(ONE_BLOCK)
    model.loss_options = LossOptions(**OPTIONS[name])
    loss, gradients = fw.loss_and_gradients(model, input_ids=IDS, labels=SOME)
    expected_loss, expected = loss_and_gradients(ONE_BLOCK, READ, IDS, SOME, **OPTIONS[name])
    assert loss == pytest.approx(expected_loss, rel=LOSS)
    assert_gradients_equal(gradients, expected)


def test_logits_in_training_on_demand(fw, model):
    arguments = {"input_ids": IDS, "labels": IDS}
    assert fw.train_call(model, 0, **arguments).logits is None
    assert fw.train_call(model, 0, **arguments, return_logits=True).logits.shape == (2, 11, CONFIG.vocab_size)
    assert fw.train_call(model, 0, **arguments, logits_to_keep=2).logits.shape == (2, 2, CONFIG.vocab_size)
    assert fw.train_call(model, 0, input_ids=IDS).logits is not None
    # As the documented example expects, which evaluates.
    assert fw.call(model, **arguments).logits is not None
    output = fw.call(model, **arguments, return_logits=False, use_cache=False)
    assert output.keys() == ("loss",)
    assert float(fw.numpy(output.loss)) == pytest.approx(float(fw.numpy(fw.call(model, **arguments).loss)), rel=LOSS)


@pytest.mark.parametrize("values", [{"label_smoothing": 1.5}, {"label_smoothing": -0.1}, {"z_loss": "0.1"}])
def test_impossible_options(values):
    with pytest.raises(InputError, match=r"is .*, expected a number from 0 to"):
        LossOptions(**values)


def test_labels_of_padded_batches():
    np.testing.assert_array_equal(labels_for(IDS[:1]), IDS[:1])
    np.testing.assert_array_equal(labels_for(IDS, LEFT)[0], [*[IGNORED_LABEL] * 4, *IDS[0, 4:]])
    np.testing.assert_array_equal(labels_for(IDS, RIGHT)[0], [*IDS[0, :8], *[IGNORED_LABEL] * 3])


def test_chunks_are_bounded():
    assert chunk_positions(256_008) == 256
    assert 4 * 256_008 * chunk_positions(256_008) < 2**28
    assert chunk_positions(2**40) == 1


def test_who_wants_logits():
    nothing = {"has_labels": False, "training": True, "logits_to_keep": 0}
    assert wants_logits(None, **nothing)
    assert not wants_logits(None, **{**nothing, "has_labels": True})
    assert wants_logits(None, **{**nothing, "has_labels": True, "logits_to_keep": np.array([1])})
    assert not wants_logits(False, **nothing)
