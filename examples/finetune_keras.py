"""Fine-tunes a checkpoint with Keras: `compile`, `fit`, and a callback for the learning curve.

    python examples/finetune_keras.py --output finetuned

The same batches and the same first losses as in the other examples. With `--devices 2`, a batch is shared by two of the
machine's devices, and with `--lora 8` only adapters of rank 8 are trained.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import finetune_data
import keras
import numpy as np
import tensorflow as tf

from xglm_core import XGLMTokenizer
from xglm_tf import TFXGLMForCausalLM


class Batches(keras.utils.PyDataset):
    """The batches of a run, with labels among the inputs."""

    def __init__(self, batches: list[dict[str, np.ndarray]]) -> None:
        super().__init__()
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.batches[index]


class LearningCurve(keras.callbacks.Callback):
    """Tells the curve the loss of each batch, of which Keras logs the mean since the metrics were reset."""

    def __init__(self, curve: finetune_data.Curve) -> None:
        super().__init__()
        self.curve = curve

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Begins a new mean."""
        self.model.reset_metrics()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Takes the loss."""
        self.curve.add((logs or {})["loss"])


def main() -> None:
    """Trains, saves, and continues a prompt."""
    parser = finetune_data.arguments(__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=1, help="GPUs, or parts of the CPU, for a batch (%(default)s)")
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters; 0 trains all weights (%(default)s)")
    arguments = parser.parse_args()
    keras.utils.set_random_seed(0)

    # A model belongs to the strategy in whose scope it is made.
    with strategy_for(arguments.devices).scope():
        model = TFXGLMForCausalLM.from_pretrained(arguments.checkpoint)
        if arguments.lora:
            model.enable_lora(arguments.lora)
        # No loss is named, so it is that of the labels, which are among the inputs.
        model.compile(keras.optimizers.AdamW(arguments.learning_rate, weight_decay=0.01, epsilon=1e-8))

    tokenizer = XGLMTokenizer.from_pretrained(arguments.checkpoint)
    data = Batches(list(finetune_data.batches(tokenizer, arguments.steps)))
    curve = finetune_data.Curve("Keras", arguments.steps)
    model.fit(data, shuffle=False, verbose=0, callbacks=[LearningCurve(curve)])

    curve.save(arguments.output)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    prompt = tokenizer(["Tomorrow in the"], return_tensors="tf")
    text = tokenizer.batch_decode(model.generate(**prompt, max_new_tokens=12), skip_special_tokens=True)
    print(f"{arguments.output}: {text[0]}")


def strategy_for(devices: int) -> tf.distribute.Strategy:
    """One that shares each batch among so many devices."""
    if devices == 1:
        return tf.distribute.get_strategy()
    if tf.config.list_physical_devices("GPU"):
        return tf.distribute.MirroredStrategy([f"GPU:{index}" for index in range(devices)])
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * devices)
    return tf.distribute.MirroredStrategy([f"CPU:{index}" for index in range(devices)])


if __name__ == "__main__":
    main()
