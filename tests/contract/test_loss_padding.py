"""What padding predicts does not count: a padded row's loss and gradients are those of the row alone.

The rule: a label counts if it is not -100 and the position before it holds a token.
"""

import importlib

import numpy as np
import pytest

from conformance.gradients import loss_and_gradients
from conformance.random_weights import random_weights, write_checkpoint
from tests.helpers.commands import ROOT
from tests.helpers.gradients import LOSS, assert_gradients_equal
from tests.helpers.models import CONFIG, IDS, LEFT, RIGHT, changed
from xglm_core import XGLMTokenizer
from xglm_core.compare import oracle
from xglm_core.inputs import IGNORED_LABEL
from xglm_core.loss import counted_labels, items_in_batch

SHALLOW = changed(CONFIG, num_layers=1, dropout=0.0, attention_dropout=0.0)
READ = random_weights(SHALLOW, 1).__getitem__
MASKS = {"left": LEFT, "right": RIGHT, "both sides": LEFT & RIGHT}
# A gap in each row, and padding at an end.
GAPS = np.array([[0, 0, 1, 1, 0, 0, 1, 1, 0, 1, 1], [1, 1, 1, 0, 1, 0, 1, 1, 1, 0, 0]])
WEIGHTS = np.random.RandomState(8).random_sample(IDS.shape).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path, SHALLOW, seed=1)
    return path


def as_people_write_them(mask):
    """The labels: the ids, with -100 where the mask is 0."""
    return np.where(mask == 1, IDS, IGNORED_LABEL)


@pytest.mark.parametrize("name", MASKS)
def test_a_padded_row_is_the_row_alone(fw, model, name):
    mask = MASKS[name][:1]
    row = IDS[:1, mask[0] == 1]
    expected_loss, expected = loss_and_gradients(SHALLOW, READ, row, row)
    labels = as_people_write_them(MASKS[name])[:1]
    loss, gradients = fw.loss_and_gradients(model, input_ids=IDS[:1], attention_mask=mask, labels=labels)
    assert loss == pytest.approx(expected_loss, rel=LOSS)
    assert_gradients_equal(gradients, expected)


