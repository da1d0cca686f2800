"""HDF5 files in the layout of transformers' TensorFlow classes, and what else may be in such a file."""

import numpy as np
import pytest

from tests.helpers.checkpoint_files import library, write_keras
from xglm_core.checkpoint.keras_h5 import KerasFile
from xglm_core.errors import CheckpointError

KERNEL = np.arange(35, dtype=np.float32).reshape(5, 7)
SCOPE = "model/tfxglm_for_causal_lm/model"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tf_model.h5"


@pytest.fixture
def h5py():
    return library("h5py")


def rejected(path, match):
    with pytest.raises(CheckpointError, match=match) as error:
        KerasFile(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert len(message) < len(str(path)) + 320


class TestReading:
    @pytest.mark.parametrize("libver", ["earliest", "latest"])
    def test_names(self, path, libver):
        """Of both generations of the format, which describe groups differently."""
        datasets = {
            f"{SCOPE}/embed_tokens/weight:0": KERNEL,
            f"{SCOPE}/layers.0/self_attn/q_proj/kernel:0": KERNEL,
            f"{SCOPE}/layers.0/self_attn/q_proj/bias:0": KERNEL[0],
            f"{SCOPE}/layers.11/final_layer_norm/gamma:0": KERNEL[0],
            f"{SCOPE}/layers.11/final_layer_norm/beta:0": KERNEL[1],
            "lm_head/tfxglm_for_causal_lm/lm_head/kernel:0": KERNEL,
        }
        write_keras(path, datasets, libver=libver)
        file = KerasFile(path)
        expected = {
            "model.embed_tokens.weight": KERNEL,
            "model.layers.0.self_attn.q_proj.weight": KERNEL.T,
            "model.layers.0.self_attn.q_proj.bias": KERNEL[0],
            "model.layers.11.final_layer_norm.weight": KERNEL[0],
            "model.layers.11.final_layer_norm.bias": KERNEL[1],
            "lm_head.weight": KERNEL.T,
        }
        assert file.tensors.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(file.read(name), array)
            assert file.tensors[name].shape == array.shape
            assert np.shares_memory(file.read(name), file.read(name))
            file.release(name)

    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
    def test_types_in_hdf5(self, path, dtype):
        write_keras(path, {"a/bias:0": KERNEL.astype(dtype), "empty:0": KERNEL[:0].astype(dtype)})
        file = KerasFile(path)
        assert file.tensors["a.bias"].dtype.name == dtype
        np.testing.assert_array_equal(file.read("a.bias"), KERNEL.astype(dtype))
        assert file.read("empty").shape == (0, 7)

    def test_views_do_not_change_the_file(self, path):
        write_keras(path, {"bias:0": KERNEL})
        before = path.read_bytes()
        KerasFile(path).read("bias")[:] = 7
        assert path.read_bytes() == before


class TestRefused:
    @pytest.mark.parametrize("dtype", [">f4", "complex64", "S3"])
    def test_refused_types_in_hdf5(self, path, dtype):
        write_keras(path, {"a:0": np.zeros(2, dtype)})
        rejected(path, "'a:0': is of .*, expected float16, float32 or float64")

    @pytest.mark.parametrize("options", [{"compression": "gzip"}, {"chunks": (5, 1)}, {"maxshape": (None, 7)}])
    def test_pieces(self, path, h5py, options):
        with h5py.File(path, "w") as file:
            file.create_dataset("a:0", data=KERNEL, **options)
        rejected(path, "'a:0': is in pieces, compressed or never written, expected plain numbers")

    def test_compressed_bomb(self, path, h5py):
        with h5py.File(path, "w") as file:
            file.create_dataset("a:0", (2**20, 2**20), "f4", compression="gzip", fillvalue=1)
        rejected(path, "'a:0': is in pieces, compressed or never written")

    def test_never_written(self, path, h5py):
        with h5py.File(path, "w") as file:
            file.create_dataset("a:0", (2**20, 2**20), "f4")
        rejected(path, "'a:0': is in pieces, compressed or never written")

    def test_other_files(self, path, h5py, tmp_path):
        write_keras(tmp_path / "other.h5", {"a:0": KERNEL})
        (tmp_path / "raw").write_bytes(KERNEL.tobytes())
        for make in (
            lambda file: file.__setitem__("a:0", h5py.ExternalLink("other.h5", "/a:0")),
            lambda file: file.__setitem__("a:0", h5py.ExternalLink("/etc/passwd", "/")),
            lambda file: file.__setitem__("a:0", h5py.SoftLink("/b")),
        ):
            with h5py.File(path, "w") as file:
                make(file)
            rejected(path, "'a:0': is a link to another place or file, expected a dataset")
        with h5py.File(path, "w") as file:
            file.create_dataset("a:0", KERNEL.shape, "f4", external=[(str(tmp_path / "raw"), 0, 140)])
        rejected(path, "'a:0': is in pieces, compressed or never written")
        with h5py.File(path, "w") as file:
            layout = h5py.VirtualLayout(KERNEL.shape, "f4")
            layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "a:0", KERNEL.shape)
            file.create_virtual_dataset("a:0", layout)
        rejected(path, "'a:0': is in pieces, compressed or never written")

    def test_one_dataset_under_two_names(self, path, h5py):
        with h5py.File(path, "w") as file:
            file["a:0"] = KERNEL
            file["b:0"] = file["a:0"]
        rejected(path, "tensor 'b': begins at byte [0-9]+, within another tensor")

    def test_two_names_after_translation(self, path):
        write_keras(path, {"model/x/lm_head/kernel:0": KERNEL, "model/y/lm_head/kernel:0": KERNEL})
        rejected(path, r"the file has two tensors 'lm_head\.weight'")

    def test_group_within_itself(self, path, h5py):
        with h5py.File(path, "w") as file:
            file["a"] = file["/"]
        rejected(path, "'a/a/a/.*': expected at most 16 levels")

    def test_groups_without_end(self, path, h5py):
        """2^16 paths through 16 groups."""
        with h5py.File(path, "w") as file:
            inner = file.create_group("end")
            for index in range(14):
                outer = file.create_group(f"group{index}")
                outer["a"] = outer["b"] = inner
                inner = outer
        rejected(path, "the file has more than 20000 groups and datasets")

    def test_types_by_name(self, path, h5py):
        with h5py.File(path, "w") as file:
            file["a"] = np.dtype("f4")
        rejected(path, "'a': is a Datatype, expected a dataset")

    @pytest.mark.parametrize("data", [b"", b"\x89HDF", b"PK\3\4" * 9, b"\x89HDF\r\n\x1a\n" + bytes(100)])
    def test_other_kinds(self, path, h5py, data):
        path.write_bytes(data)
        rejected(path, "expected at least 8 bytes|does not begin as an HDF5 file|the tree of the file is damaged")

    def test_every_truncation(self, path):
        write_keras(path, {"model/a/bias:0": KERNEL, "model/b/bias:0": KERNEL})
        whole = path.read_bytes()
        for size in range(0, len(whole), 97):
            path.unlink()
            path.write_bytes(whole[:size])
            rejected(path, "truncated|does not begin|the tree of the file is damaged")
