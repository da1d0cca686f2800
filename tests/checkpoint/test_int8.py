"""Checkpoints whose matrices are int8 with a float32 scale for each row: written, read, converted back, and refused."""

import json
import re

import numpy as np
import pytest
import safetensors.numpy

from conformance.random_weights import random_weights, write_checkpoint
from tests.helpers.checkpoint_files import library
from tests.helpers.commands import assert_refused, run_xglm
from tests.helpers.models import CONFIG, changed
from xglm_core import XGLMConfig, convert_checkpoint, open_checkpoint
from xglm_core.checkpoint import plan_loading
from xglm_core.checkpoint.dtypes import DTYPES, FLOAT32, convert
from xglm_core.errors import CheckpointError, InputError
from xglm_core.weight_names import EMBEDDING, HEAD

UNTIED = changed(CONFIG, tie_word_embeddings=False)
FC1 = "model.layers.1.fc1.weight"
FILE = "model.safetensors"


def written(tmp_path, config=CONFIG, dtype="float32", **options):
    """A checkpoint, and the same with matrices of int8."""
    write_checkpoint(tmp_path / "floats", config, seed=1, dtype=dtype)
    convert_checkpoint(tmp_path / "floats", tmp_path / "int8", to="safetensors", dtype="int8", **options)
    return tmp_path / "floats", tmp_path / "int8"


def arrays(folder):
    return {
        name: array
        for path in sorted(folder.glob("*.safetensors"))
        for name, array in safetensors.numpy.load_file(path).items()
    }


def formula(matrix):
    """Integers and scales, in float64."""
    scales = np.abs(matrix.astype(np.float64)).max(axis=1, keepdims=True) / 127
    return np.rint(matrix / scales), scales


@pytest.fixture
def int8(tmp_path):
    return written(tmp_path)[1]


def damage(folder, **changes):
    """Replaces tensors, by the ends of their names with _ for a dot; None takes one away."""
    found = arrays(folder)
    for name, array in changes.items():
        name = f"model.layers.1.{name.replace('__', '.')}"
        found.pop(name)
        if array is not None:
            found[name] = array
    safetensors.numpy.save_file(found, folder / FILE, metadata={"format": "pt"})


class TestTheFile:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
    def test_matrices_follow_the_formula_and_vectors_stay(self, tmp_path, config, dtype):
        _, int8 = written(tmp_path, config, dtype)
        stored = open_checkpoint(tmp_path / "floats")
        found = safetensors.numpy.load_file(int8 / FILE) if dtype != "bfloat16" else {}
        checkpoint = open_checkpoint(int8)
        assert checkpoint.names == stored.names
        for name in stored.names:
            before = stored.read(name, FLOAT32)
            if before.ndim == 1:
                np.testing.assert_array_equal(checkpoint.read(name), stored.read(name), strict=True)
                continue
            integers, scales = formula(before)
            q = checkpoint.read(name)
            assert q.dtype == np.int8
            # float32 and float64 may round what lies between two integers to either.
            between = np.abs(np.abs(before / scales % 1) - 0.5) < 1e-4
            assert np.array_equal(q[~between], integers[~between])
            assert np.abs(q - integers).max() <= 1
            np.testing.assert_allclose(checkpoint.scales(name), scales, rtol=1e-6)
            np.testing.assert_allclose(checkpoint.read(name, FLOAT32), q * scales, rtol=1e-6)
            assert np.abs(checkpoint.read(name, FLOAT32) - before).max() <= scales.max() / 2 * (1 + 1e-4)
            if found:
                assert found[name].dtype == np.int8
                assert found[f"{name}_scale"].dtype == np.float32
                assert found[f"{name}_scale"].shape == (len(q), 1)
                np.testing.assert_array_equal(found[name], q)

    def test_the_configuration_says_so(self, int8):
        says = json.loads((int8 / "config.json").read_text())["quantization_config"]
        assert says == {"quant_method": "int8", "bits": 8, "symmetric": True, "strategy": "channel"}

    def test_it_is_a_quarter(self, tmp_path):
        floats, int8 = (folder / FILE for folder in written(tmp_path))
        assert int8.stat().st_size < 0.4 * floats.stat().st_size  # Vectors and names are much of so small a model.

    @pytest.mark.parametrize("format", ["torch", "flax", "tf"])
    def test_every_format_gives_the_same_file(self, tmp_path, format):
        if format == "tf":
            library("h5py")
        floats, int8 = written(tmp_path)
        convert_checkpoint(floats, tmp_path / "other", to=format)
        convert_checkpoint(tmp_path / "other", tmp_path / "from other", to="safetensors", dtype="int8")
        assert (tmp_path / "from other" / FILE).read_bytes() == (int8 / FILE).read_bytes()

    def test_a_row_of_zeros_and_numbers_too_small_for_a_scale(self, tmp_path):
        write_checkpoint(tmp_path / "floats", CONFIG, seed=1)
        found = arrays(tmp_path / "floats")
        found[FC1][0], found[FC1][1] = 0, 1e-44
        safetensors.numpy.save_file(found, tmp_path / "floats" / FILE, metadata={"format": "pt"})
        convert_checkpoint(tmp_path / "floats", tmp_path / "int8", to="safetensors", dtype="int8")
        found = open_checkpoint(tmp_path / "int8").read(FC1, FLOAT32)
        assert np.all(found[:2] == 0)
        assert np.all(found[2:].any(axis=1))

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_what_is_not_finite_is_refused(self, tmp_path, value):
        write_checkpoint(tmp_path / "floats", CONFIG, seed=1)
        found = arrays(tmp_path / "floats")
        found[FC1][3, 2] = value
        safetensors.numpy.save_file(found, tmp_path / "floats" / FILE, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"{re.escape(FC1)} has numbers that are not finite"):
            convert_checkpoint(tmp_path / "floats", tmp_path / "int8", to="safetensors", dtype="int8")
        assert not [*tmp_path.glob("int8/*")]


