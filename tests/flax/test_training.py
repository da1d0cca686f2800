"""Training in JAX: the loss inside its transformations, steps and their state, recomputation, and meshes of devices."""

import json
import math
import os
import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import xglm_flax.loss
from conformance.gradients import loss_and_gradients
from tests.flax import run_in_processes
from tests.helpers.commands import ROOT
from tests.helpers.models import CONFIG, IDS, LEFT, SAME, changed
from tests.helpers.programs import computed_shapes
from xglm_core.errors import InputError
from xglm_core.loss import LossOptions, labels_for
from xglm_flax import FlaxXGLMForCausalLM, make_eval_step, make_loss_fn, make_train_step, stack_layers
from xglm_flax.loss import causal_lm_loss
from xglm_flax.weights import read_weight

NO_CHANCE = changed(CONFIG, dropout=0.0, attention_dropout=0.0)
SHALLOW = changed(NO_CHANCE, num_layers=1)
ROWS = np.tile(IDS, (2, 1)).astype(np.int32)
MASK = np.tile(LEFT, (2, 1))
BATCH = {"input_ids": ROWS, "attention_mask": MASK, "labels": labels_for(ROWS, MASK)}
ON_A_CPU = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}  # The environment of other processes.
OF_A_CPU = pytest.mark.skipif(jax.default_backend() != "cpu", reason="an accelerator has more room for logits")


@pytest.fixture(scope="module")
def shallow():
    return FlaxXGLMForCausalLM(SHALLOW)


@pytest.fixture(scope="module")
def differentiated(shallow):
    """The loss of parameters and a batch, and its gradients."""
    return jax.jit(jax.value_and_grad(make_loss_fn(shallow)))


def assert_same(ours, theirs, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **(tolerance or SAME)), ours, theirs)