@pytest.mark.parametrize("name", MASKS)
def test_loss_times_count_is_minus_the_score(fw, model, name):
    mask, labels = MASKS[name], as_people_write_them(MASKS[name])
    loss = float(fw.numpy(fw.call(model, IDS, mask, labels=labels).loss))
    assert loss * items_in_batch(labels, mask) == pytest.approx(-np.asarray(model.score(IDS, mask)).sum(), rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_of_the_bundled_model(fw, side):
    folder = ROOT / "examples" / "tiny_model" / "checkpoint"
    tokenizer, model = XGLMTokenizer.from_pretrained(folder), fw.causal_lm.from_pretrained(folder)
    texts = ["The children go to school by bus.", "Каждое утро"]
    ids, mask = map(np.asarray, tokenizer(texts, padding=True, padding_side=side, return_tensors="np").values())
    loss = fw.call(model, ids, mask, labels=np.where(mask == 1, ids, IGNORED_LABEL)).loss
    assert float(fw.numpy(loss)) == pytest.approx(3.498, abs=5e-4)


@pytest.mark.parametrize("labels", [IDS, as_people_write_them(GAPS)], ids=["all", "tokens"])
def test_a_row_with_gaps(fw, model, labels):
    """The label alone says whether a target counts, the mask whether what predicts it does."""
    loss, gradients = fw.loss_and_gradients(model, input_ids=IDS, attention_mask=GAPS, labels=labels)
    expected_loss, expected = loss_and_gradients(SHALLOW, READ, IDS, labels, GAPS)
    logits = oracle.forward(SHALLOW, READ, IDS, GAPS).logits
    assert expected_loss == pytest.approx(oracle.loss(logits, labels, attention_mask=GAPS), rel=1e-12)
    assert loss == pytest.approx(expected_loss, rel=LOSS)
    assert_gradients_equal(gradients, expected)


def test_parts_of_a_batch_add_up(fw, model):
    labels, items = as_people_write_them(GAPS), items_in_batch(as_people_write_them(GAPS), GAPS)
    parts = [
        float(fw.numpy(fw.call(model, IDS[i : i + 1], GAPS[i : i + 1], labels=labels[i : i + 1], **divided).loss))
        for i in range(2)
        for divided in [{"num_items_in_batch": items}]
    ]
    assert sum(parts) == pytest.approx(float(fw.numpy(fw.call(model, IDS, GAPS, labels=labels).loss)), rel=LOSS)


@pytest.mark.parametrize("capacity", [None, 20])
def test_after_a_cache(fw, model, capacity):
    """The mask is also over what the cache holds; in Flax, over all that it has room for."""
    labels = as_people_write_them(GAPS)
    logits = oracle.forward(SHALLOW, READ, IDS, GAPS).logits[:, 5:]
    expected = oracle.loss(logits, labels[:, 5:], attention_mask=GAPS[:, 5:])
    mask, start = GAPS, {"use_cache": True}
    if capacity is not None:
        if fw.name != "flax":
            pytest.skip("only Flax has caches of a fixed capacity")
        mask = np.pad(GAPS, ((0, 0), (0, capacity - 11)), constant_values=1)
        start = {"past_key_values": model.init_cache(2, capacity)}
    past = fw.call(model, IDS[:, :5], mask if capacity else GAPS[:, :5], **start).past_key_values
    loss = fw.call(model, IDS[:, 5:], mask, past_key_values=past, labels=labels[:, 5:]).loss
    assert float(fw.numpy(loss)) == pytest.approx(expected, rel=LOSS)


def test_metrics_in_the_framework_s_own_training(fw, load):
    """Of evaluation, and of a step of training from the same parameters; in JAX of two parts."""
    if fw.name == "torch":
        pytest.skip("PyTorch's loops compute their own metrics")
    logits = oracle.forward(SHALLOW, READ, IDS, GAPS).logits[:, :-1]
    # By hand: the targets of GAPS whose position before holds a token.
    factors = np.array([[0, 0, 1, 0, 0, 0, 1, 0, 0, 1], [1, 1, 0, 0, 0, 0, 1, 1, 0, 0]])
    factors = factors * WEIGHTS[:, 1:]
    own = np.take_along_axis(logits, IDS[:, 1:, None], -1)[..., 0]
    loss = ((np.log(np.exp(logits).sum(-1)) - own) * factors).sum() / factors.sum()
    accuracy = ((own == logits.max(-1)) * factors).sum() / factors.sum()
    batch = {"input_ids": IDS, "attention_mask": GAPS, "labels": as_people_write_them(GAPS)}
    for found in METRICS[fw.name](load(SHALLOW), batch):
        assert float(found["loss"]) == pytest.approx(loss, rel=1e-5)
        assert float(found["accuracy"]) == pytest.approx(accuracy, rel=1e-5)
        assert float(found["perplexity"]) == pytest.approx(np.exp(loss), rel=1e-5)
        assert float(found.get("count", factors.sum())) == pytest.approx(factors.sum(), rel=1e-5)


def tf_metrics(model, batch):
    labels = batch.pop("labels")
    model.compile("sgd", jit_compile=False)
    yield model.evaluate(batch, labels, sample_weight=WEIGHTS, verbose=0, return_dict=True)
    # A batch of both rows, so that nothing is learnt before the metrics are there.
    yield {k: v[0] for k, v in model.fit(batch, labels, 2, sample_weight=WEIGHTS, verbose=0).history.items()}


def flax_metrics(model, batch):
    xglm_flax, optax = importlib.import_module("xglm_flax"), importlib.import_module("optax")
    batch = {**batch, "weights": WEIGHTS}
    yield xglm_flax.make_eval_step(model)(model.params, batch)
    step, state = xglm_flax.make_train_step(model, optax.sgd(0.1), accumulation_steps=2)
    yield step(state, batch)[1]


METRICS = {"tf": tf_metrics, "flax": flax_metrics}


def test_counted_labels():
    assert counted_labels([[5, 6, 7]]).tolist() == [[5, 6, 7]]
    mask = np.array([[1, 0, 0, 1, 1], [1, 1, 1, 1, 0]])
    # The last three columns of a mask that goes back to what a cache holds.
    assert counted_labels(np.array([[5, 6, 7], [5, -100, 7]]), mask).tolist() == [[5, -100, 7], [5, -100, 7]]
    assert items_in_batch(np.array([[5, 6, 7], [5, -100, 7]]), mask) == 2
    assert items_in_batch(IDS, LEFT) == 17