class TestBackAndForth:
    def test_shards(self, tmp_path):
        _, int8 = written(tmp_path, max_shard_size="10KB")
        assert len([*int8.glob("*.safetensors")]) == 5
        convert_checkpoint(int8, tmp_path / "one", to="safetensors")
        assert {name: array.tobytes() for name, array in arrays(int8).items()} == {
            name: array.tobytes() for name, array in arrays(tmp_path / "one").items()
        }

    @pytest.mark.parametrize("format", ["safetensors", "torch", "flax", "tf"])
    @pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
    def test_floats_of_it(self, tmp_path, format, config):
        if format == "tf":
            library("h5py")
        _, int8 = written(tmp_path, config)
        convert_checkpoint(int8, tmp_path / "again", to=format, dtype="float32")
        found, expected = open_checkpoint(tmp_path / "again"), open_checkpoint(int8)
        for name in expected.names:
            np.testing.assert_array_equal(found.read(name), expected.read(name, FLOAT32), err_msg=name)
        config = XGLMConfig.from_pretrained(tmp_path / "again")
        assert config == XGLMConfig.from_pretrained(tmp_path / "floats")

    def test_a_bare_decoder(self, tmp_path):
        weights = {name.removeprefix("model."): array for name, array in random_weights(CONFIG, seed=1).items()}
        CONFIG.save_pretrained(tmp_path / "floats")
        safetensors.numpy.save_file(weights, tmp_path / "floats" / FILE, metadata={"format": "pt"})
        convert_checkpoint(tmp_path / "floats", tmp_path / "int8", to="safetensors", dtype="int8")
        bare = {name.removeprefix("model."): array for name, array in arrays(tmp_path / "int8").items()}
        safetensors.numpy.save_file(bare, tmp_path / "int8" / FILE, metadata={"format": "pt"})
        plan = plan_loading(open_checkpoint(tmp_path / "int8"), with_head=False)
        assert plan.int8
        for spec in plan.specs:
            expected = weights[spec.name.removeprefix("model.")]
            np.testing.assert_allclose(plan.read(spec), expected, atol=np.abs(expected).max() / 250)

    @pytest.mark.parametrize("format", ["torch", "flax", "tf"])
    def test_other_formats_do_not_have_it(self, tmp_path, format):
        floats, int8 = written(tmp_path)
        for source, dtype in ((floats, "int8"), (int8, None)):
            with pytest.raises(InputError, match=r"cannot hold int8, only float32.*; give one of these as dtype"):
                convert_checkpoint(source, tmp_path / "new", to=format, dtype=dtype)

    def test_not_beside_floats(self, tmp_path):
        write_checkpoint(tmp_path / "floats", CONFIG, seed=1)
        convert_checkpoint(tmp_path / "floats", tmp_path / "torch", to="torch")
        with pytest.raises(InputError, match=r"torch: config\.json says whether weights are int8"):
            convert_checkpoint(tmp_path / "torch", tmp_path / "torch", to="safetensors", dtype="int8")


class TestAPlan:
    def test_aligned_floats_are_those_of_the_formula(self, int8):
        checkpoint = open_checkpoint(int8)
        with pytest.warns(UserWarning, match=r"matrices of int8 become float32 here: they take 0\.00 GB in place of"):
            plan = plan_loading(checkpoint, with_head=True, int8=False)
        assert (plan.int8, "quantization_config" in plan.config) == (False, False)
        for spec in plan.specs:
            expected = checkpoint.read(spec.name, FLOAT32)
            np.testing.assert_array_equal(plan.read(spec), expected)
            np.testing.assert_array_equal(plan.aligned(spec), expected)
            if expected.ndim == 2:
                np.testing.assert_array_equal(plan.aligned(spec, transposed=True), expected.T)

    def test_floats_become_int8_while_they_are_read(self, tmp_path):
        floats, int8 = written(tmp_path)
        plan = plan_loading(open_checkpoint(floats), with_head=True, int8=True)
        stored = plan_loading(open_checkpoint(int8), with_head=True)
        assert plan.int8
        assert stored.int8
        assert plan.config == stored.config == XGLMConfig.from_pretrained(int8)
        for spec in plan.specs:
            if len(spec.shape) == 2:
                for ours, theirs in zip(plan.read_int8(spec), stored.read_int8(spec), strict=True):
                    np.testing.assert_array_equal(ours, theirs, strict=True)

    def test_a_half_precision_model(self, int8):
        checkpoint = open_checkpoint(int8)
        found = checkpoint.read(FC1, DTYPES["bfloat16"])
        np.testing.assert_array_equal(found, convert(checkpoint.read(FC1, FLOAT32), FLOAT32, DTYPES["bfloat16"]))

    def test_a_head_with_other_scales_is_another_head(self, tmp_path):
        _, int8 = written(tmp_path)
        found = arrays(int8)
        found[HEAD], found[f"{HEAD}_scale"] = found[EMBEDDING], found[f"{EMBEDDING}_scale"]
        safetensors.numpy.save_file(found, int8 / FILE, metadata={"format": "pt"})
        assert plan_loading(open_checkpoint(int8), with_head=True).config.tie_word_embeddings
        found[f"{HEAD}_scale"] = 2 * found[f"{HEAD}_scale"]
        safetensors.numpy.save_file(found, int8 / FILE, metadata={"format": "pt"})
        with pytest.warns(UserWarning, match="stay untied"):
            assert not plan_loading(open_checkpoint(int8), with_head=True).config.tie_word_embeddings


