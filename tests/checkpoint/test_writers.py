"""What is written in each format, read by the libraries that define it."""

import importlib.util
import json
import struct
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from conformance.random_weights import random_weights, write_checkpoint
from tests.helpers.checkpoint_files import library
from tests.helpers.models import CONFIG, changed
from xglm_core import convert_checkpoint, open_checkpoint
from xglm_core.checkpoint import flax_writer, keras_writer, torch_writer
from xglm_core.checkpoint.dtypes import BFLOAT16, DTYPES, FLOAT32, convert
from xglm_core.checkpoint.file_layout import Entry
from xglm_core.checkpoint.flax_msgpack import FlaxFile
from xglm_core.checkpoint.formats import FORMATS
from xglm_core.checkpoint.tensor_writing import write_values
from xglm_core.weight_names import EMBEDDING, HEAD, weight_specs

UNTIED = changed(CONFIG, tie_word_embeddings=False)
SPECS = {spec.name: spec for spec in weight_specs(CONFIG, with_head=True)}
SCOPE = "tfxglm_for_causal_lm"


@pytest.fixture(scope="module", params=[CONFIG, UNTIED], ids=["tied", "untied"])
def config(request):
    return request.param


@pytest.fixture(scope="module")
def weights(config):
    return random_weights(config, seed=1)


@pytest.fixture(scope="module")
def folder(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("source")
    write_checkpoint(path, config, seed=1)
    return path


def with_head(weights):
    return {HEAD: weights[EMBEDDING], **weights}


def keras_names(weights):
    """What the TensorFlow class of transformers calls each weight, and the array it holds."""
    names = {}
    for name, array in with_head(weights).items():
        path = SPECS[name].keras.replace("embed_tokens/embeddings", "embed_tokens/weight")
        names[f"{SCOPE}/{path}:0"] = array.T if SPECS[name].transposed else array
    return names


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name, strict=True)


def shards(folder, format):
    """The names in each file that the index lists."""
    index = json.loads((folder / FORMATS[format].index).read_text())
    files = {}
    for name, file in index["weight_map"].items():
        files.setdefault(file, []).append(name)
    stem, suffix = FORMATS[format].file.rsplit(".", 1)
    assert sorted(files) == [f"{stem}-{i + 1:05d}-of-{len(files):05d}.{suffix}" for i in range(len(files))]
    assert len(files) > 2
    assert index["metadata"]["total_size"] > 0
    return files


def flat(tree, place=()):
    for key, value in tree.items():
        yield from flat(value, (*place, key)) if isinstance(value, dict) else [((*place, key), value)]


class TestSafetensors:
    def test_the_library_reads_it(self, folder, weights, tmp_path):
        convert_checkpoint(folder, tmp_path, to="safetensors")
        assert_equal(safetensors.numpy.load_file(tmp_path / "model.safetensors"), weights)

    def test_shards_of_safetensors(self, folder, weights, tmp_path):
        convert_checkpoint(folder, tmp_path, to="safetensors", max_shard_size="30KB")
        for file, names in shards(tmp_path, "safetensors").items():
            assert_equal(safetensors.numpy.load_file(tmp_path / file), {name: weights[name] for name in names})


