"""Training on several devices and in several processes gives what one device gives; and goes on after one has died."""

import json
import os
import socket
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from conformance import training
from conformance.random_weights import write_checkpoint
from tests.helpers.commands import ROOT
from tests.helpers.models import changed
from xglm_tf import TFXGLMForCausalLM

CONFIG = changed(training.CONFIG, num_layers=1)
ROWS, STEPS, EPOCHS = 4, 2, 3
CLASSES = dict.fromkeys(range(0, CONFIG.vocab_size, 3), 0.5)

# Rounding moves a loss by 1e-7; a loss of the mean of two replicas' means, by 1e-2.
SAME = 1e-5

# What one process does, whatever the strategy: the arguments are checkpoint, output, strategy, and where to die.
WORKER = """
import json, os, sys
import numpy as np
import keras
import tensorflow as tf
from tests.tf.test_distributed import data, fitted
from xglm_core.errors import InputError
from xglm_tf import TFXGLMForCausalLM
checkpoint, output, name, die = sys.argv[1:]
if name == "mirrored":
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
else:
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
assert strategy.num_replicas_in_sync == 2

class Die(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if str(epoch) == die:
            os._exit(3)

backup = keras.callbacks.BackupAndRestore(f"{output}-backup", delete_checkpoint=False)
with strategy.scope():
    try:
        TFXGLMForCausalLM.from_pretrained(checkpoint).compile("sgd", jit_compile=True)
    except InputError as error:
        print(error)
    model, losses = fitted(checkpoint, [backup, Die()] if name != "mirrored" else [])
assert model.lm_head is None
model.save_pretrained(output)
if name == "mirrored":
    with strategy.scope():
        uneven, losses["uneven"] = fitted(checkpoint, rows=2 * 4 + 1, epochs=1)
    uneven.save_pretrained(f"{output}/uneven")
    # Outside of the scope.
    losses["evaluated"] = uneven.evaluate(data(rows=2 * 4 + 1), verbose=0)
with open(f"{output}/losses.json", "w") as file:
    json.dump(losses, file)
"""


def data(rows=ROWS * STEPS):
    """Rows of very different lengths, so that no replica has as many tokens as another."""
    stream = np.random.RandomState(3)
    ids = stream.randint(4, CONFIG.vocab_size, (rows, 13)).astype(np.int32)
    labels = np.where(np.arange(13) < stream.randint(3, 14, (rows, 1)), ids, -100)
    weights = stream.random_sample(labels.shape).astype(np.float32)
    whole = rows % ROWS == 0
    return tf.data.Dataset.from_tensor_slices(({"input_ids": ids}, labels, weights)).batch(ROWS, drop_remainder=whole)


def fitted(checkpoint, callbacks=(), rows=ROWS * STEPS, epochs=EPOCHS):
    """A model, trained, and the metrics of each epoch."""
    model = TFXGLMForCausalLM.from_pretrained(checkpoint)
    # Its state shows whether it was kept. Adam would make a step of the rounding that is the gradient of a key bias.
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), jit_compile=False)
    options = {"epochs": epochs, "class_weight": CLASSES, "callbacks": list(callbacks)}
    return model, model.fit(data(rows), shuffle=False, verbose=0, **options).history


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, CONFIG, seed=1)
    return folder


@pytest.fixture(scope="module")
def alone(checkpoint):
    """The same on one device."""
    return fitted(checkpoint)


def start(checkpoint, output, strategy, die=None, **environment):
    arguments = [sys.executable, "-c", WORKER, str(checkpoint), str(output), strategy, str(die)]
    return subprocess.Popen(
        arguments,
        env={**os.environ, **environment},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_same(output, alone, epochs=EPOCHS, losses=None):
    model, history = alone
    losses = losses or json.loads((output / "losses.json").read_text())
    for name in ("loss", "accuracy", "perplexity"):
        np.testing.assert_allclose(losses[name], history[name][-epochs:], rtol=SAME)
    again = TFXGLMForCausalLM.from_pretrained(output)
    for ours, theirs in zip(again.weights, model.weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=SAME)


@pytest.mark.slow
def test_two_devices(checkpoint, alone, tmp_path):
    worker = start(checkpoint, tmp_path / "trained", "mirrored")
    printed, errors = worker.communicate()
    assert worker.returncode == 0, errors
    assert_same(tmp_path / "trained", alone)
    assert "jit_compile is True for 2 replicas" in printed
    # A last batch of one row, of which the second device gets none.
    uneven = fitted(checkpoint, rows=2 * ROWS + 1, epochs=1)
    losses = json.loads((tmp_path / "trained" / "losses.json").read_text())
    assert_same(tmp_path / "trained" / "uneven", uneven, epochs=1, losses=losses["uneven"])
    np.testing.assert_allclose(losses["evaluated"], uneven[0].evaluate(data(2 * ROWS + 1), verbose=0), rtol=SAME)


def test_one_device_may_be_compiled(checkpoint, alone):
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        model = TFXGLMForCausalLM.from_pretrained(checkpoint)
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), jit_compile=True)
        losses = model.fit(data(), class_weight=CLASSES, shuffle=False, verbose=0).history["loss"]
    np.testing.assert_allclose(losses, alone[1]["loss"][:1], rtol=SAME)


@pytest.mark.slow
def test_two_processes_of_which_one_dies(checkpoint, alone, tmp_path):
    def workers(die):
        with socket.socket() as first, socket.socket() as second:
            for free in (first, second):
                free.bind(("localhost", 0))
            cluster = {"worker": [f"localhost:{free.getsockname()[1]}" for free in (first, second)]}
        return [
            start(
                checkpoint,
                tmp_path / f"trained-{index}",
                "processes",
                die if index else None,
                TF_CONFIG=json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}}),
            )
            for index in range(2)
        ]

    chief, other = workers(die=1)
    assert other.wait() == 3
    chief.kill()
    chief.wait()
    assert not (tmp_path / "trained-0").exists()
    for worker in workers(die=None):
        printed, errors = worker.communicate()
        assert worker.returncode == 0, errors
        assert "jit_compile is True for 2 replicas" in printed
    for index in range(2):
        assert_same(tmp_path / f"trained-{index}", alone, epochs=EPOCHS - 1)
