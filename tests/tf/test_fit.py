"""`fit`, `evaluate` and `predict` with data as people have it: weights, classes, metrics, targets by name; limits."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from conformance.random_weights import write_checkpoint
from tests.helpers.models import CONFIG, changed
from xglm_core.errors import InputError
from xglm_core.tokenization.encoding import BatchEncoding
from xglm_tf import TFXGLMForCausalLM, TFXGLMModel

SMALL = changed(CONFIG, num_layers=1, dropout=0.0, attention_dropout=0.0)
ROWS, LENGTH = 6, 9
STREAM = np.random.RandomState(7)
IDS = STREAM.randint(4, SMALL.vocab_size, (ROWS, LENGTH))
MASK = (np.arange(LENGTH) < STREAM.randint(4, LENGTH + 1, (ROWS, 1))).astype(int)
LABELS = np.where(MASK == 0, -100, IDS)
INPUTS = {"input_ids": IDS, "attention_mask": MASK}
BATCH = {**INPUTS, "labels": LABELS}
WEIGHTS = STREAM.random_sample(IDS.shape).astype(np.float32)
CLASSES = {int(token): 0.25 * place for place, token in enumerate(np.unique(IDS)[::3])}
OF_CLASSES = np.vectorize(lambda token: CLASSES.get(token, 1.0))(LABELS)

# float32 rounds at 6e-8 of a number; a sum of 50 of them, and a few logarithms.
SAME = 2e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path, SMALL, seed=1)
    return path


@pytest.fixture
def model(folder):
    """A compiled model that does not learn, so that each step has the same loss.

    Without XLA, which takes most of the time: it is in the scope of a strategy below, and in test_training.py.
    """
    model = TFXGLMForCausalLM.from_pretrained(folder)
    model.compile(keras.optimizers.SGD(0.0), jit_compile=False)
    return model


@pytest.fixture(scope="module")
def expected(folder):
    """The metrics for weights of the labels, from all logits in float64 numpy."""
    logits = TFXGLMForCausalLM.from_pretrained(folder)(**INPUTS).logits.numpy().astype(np.float64)[:, :-1]
    own = np.take_along_axis(logits, IDS[:, 1:, None], axis=-1)[..., 0]
    surprisals, right = np.log(np.exp(logits).sum(axis=-1)) - own, own == logits.max(axis=-1)

    def expected(weights=1):
        factors = (LABELS[:, 1:] != -100) * np.broadcast_to(weights, IDS.shape)[:, 1:]
        loss, accuracy = ((values * factors).sum() / factors.sum() for values in (surprisals, right))
        return {"loss": loss, "accuracy": accuracy, "perplexity": np.exp(loss)}

    return expected


def dataset(*parts):
    return tf.data.Dataset.from_tensor_slices(parts if len(parts) > 1 else parts[0]).batch(4)


def generator(batch, rows=2):
    for begin in range(0, ROWS, rows):
        yield {name: value[begin : begin + rows] for name, value in batch.items()}


class TestWeights:
    @pytest.mark.parametrize(
        ("data", "weights"),
        [
            ((BatchEncoding(BATCH),), WEIGHTS),
            ((INPUTS, {"labels": LABELS}), WEIGHTS[:, 0]),
            (([IDS, MASK], LABELS.tolist()), WEIGHTS),
        ],
        ids=["labels inside", "labels by name", "lists"],
    )
    def test_of_samples_count(self, model, expected, data, weights):
        due = pytest.approx(expected(weights.reshape(ROWS, -1)), rel=SAME)
        assert model.evaluate(*data, sample_weight=weights, batch_size=4, verbose=0, return_dict=True) == due
        assert model.test_on_batch(*data, sample_weight=weights, return_dict=True) == due
        assert model.train_on_batch(*data, sample_weight=weights, return_dict=True) == due
        validation = (data[0], data[1] if len(data) > 1 else None, weights)
        history = model.fit(*data, sample_weight=weights, batch_size=4, validation_data=validation, verbose=0).history
        assert {name: value for name, (value,) in history.items() if not name.startswith("val_")} == due
        assert {name[4:]: value for name, (value,) in history.items() if name.startswith("val_")} == due

    def test_of_classes_are_of_tokens(self, model, expected):
        due = pytest.approx(expected(OF_CLASSES), rel=SAME)
        for data in ((BATCH,), (dataset(INPUTS, LABELS),)):
            history = model.fit(*data, class_weight=CLASSES, validation_data=BATCH, verbose=0).history
            assert {name: value for name, (value,) in history.items() if not name.startswith("val_")} == due
            assert history["val_loss"] == [pytest.approx(expected()["loss"], rel=SAME)]
        assert model.train_on_batch(BATCH, class_weight=CLASSES, return_dict=True) == due
        assert model.train_on_batch(BATCH, return_dict=True) == pytest.approx(expected(), rel=SAME)
        both = model.train_on_batch(INPUTS, LABELS, WEIGHTS, CLASSES, return_dict=True)
        assert both == pytest.approx(expected(OF_CLASSES * WEIGHTS), rel=SAME)

    @pytest.mark.parametrize("classes", [{131: 1.0}, {-1: 1.0}, {"cat": 2.0}, {5: -1.0}])
    def test_of_what_is_no_class(self, model, classes):
        with pytest.raises(InputError, match=r"class_weight has .* expected a number from 0 for an id from 0 to 130"):
            model.fit(BATCH, class_weight=classes, verbose=0)

    def test_targets_of_another_name(self, model):
        for data in ((INPUTS, {"logits": LABELS}), (dataset(INPUTS, {"logits": LABELS}),)):
            with pytest.raises(InputError, match=r"the targets are \['logits'\], expected 'labels' alone"):
                model.fit(*data, verbose=0)


class TestMetrics:
    @pytest.mark.parametrize(
        "options",
        [
            {"metrics": ["accuracy"]},
            {"metrics": ["acc", "perplexity"]},
            {"weighted_metrics": ["accuracy"]},
            {"metrics": {"logits": ["accuracy"]}},
        ],
    )
    def test_named_are_those_of_the_tokens(self, model, expected, options):
        model.compile("sgd", jit_compile=False, **options)
        due = pytest.approx(expected(WEIGHTS), rel=SAME)
        assert model.evaluate(INPUTS, LABELS, sample_weight=WEIGHTS, verbose=0, return_dict=True) == due

    def test_others_are_given_what_is_predicted(self, model, expected, tmp_path):
        model.compile("sgd", metrics=["sparse_categorical_accuracy", "accuracy"], jit_compile=False)
        for data in ((INPUTS, LABELS, WEIGHTS), (dataset(INPUTS, LABELS, WEIGHTS),)):
            due = expected(WEIGHTS)
            due = pytest.approx({**due, "sparse_categorical_accuracy": due["accuracy"]}, rel=SAME)
            names = ("x", "y", "sample_weight")
            assert model.evaluate(**dict(zip(names, data, strict=False)), verbose=0, return_dict=True) == due
        model.save(tmp_path / "model.keras")
        again = keras.models.load_model(tmp_path / "model.keras")
        assert again.evaluate(INPUTS, LABELS, sample_weight=WEIGHTS, verbose=0, return_dict=True) == due

    def test_in_the_scope_of_a_strategy(self, folder, expected):
        with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
            model = TFXGLMForCausalLM.from_pretrained(folder)
            model.compile(keras.optimizers.SGD(0.0), metrics=["accuracy", "sparse_categorical_accuracy"])
        due = expected(OF_CLASSES)
        history = model.fit(BATCH, batch_size=4, class_weight=CLASSES, verbose=0).history
        assert history.pop("sparse_categorical_accuracy") == [pytest.approx(due["accuracy"], rel=SAME)]
        assert {name: value for name, (value,) in history.items()} == pytest.approx(due, rel=SAME)
        with pytest.raises(InputError, match=TOO_LONG):
            model.fit(dataset({"input_ids": LONG, "labels": LONG}), verbose=0)

    def test_another_compile_begins_anew(self, model, expected):
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(True), metrics=["sparse_categorical_accuracy"])
        model.compile("sgd", jit_compile=False)
        assert model.evaluate(BATCH, verbose=0, return_dict=True) == pytest.approx(expected(), rel=SAME)


class TestData:
    def test_generators_and_encodings(self, model, expected):
        due = pytest.approx(expected(), rel=SAME)
        encoding = BatchEncoding(BATCH)
        for data in (generator(BATCH), dataset(dict(encoding))):
            assert model.evaluate(data, verbose=0, return_dict=True) == due
        assert model.fit(generator(BATCH), verbose=0).history["loss"] == [pytest.approx(expected()["loss"], rel=SAME)]

    def test_predict_takes_options(self, model):
        logits = model(**INPUTS).logits.numpy()
        last = model.predict({**INPUTS, "logits_to_keep": 1}, batch_size=4, verbose=0).logits
        np.testing.assert_allclose(last, logits[:, -1:], rtol=0, atol=1e-5)
        outputs = model.predict({**INPUTS, "output_hidden_states": True}, verbose=0)
        assert len(outputs.hidden_states) == 2
        assert model.predict(INPUTS, verbose=0).keys() == ("logits",)
        assert model.predict_on_batch(INPUTS).logits.shape == logits.shape


LONG = STREAM.randint(4, SMALL.vocab_size, (5, SMALL.max_position_embeddings + 1))
LONG_MASK = np.ones(LONG.shape, int)
LONG_MASK[:3, 0] = 0  # Three rows are as long as they may be.
TOO_LONG = "position 61 is past the limit of 61 tokens; shorten the text or set max_position_embeddings in config.json"
OUTSIDE = r"(\[\d, \d\] is| hold) {}, expected 0 to 130 \(vocab_size=131\)"
CASES = {
    "text": ({"input_ids": LONG, "attention_mask": LONG_MASK}, LONG, TOO_LONG),
    "text without a mask": ({"input_ids": LONG}, LONG, TOO_LONG),
    "position": ({"input_ids": IDS, "position_ids": IDS}, IDS, r"position \d+ is past the limit of 61 tokens"),
    "id": ({"input_ids": np.where(IDS[5, 2] == IDS, 131, IDS)}, IDS, f"input_ids{OUTSIDE.format(131)}"),
    "ignored id": ({"input_ids": LABELS}, IDS, f"input_ids{OUTSIDE.format(-100)}"),
    "label": ({"input_ids": IDS}, np.where(IDS[5, 2] == IDS, -1, IDS), f"labels{OUTSIDE.format(-1)}"),
}


class TestLimits:
    """What compiled code cannot refuse is refused before a step, which leaves no trace."""

    @pytest.mark.parametrize(("case", "jit"), [("text", True), *((case, False) for case in CASES)])
    def test_of_fit_and_evaluate(self, folder, case, jit):
        inputs, labels, message = CASES[case]
        model = TFXGLMForCausalLM.from_pretrained(folder)
        model.compile(keras.optimizers.SGD(1.0), jit_compile=jit)
        before = [weight.numpy() for weight in model.weights]
        batch = {**inputs, "labels": labels}
        calls = [
            lambda: model.fit(inputs, labels, verbose=0),
            lambda: model.fit(dataset(batch).skip(1), verbose=0),
            lambda: model.train_on_batch(batch),
            lambda: model.test_on_batch(inputs, {"labels": labels}),
            lambda: model.fit(generator(batch, 5), verbose=0),
            lambda: model.fit(BATCH, validation_data=(inputs, labels), verbose=0),
            lambda: model.evaluate(dataset(inputs, labels), verbose=0),
        ]
        for call in calls[1:2] if jit else calls if case == "text" else calls[:3]:
            with pytest.raises(InputError, match=message):
                call()
        for ours, theirs in zip(model.weights, before, strict=True):
            assert np.array_equal(ours, theirs)

    @pytest.mark.parametrize("model_class", [TFXGLMForCausalLM, TFXGLMModel])
    def test_of_predict(self, folder, model_class):
        model = model_class.from_pretrained(folder)
        for data in (LONG, {"input_ids": LONG, "attention_mask": LONG_MASK}, dataset({"input_ids": LONG})):
            with pytest.raises(InputError, match=TOO_LONG):
                model.predict(data, verbose=0)
        with pytest.raises(InputError, match=TOO_LONG):
            model.predict_on_batch(LONG)

    def test_a_text_of_full_length(self, folder):
        model = TFXGLMForCausalLM.from_pretrained(folder)
        model.compile("sgd", jit_compile=False)
        data = dataset({"input_ids": LONG[:3], "attention_mask": LONG_MASK[:3], "labels": LONG[:3]})
        assert np.isfinite(model.evaluate(data, verbose=0, return_dict=True)["loss"])

    def test_targets_of_the_users_own_are_not_looked_at(self, folder):
        decoder = TFXGLMModel.from_pretrained(folder)
        decoder.compile("sgd", lambda truth, states: keras.ops.mean(states, axis=(1, 2)) - truth)
        decoder.config.return_dict = False
        decoder.config.use_cache = False
        assert np.isfinite(decoder.fit(INPUTS, np.full((ROWS, 1), 1e9), verbose=0).history["loss"])
        with pytest.raises(InputError, match=TOO_LONG):
            decoder.fit({"input_ids": LONG}, np.zeros((len(LONG), 1)), verbose=0)
