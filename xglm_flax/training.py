"""Steps of training and evaluation: pure functions to compile, and the state that they pass on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

from xglm_core.calls import DecoderInputs, Wanted
from xglm_core.errors import InputError
from xglm_core.inputs import (
    IGNORED_LABEL,
    check_input_ids,
    check_labels,
    check_labels_shape,
    check_positions_of,
    check_shapes,
)
from xglm_core.loss import LossOutput, check_trainable_type
from xglm_flax.cache import is_traced
from xglm_flax.causal_lm import FlaxXGLMForCausalLM
from xglm_flax.inputs import check_dropout
from xglm_flax.loss import counted_labels
from xglm_flax.parallel import automatic, data_shards, place_batch, place_params, specs_like, within
from xglm_flax.weights import Params

Batch = Mapping[str, Any]
Metrics = dict[str, jax.Array]

_FIELDS = ("input_ids", "attention_mask", "position_ids", "labels", "weights")


class FlaxXGLMTrainState(TrainState):
    """Flax's own training state with a PRNG key: a pytree, which every checkpointing library knows.

    Attributes:
        dropout_key: raw key data, uint32, which never change: each step folds its number into them. So a resumed run
            goes on as if it had not stopped.
    """

    dropout_key: jax.Array

    def step_key(self) -> jax.Array:
        """The key of the next step."""
        return jax.random.fold_in(jax.random.wrap_key_data(self.dropout_key), self.step)


def make_loss_fn(
    model: FlaxXGLMForCausalLM, *, train: bool = True, has_aux: bool = False, mesh: jax.sharding.Mesh | None = None
) -> Callable[..., Any]:
    """The loss as a pure function of parameters and a batch, for `jax.grad` and any loop of training.

    Args:
        model: what computes it; its `loss_options` are read here.
        train: whether dropout acts.
        has_aux: whether to return a pair: the loss, and all of `LossOutput`, as `jax.value_and_grad(..., has_aux=True)`
            wants it.
        mesh: the devices, if there are several; see `xglm_flax.parallel`.

    Returns:
        `loss_fn(params, batch, rng=None, num_items_in_batch=None)`. A batch holds integers [batch, length] as
        `input_ids` and `labels`, and may hold `attention_mask`, `position_ids`, and `weights` of the labels, floats
        [batch, length]. `rng` is a key of `jax.random`, needed for dropout. The loss is a float32 scalar.
    """
    module, options, shards = model.module, model.loss_options, data_shards(mesh)

    def loss_fn(
        params: Params, batch: Batch, rng: jax.Array | None = None, num_items_in_batch: Any = None
    ) -> jax.Array | tuple[jax.Array, LossOutput]:
        check_batch(model, batch)
        check_dropout(model.config, train, rng)
        rngs = {"dropout": rng} if train and rng is not None else {}

        def loss(module: Any) -> LossOutput:
            inputs = DecoderInputs(*map(batch.get, ("input_ids", "attention_mask", "position_ids")))
            states = module.model.decode(inputs, None, Wanted(), deterministic=not rngs).last_hidden_state
            labels = counted_labels(batch["labels"], inputs.attention_mask)
            weights = batch.get("weights")
            return module.loss(states, labels, num_items_in_batch, options=options, weights=weights, shards=shards)

        output: Any = module.apply({"params": params}, method=loss, rngs=rngs)
        return (output.loss, output) if has_aux else output.loss

    return loss_fn


def make_train_step(
    model: FlaxXGLMForCausalLM,
    optimizer: Any,
    *,
    accumulation_steps: int = 1,
    seed: int = 0,
    params: Params | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[Callable[[Any, Batch], tuple[Any, Metrics]], FlaxXGLMTrainState]:
    """A compiled step of training, and the state to begin with.

    Args:
        model: what to train; its `loss_options` are read here.
        optimizer: any `optax.GradientTransformation`; one that asks for it is given the loss as `value`, the gradients
            as `grad`, and the loss of other parameters on the same batch as `value_fn`.
        accumulation_steps: how many parts of a batch to compute one after the other. The result is that of the whole
            batch: each label counts the same, wherever it is.
        seed: of dropout.
        params: the parameters to begin with, of which the state takes the memory: they are gone after the first step.
            None takes a copy of the model's, which stay as they are.
        mesh: the devices to spread parameters and batches over; see `xglm_flax.parallel`. None means one device.

    Returns:
        `step(state, batch) -> (state, metrics)`, and the state, a `flax.training.train_state.TrainState`. A batch is
        that of `make_loss_fn`. The state passed in is gone afterwards, as the new one takes its memory; after an error
        it is as it was. It may come from another `make_train_step`, whose optimizer keeps the same. The metrics are
        float32 scalars: `loss`, `accuracy` and `perplexity` of the labels that count, their `count`, and
        `gradient_norm`. After training, `model.params = state.params`.

    Raises:
        InputError: parameters are float16, which cannot be trained, or there are none; the mesh does not divide the
            model. The step raises it for a batch that cannot be divided, or holds ids or labels outside the vocabulary
            or a text past `max_position_embeddings`, and for the state of an optimizer that keeps something else.
    """
    own = params is None
    params = model._params_or_own(params)
    for leaf in jax.tree.leaves(params):
        check_trainable_type(leaf.dtype.name)
    mesh = None if mesh is None else automatic(mesh)
    with within(mesh):
        if mesh is not None:
            params = place_params(params, model.config, mesh)
        elif own:
            params = jax.tree.map(jnp.copy, params)
        state, shardings = _initial_state(model, optimizer, params, seed, mesh)
    loss_fn = make_loss_fn(model, has_aux=True, mesh=mesh)
    apply_fn, kept = state.apply_fn, _layout(state.opt_state)
    update = optax.with_extra_args_support(optimizer).update

    @functools.partial(jax.jit, donate_argnums=0)
    def compiled(state: Any, batch: Batch) -> tuple[Any, Metrics]:
        params, key = state.params, state.step_key()
        output, gradients = _gradients(loss_fn, params, batch, key, accumulation_steps)
        metrics = {**metrics_of(output), "gradient_norm": _norm(gradients)}
        updates, opt_state = update(
            gradients,
            state.opt_state,
            params,
            value=output.loss,
            grad=gradients,
            value_fn=lambda other: _summed(lambda *part: loss_fn(other, *part)[0], batch, key, accumulation_steps),
        )
        params = optax.apply_updates(params, updates)
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        return state if shardings is None else jax.lax.with_sharding_constraint(state, shardings), metrics

    def step(state: Any, batch: Batch) -> tuple[Any, Metrics]:
        check_batch(model, batch)
        batch = _for_devices(batch, mesh, accumulation_steps)
        if state.tx is not optimizer and _layout(state.opt_state) != kept:
            raise InputError(
                "the state is of another optimizer, which keeps something else than this step's; expected what "
                "make_train_step returned with it, or begin anew from params=state.params"
            )
        # The functions that a state refers to are part of what is compiled.
        with within(mesh):
            return compiled(state.replace(tx=optimizer, apply_fn=apply_fn), batch)

    return step, state


def make_eval_step(
    model: FlaxXGLMForCausalLM, *, mesh: jax.sharding.Mesh | None = None
) -> Callable[[Params, Batch], Metrics]:
    """A compiled step of evaluation: `evaluate(params, batch)` returns the metrics of `make_train_step`, but the norm.

    Args:
        model: what to evaluate; its `loss_options` are read here.
        mesh: see `make_train_step`.
    """
    mesh = None if mesh is None else automatic(mesh)
    loss_fn = make_loss_fn(model, train=False, has_aux=True, mesh=mesh)
    compiled = jax.jit(lambda params, batch: metrics_of(loss_fn(params, batch)[1]))

    def evaluate(params: Params, batch: Batch) -> Metrics:
        check_batch(model, batch)
        with within(mesh):
            return compiled(params, _for_devices(batch, mesh))

    return evaluate


def metrics_of(output: LossOutput) -> Metrics:
    """What a loss tells about a batch; without labels that count, accuracy is 0 and perplexity 1."""
    count = jnp.where(output.count == 0, 1.0, output.count)
    return {
        "loss": output.loss,
        "accuracy": output.correct / count,
        "perplexity": jnp.exp(output.surprisal / count),
        "count": output.count,
    }


def check_batch(model: FlaxXGLMForCausalLM, batch: Batch) -> None:
    """Checks which arrays there are, their shapes, and unless they are traced the values of ids, labels and positions.

    Raises:
        InputError: see `xglm_core.inputs`; or something is missing or unknown.
    """
    unknown, missing = sorted(set(batch) - set(_FIELDS)), sorted({"input_ids", "labels"} - set(batch))
    if unknown or missing:
        raise InputError(
            f"the batch holds {sorted(batch)}, expected input_ids and labels, and perhaps attention_mask, position_ids "
            "and weights"
        )
    shapes = {name: np.shape(array) for name, array in batch.items() if name not in ("labels", "weights")}
    check_shapes(model.config, shapes)
    check_labels_shape(np.shape(batch["labels"]), shapes["input_ids"])
    if "weights" in batch and np.shape(batch["weights"]) != shapes["input_ids"]:
        raise InputError(
            f"weights is {list(np.shape(batch['weights']))}, expected {list(shapes['input_ids'])}, one for each label"
        )
    for name, check in (("input_ids", check_input_ids), ("labels", check_labels)):
        for part in _known_parts(batch[name]):
            check(part, model.config)
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    for part in _known_parts(mask if positions is None else positions):
        given: tuple[Any, Any] = (None, part) if positions is None else (part, None)
        check_positions_of(model.config, np.asarray, *given, shapes["input_ids"][1])


def _known_parts(array: Any) -> list[Any]:
    """The parts of an array that this process holds: none of a traced one, and None alone of None."""
    if array is None or is_traced(array):
        return [None] if array is None else []
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return [np.asarray(shard.data) for shard in array.addressable_shards]
    return [np.asarray(array)]


def _for_devices(batch: Batch, mesh: jax.sharding.Mesh | None, accumulation_steps: int = 1) -> Batch:
    """The batch as compiled code takes it.

    Raises:
        InputError: the rows cannot be divided evenly.
    """
    rows, positions = len(batch["input_ids"]), batch.get("position_ids")
    if positions is not None and len(positions) != rows:  # One row serves all, but cannot be divided as they are.
        batch = {**batch, "position_ids": np.broadcast_to(np.asarray(positions), (rows, np.shape(positions)[1]))}
    batch = dict(batch) if mesh is None else place_batch(batch, mesh)
    rows, groups = len(batch["input_ids"]), data_shards(mesh) or 1
    if rows % (accumulation_steps * groups):
        raise InputError(
            f"the batch has {rows} rows, expected a multiple of {accumulation_steps * groups} "
            f"(accumulation_steps={accumulation_steps}, over {groups} groups of devices)"
        )
    return batch


def _initial_state(
    model: FlaxXGLMForCausalLM, optimizer: Any, params: Params, seed: int, mesh: jax.sharding.Mesh | None
) -> tuple[FlaxXGLMTrainState, Any]:
    """The state, and how it lies on a mesh."""

    def made(params: Params) -> FlaxXGLMTrainState:
        state = FlaxXGLMTrainState.create(
            apply_fn=model.module.apply,
            params=params,
            tx=optimizer,
            dropout_key=jax.random.key_data(jax.random.key(seed)),
        )
        return state.replace(step=jnp.zeros((), jnp.int32))

    if mesh is None:
        return _unshared(made(params)), None
    # The optimizer's state lies where the parameters are that it belongs to.
    specs = specs_like(jax.eval_shape(made, params), params, model.config)
    shardings = jax.tree.map(lambda spec: jax.sharding.NamedSharding(mesh, spec), specs)
    return _unshared(jax.jit(made, out_shardings=shardings)(params)), shardings


def _unshared(tree: Any) -> Any:
    """The tree with each leaf in memory of its own, for a step to take: some optimizers keep the first parameters."""
    seen: set[int] = set()

    def own(leaf: jax.Array) -> jax.Array:
        if id(leaf) in seen:
            return jnp.copy(leaf)
        seen.add(id(leaf))
        return leaf

    return jax.tree.map(own, tree)


def _layout(tree: Any) -> Any:
    """The structure of a tree and the shapes of its leaves."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [np.shape(leaf) for leaf in leaves]


