"""Whole folders in each format: the same weights, the same logits."""

import importlib
import json

import numpy as np
import pytest

from conformance.random_weights import random_weights, write_checkpoint
from tests.helpers.checkpoint_files import (
    fairseq_checkpoint,
    flax_tree,
    keras_datasets,
    library,
    tensors,
    write_flax,
    write_keras,
    write_shards,
    write_torch,
)
from tests.helpers.commands import run
from tests.helpers.frameworks import Framework, needs
from tests.helpers.models import CONFIG, IDS, LEFT, changed
from xglm_core import open_checkpoint
from xglm_core.checkpoint import plan_loading
from xglm_core.checkpoint.dtypes import FLOAT32
from xglm_core.checkpoint.folder import WEIGHTS_FILE
from xglm_core.checkpoint.formats import FORMATS
from xglm_core.errors import CheckpointError, InputError
from xglm_core.weight_names import EMBEDDING, HEAD

UNTIED = changed(CONFIG, tie_word_embeddings=False, activation_function="relu")
WEIGHTS = {False: random_weights(CONFIG, seed=1), True: random_weights(UNTIED, seed=1)}


def thirds(names):
    """Names in three groups, the first of them empty."""
    names = sorted(names)
    return [], names[::2], names[1::2]


def write_flax_shard(path, flat):
    tree = {}
    for name, array in flat.items():
        *owners, last = name.split("/")
        owner = tree
        for key in owners:
            owner = owner.setdefault(key, {})
        owner[last] = array
    path.write_bytes(importlib.import_module("flax.serialization").to_bytes(tree))


def flat(tree, place=""):
    return {
        name: array
        for key, value in tree.items()
        for name, array in (flat(value, f"{place}{key}/") if isinstance(value, dict) else {place + key: value}).items()
    }


def torch_shards(folder, config, weights):
    write_shards(folder, "pytorch_model.bin", weights, write_torch, thirds(weights))


def flax_shards(folder, config, weights):
    library("flax")
    leaves = flat(flax_tree(config, weights))
    write_shards(folder, "flax_model.msgpack", leaves, write_flax_shard, thirds(leaves)[1:])


def keras_shards(folder, config, weights):
    # In shards, transformers leaves out the scope, but not in the index.
    datasets = {name.split("/", 2)[2]: array for name, array in keras_datasets(config, weights).items()}
    write_shards(folder, "tf_model.h5", datasets, write_keras, thirds(datasets)[1:])
    index = folder / "tf_model.h5.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {f"tfxglm_for_causal_lm/{n}": file for n, file in weight_map.items()}}))


def bare(weights):
    return {name.removeprefix("model."): array for name, array in weights.items()}


LAYOUTS = {
    "torch": lambda folder, config, weights: write_torch(folder / "pytorch_model.bin", weights),
    "torch-legacy": lambda folder, config, weights: write_torch(folder / "pytorch_model.bin", weights, legacy=True),
    "torch-shards": torch_shards,
    "torch-bare": lambda folder, config, weights: write_torch(folder / "pytorch_model.bin", bare(weights)),
    "flax": lambda folder, config, weights: write_flax(folder / "flax_model.msgpack", config, weights),
    "flax-shards": flax_shards,
    "tf": lambda folder, config, weights: write_keras(folder / "tf_model.h5", keras_datasets(config, weights)),
    "tf-shards": keras_shards,
    "fairseq": lambda folder, config, weights: library("torch").save(
        fairseq_checkpoint(config, weights), folder / "model.pt"
    ),
}


@pytest.fixture(scope="module", params=[False, True], ids=["tied", "untied"])
def untied(request):
    return request.param


@pytest.fixture(scope="module", params=LAYOUTS)
def written(request, untied, tmp_path_factory):
    """A folder in one layout."""
    folder = tmp_path_factory.mktemp(request.param)
    config = UNTIED if untied else CONFIG
    LAYOUTS[request.param](folder, config, WEIGHTS[untied])
    if request.param != "fairseq":
        config.save_pretrained(folder)
    return folder