class TestLoss:
    @OF_A_CPU
    def test_no_array_has_all_logits(self, shallow, chunk_of):
        chunk_of(6)

        def largest(**options):
            def loss(params):
                output = shallow(ROWS, labels=ROWS, params=params, train=True, **options)
                return output.loss + (output.logits.sum() if options else 0)

            shapes = computed_shapes(jax.grad(loss), shallow.params)
            return max(math.prod(shape) for shape in shapes if CONFIG.vocab_size in shape)

        assert largest() == CONFIG.vocab_size * CONFIG.d_model < CONFIG.vocab_size * ROWS.size
        assert largest(return_logits=True) == CONFIG.vocab_size * ROWS.size

    @OF_A_CPU
    @pytest.mark.parametrize("axis", [0, 1])
    def test_memory(self, axis):
        """At 8 x 512 tokens of the 564M model: beyond inputs and gradients, 300 MB."""
        shapes = [(8, 512, 1024), (256008, 1024)[:: 1 - 2 * axis]]
        states, head = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
        labels = jax.ShapeDtypeStruct((8, 512), jnp.int32)

        def loss(states, head, labels):
            return causal_lm_loss(states, head, labels, vocabulary_axis=axis).loss

        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(states, head, labels).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 300e6
        compiled = jax.jit(loss).lower(states, head, labels).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 200e6

    @pytest.mark.parametrize("axis", [0, 1])
    @pytest.mark.parametrize(("words", "devices"), [(50, 1), (131, 1), (50, 2)])
    def test_parts_of_the_gradient(self, chunk_of, monkeypatch, axis, words, devices):
        """Some words at a time, or, where there may be several devices, some columns."""
        monkeypatch.setattr(xglm_flax.loss, "_WORDS", words)
        chunk_of(8)
        monkeypatch.setattr(jax, "device_count", lambda: devices)
        stream = np.random.RandomState(0)
        states, head = stream.randn(2, 11, 35).astype("f"), stream.randn(131, 35).astype("f")
        labels = stream.randint(0, 131, (2, 11))

        def loss(states, head):
            return causal_lm_loss(states, head, labels, vocabulary_axis=axis).loss

        def plain(states, head):
            chances = jax.nn.log_softmax(jnp.matmul(states[:, :-1], head.T, precision="highest"))
            return -jnp.take_along_axis(chances, labels[:, 1:, None], axis=2).mean()

        ours = jax.grad(loss, (0, 1))(states, head.T if axis else head)
        expected = jax.grad(plain, (0, 1))(states, head)
        assert_same(ours[0], expected[0])
        assert_same(ours[1].T if axis else ours[1], expected[1])

    def test_float16(self):
        """Gradients of single logits that float16 does not have, of a loss that is scaled as one does with float16."""
        stream = np.random.RandomState(0)
        states, head = stream.randn(2, 11, 35).astype("float16"), stream.randn(131, 35).astype("float16").astype("f")
        labels = stream.randint(0, 131, (2, 11))

        def loss(states, head):
            return causal_lm_loss(states, head, labels, num_items_in_batch=10**6).loss * 2.0**20

        ours = jax.grad(loss, (0, 1))(states, head)
        expected = jax.grad(loss, (0, 1))(states.astype("f"), head)
        for one, other in zip(ours, expected, strict=True):
            # The gradients of the logits, and those of the states, are rounded to 11 bits.
            np.testing.assert_allclose(one, other, rtol=2**-10, atol=2**-10 * float(jnp.abs(other).max()))

    @pytest.mark.slow
    def test_gradients_of_each_example(self, shallow, differentiated):
        loss_fn = make_loss_fn(shallow)

        def of_row(params, row):
            return jax.grad(loss_fn)(params, {name: array[None] for name, array in row.items()})

        each = jax.jit(jax.vmap(of_row, (None, 0)))(shallow.params, BATCH)
        for row in range(2):
            one = {name: array[row : row + 1] for name, array in BATCH.items()}
            _, expected = differentiated(shallow.params, one)
            assert_same(jax.tree.map(lambda leaf, row=row: leaf[row], each), expected)

    @pytest.mark.slow
    def test_forward_over_reverse(self, shallow, differentiated):
        """The product with the Hessian, against a difference of gradients."""

        def gradient(params, batch):
            return differentiated(params, batch)[1]

        direction = jax.tree.map(
            lambda leaf: jnp.sin(jnp.arange(leaf.size, dtype=float)).reshape(leaf.shape), shallow.params
        )
        _, slope = jax.jvp(lambda params: gradient(params, BATCH), (shallow.params,), (direction,))

        def moved(step):
            return gradient(jax.tree.map(lambda leaf, d: leaf + step * d, shallow.params, direction), BATCH)

        near = jax.tree.map(lambda a, b: (a - b) / 2e-3, moved(1e-3), moved(-1e-3))
        scale = max(float(abs(leaf).max()) for leaf in jax.tree.leaves(slope))
        assert scale > 0.01
        # A difference of float32 gradients of order 0.1: 1e-8 / 2e-3, and what the third derivative adds.
        assert_same(slope, near, rtol=0, atol=0.01 * scale)

    def test_weights_of_the_labels(self, shallow, differentiated):
        weights = np.where(np.arange(11) % 3 == 0, 0.5, 2.0).astype(np.float32)[None].repeat(4, 0)
        weights[1] = 0
        loss_fn = make_loss_fn(shallow, has_aux=True)
        loss, output = jax.jit(loss_fn)(shallow.params, {**BATCH, "weights": weights})
        logits = np.asarray(shallow(ROWS, MASK).logits, np.float64)[:, :-1]
        labels, factors = BATCH["labels"][:, 1:], np.where(BATCH["labels"] == -100, 0, weights)[:, 1:]
        of_labels = np.take_along_axis(logits, np.maximum(labels, 0)[..., None], -1)[..., 0]
        surprisal = factors * (np.log(np.exp(logits).sum(-1)) - of_labels)
        assert float(loss) == pytest.approx(surprisal.sum() / factors.sum(), rel=1e-6)
        assert float(output.surprisal) == pytest.approx(surprisal.sum(), rel=1e-6)
        assert float(output.count) == pytest.approx(factors.sum())
        correct = logits.argmax(-1) == labels
        assert float(output.correct) == pytest.approx((factors * correct).sum(), rel=1e-6)
        nothing = differentiated(shallow.params, {**BATCH, "weights": weights * 0})
        assert not any(leaf.any() for leaf in jax.tree.leaves(nothing))

    def test_bfloat16(self, shallow, differentiated):
        """The products are in bfloat16, the sums and the gradients in float32."""
        model = FlaxXGLMForCausalLM(SHALLOW, dtype="bfloat16")
        loss, gradients = jax.jit(jax.value_and_grad(make_loss_fn(model)))(model.params, BATCH)
        exact, expected = differentiated(shallow.params, BATCH)
        assert {leaf.dtype.name for leaf in jax.tree.leaves((loss, gradients))} == {"float32"}
        assert float(loss) == pytest.approx(float(exact), rel=2e-3)
        table, other = (tree["model"]["embed_tokens"]["embedding"] for tree in (gradients, expected))
        assert abs(table - other).max() < 0.03 * abs(other).max()  # bfloat16 has 8 bits: 0.4% for each of some factors.

    def test_only_what_is_trained(self, shallow, differentiated):
        """No gradient of a head that is not asked for."""
        frozen = shallow.params["model"]["embed_tokens"]
        rest = {name: tree for name, tree in shallow.params["model"].items() if name != "embed_tokens"}

        def loss(rest):
            return make_loss_fn(shallow)({"model": {**rest, "embed_tokens": frozen}}, BATCH)

        expected = differentiated(shallow.params, BATCH)[1]["model"]
        assert_same(jax.jit(jax.grad(loss))(rest), {name: expected[name] for name in rest})
        shapes = computed_shapes(jax.grad(loss), rest)
        assert (CONFIG.vocab_size, CONFIG.d_model) not in shapes