class TestTorch:
    def load(self, path, **options):
        found = library("torch").load(path, weights_only=True, **options)
        assert type(found) is dict
        return found

    @pytest.mark.parametrize("options", [{}, {"mmap": True}])
    def test_the_library_reads_it(self, folder, weights, tmp_path, options):
        convert_checkpoint(folder, tmp_path, to="torch")
        found = self.load(tmp_path / "pytorch_model.bin", **options)
        assert_equal({name: tensor.numpy() for name, tensor in found.items()}, weights)
        assert all(tensor.is_contiguous() for tensor in found.values())

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_types_for_torch(self, folder, weights, tmp_path, dtype):
        convert_checkpoint(folder, tmp_path, to="torch", dtype=dtype)
        torch = library("torch")
        for name, tensor in self.load(tmp_path / "pytorch_model.bin").items():
            assert torch.equal(tensor, torch.from_numpy(weights[name]).to(getattr(torch, dtype))), name

    def test_shards_for_torch(self, folder, weights, tmp_path):
        convert_checkpoint(folder, tmp_path, to="torch", max_shard_size="30KB")
        for file, names in shards(tmp_path, "torch").items():
            found = {name: tensor.numpy() for name, tensor in self.load(tmp_path / file).items()}
            assert_equal(found, {name: weights[name] for name in names})

    def test_archive(self, folder, weights, tmp_path):
        """Stored as they are, with right check sums, and aligned to 64 bytes."""
        convert_checkpoint(folder, tmp_path, to="torch")
        with zipfile.ZipFile(tmp_path / "pytorch_model.bin") as archive:
            assert archive.testzip() is None
            members = archive.infolist()
            assert archive.read("archive/byteorder") == b"little"
        assert {member.compress_type for member in members} == {zipfile.ZIP_STORED}
        data = (tmp_path / "pytorch_model.bin").read_bytes()
        for member in members:
            name, extra = struct.unpack_from("<2H", data, member.header_offset + 26)
            assert (member.header_offset + 30 + name + extra) % 64 == 0
            assert struct.unpack_from("<L", data, member.header_offset + 14) == (member.CRC,)
        assert len(members) == len(weights) + 3

    def test_sizes_of_more_than_32_bits(self, tmp_path, monkeypatch):
        """As if 32 bits ended at 1000: the fields of a large file, in a small one."""
        monkeypatch.setattr(torch_writer, "_FULL", 1000)
        assert b"\1\0\x10\0" in torch_writer._local_header(torch_writer._Member(b"a", 0, 1000))
        entry = torch_writer._directory_entry(torch_writer._Member(b"a", 5000, 2000))
        assert entry.endswith(struct.pack("<2H3Q", 1, 24, 2000, 2000, 5000))
        assert entry.count(struct.pack("<L", 1000)) == 3


