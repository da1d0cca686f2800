"""Training in Keras' own way: `compile`, `fit`, `evaluate`, callbacks, resuming, adapters; and the loss by itself."""

import importlib.util
import json
import runpy
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from conformance import training
from conformance.random_weights import write_checkpoint
from tests.helpers.commands import ROOT
from tests.helpers.models import changed
from tests.helpers.programs import shapes_in
from xglm_core.errors import InputError
from xglm_core.loss import LossOptions
from xglm_tf import TFXGLMForCausalLM
from xglm_tf.loss import causal_lm_loss

CONFIG = changed(training.CONFIG, num_layers=1)
ROWS, LENGTH = 6, 13
STREAM = np.random.RandomState(5)
IDS = STREAM.randint(4, CONFIG.vocab_size, (ROWS, LENGTH)).astype(np.int32)
MASK = (np.arange(LENGTH) < STREAM.randint(4, LENGTH + 1, (ROWS, 1))).astype(np.int32)
LABELS = np.where(MASK == 0, -100, IDS)
INPUTS = {"input_ids": IDS, "attention_mask": MASK}
WEIGHTS = STREAM.random_sample(IDS.shape).astype(np.float32)

# float32 rounds at 6e-8 of a number; a sum of 50 of them, and a few logarithms.
SAME = 2e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path, CONFIG, seed=1)
    return path


@pytest.fixture
def model(folder):
    return TFXGLMForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def evaluated(folder):
    """A compiled model, to evaluate with only."""
    model = TFXGLMForCausalLM.from_pretrained(folder)
    model.compile()
    return model


@pytest.fixture(scope="module")
def surprisals(folder):
    """-ln p(next token) at each position, and whether that is the likeliest token, from all logits in float64 numpy."""
    logits = TFXGLMForCausalLM.from_pretrained(folder)(**INPUTS).logits.numpy().astype(np.float64)[:, :-1]
    logits -= logits.max(axis=-1, keepdims=True)
    own = np.take_along_axis(logits, IDS[:, 1:, None].astype(int), axis=-1)[..., 0]
    return np.log(np.exp(logits).sum(axis=-1)) - own, own == 0


def expected(surprisals, weights=None):
    """The metrics that are due."""
    factors = (LABELS[:, 1:] != -100) * (1 if weights is None else np.broadcast_to(weights, IDS.shape)[:, 1:])
    loss, accuracy = ((values * factors).sum() / factors.sum() for values in surprisals)
    return {"loss": loss, "accuracy": accuracy, "perplexity": np.exp(loss)}


class Batches(keras.utils.PyDataset):
    """Batches of two rows, with labels among the inputs, cut to what they need."""

    def __len__(self):
        return ROWS // 2

    def __getitem__(self, index):
        rows = slice(2 * index, 2 * index + 2)
        longest = MASK[rows].sum(axis=1).max()
        return {name: value[rows, :longest] for name, value in {**INPUTS, "labels": LABELS}.items()}


def bucketed():
    """The same as a dataset of tensors without a known length."""
    rows = tf.data.Dataset.from_tensor_slices({**INPUTS, "labels": LABELS})
    cut = rows.map(lambda row: {name: value[: tf.reduce_sum(row["attention_mask"])] for name, value in row.items()})
    return cut.padded_batch(2, padding_values={"input_ids": 1, "attention_mask": 0, "labels": -100})


DATA = {
    "labels inside": lambda: ({**INPUTS, "labels": LABELS},),
    "inputs and labels": lambda: (INPUTS, LABELS),
    "list": lambda: ([IDS, MASK], LABELS),
    "dataset": lambda: (bucketed(),),
    "PyDataset": lambda: (Batches(),),
}