class TestRemat:
    @pytest.mark.parametrize("scan_layers", [False, pytest.param(True, marks=pytest.mark.slow)])
    def test_same_numbers(self, scan_layers):
        config = changed(CONFIG, dropout=0.25, num_layers=2 if scan_layers else 1)
        ids, key = np.tile(IDS, (2, 5)), jax.random.key(1)
        params = FlaxXGLMForCausalLM(config).params
        params = stack_layers(params) if scan_layers else params
        products, sizes, expected = [], [], None
        named = jax.checkpoint_policies.save_only_these_names("fc1")
        policies = ("none", "dots", named, jax.checkpoint_policies.nothing_saveable)
        for remat in policies[:: 1 if scan_layers else 3]:
            model = FlaxXGLMForCausalLM(config, scan_layers=scan_layers, remat=remat, _do_init=False)
            batch = {"input_ids": ids, "labels": ids}
            function = jax.jit(jax.value_and_grad(make_loss_fn(model))).lower(params, batch, key)
            products.append(function.as_text().count("dot_general"))
            compiled = function.compile()
            sizes.append(compiled.memory_analysis().temp_size_in_bytes)
            result = compiled(params, batch, key)
            expected = result if expected is None else expected
            assert_same(result, expected)
        assert products == sorted(set(products))
        if scan_layers:  # Otherwise XLA has to find an order that needs less, which it does not on a CPU.
            assert sizes == sorted(set(sizes), reverse=True)

    def test_unknown(self):
        with pytest.raises(InputError, match="remat is 'some', expected 'none', 'dots', 'full', or a policy"):
            FlaxXGLMForCausalLM(CONFIG, remat="some", _do_init=False)


