"""The keywords of transformers' `from_pretrained` and `save_pretrained` beside our own arguments.

A keyword is accepted, perhaps under another name; or it has no effect here, for the reason given beside it; or it is
refused, with advice what to do instead. None and False mean that a keyword is not given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from xglm_core.errors import InputError
from xglm_core.hub import HubOptions

_ONE_WAY = "weights are always mapped and read one by one, and nothing is drawn at random first"
_NOTHING_RUNS = "no code in a checkpoint is ever run"
_NO_CODE = "classes are imported, not looked up"
_DOWNLOADS = "huggingface_hub decides, by its own environment variables"

LOADED_WITHOUT_EFFECT = {
    "_commit_hash": "the commit is looked up",
    "_fast_init": _ONE_WAY,
    "_from_auto": _NO_CODE,
    "_from_pipeline": _NO_CODE,
    "code_revision": _NOTHING_RUNS,
    "experts_implementation": "there are no experts",
    "from_pt": "files of PyTorch are read without being asked for",
    "low_cpu_mem_usage": _ONE_WAY,
    "mirror": _DOWNLOADS,
    "offload_state_dict": _ONE_WAY,
    "resume_download": "an interrupted download always goes on where it was",
    "trust_remote_code": _NOTHING_RUNS,
    "user_agent": _DOWNLOADS,
    "weights_only": _NOTHING_RUNS,
}

_AFTER_LOADING = "load the model first, then"
_ACCELERATE = f"{_AFTER_LOADING} call dispatch_model, cpu_offload or disk_offload of accelerate"
_ADAPTERS = f"{_AFTER_LOADING} give it to PeftModel.from_pretrained of peft"
_PARALLEL = "see xglm_torch.parallel, which spreads a model over the processes of a device mesh"
_QUANTIZED = (
    "for int8 in PyTorch give quantization='int8'; for other types "
    f"{_AFTER_LOADING} quantize it: torchao's quantize_ in PyTorch, model.quantize in Keras"
)

# Refused keywords: the values, beside None and False, at which they have no effect, and what to do instead.
LOADED_NOT_OFFERED: dict[str, tuple[tuple[Any, ...], str]] = {
    "adapter_kwargs": ((), _ADAPTERS),
    "adapter_name": ((), _ADAPTERS),
    "attn_implementation": (("eager", "sdpa"), "attention is computed in one way, by the framework's own operations"),
    "device_map": ((), "load the model within `with tf.device(...):` or `with jax.default_device(...):`"),
    "device_mesh": ((), _PARALLEL),
    "distributed_config": ((), _PARALLEL),
    "generation_config": ((), f"{_AFTER_LOADING} set model.generation_config"),
    "gguf_file": ((), "only the formats of docs/checkpoints.md are read"),
    "ignore_mismatched_sizes": ((), f"{_AFTER_LOADING} call resize_token_embeddings, or make the model anew"),
    "key_mapping": ((), "rename the tensors in the file; a prefix that all names share is taken away anyway"),
    "load_in_4bit": ((), _QUANTIZED),
    "load_in_8bit": ((), _QUANTIZED),
    "max_memory": ((), _ACCELERATE),
    "offload_buffers": ((), _ACCELERATE),
    "offload_folder": ((), _ACCELERATE),
    "proxies": (({},), "set the environment variable HTTPS_PROXY"),
    "quantization": ((), "PyTorch computes with int8; here, a checkpoint of int8 is loaded as floats"),
    "quantization_config": ((), _QUANTIZED),
    "state_dict": ((), "set the parameters after the model was made, or load them in PyTorch and save"),
    "tp_plan": ((), _PARALLEL),
    "tp_size": ((), _PARALLEL),
    "use_kernels": ((), "attention is computed in one way, by the framework's own operations"),
    "variant": ((), "weights are looked for under their usual names; rename the files, or give another `revision`"),
}

SAVED_WITHOUT_EFFECT = {
    "save_function": "files are written by this package, complete or not at all",
    "save_original_format": "names and layout are always the published ones",
    "save_peft_format": "adapters are saved by peft",
    "token": "nothing is uploaded",
    "use_auth_token": "nothing is uploaded",
}
UPLOAD = "save, then call huggingface_hub.upload_folder"
SAVED_NOT_OFFERED: dict[str, tuple[tuple[Any, ...], str]] = {
    "commit_message": ((), UPLOAD),
    "create_pr": ((), UPLOAD),
    "push_to_hub": ((), UPLOAD),
    "repo_id": ((), UPLOAD),
    "saved_model": ((), "call model.export"),
    "state_dict": ((), "put the weights into the model by load_state_dict"),
    "variant": ((), "rename the files afterwards"),
}

_OURS = {"use_auth_token": "token"}  # Other names of hub options.


def split_options(options: Mapping[str, Any]) -> tuple[HubOptions, dict[str, Any]]:
    """Splits the keywords of `from_pretrained` into hub options and the rest; drops those without effect.

    Raises:
        InputError: a keyword is not offered, or is given under two names.
    """
    _refuse(options, LOADED_NOT_OFFERED)
    rest = _given(options, LOADED_WITHOUT_EFFECT, LOADED_NOT_OFFERED)
    for theirs, ours in _OURS.items():
        value = rest.pop(theirs, None)
        if value is not None:
            if rest.get(ours) not in (None, value):
                raise InputError(f"{theirs} and {ours} are both given, expected one of the two")
            rest[ours] = value
    hub = {name: rest.pop(name) for name in HubOptions.__annotations__ if name in rest}
    return cast(HubOptions, hub), rest


def writes(options: Mapping[str, Any]) -> bool:
    """Whether this process writes, according to the further keywords of `save_pretrained`.

    Raises:
        InputError: a keyword is not offered, or is unknown.
    """
    _refuse(options, SAVED_NOT_OFFERED)
    if options.get("safe_serialization") is False:
        raise InputError(
            "safe_serialization=False is not offered; save, then run: xglm convert FOLDER OTHER --to torch"
        )
    for name in _given(options, SAVED_WITHOUT_EFFECT, SAVED_NOT_OFFERED):
        if name not in ("is_main_process", "safe_serialization"):
            raise InputError(f"{name} is not an option of save_pretrained")
    return options.get("is_main_process") is not False


def _refuse(options: Mapping[str, Any], not_offered: Mapping[str, tuple[tuple[Any, ...], str]]) -> None:
    for name, value in options.items():
        harmless, instead = not_offered.get(name, ((value,), ""))
        if value is not None and value is not False and value not in harmless:
            raise InputError(f"{name} is not offered here; {instead}")


def _given(options: Mapping[str, Any], *without_effect: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if not any(name in names for names in without_effect)}