class TestEvaluate:
    """Means over tokens, however they come in batches."""

    @pytest.mark.parametrize("kind", DATA)
    def test_data(self, evaluated, surprisals, kind):
        results = evaluated.evaluate(
            *DATA[kind](), batch_size=None if "ataset" in kind else 4, verbose=0, return_dict=True
        )
        assert results == pytest.approx(expected(surprisals), rel=SAME)

    @pytest.mark.parametrize("weights", [WEIGHTS[:, 0], WEIGHTS], ids=["of rows", "of tokens"])
    def test_weights_of_the_labels(self, evaluated, surprisals, weights):
        results = evaluated.evaluate(INPUTS, LABELS, sample_weight=weights, batch_size=4, verbose=0, return_dict=True)
        assert results == pytest.approx(expected(surprisals, weights.reshape(ROWS, -1)), rel=SAME)

    def test_nothing_counts(self, evaluated):
        results = evaluated.evaluate(INPUTS, np.full_like(LABELS, -100), verbose=0, return_dict=True)
        assert results == {"loss": 0, "accuracy": 0, "perplexity": 1}

    def test_predict_is_as_it_was(self, evaluated):
        outputs = evaluated.predict({**INPUTS, "labels": LABELS}, verbose=0)
        assert outputs.keys() == ("logits",)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ((INPUTS,), "there are no labels; expected 'labels' among the inputs, or data of"),
            (({**INPUTS, "labels": LABELS}, LABELS), "labels are given twice, expected once"),
            ((INPUTS, LABELS[:, 1:]), r"labels is \[6, 12\], expected \[6, 13\]"),
            ((INPUTS, LABELS, WEIGHTS[:, 1:]), r"sample_weight is \[6, 12\], expected \[6\] or \[6, 13\]"),
        ],
        ids=["none", "twice", "shape", "weights"],
    )
    def test_wrong_data_of_evaluate(self, model, data, message):
        model.compile(run_eagerly=True)
        with pytest.raises(InputError, match=message):
            model.test_on_batch(*data)