class TestTorchOfMoreThan4GiB:
    def test_the_libraries_read_it(self, tmp_path):
        """A hole in place of the numbers of the first tensor, so that the file takes no space."""
        path = tmp_path / "large.bin"
        size = 2**32 + 4
        entries = [Entry("a", FLOAT32, (size // 4,)), Entry("b", FLOAT32, (3,))]
        with open(path, "wb") as file:
            layout = torch_writer.TORCH_WRITER.lay_out(file, entries, False)
            file.seek(layout.places[1][0][0])
            file.write(np.arange(3, dtype=np.float32).tobytes())
            layout.finish([0, 0])
        with zipfile.ZipFile(path) as archive:
            assert archive.getinfo("archive/data/0").file_size == size
        assert FORMATS["torch"].open(path).read("b").tolist() == [0, 1, 2]
        found = library("torch").load(path, weights_only=True, mmap=True)
        assert found["a"].shape == (size // 4,)
        assert found["b"].tolist() == [0, 1, 2]


class TestFlax:
    def restore(self, path):
        library("flax")
        data = path.read_bytes()
        return dict(flat(importlib.import_module("flax.serialization").msgpack_restore(data)))

    def expected(self, weights):
        return {
            SPECS[name].flax: np.ascontiguousarray(array.T if SPECS[name].transposed else array)
            for name, array in weights.items()
        }

    def test_the_library_reads_it(self, folder, weights, tmp_path):
        convert_checkpoint(folder, tmp_path, to="flax")
        assert_equal(self.restore(tmp_path / "flax_model.msgpack"), self.expected(weights))

    def test_types_for_flax(self, folder, weights, tmp_path):
        convert_checkpoint(folder, tmp_path, to="flax", dtype="bfloat16")
        for name, array in self.restore(tmp_path / "flax_model.msgpack").items():
            assert array.dtype.name == "bfloat16"
            np.testing.assert_array_equal(
                array.view(np.uint16), convert(self.expected(weights)[name], FLOAT32, BFLOAT16), err_msg=str(name)
            )

    def test_shards_for_flax(self, folder, weights, tmp_path):
        convert_checkpoint(folder, tmp_path, to="flax", max_shard_size="30KB")
        expected = self.expected(weights)
        for file, names in shards(tmp_path, "flax").items():
            places = [tuple(name.split("/")) for name in names]
            assert_equal(self.restore(tmp_path / file), {place: expected[place] for place in places})

    def test_pieces(self, folder, weights, tmp_path, monkeypatch):
        """Large arrays are cut where Flax cuts them, although blocks end elsewhere."""
        library("flax")
        monkeypatch.setattr(flax_writer, "_MOST_BYTES", 1004)
        convert_checkpoint(folder, tmp_path, to="flax")
        assert_equal(self.restore(tmp_path / "flax_model.msgpack"), self.expected(weights))
        serialization = importlib.import_module("flax.serialization")
        monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 1004)
        tree = {}
        for place, array in self.expected(weights).items():
            owner = tree
            for key in place[:-1]:
                owner = owner.setdefault(key, {})
            owner[place[-1]] = array
        unpack = importlib.import_module("msgpack").unpackb
        theirs = dict(flat(unpack(serialization.to_bytes(tree))))
        ours = dict(flat(unpack((tmp_path / "flax_model.msgpack").read_bytes())))
        assert ours.keys() == theirs.keys()
        assert len(ours) > 2 * len(weights)


class TestKeras:
    def datasets(self, path):
        found = {}
        with library("h5py").File(path) as file:
            file.visititems(lambda name, item: found.update({name: item[()]} if hasattr(item, "shape") else {}))
            return found, dict(file.attrs)

    def test_the_library_reads_it(self, folder, weights, tmp_path):
        convert_checkpoint(folder, tmp_path, to="tf")
        found, attributes = self.datasets(tmp_path / "tf_model.h5")
        expected = {f"{name.split('/')[1]}/{name}": array for name, array in keras_names(weights).items()}
        assert_equal(found, expected)
        assert sorted(attributes["layer_names"]) == [b"lm_head", b"model"]
        with library("h5py").File(tmp_path / "tf_model.h5") as file:
            for layer in ("model", "lm_head"):
                names = [name.decode() for name in file[layer].attrs["weight_names"]]
                assert sorted(names) == sorted(name for name in keras_names(weights) if name.split("/")[1] == layer)
            assert all(file[name].id.get_offset() % 64 == 0 for name in expected)

    def test_shards_for_keras(self, folder, weights, tmp_path):
        convert_checkpoint(folder, tmp_path, to="tf", max_shard_size="30KB")
        expected = keras_names(weights)
        for file, names in shards(tmp_path, "tf").items():
            found, attributes = self.datasets(tmp_path / file)
            assert_equal(found, {name.partition("/")[2]: expected[name] for name in names})
            assert {name.decode() for name in attributes["layer_names"]} == found.keys()

    def test_many_names(self, tmp_path):
        """HDF5 has room for 64 KB in an attribute; Keras numbers several."""
        entries = [Entry(f"{SCOPE}/model/{'x' * 90}{i}:0", FLOAT32, (1,)) for i in range(1500)]
        library("h5py")
        with open(tmp_path / "tf_model.h5", "wb") as file:
            layout = keras_writer.KERAS_WRITER.lay_out(file, entries, False)
            write_values(file, entries, layout, lambda index: iter([np.array([index], np.float32)]))
        with library("h5py").File(tmp_path / "tf_model.h5") as file:
            attributes = file["model"].attrs
            assert "weight_names" not in attributes
            parts = [f"weight_names{i}" for i in range(len(attributes))]
            names = [name.decode() for part in parts for name in attributes[part]]
            assert names == [entry.name for entry in entries]
            assert [file["model"][name][0] for name in names] == [*range(1500)]


def test_scattered_writes(folder, weights, config, tmp_path, monkeypatch):
    """Matrices that are written column by column, as in files with more than a block per matrix."""
    monkeypatch.setattr("xglm_core.checkpoint.tensor_file._MAPPED_VALUES", 150)
    monkeypatch.setattr("xglm_core.checkpoint.tensor_file._BLOCK_VALUES", 100)
    monkeypatch.setattr(flax_writer, "_MOST_BYTES", 1004)
    convert_checkpoint(folder, tmp_path / "flax", to="flax")
    numbers, sizes = FlaxFile._values, []

    def spy(file, name, begin, end):
        sizes.append((file.tensors[name].strides is None, end - begin))
        return numbers(file, name, begin, end)

    monkeypatch.setattr(FlaxFile, "_values", spy)
    convert_checkpoint(tmp_path / "flax", tmp_path / "torch", to="torch")
    # Of what is stored in pieces, but not transposed: the embedding, never put together as a whole.
    assert sizes
    assert max(size for plain, size in sizes if plain) <= 150
    with zipfile.ZipFile(tmp_path / "torch" / "pytorch_model.bin") as archive:
        assert archive.testzip() is None
    if importlib.util.find_spec("h5py"):
        convert_checkpoint(tmp_path / "flax", tmp_path / "tf", to="tf")
        checkpoint = open_checkpoint(tmp_path / "tf")
        assert_equal({name: checkpoint.read(name) for name in checkpoint.names}, with_head(weights))
    checkpoint = open_checkpoint(tmp_path / "torch")
    assert_equal({name: checkpoint.read(name) for name in checkpoint.names}, weights)