class TestSteps:
    def test_accumulation_is_one_big_batch(self, shallow):
        """Rows with different numbers of labels: a mean of means would differ."""
        optimizer = optax.sgd(0.1)
        step, state = make_train_step(shallow, optimizer)
        parts, other = make_train_step(shallow, optimizer, accumulation_steps=2)
        weights = np.linspace(0.5, 2, ROWS.size).reshape(ROWS.shape).astype(np.float32)
        for batch in (BATCH, {**BATCH, "weights": weights}):
            state, metrics = step(state, batch)
            other, same = parts(other, batch)
            assert_same(same, metrics, rtol=1e-5)
            assert_same(other.params, state.params)
        with pytest.raises(InputError, match=r"3 rows, expected a multiple of 2 \(accumulation_steps=2"):
            parts(other, {name: array[:3] for name, array in BATCH.items()})

    def test_metrics(self, shallow):
        shallow.loss_options = LossOptions(label_smoothing=0.1)
        step, state = make_train_step(shallow, optax.sgd(0.0))
        _, metrics = step(state, BATCH)
        evaluated = make_eval_step(shallow)(shallow.params, BATCH)
        shallow.loss_options = LossOptions()
        smooth, gradients = loss_and_gradients(
            SHALLOW, random_weights_of(shallow), ROWS, BATCH["labels"], MASK, label_smoothing=0.1
        )
        plain, _ = loss_and_gradients(SHALLOW, random_weights_of(shallow), ROWS, BATCH["labels"], MASK)
        assert float(metrics["loss"]) == pytest.approx(smooth, rel=1e-6)
        assert float(metrics["perplexity"]) == pytest.approx(math.exp(plain), rel=1e-5)
        norm = math.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))
        assert float(metrics["gradient_norm"]) == pytest.approx(norm, rel=1e-5)
        assert float(metrics["count"]) == (BATCH["labels"][:, 1:] != -100).sum()
        hits = (shallow(ROWS, MASK).logits[:, :-1].argmax(-1) == BATCH["labels"][:, 1:]).sum()
        assert float(metrics["accuracy"]) == pytest.approx(float(hits / metrics["count"]))
        assert_same(evaluated, {name: metrics[name] for name in evaluated}, rtol=1e-6)
        assert metrics.keys() - evaluated.keys() == {"gradient_norm"}

    def test_memory_is_passed_on(self, shallow):
        step, first = make_train_step(shallow, optax.adam(1e-3))
        assert isinstance(first, TrainState)
        second, _ = step(first, BATCH)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((first.params, first.opt_state)))
        assert int(second.step) == 1
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(shallow.params))
        given = jax.tree.map(jnp.copy, shallow.params)
        step, first = make_train_step(shallow, optax.adam(1e-3), params=given)
        step(first, BATCH)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))

    def test_resumed_from_a_checkpoint(self, tmp_path):
        """With dropout: the key of each step follows from the state."""
        ocp = pytest.importorskip("orbax.checkpoint")
        model = FlaxXGLMForCausalLM(changed(SHALLOW, dropout=0.5))
        step, state = make_train_step(model, optax.adamw(1e-2), seed=3)
        losses = []
        for index in range(4):
            if index == 2:
                with ocp.StandardCheckpointer() as checkpointer:
                    checkpointer.save(tmp_path / "state", state)
            state, metrics = step(state, BATCH)
            losses.append(float(metrics["loss"]))
        assert len(set(losses)) == 4
        step, fresh = make_train_step(model, optax.adamw(1e-2))
        with ocp.StandardCheckpointer() as checkpointer:
            state = checkpointer.restore(tmp_path / "state", fresh)
        for expected in losses[2:]:
            state, metrics = step(state, BATCH)
            assert float(metrics["loss"]) == expected
        assert float(step(fresh, BATCH)[1]["loss"]) != losses[0]  # Another seed.

    def test_what_is_wrong_with_a_batch(self, shallow):
        step, state = make_train_step(shallow, optax.sgd(0.1))
        labels = BATCH["labels"].copy()
        labels[1, 5] = 131
        for batch, message in (
            ({**BATCH, "labels": labels}, r"labels\[1, 5\] is 131, expected 0 to 130"),
            ({"input_ids": ROWS}, r"the batch holds \['input_ids'\], expected input_ids and labels"),
            ({**BATCH, "loss": ROWS}, "the batch holds .*'loss'"),
            ({**BATCH, "weights": np.ones((4, 10))}, r"weights is \[4, 10\], expected \[4, 11\]"),
        ):
            with pytest.raises(InputError, match=message):
                step(state, batch)
        half = shallow.to_fp16(shallow.params)
        with pytest.raises(InputError, match="the trainable parameters are float16"):
            make_train_step(shallow, optax.sgd(0.1), params=half)
        with pytest.raises(InputError, match=r"dropout_rng=jax\.random\.key"):
            make_loss_fn(FlaxXGLMForCausalLM(CONFIG, _do_init=False))(shallow.params, BATCH)