class TestFit:
    def test_callbacks(self, model, surprisals, tmp_path):
        model.compile(keras.optimizers.SGD(0.0), steps_per_execution=2)
        path = tmp_path / "best.keras"
        history = model.fit(
            bucketed(),
            validation_data=(INPUTS, LABELS, WEIGHTS),
            epochs=9,
            verbose=0,
            callbacks=[
                keras.callbacks.ModelCheckpoint(path, monitor="val_perplexity", mode="min", save_best_only=True),
                keras.callbacks.EarlyStopping("val_loss", patience=1),
            ],
        ).history
        assert len(history["loss"]) == 2  # Nothing is learned.
        means = {**expected(surprisals), **{f"val_{k}": v for k, v in expected(surprisals, WEIGHTS).items()}}
        assert {name: values[-1] for name, values in history.items()} == pytest.approx(means, rel=SAME)
        assert np.array_equal(keras.models.load_model(path)(**INPUTS).logits, model(**INPUTS).logits)

    def test_tensorboard(self, model, tmp_path, monkeypatch):
        """What `fit` returns, and values of batches and weights, are in the files that TensorBoard shows."""
        if importlib.util.find_spec("tensorboard") is None:  # It brings these two, which end in the same `write`.
            summary = importlib.import_module("tensorflow.summary")  # What Keras imports is not `tf.summary`.
            monkeypatch.setattr(summary, "scalar", summary.write)
            monkeypatch.setattr(summary, "histogram", summary.write)
        model.compile(keras.optimizers.SGD(0.1))
        board = keras.callbacks.TensorBoard(tmp_path, histogram_freq=1, update_freq="batch", write_graph=True)
        history = model.fit(
            INPUTS, LABELS, batch_size=3, epochs=2, validation_data=(INPUTS, LABELS), callbacks=[board], verbose=0
        ).history
        written = {"train": {}, "validation": {}}
        for part, tags in written.items():
            (file,) = (tmp_path / part).glob("events.out.tfevents.*")
            for record in tf.data.TFRecordDataset(str(file)):
                event = tf.compat.v1.Event.FromString(record.numpy())
                for value in event.summary.value:
                    tags.setdefault(value.tag, {})[event.step] = tf.make_ndarray(value.tensor)

        for name in ("loss", "accuracy", "perplexity"):
            for epoch in range(2):
                assert written["train"][f"epoch_{name}"][epoch] == pytest.approx(history[name][epoch])
                assert written["validation"][f"epoch_{name}"][epoch] == pytest.approx(history[f"val_{name}"][epoch])
            batches = written["train"][f"batch_{name}"]
            assert sorted(batches) == [1, 2, 3, 4]
            assert [batches[2], batches[4]] == pytest.approx(history[name])  # The means so far.
            assert sorted(written["validation"][f"evaluation_{name}_vs_iterations"]) == [2, 4]
        assert history["loss"][1] < history["loss"][0]
        assert {f"{weight.path}/histogram" for weight in model.weights} <= written["train"].keys()

    def test_precision_and_xla(self, folder):
        """Roundings of 8 or 11 bits, a few times each, move the losses of three steps less than these bounds."""
        losses = []
        for dtype, jit, bound in (("float32", False, 0), ("float32", True, 1e-5), ("mixed_bfloat16", False, 1e-2)):
            model = TFXGLMForCausalLM.from_pretrained(folder, dtype=dtype)
            model.compile(keras.optimizers.SGD(0.1), jit_compile=jit)
            losses.append(model.fit(INPUTS, LABELS, batch_size=ROWS, epochs=3, verbose=0).history["loss"])
            assert {weight.dtype for weight in model.weights} == {"float32"}
            np.testing.assert_allclose(losses[-1], losses[0], rtol=bound)
        assert losses[0][2] < losses[0][0] - 0.3

    def test_float16_with_a_loss_scale(self, folder):
        """The scale, 2^15 at first, acts before gradients are rounded to float16, and is undone."""
        model = TFXGLMForCausalLM.from_pretrained(folder, dtype="mixed_float16")
        model.compile(keras.optimizers.SGD(0.1))
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        before = model.model.layer_norm.gamma.numpy()
        plain = TFXGLMForCausalLM.from_pretrained(folder)
        plain.compile(keras.optimizers.SGD(0.1))
        for trained in (model, plain):
            trained.train_on_batch(INPUTS, LABELS)
        moved = plain.model.layer_norm.gamma.numpy() - before
        np.testing.assert_allclose(model.model.layer_norm.gamma - before, moved, rtol=0, atol=2e-2 * abs(moved).max())

    def test_resumes_with_the_same_curve(self, folder, tmp_path):
        """With the state of the optimizer and the options of the loss. (Keras does not save the chance of dropout.)"""

        def losses(model, count):
            return [model.train_on_batch(INPUTS, LABELS, return_dict=True)["loss"] for _ in range(count)]

        model = TFXGLMForCausalLM.from_pretrained(folder)
        model.loss_options = LossOptions(label_smoothing=0.1, z_loss=0.01)
        model.compile(keras.optimizers.AdamW(1e-2))
        losses(model, 2)
        model.save(tmp_path / "model.keras")
        again = keras.models.load_model(tmp_path / "model.keras")
        assert again.loss_options == model.loss_options
        model.reset_metrics()
        ours = losses(model, 3)
        np.testing.assert_allclose(losses(again, 3), ours, rtol=1e-6)
        assert ours[2] < ours[0]

    def test_a_loss_and_metrics_of_the_users_own(self, model, surprisals):
        """Of logits and labels as they are given."""
        loss = keras.losses.SparseCategoricalCrossentropy(True, ignore_class=-100, reduction="sum_over_batch_size")
        shifted = np.pad(LABELS[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
        logits = model(**INPUTS).logits
        model.compile("sgd", loss=loss, metrics=["sparse_categorical_accuracy"])
        results = model.evaluate({**INPUTS, "labels": shifted}, verbose=0, return_dict=True)
        assert results["loss"] == pytest.approx(float(loss(shifted, logits)), rel=SAME)
        assert results.keys() == {"loss", "sparse_categorical_accuracy"}
        assert model.train_on_batch(INPUTS, shifted)[0] == pytest.approx(float(loss(shifted, logits)), rel=SAME)

    def test_other_options_act_on_a_compiled_model(self, model):
        model.compile("sgd")
        before = model.test_on_batch(INPUTS, LABELS, return_dict=True)["loss"]
        model.loss_options = LossOptions(z_loss=1.0)
        model.reset_metrics()
        assert model.test_on_batch(INPUTS, LABELS, return_dict=True)["loss"] > before + 1

    def test_float16_parameters_are_refused(self, folder):
        model = TFXGLMForCausalLM.from_pretrained(folder, dtype="float16")
        with pytest.raises(InputError, match="the trainable parameters are float16"):
            model.compile("adam")
        model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()))