class TestDamagedFiles:
    @pytest.mark.parametrize(
        ("scale", "message"),
        [
            (None, r"missing: model\.layers\.1\.fc1\.weight_scale"),
            (np.ones((53, 1), np.float16), r"fc1\.weight_scale is \[53, 1\] of float16, expected \[53, 1\] of float32"),
            (np.ones(53, np.float32), r"wrong shape: .*fc1\.weight_scale is \[53\] of float32, expected \[53, 1\]"),
            (np.ones((52, 1), np.float32), r"fc1\.weight_scale is \[52, 1\] of float32, expected \[53, 1\]"),
            (np.ones((53, 35), np.float32), r"fc1\.weight_scale is \[53, 35\] of float32, expected \[53, 1\]"),
            (np.ones((53, 1), np.int8), r"missing: .*fc1\.weight_scale; unexpected: .*fc1\.weight_scale \(of int8\)"),
        ],
        ids=["missing", "float16", "vector", "another length", "groups", "int8"],
    )
    def test_scales(self, int8, scale, message):
        damage(int8, fc1__weight_scale=scale)
        with pytest.raises(CheckpointError, match=message) as error:
            plan_loading(open_checkpoint(int8), with_head=True)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("value", [np.nan, -np.inf])
    def test_scales_that_are_not_finite(self, int8, value):
        damage(int8, fc1__weight_scale=np.full((53, 1), value, np.float32))
        plan = plan_loading(open_checkpoint(int8), with_head=True)
        (spec,) = (spec for spec in plan.specs if spec.name == FC1)
        for read in (plan.read, plan.read_int8, plan.aligned):
            with pytest.raises(CheckpointError, match=r"fc1\.weight_scale has numbers that are not finite"):
                read(spec)

    def test_vectors_of_int8(self, int8):
        damage(int8, fc1__bias=np.ones(53, np.int8))
        with pytest.raises(CheckpointError, match=r"missing: .*fc1\.bias; unexpected: .*fc1\.bias \(of int8\)"):
            plan_loading(open_checkpoint(int8), with_head=True)

    def test_a_zero_point(self, int8):
        found = arrays(int8)
        found["model.layers.1.fc1.weight_zero_point"] = np.ones((53, 1), np.int8)
        safetensors.numpy.save_file(found, int8 / FILE, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"unexpected: model\.layers\.1\.fc1\.weight_zero_point \(of int8\)"):
            plan_loading(open_checkpoint(int8), with_head=True)

    def test_a_head_without_scales(self, int8):
        found = arrays(int8)
        found[HEAD] = found[EMBEDDING]
        safetensors.numpy.save_file(found, int8 / FILE, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"lm_head\.weight is int8, but there is no lm_head\.weight_scale"):
            plan_loading(open_checkpoint(int8), with_head=True)


class TestCommands:
    def test_convert_and_inspect(self, tmp_path):
        write_checkpoint(tmp_path / "floats", CONFIG, seed=1)
        run = run_xglm("convert", tmp_path / "floats", tmp_path / "int8", "--to", "safetensors", "--dtype", "int8")
        assert run.returncode == 0, run.stderr
        assert "wrote safetensors, read back and found equal" in run.stderr
        run = run_xglm("inspect", tmp_path / "int8", "--json")
        found = json.loads(run.stdout)
        matrices, vectors = 3 * 6 + 1, 3 * (6 + 4) + 2
        assert found["tensors"] == {"float32": matrices + vectors, "int8": matrices}
        assert found["error"] is None
        assert any("int8" in note for note in found["notes"])

    def test_convert_refuses(self, tmp_path):
        write_checkpoint(tmp_path / "floats", CONFIG, seed=1)
        run = run_xglm("convert", tmp_path / "floats", tmp_path / "int8", "--to", "flax", "--dtype", "int8")
        assert_refused(run, "flax_model.msgpack cannot hold int8")
