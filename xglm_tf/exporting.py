"""Models for TensorFlow without this package: SavedModel and LiteRT.

Differs: in Flax `exporting.py` tells `jax.export` about our types; PyTorch needs neither.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from xglm_core.errors import InputError

_THROUGH_TORCH = "load the checkpoint in xglm_torch, and call torch.onnx.export(model, ..., dynamo=True)"
_OTHER_FORMATS = {
    "onnx": _THROUGH_TORCH,
    "openvino": "write a SavedModel, and give its folder to openvino.convert_model",
    "torch": "load the checkpoint in xglm_torch, and call torch.export.export",
}


class Exporting(keras.Model):
    """The method `export`."""

    def export(
        self,
        filepath: str | os.PathLike[str],
        format: str = "tf_saved_model",
        verbose: bool | None = None,
        input_signature: Any = None,
        **kwargs: Any,
    ) -> None:
        """Writes a SavedModel that TensorFlow runs without this package; or a file for LiteRT, once TensorFlow Lite.

        Its signature `serving_default`, which is also its method `serve`, takes `input_ids` and `attention_mask`, int32
        [batch, length] of any size, and returns the first output by its name. Nothing is checked there: see `call`.

        Args:
            filepath: the folder to write, or the file.
            format: "tf_saved_model" or "litert".
            verbose, kwargs: see `keras.Model.export`.
            input_signature: specifications of other inputs, as `call` takes them. LiteRT needs them, with all sizes.

        Raises:
            InputError: it is another format, or LiteRT would not know the sizes.
        """
        if format in _OTHER_FORMATS:
            raise InputError(f"export writes no {format!r}; {_OTHER_FORMATS[format]}")
        if format not in ("tf_saved_model", "litert"):
            super().export(filepath, format, verbose, input_signature, **kwargs)
            return
        shapes = [one.shape for one in input_signature or ()]
        if format == "litert" and (not shapes or any(None in tuple(shape) for shape in shapes)):
            raise InputError(
                "export to 'litert' needs the sizes of its inputs; expected input_signature, for example "
                "[tf.TensorSpec((1, 32), tf.int32, name) for name in ('input_ids', 'attention_mask')]"
            )
        if format == "litert":
            with tempfile.TemporaryDirectory() as folder:
                self.export(folder, verbose=verbose, input_signature=input_signature, **kwargs)
                Path(filepath).write_bytes(tf.lite.TFLiteConverter.from_saved_model(folder).convert())
            return

        def serve(*inputs: Any) -> dict[str, tf.Tensor]:
            outputs = self(*inputs, use_cache=False, return_dict=True)
            return {outputs.keys()[0]: outputs[0]}

        if input_signature is None:
            input_signature = list(self.input_signature.values())
        archive = keras.export.ExportArchive()
        archive.track(self)
        archive.add_endpoint("serve", serve, input_signature)
        archive.write_out(filepath, verbose=bool(verbose), **kwargs)

    @property
    def input_signature(self) -> dict[str, tf.TensorSpec]:
        """What `export` asks for by default: ids and mask, int32 [batch, length] of any size."""
        return {name: tf.TensorSpec((None, None), tf.int32, name) for name in ("input_ids", "attention_mask")}
