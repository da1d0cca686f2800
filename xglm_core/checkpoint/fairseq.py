"""The original checkpoints, fairseq's `model.pt`: a `torch.save` file of weights and training settings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from xglm_core.checkpoint.tensor_file import shown
from xglm_core.checkpoint.torch_bin import TorchFile
from xglm_core.config import XGLMConfig
from xglm_core.errors import ConfigError
from xglm_core.weight_names import HEAD

# fairseq's names for the keys of our configuration; those of the first group must exist.
_REQUIRED = {
    "d_model": "decoder_embed_dim",
    "ffn_dim": "decoder_ffn_embed_dim",
    "num_layers": "decoder_layers",
    "attention_heads": "decoder_attention_heads",
    "activation_function": "activation_fn",
}
_OPTIONAL = {
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "layerdrop": "decoder_layerdrop",
    "max_position_embeddings": "max_target_positions",
}
# fairseq calls the GELU by tanh "gelu_accurate", others "gelu_new".
_ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "gelu_accurate": "gelu_new", "gelu_fast": "gelu_new", "swish": "silu"}

_HEAD = "decoder.output_projection.weight"
# Markers of a version and of a device; they do not affect the model.
_DROPPED = {"decoder.version", "_float_tensor", "decoder._float_tensor", "decoder.embed_positions._float_tensor"}


class FairseqFile(TorchFile):
    """A checkpoint of fairseq; see `TorchFile`.

    Attributes:
        config: the architecture, from `cfg`.
    """

    allows_records = True  # `cfg` holds the `argparse.Namespace` of the command line.

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self.config = self._read_config()

    def _named_tensors(self) -> Mapping[str, Any]:
        weights = self.contents.get("model") if isinstance(self.contents, dict) else None
        if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
            raise self._damaged("expected a dictionary with the weights by name as 'model' and the settings as 'cfg'")
        return {
            HEAD
            if name == _HEAD
            else name.replace("decoder", "model", 1)
            if name.startswith("decoder.")
            else name: value
            for name, value in weights.items()
            if name not in _DROPPED
        }

    def _read_config(self) -> XGLMConfig:
        cfg = self.contents.get("cfg")
        settings = cfg.get("model") if isinstance(cfg, dict) else None
        if not isinstance(settings, dict):
            raise self._damaged(f"cfg['model'] is a {type(settings).__name__}, expected the settings of the model")
        missing = [key for key in _REQUIRED.values() if key not in settings]
        if missing:
            raise self._damaged(f"cfg['model'] has no {', '.join(missing)}")
        names = {**_REQUIRED, **_OPTIONAL}
        values = {ours: settings[theirs] for ours, theirs in names.items() if settings.get(theirs) is not None}
        for ours, value in values.items():
            if not isinstance(value, int | float | str):
                raise self._damaged(
                    f"cfg['model'].{names[ours]} is a {type(value).__name__}, expected a number or name"
                )
        activation = values.get("activation_function")
        if activation not in _ACTIVATIONS:
            raise self._damaged(f"activation_fn is {shown(str(activation))}, expected one of {', '.join(_ACTIVATIONS)}")
        embedding = self.tensors.get("model.embed_tokens.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise self._damaged("no matrix decoder.embed_tokens.weight, whose rows are the vocabulary")
        values["activation_function"] = _ACTIVATIONS[activation]
        values["vocab_size"] = embedding.shape[0]
        values["scale_embedding"] = not settings.get("no_scale_embedding", False)
        values["tie_word_embeddings"] = bool(settings.get("share_decoder_input_output_embed", True))
        try:
            return XGLMConfig(**values)
        except ConfigError as error:
            raise self._damaged(f"cfg['model']: {error}") from None
