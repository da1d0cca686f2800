"""Whether a model is still the one that its compiled code was traced from.

Differs: there is no such file in the other backends. Compiled code here holds on to the variables that it met, and to
what Python did then; in JAX parameters are its arguments, and PyTorch runs the modules as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import keras

from xglm_tf.weights import all_layers


@dataclasses.dataclass(frozen=True)
class Traced:
    """What a model consisted of.

    Attributes:
        key: to compare.
        objects: layers and variables, by whose identity that is; so none of them makes room for another.
    """

    key: tuple[Any, ...]
    objects: list[Any] = dataclasses.field(compare=False, repr=False)


def compiled(model: keras.Model, name: str, make: Callable[[Any], Any]) -> Any:
    """What `make` compiles of a model; the same as before as long as that has not changed."""
    attribute = f"_compiled_for_{name}"
    if outdated(model, name) or attribute not in model.__dict__:
        model.__dict__[attribute] = make(model)  # Keras and TensorFlow, which save attributes, are passed by.
    return model.__dict__[attribute]


def forget(model: keras.Model) -> None:
    """Drops what is kept of a model: it holds on to variables that have been replaced."""
    for attribute in [name for name in model.__dict__ if name.startswith(("_compiled_for_", "_traced_for_"))]:
        del model.__dict__[attribute]


def outdated(model: keras.Model, name: str, *options: Any) -> bool:
    """Whether a model has changed since this was last asked; True at first.

    Variables and layers may have been replaced, quantized or adapted, policies and the configuration changed.

    Args:
        model: the model.
        name: for which compiled code it is asked.
        options: what that depends on besides.
    """
    layers = all_layers(model)
    known = set(map(id, layers))
    # Keras does not see what is put into the list of blocks in place of another.
    swapped = [block for block in model.model.layers if id(block) not in known]
    for block in swapped:
        layers += all_layers(block)
    variables = [variable for owner in (model, *swapped) for variable in owner.variables]
    of_layers = ((id(layer), layer.dtype_policy.name, getattr(layer, "lora_alpha", None)) for layer in layers)
    blocks = tuple(map(id, model.model.layers))
    key = (*of_layers, blocks, *map(id, variables), repr(model.config), *options)
    attribute = f"_traced_for_{name}"
    before = model.__dict__.get(attribute)
    model.__dict__[attribute] = now = Traced(key, [*layers, *variables])
    return before != now