def _norm(tree: Any) -> jax.Array:
    """The Euclidean norm of all leaves together."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)))


def _gradients(
    loss_fn: Callable[..., Any], params: Params, batch: Batch, key: jax.Array, parts: int
) -> tuple[LossOutput, Params]:
    """The loss of a batch and its gradients, part by part."""
    differentiated = jax.value_and_grad(loss_fn, has_aux=True)

    def compute(*part: Any) -> Any:
        (_, output), gradients = differentiated(params, *part)
        return output, gradients

    output, gradients = _summed(compute, batch, key, parts)
    return output, jax.tree.map(lambda gradient, leaf: gradient.astype(leaf.dtype), gradients, params)


def _summed(compute: Callable[..., Any], batch: Batch, key: jax.Array, parts: int) -> Any:
    """The sums, float32, of what a function of rows, a key and the number of labels returns for each part."""
    if parts == 1:
        return compute(batch, key, None)
    divided, items = _divided(batch, parts)

    @jax.checkpoint
    def add(sums: Any, part: Any) -> tuple[Any, None]:
        rows, index = part
        new = compute(rows, jax.random.fold_in(key, index), items)
        return jax.tree.map(lambda total, one: total + one.astype(total.dtype), sums, new), None

    shapes = jax.eval_shape(compute, jax.tree.map(lambda array: array[0], divided), key, items)
    start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes)
    return jax.lax.scan(add, start, (divided, jnp.arange(parts)))[0]


def _divided(batch: Batch, parts: int) -> tuple[dict[str, jax.Array], jax.Array]:
    """The parts of a batch, along a first axis, and the sum of the weights of what counts in it."""
    counts = counted_labels(batch["labels"], batch.get("attention_mask"))[:, 1:] != IGNORED_LABEL
    weights = batch["weights"][:, 1:] if "weights" in batch else jnp.ones(())
    items = jnp.where(counts, weights, 0).sum()
    # Part i has the rows i, i + parts, ...: some of each device's.
    return {name: array.reshape(-1, parts, *array.shape[1:]).swapaxes(0, 1) for name, array in batch.items()}, items