class TestEveryLayout:
    def test_weights_in_every_layout(self, written, untied):
        checkpoint = open_checkpoint(written)
        always_has_a_head = written.name.startswith("fairseq")
        assert checkpoint.names == WEIGHTS[untied].keys() | ({HEAD} if always_has_a_head else set())
        for name, array in WEIGHTS[untied].items():
            np.testing.assert_array_equal(checkpoint.read(name), array, err_msg=name)
            assert checkpoint.info(name).shape == array.shape
            checkpoint.release(name)
            np.testing.assert_array_equal(checkpoint.read(name), array, err_msg=name)

    def test_config(self, written, untied):
        assert open_checkpoint(written).config == (UNTIED if untied else CONFIG)
        assert plan_loading(open_checkpoint(written), with_head=True).config == (UNTIED if untied else CONFIG)

    def test_logits(self, fw, written, untied, tmp_path):
        write_checkpoint(tmp_path, UNTIED if untied else CONFIG, seed=1)
        expected = fw.logits(fw.causal_lm.from_pretrained(tmp_path), IDS, LEFT)
        # The same numbers in the same layout in memory: the same logits, bit for bit.
        np.testing.assert_array_equal(fw.logits(fw.causal_lm.from_pretrained(written), IDS, LEFT), expected)

    def test_memory_layout(self, written):
        """PyTorch's kernels expect rows of numbers, on addresses of numbers."""
        needs("torch")
        torch_lm = Framework("torch").causal_lm
        for dtype in ("float32", "float16"):
            for name, parameter in torch_lm.from_pretrained(written, dtype=dtype).named_parameters():
                assert parameter.is_contiguous(), name
                assert parameter.data_ptr() % parameter.element_size() == 0, name

    def test_bare_decoder(self, fw, written):
        model = fw.decoder.from_pretrained(written)
        np.testing.assert_array_equal(fw.embedding_matrix(model), WEIGHTS[False][EMBEDDING])


class TestHeads:
    """A head is tied if it equals the embedding, in whatever layout."""

    @pytest.mark.parametrize("layout", ["torch", "flax", "tf", "fairseq"])
    @pytest.mark.parametrize("equal", [True, False])
    def test_stored_head(self, tmp_path, layout, equal):
        head = WEIGHTS[False][EMBEDDING].copy()
        if not equal:
            head[-1, -1] += 1
        LAYOUTS[layout](tmp_path, CONFIG, {**WEIGHTS[False], HEAD: head})
        CONFIG.save_pretrained(tmp_path)
        checkpoint = open_checkpoint(tmp_path)
        assert checkpoint.info(HEAD).shape == (CONFIG.vocab_size, CONFIG.d_model)
        if equal:
            assert plan_loading(checkpoint, with_head=True).config.tie_word_embeddings
        else:
            with pytest.warns(UserWarning, match="the stored lm_head.weight differs from model.embed_tokens.weight"):
                plan = plan_loading(checkpoint, with_head=True)
            assert not plan.config.tie_word_embeddings
            np.testing.assert_array_equal(plan.read(plan.specs[-1]), head)


class TestPositionTable:
    @pytest.mark.parametrize("layout", ["torch", "torch-bare"])
    def test_torch(self, tmp_path, layout):
        table = {"model.embed_positions.weights": np.ones((63, 35), np.float32)}
        LAYOUTS[layout](tmp_path, CONFIG, {**WEIGHTS[False], **table})
        CONFIG.save_pretrained(tmp_path)
        specs = plan_loading(open_checkpoint(tmp_path), with_head=True).specs
        assert {spec.name for spec in specs} == WEIGHTS[False].keys()

    def test_tf(self, tmp_path):
        table = {"model/tfxglm_for_causal_lm/model/embed_positions/weights:0": np.ones((63, 35), np.float32)}
        write_keras(tmp_path / "tf_model.h5", {**keras_datasets(CONFIG, WEIGHTS[False]), **table})
        CONFIG.save_pretrained(tmp_path)
        specs = plan_loading(open_checkpoint(tmp_path), with_head=True).specs
        assert {spec.name for spec in specs} == WEIGHTS[False].keys()