def random_weights_of(model):
    """The parameters as the oracle reads them, in float64."""
    specs = model._specs()
    return lambda name: np.asarray(read_weight(model.params, specs[name]), np.float64)


@pytest.mark.slow
def test_mesh_of_eight_devices():
    environment = {**os.environ, **ON_A_CPU, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.flax.run_on_a_mesh"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "as on one device\n"


@pytest.mark.slow
def test_finetune_jax(tmp_path):
    """It is stopped after two steps and goes on; the losses are those of the other frameworks' examples."""

    def run(steps):
        command = [sys.executable, "examples/finetune_jax.py", "--output", str(tmp_path), "--steps", steps]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert "step    2 of 2  loss 7.8322" in run("2")
    assert "goes on after step 2\njax  step    3 of 3  loss 6.4078" in run("3")
    losses = json.loads((tmp_path / "losses.json").read_text())["losses"]
    np.testing.assert_allclose(losses, [9.4253, 7.8322, 6.4078], atol=1e-4)
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.slow
def test_two_processes_of_which_one_dies(shallow, tmp_path):
    """They go on where one process stopped, each with its part of the rows; the second is killed while a checkpoint is
    written; two others go on from the last complete one, and one process from theirs."""
    ocp = pytest.importorskip("orbax.checkpoint")
    folder = tmp_path / "checkpoints"
    step, state = make_train_step(shallow, run_in_processes.OPTIMIZER)
    losses = {}
    for number in range(1, 5):
        state, metrics = step(state, run_in_processes.BATCH)
        losses[number] = float(metrics["loss"])
        if number == 1:
            with ocp.CheckpointManager(folder) as manager:
                manager.save(1, args=ocp.args.StandardSave(state))

    def run(name, *last):
        """Starts two processes; returns them, and where each one's lines and errors go."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        environment = {**os.environ, **ON_A_CPU}
        processes, outputs = [], []
        for rank in range(2):
            outputs.append(tmp_path / f"{name}-{rank}.txt")
            arguments = [str(rank), port, str(folder), *(last if rank else ())]
            with outputs[-1].open("w") as output:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "tests.flax.run_in_processes", *arguments],
                        cwd=ROOT,
                        env=environment,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )
        return processes, outputs

    def assert_losses(output, numbers):
        lines = [line.split() for line in output.read_text().splitlines() if line.startswith("loss ")]
        assert [int(number) for _, number, _ in lines] == numbers, output.read_text()
        np.testing.assert_allclose([float(loss) for *_, loss in lines], [losses[n] for n in numbers], rtol=1e-5)

    (other, killed), outputs = run("killed", "dies")
    try:
        assert killed.wait(timeout=120) == -signal.SIGKILL, outputs[1].read_text()
    finally:
        other.kill()  # It waits for the one that is gone.
        other.wait()
    for output in outputs:
        assert_losses(output, [2, 3])
    assert run_in_processes.unfinished(folder, 3)
    assert not (folder / "3").exists()

    processes, outputs = run("resumed")
    for process, output in zip(processes, outputs, strict=True):
        assert process.wait(timeout=120) == 0, output.read_text()
        assert_losses(output, [3])
        assert "not saved: " in output.read_text()
    assert "the first process could not write the checkpoint" in outputs[1].read_text()
    saved = FlaxXGLMForCausalLM.from_pretrained(tmp_path / "saved")
    whole = FlaxXGLMForCausalLM(saved.config)
    assert_same(saved.params, jax.tree.map(lambda leaf: leaf.astype("bfloat16").astype("float32"), whole.params))

    with ocp.CheckpointManager(folder) as manager:
        state = manager.restore(3, args=ocp.args.StandardRestore(state))
    assert float(step(state, run_in_processes.BATCH)[1]["loss"]) == pytest.approx(losses[4], rel=1e-5)