@pytest.mark.slow
def test_finetune_keras(tmp_path, monkeypatch):
    """The first losses are those of the other examples, which follow torch's AdamW."""
    examples = ROOT / "examples"
    monkeypatch.syspath_prepend(str(examples))
    monkeypatch.setattr(sys, "argv", ["finetune_keras.py", "--steps", "3", "--output", str(tmp_path)])
    runpy.run_path(str(examples / "finetune_keras.py"), run_name="__main__")
    losses = json.loads((tmp_path / "losses.json").read_text())["losses"]
    np.testing.assert_allclose(losses, [9.4253, 7.8322, 6.4078], rtol=1e-4)
    assert TFXGLMForCausalLM.from_pretrained(tmp_path).lm_head is None


class TestLora:
    def test_only_adapters_are_trained_and_merged_when_saved(self, model, folder, tmp_path):
        before = {weight.path: weight.numpy() for weight in model.weights}
        expected = model(**INPUTS).logits
        model.enable_lora(2, projections=("q_proj", "out_proj"), lora_alpha=3)
        assert [variable.path.split("/", 3)[-1] for variable in model.trainable_variables] == [
            f"self_attn/{layer}/lora_kernel_{part}" for layer in ("q_proj", "out_proj") for part in "ab"
        ]
        np.testing.assert_allclose(model(**INPUTS).logits, expected, rtol=0, atol=1e-6)
        model.compile(keras.optimizers.AdamW(1e-2))
        losses = model.fit(INPUTS, LABELS, batch_size=ROWS, epochs=4, verbose=0).history["loss"]
        assert losses[-1] < losses[0]
        for weight in model.weights:
            assert weight.path not in before or np.array_equal(weight, before[weight.path])

        trained = model(**INPUTS).logits
        assert abs(trained - expected).numpy().max() > 1e-2
        model.save_pretrained(tmp_path / "merged")
        model.save(tmp_path / "model.keras")
        model.save_weights(tmp_path / "model.weights.h5")
        fresh = TFXGLMForCausalLM(CONFIG)
        fresh.load_weights(tmp_path / "model.weights.h5")
        merged = TFXGLMForCausalLM.from_pretrained(tmp_path / "merged")
        saved = keras.models.load_model(tmp_path / "model.keras", compile=False)
        for again in (fresh, merged, saved):
            np.testing.assert_allclose(again(**INPUTS).logits, trained, rtol=0, atol=1e-5)
            assert len(again.trainable_variables) == len(before)
        with pytest.raises(InputError, match="there are adapters, expected none"):
            model.prune_heads({0: [1]})
        with pytest.raises(InputError, match="there are adapters already"):
            model.enable_lora(2)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"rank": 0}, "rank is 0, expected a positive integer"),
            ({"rank": 2, "layers": [0, 1]}, r"there are no blocks \[1\], expected some of 0 to 0"),
            ({"rank": 2, "projections": ["fc1"]}, r"there are no projections \['fc1'\], expected some of q_proj"),
        ],
    )
    def test_wrong_adapters(self, model, arguments, message):
        with pytest.raises(InputError, match=message):
            model.enable_lora(**arguments)
        assert len(model.trainable_variables) == len(model.weights)