class TestDtypes:
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
    @pytest.mark.parametrize("legacy", [False, True])
    def test_torch(self, tmp_path, dtype, legacy):
        write_torch(tmp_path / "pytorch_model.bin", WEIGHTS[False], dtype, legacy=legacy)
        CONFIG.save_pretrained(tmp_path)
        checkpoint = open_checkpoint(tmp_path)
        for name, tensor in tensors(WEIGHTS[False], dtype).items():
            assert checkpoint.info(name).dtype.name == dtype
            np.testing.assert_array_equal(checkpoint.read(name, FLOAT32), tensor.float().numpy())
        expected = "float32" if dtype == "float64" else dtype  # Which no model has.
        assert plan_loading(checkpoint, with_head=True, dtype="auto").dtype.name == expected

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_flax(self, tmp_path, dtype):
        library("jax")
        jnp = importlib.import_module("jax.numpy")
        write_flax(
            tmp_path / "flax_model.msgpack",
            CONFIG,
            {name: np.asarray(jnp.asarray(array, dtype)) for name, array in WEIGHTS[False].items()},
        )
        CONFIG.save_pretrained(tmp_path)
        checkpoint = open_checkpoint(tmp_path)
        for name, array in WEIGHTS[False].items():
            assert checkpoint.info(name).dtype.name == dtype
            expected = np.asarray(jnp.asarray(array, dtype)).astype(np.float32)
            np.testing.assert_array_equal(checkpoint.read(name, FLOAT32), expected)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """All formats, told apart by their last bias."""
    folder = tmp_path_factory.mktemp("everything")
    for index, layout in enumerate(["torch", "flax", "tf", "fairseq"], 1):
        LAYOUTS[layout](folder, CONFIG, {**WEIGHTS[False], "model.layer_norm.bias": np.full(35, index, np.float32)})
    write_checkpoint(folder, CONFIG, seed=1)
    return folder


class TestPreference:
    def bias(self, folder, weights=None):
        return float(open_checkpoint(folder, weights).read("model.layer_norm.bias")[0])

    def test_choice(self, everything):
        assert [self.bias(everything, name) for name in FORMATS][1:] == [1, 2, 3, 4]
        assert self.bias(everything, "safetensors") == WEIGHTS[False]["model.layer_norm.bias"][0]

    def test_choice_of_a_backend(self, fw, everything):
        model = fw.causal_lm.from_pretrained(everything, weights="flax")
        other = fw.causal_lm.from_pretrained(everything, weights="tf")
        assert not np.array_equal(fw.logits(model, IDS), fw.logits(other, IDS))

    def test_order(self, everything, tmp_path):
        for entry in everything.iterdir():
            (tmp_path / entry.name).write_bytes(entry.read_bytes())
        found = []
        for format in FORMATS.values():
            found.append(self.bias(tmp_path))
            (tmp_path / format.file).unlink()
        assert found == [self.bias(everything, name) for name in FORMATS]

    def test_unknown(self, everything):
        with pytest.raises(InputError, match="weights is 'keras', expected one of safetensors, torch, flax, tf, fairs"):
            open_checkpoint(everything, "keras")

    def test_absent(self, tmp_path):
        write_checkpoint(tmp_path, CONFIG, seed=1)
        with pytest.raises(CheckpointError, match=r"no pytorch_model\.bin here, found weights in the formats safetens"):
            open_checkpoint(tmp_path, "torch")
        (tmp_path / WEIGHTS_FILE).unlink()
        with pytest.raises(CheckpointError, match=r"no checkpoint here; expected config\.json and model\.safet"):
            open_checkpoint(tmp_path, "torch")


class TestWithoutFrameworks:
    """Each format is read where no framework is installed; HDF5 needs h5py, which says so."""

    @pytest.mark.parametrize("layout", ["torch", "torch-legacy", "flax", "tf", "fairseq"])
    def test_read(self, tmp_path, layout):
        LAYOUTS[layout](tmp_path, CONFIG, WEIGHTS[False])
        CONFIG.save_pretrained(tmp_path)
        code = f"""
hide("torch", "tensorflow", "keras", "jax", "flax", "msgpack", "ml_dtypes", "safetensors", "transformers")
import json
from xglm_core import open_checkpoint
checkpoint = open_checkpoint({str(tmp_path)!r})
print(json.dumps([float(abs(checkpoint.read(name)).sum(dtype="f8")) for name in sorted(checkpoint.names)]))
"""
        weights = {**WEIGHTS[False], **({HEAD: WEIGHTS[False][EMBEDDING]} if layout == "fairseq" else {})}
        # The order in which 4,585 numbers are summed depends on their layout.
        expected = [float(np.abs(weights[name]).sum(dtype="f8")) for name in sorted(weights)]
        assert run(code) == pytest.approx(expected, rel=1e-12)

    def test_h5py_is_missing(self, tmp_path):
        write_keras(tmp_path / "tf_model.h5", keras_datasets(CONFIG, WEIGHTS[False]))
        CONFIG.save_pretrained(tmp_path)
        code = f"""
hide("h5py")
import json
from xglm_core import open_checkpoint
from xglm_core.errors import BackendError
try:
    open_checkpoint({str(tmp_path)!r})
except BackendError as error:
    print(json.dumps(str(error)))
"""
        assert run(code).endswith("tf_model.h5: needs h5py, not installed here; run: pip install 'xglm[h5]'")