class TestLoss:
    """`causal_lm_loss` by itself, in several chunks."""

    STATES = STREAM.standard_normal((ROWS, LENGTH, 35)).astype(np.float32)
    MATRIX = STREAM.standard_normal((131, 35)).astype(np.float32)

    @pytest.fixture(autouse=True)
    def small_chunks(self, chunk_of, monkeypatch):
        chunk_of(2 * 7)  # Of which a chunk takes half.
        monkeypatch.setattr("xglm_tf.fast.adding._TILE_BYTES", 4 * 35 * 50)

    @staticmethod
    def gradients(states, matrix, training):
        with tf.GradientTape() as tape:
            tape.watch([states, matrix])
            results = causal_lm_loss(
                states, matrix, LABELS, options=LossOptions(0.1, 0.01), weights=WEIGHTS, training=training
            )
        return (*results, *tape.gradient(results.loss, [states, matrix]))

    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("mode", ["eager", "graph", "unknown length", "xla", "plain graph", "plain xla"])
    def test_in_every_mode(self, mode, training, monkeypatch):
        """Against the formula with all logits, and TensorFlow's own gradients."""
        if "plain" in mode:
            monkeypatch.setenv("XGLM_PLAIN", "1")
        states, matrix = tf.constant(self.STATES), tf.constant(self.MATRIX)
        targets = np.pad(LABELS[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
        factors = np.where(targets == -100, 0, np.pad(WEIGHTS[:, 1:], ((0, 0), (0, 1))))
        with tf.GradientTape() as tape:
            tape.watch([states, matrix])
            logits = tf.einsum("btd,vd->btv", states, matrix)
            total = tf.reduce_logsumexp(logits, axis=-1)
            own = tf.gather(logits, np.where(targets == -100, 0, targets), batch_dims=2)
            losses = total - 0.9 * own - 0.1 * tf.reduce_mean(logits, axis=-1) + 0.01 * total**2
            loss = tf.reduce_sum(losses * factors) / factors.sum()
        correct = (own == tf.reduce_max(logits, axis=-1)).numpy()
        due = [loss, np.sum((total - own) * factors), np.sum(correct * factors), factors.sum()]
        due += tape.gradient(loss, [states, matrix])

        run = lambda states, matrix: self.gradients(states, matrix, training)  # noqa: E731
        shape = (None, None, 35) if mode == "unknown length" else self.STATES.shape
        if mode != "eager":
            signature = [tf.TensorSpec(shape), tf.TensorSpec(self.MATRIX.shape)]
            run = tf.function(run, input_signature=signature, jit_compile="xla" in mode)
        for ours, theirs in zip(run(states, matrix), due, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())

    def test_no_array_of_all_logits(self):
        program = tf.function(lambda *given: self.gradients(*given, True), jit_compile=True)
        given = tf.constant(self.STATES), tf.constant(self.MATRIX)
        shapes = shapes_in(program.experimental_get_compiler_ir(*given)(stage="hlo"))
        assert any(sorted(shape) == [7, 131] for shape in shapes), "no chunk of logits has been seen"
        assert max(np.prod(shape) for shape in shapes if 131 in shape) == 131 * 35

    def test_what_does_not_count_may_be_anything(self):
        states = np.where((LABELS != -100)[..., None], self.STATES, np.nan)  # Also of the last tokens, which do count.
        states[:, :-1][LABELS[:, 1:] == -100] = np.nan
        states[:, -1] = np.nan
        for number in self.gradients(tf.constant(states), tf.constant(self.MATRIX), True):
            assert np.isfinite(number).all()

    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
    def test_second_derivatives_are_refused(self, mode, training):
        def run(states, matrix):
            with tf.GradientTape() as tape:
                tape.watch(states)
                of_states, of_matrix = self.gradients(states, matrix, training)[-2:]
                slope = tf.reduce_sum(of_states**2) + tf.reduce_sum(of_matrix**2)
            return tape.gradient(slope, states)

        if mode != "eager":
            run = tf.function(run, jit_compile=mode == "xla")
        with pytest.raises(InputError, match=r"the loss has no second derivatives, .* logits of a call without labels"):
            run(tf.constant(self.STATES), tf.constant(self.MATRIX))

    @pytest.mark.parametrize("jit", [False, True])
    def test_a_persistent_tape(self, jit):
        """It keeps no logits, in spite of the second derivatives that it might be asked for."""

        def gradients(states, matrix):
            with tf.GradientTape(persistent=True) as tape:
                tape.watch([states, matrix])
                loss = causal_lm_loss(states, matrix, LABELS, options=LossOptions(), training=True).loss
            return tape.gradient(loss, states), tape.gradient(loss, matrix)

        program = tf.function(gradients, jit_compile=jit)
        given = tf.constant(self.STATES), tf.constant(self.MATRIX)
        with tf.GradientTape() as tape:
            tape.watch(given)
            loss = causal_lm_loss(*given, LABELS, options=LossOptions()).loss
        for ours, due in zip(program(*given), tape.gradient(loss, given), strict=True):
            np.testing.assert_allclose(ours, due, rtol=1e-5, atol=1e-6 * np.abs(due).max())
        functions = program.get_concrete_function(*given).graph.as_graph_def().library.function
        assert "TensorListPushBack" not in {node.op for function in functions for node in function.node_def}

    def test_a_frozen_head_has_no_gradient(self):
        states, matrix = tf.constant(self.STATES), tf.constant(self.MATRIX)
        with tf.GradientTape() as tape:
            tape.watch([states, matrix])
            loss = causal_lm_loss(states, matrix, LABELS, options=LossOptions(), training=True, train_head=False).loss
        of_states, of_matrix = tape.gradient(loss, [states, matrix])
        assert of_matrix is None
        assert of_states.numpy().any()


class TestTiedMatrix:
    """One gradient of both uses, which is that of the lookup added to that of the head."""

    @pytest.mark.parametrize("jit", [False, True])
    def test_gradient(self, model, jit):
        matrix = model.get_input_embeddings().embeddings

        def gradient(ids):
            with tf.GradientTape() as tape:
                loss = 3 * model(ids, labels=ids, use_cache=False, training=True).loss
            return tf.convert_to_tensor(tape.gradient(loss, matrix.value))

        due = gradient(tf.constant(IDS)).numpy()  # As TensorFlow adds them: nothing is shared outside a program.
        program = tf.function(gradient, jit_compile=jit)
        np.testing.assert_allclose(program(tf.constant(IDS)).numpy(), due, rtol=1e-5, atol=1e-6 * np.abs(due).max())
        operations = program.get_concrete_function(tf.constant(IDS)).graph.get_operations()
        whole = {one.type for one in operations if [tuple(result.shape) for result in one.outputs] == [matrix.shape]}
        assert "AddN" not in whole
        assert "UnsortedSegmentSum" not in whole

    def test_in_fit(self, model):
        model.compile(keras.optimizers.SGD(0.1))
        model.optimizer.build(model.trainable_variables)
        data = tf.nest.map_structure(tf.constant, (INPUTS, LABELS))
        operations = tf.function(model.train_step).get_concrete_function(data).graph.get_operations()
        shape = model.get_input_embeddings().embeddings.shape
        whole = {one.type for one in operations if [tuple(result.shape) for result in one.outputs] == [shape]}
        assert not whole & {"AddN", "UnsortedSegmentSum"}

    @pytest.mark.parametrize("compiled", [False, True])
    def test_second_derivatives_are_refused(self, model, compiled):
        gamma = model.model.layer_norm.gamma

        def curvature(ids):
            with tf.GradientTape() as outer:
                with tf.GradientTape() as inner:
                    loss = model(ids, labels=ids, use_cache=False, training=True).loss
                slope = tf.reduce_sum(inner.gradient(loss, gamma.value) ** 2)
            return outer.gradient(slope, gamma.value)

        with pytest.raises(InputError, match="the loss has no second derivatives"):
            (tf.function(curvature) if compiled else curvature)(tf.constant(IDS))
