import importlib
import json
import os
import re
import stat
import struct

import numpy as np
import pytest

from tests.helpers.checkpoint_files import write_safetensors
from tests.helpers.frameworks import backends_under_test
from xglm_core import XGLMConfig, convert_checkpoint, open_checkpoint
from xglm_core.checkpoint import DTYPES, plan_loading, save_checkpoint
from xglm_core.checkpoint.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, convert, float_type
from xglm_core.checkpoint.folder import WEIGHTS_FILE
from xglm_core.checkpoint.safetensors import SafetensorsFile
from xglm_core.checkpoint.tensor_file import copy_values
from xglm_core.checkpoint.writing import parse_size
from xglm_core.config import CONFIG_FILE
from xglm_core.errors import CheckpointError, ConfigError, InputError
from xglm_core.files import replacing
from xglm_core.weight_names import EMBEDDING, HEAD, weight_specs

CONFIG = XGLMConfig(vocab_size=131, max_position_embeddings=61, d_model=35, ffn_dim=53, num_layers=3, attention_heads=5)
INDEX_FILE = "model.safetensors.index.json"
POSITIONS = "model.embed_positions.weights"


def random_weights(config=CONFIG, with_head=False, seed=0):
    random = np.random.default_rng(seed)
    specs = weight_specs(config, with_head=with_head)
    return {spec.name: random.standard_normal(spec.shape, dtype=np.float32) for spec in specs}


def save(folder, weights, config=CONFIG, dtype=FLOAT32, **kwargs):
    """By the function under test."""
    specs = weight_specs(config, with_head=HEAD in weights)
    save_checkpoint(folder, config, specs, dtype, lambda name: convert(weights[name], FLOAT32, dtype), **kwargs)


def write(folder, arrays, config=CONFIG):
    """A folder with any tensors at all, [name] -> float32 array."""
    config.save_pretrained(folder)
    with replacing(folder / WEIGHTS_FILE) as file:
        write_safetensors(file, [(name, FLOAT32, array.shape) for name, array in arrays.items()], arrays.__getitem__)


def assert_holds(folder, weights, dtype=FLOAT32):
    checkpoint = open_checkpoint(folder)
    assert checkpoint.names == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(checkpoint.read(name), convert(array, FLOAT32, dtype), err_msg=name)
        assert checkpoint.info(name).dtype is dtype
        assert checkpoint.info(name).shape == array.shape


def files(folder):
    return sorted(entry.name for entry in folder.iterdir())


def shard(number, count):
    return f"model-{number:05d}-of-{count:05d}.safetensors"


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", DTYPES.values(), ids=lambda dtype: dtype.name)
    @pytest.mark.parametrize("with_head", [False, True])
    def test_single_file(self, tmp_path, dtype, with_head):
        weights = random_weights(with_head=with_head)
        save(tmp_path / "a" / "b", weights, dtype=dtype)
        assert files(tmp_path / "a" / "b") == [CONFIG_FILE, WEIGHTS_FILE]
        assert_holds(tmp_path / "a" / "b", weights, dtype)
        assert open_checkpoint(tmp_path / "a" / "b").config == CONFIG

    @pytest.mark.parametrize("dtype", DTYPES.values(), ids=lambda dtype: dtype.name)
    @pytest.mark.parametrize("limit", ["1KB", "10KB", 30_000, "0.03 MiB"])
    def test_round_trip_of_shards(self, tmp_path, dtype, limit):
        weights = random_weights()
        save(tmp_path, weights, dtype=dtype, max_shard_size=limit)
        assert_holds(tmp_path, weights, dtype)

        index = json.loads((tmp_path / INDEX_FILE).read_text())
        shards = sorted(set(index["weight_map"].values()))
        assert shards == [shard(i + 1, len(shards)) for i in range(len(shards))]
        assert len(shards) > 1
        assert files(tmp_path) == sorted([CONFIG_FILE, INDEX_FILE, *shards])
        assert index["metadata"] == {"total_size": sum(w.size for w in weights.values()) * dtype.storage.itemsize}
        for name in shards:
            tensors = SafetensorsFile(tmp_path / name).tensors
            assert index["weight_map"].items() >= dict.fromkeys(tensors, name).items()
            size = sum(info.end - info.begin for info in tensors.values())
            assert size <= parse_size(limit) or len(tensors) == 1

    def test_largest_shard_is_the_limit_itself(self, tmp_path):
        weights = random_weights()
        total = sum(array.nbytes for array in weights.values())
        save(tmp_path, weights, max_shard_size=total)
        assert files(tmp_path) == [CONFIG_FILE, WEIGHTS_FILE]
        save(tmp_path, weights, max_shard_size=total - 1)
        assert shard(2, 2) in files(tmp_path)

    @pytest.mark.parametrize(
        ("size", "count"),
        [
            (1, 1),
            (5_000_000_000, 5 * 10**9),
            ("5GB", 5 * 10**9),
            ("5 gb", 5 * 10**9),
            ("1KB", 1000),
            ("2MiB", 2 * 2**20),
            ("0.5KiB", 512),
            ("1.5GB", 15 * 10**8),
            ("123", 123),
            (2**63 + 1, 2**63 + 1),
            ("9" * 400, None),
        ],
    )
    def test_sizes(self, size, count):
        assert parse_size(size) == count or (count is None and parse_size(size) > 10**399)

    @pytest.mark.parametrize(
        "size", ["", "GB", "5TB", "5G", "-5GB", "5GBs", "five", 0, -1, "0KB", 0.5, None, True, "1e9"]
    )
    def test_impossible_sizes(self, tmp_path, size):
        with pytest.raises(InputError, match=re.escape(f"max_shard_size is {size!r}, expected a number of bytes")):
            save(tmp_path / "new", random_weights(), max_shard_size=size)
        assert files(tmp_path) == []


class TestReplacing:
    @pytest.mark.parametrize(("before", "after"), [("10KB", "5GB"), ("5GB", "10KB"), ("1KB", "10KB"), ("5GB", "5GB")])
    def test_stale_files_are_removed(self, tmp_path, before, after):
        save(tmp_path, random_weights(seed=1), max_shard_size=before)
        (tmp_path / "sentencepiece.bpe.model").write_bytes(b"kept")
        (tmp_path / "model-00001-of-00001.safetensors.bak").write_bytes(b"kept")
        old = set(files(tmp_path))
        weights = random_weights(seed=2)
        save(tmp_path, weights, max_shard_size=after)
        assert_holds(tmp_path, weights)
        save(tmp_path / "fresh", weights, max_shard_size=after)
        kept = {"sentencepiece.bpe.model", "model-00001-of-00001.safetensors.bak"}
        assert set(files(tmp_path)) - {"fresh"} == set(files(tmp_path / "fresh")) | kept
        assert kept < old

    @pytest.mark.parametrize("limit", ["5GB", "10KB"])
    def test_own_folder_while_mapped(self, tmp_path, limit):
        weights = random_weights()
        save(tmp_path, weights, max_shard_size=limit)
        checkpoint = open_checkpoint(tmp_path)
        save_checkpoint(tmp_path, CONFIG, weight_specs(CONFIG, with_head=False), FLOAT32, checkpoint.read, limit)
        assert_holds(tmp_path, weights)

    @pytest.mark.parametrize("limit", ["5GB", "10KB"])
    @pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
    def test_failing_write_changes_nothing(self, tmp_path, limit, error):
        weights = random_weights(seed=1)
        save(tmp_path, weights, max_shard_size=limit)
        before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}

        def read(name):
            if name == "model.layer_norm.bias":  # The last one.
                raise error
            return np.zeros_like(weights[name])

        with pytest.raises(error):
            save_checkpoint(tmp_path, XGLMConfig(), weight_specs(CONFIG, with_head=False), FLOAT32, read, limit)
        assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
    def test_full_disk_shows_before_anything_is_replaced(self):
        """The last bytes of a small file wait in a buffer; without a flush their loss would show only at the end."""
        with open(os.open("/dev/full", os.O_WRONLY), "wb") as file:
            with pytest.raises(OSError, match="No space left"):
                write_safetensors(file, [("w", FLOAT32, (1,))], lambda _: np.zeros(1, np.float32))
            os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())  # So that closing the file works.

    def test_configuration_that_cannot_be_saved(self, tmp_path):
        config = XGLMConfig.from_dict({**CONFIG.to_dict(), "activation_function": abs})
        with pytest.raises(ConfigError, match="activation_function is a callable"):
            save(tmp_path / "new", random_weights(), config)
        assert files(tmp_path) == []

    def test_file_mode_follows_the_umask(self, tmp_path):
        previous = os.umask(0o027)
        try:
            save(tmp_path, random_weights(), max_shard_size="10KB")
        finally:
            os.umask(previous)
        assert {stat.S_IMODE(entry.stat().st_mode) for entry in tmp_path.iterdir()} == {0o640}

    def test_link_is_replaced_not_followed(self, tmp_path):
        """As in a download cache, whose files are links to shared ones."""
        (tmp_path / "shared").write_bytes(b"shared")
        (tmp_path / "link").symlink_to(tmp_path / "shared")
        with replacing(tmp_path / "link") as file:
            file.write(b"new")
        assert (tmp_path / "shared").read_bytes() == b"shared"
        assert (tmp_path / "link").read_bytes() == b"new"


class TestOpening:
    def test_missing_folder(self, tmp_path):
        with pytest.raises(CheckpointError, match="nowhere: no such folder; expected a checkpoint folder with"):
            open_checkpoint(tmp_path / "nowhere")

    def test_file_instead_of_folder(self, tmp_path):
        save(tmp_path, random_weights())
        with pytest.raises(CheckpointError, match=r"model\.safetensors: is a file, expected the folder.*give "):
            open_checkpoint(tmp_path / WEIGHTS_FILE)

    @pytest.mark.parametrize(
        ("present", "found"),
        [
            ([], "found nothing$"),
            ([CONFIG_FILE], "found config.json$"),
            ([WEIGHTS_FILE], "found model.safetensors$"),
            (["pytorch_model.bin"], "found pytorch_model.bin$"),
            (["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"], "found a, b, c, d, e, f, g, h and 2 more$"),
        ],
    )
    def test_incomplete_folder(self, tmp_path, present, found):
        for name in present:
            (tmp_path / name).touch()
        with pytest.raises(CheckpointError, match=f"expected config.json and model.safetensors .*, {found}"):
            open_checkpoint(tmp_path)

    def test_damaged_parts_are_named(self, tmp_path):
        save(tmp_path, random_weights())
        (tmp_path / WEIGHTS_FILE).write_bytes(b"PK\3\4")
        with pytest.raises(CheckpointError, match=r"model\.safetensors: expected at least 8 bytes"):
            open_checkpoint(tmp_path)
        (tmp_path / CONFIG_FILE).write_text("{")
        with pytest.raises(ConfigError, match=r"config\.json: expected a JSON object"):
            open_checkpoint(tmp_path)

    def test_bare_decoder_names(self, tmp_path):
        weights = random_weights(with_head=True)
        write(tmp_path, {name.removeprefix("model."): array for name, array in weights.items()})
        assert_holds(tmp_path, weights)
        open_checkpoint(tmp_path).release(EMBEDDING)


class TestIndex:
    @pytest.fixture
    def folder(self, tmp_path):
        save(tmp_path, random_weights(), max_shard_size="10KB")
        return tmp_path

    def rewrite(self, folder, change):
        index = json.loads((folder / INDEX_FILE).read_text())
        change(index["weight_map"])
        (folder / INDEX_FILE).write_text(json.dumps(index))

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "[]",
            "{}",
            "3",
            '"weight_map"',
            "[" * 100_000,
            '{"weight_map": null}',
            '{"weight_map": []}',
            '{"weight_map": {"a": ["b"]}}',
            '{"weight_map": {"a": 1, "b": "c"}}',
            '{"weight_map": {"a": "b", "a": "b"}}',
        ],
        ids=lambda text: text[:40],
    )
    def test_no_index(self, folder, text):
        (folder / INDEX_FILE).write_text(text)
        with pytest.raises(CheckpointError, match=f"{INDEX_FILE}: expected a JSON object with a 'weight_map'"):
            open_checkpoint(folder)

    def test_huge_index(self, folder):
        (folder / INDEX_FILE).write_text("[" + "[]," * 2_000_001 + "[]]")
        with pytest.raises(CheckpointError, match=f"{INDEX_FILE}: has more than 6000000 bytes"):
            open_checkpoint(folder)

    def test_missing_shard(self, folder):
        last = files(folder)[-2]
        (folder / last).unlink()
        with pytest.raises(CheckpointError, match=f"{INDEX_FILE}: names the file '{last}', which is not in the folder"):
            open_checkpoint(folder)

    @pytest.mark.parametrize(
        "name", ["../outside.safetensors", "{}/outside.safetensors", "..", ".", "", 7, None, "a\0", "\ud800"]
    )
    def test_path_out_of_the_folder(self, folder, name, tmp_path_factory):
        outside = folder.parent / "outside.safetensors"
        outside.write_bytes(next(folder.glob("model-*")).read_bytes())
        name = name.format(folder.parent) if isinstance(name, str) else name
        self.rewrite(folder, lambda weight_map: weight_map.update(dict.fromkeys(weight_map, name)))
        with pytest.raises(CheckpointError, match=re.escape(f"names the file {name!r}, which is not in the folder")):
            open_checkpoint(folder)

    def test_tensor_in_another_shard(self, folder):
        def change(weight_map):
            weight_map[EMBEDDING], weight_map["model.layer_norm.bias"] = (
                weight_map["model.layer_norm.bias"],
                weight_map[EMBEDDING],
            )

        self.rewrite(folder, change)
        with pytest.raises(CheckpointError, match=f"index and files disagree on '{EMBEDDING}' in 'model-00001"):
            open_checkpoint(folder)

    def test_tensor_in_no_shard(self, folder):
        self.rewrite(folder, lambda weight_map: weight_map.update({"a\nb": weight_map[EMBEDDING]}))
        with pytest.raises(CheckpointError, match=r"index and files disagree on 'a\\nb' in 'model-") as error:
            open_checkpoint(folder)
        assert str(error.value).isprintable()

    def test_tensor_that_the_index_omits(self, folder):
        self.rewrite(folder, lambda weight_map: weight_map.pop("model.layers.0.fc1.bias"))
        with pytest.raises(CheckpointError, match=r"index and files disagree on 'model\.layers\.0\.fc1\.bias'"):
            open_checkpoint(folder)

    def test_tensor_in_two_shards(self, folder):
        first, second = (folder / name for name in files(folder)[1:3])
        second.write_bytes(first.read_bytes())
        with pytest.raises(CheckpointError, match=f"index and files disagree on .*'{EMBEDDING}' in '{second.name}'"):
            open_checkpoint(folder)

    def test_empty_index(self, folder):
        (folder / INDEX_FILE).write_text('{"weight_map": {}}')
        with pytest.raises(CheckpointError, match=f"missing: {EMBEDDING}, "):
            plan_loading(open_checkpoint(folder), with_head=True)

    def test_single_file_wins(self, folder):
        weights = random_weights(seed=5)
        write(folder, weights)
        assert_holds(folder, weights)


class TestPlan:
    def plan(self, folder, **kwargs):
        return plan_loading(open_checkpoint(folder), **{"with_head": True, **kwargs})

    def test_tied_without_head(self, tmp_path, recwarn):
        weights = random_weights()
        save(tmp_path, weights)
        plan = self.plan(tmp_path)
        assert plan.config == CONFIG
        assert [spec.name for spec in plan.specs] == list(weights)
        for spec in plan.specs:
            np.testing.assert_array_equal(plan.read(spec), weights[spec.name])
            plan.release(spec)
        assert not recwarn.list

    @pytest.mark.parametrize("numbers", [100, 2**19], ids=["blocks", "whole"])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("format", ["safetensors", "torch", "flax"])
    def test_aligned(self, tmp_path, monkeypatch, format, dtype, numbers):
        """In both orders of the file and of the memory, as it is and converted, and the file stays as it was."""
        monkeypatch.setattr("xglm_core.checkpoint.loading._COPIED_VALUES", numbers)
        monkeypatch.setattr("xglm_core.checkpoint.loading._RELEASED_BLOCKS", 2)
        weights = random_weights()
        save(tmp_path / "source", weights)
        convert_checkpoint(tmp_path / "source", tmp_path / "new", to=format)
        for turn in (False, True):
            plan = self.plan(tmp_path / "new", dtype=dtype)
            for spec in plan.specs:
                expected = convert(weights[spec.name], FLOAT32, DTYPES[dtype])
                array = plan.aligned(spec, transposed=spec.transposed and turn)
                np.testing.assert_array_equal(array, expected.T if spec.transposed and turn else expected, strict=True)
                assert array.flags.c_contiguous
                assert array.ctypes.data % 64 == 0
                array[:] = 0
        assert_holds(tmp_path / "new", weights)

    def test_aligned_views(self, tmp_path, monkeypatch):
        """The numbers of our files begin at a multiple of 64 bytes, so the embedding needs no copy."""
        save(tmp_path, random_weights())
        plan = self.plan(tmp_path)
        released = []
        monkeypatch.setattr("xglm_core.checkpoint.folder.Checkpoint.release", lambda _, name: released.append(name))
        first, second = plan.specs[:2]
        assert first.name == EMBEDDING
        assert np.shares_memory(plan.aligned(first), plan.read(first))
        assert not np.shares_memory(plan.aligned(second, transposed=True), plan.read(second))
        assert released == [second.name]  # Of a view, pages may have been written to.

    def test_stored_head_that_equals_the_embedding_stays_tied(self, tmp_path, recwarn):
        weights = random_weights(with_head=True)
        weights[HEAD] = weights[EMBEDDING]
        save(tmp_path, weights)
        plan = self.plan(tmp_path)
        assert plan.config.tie_word_embeddings
        assert HEAD not in {spec.name for spec in plan.specs}
        assert not recwarn.list

    def test_stored_head_that_differs_is_kept_and_said(self, tmp_path):
        weights = random_weights(with_head=True)
        weights[HEAD] = weights[EMBEDDING].copy()
        weights[HEAD][-1, -1] = np.nextafter(weights[HEAD][-1, -1], np.float32(9))
        save(tmp_path, weights)
        checkpoint = open_checkpoint(tmp_path)
        with pytest.warns(UserWarning, match=f"the stored {HEAD} differs from {EMBEDDING}, so the two stay untied"):
            plan = plan_loading(checkpoint, with_head=True)
        assert not plan.config.tie_word_embeddings
        assert plan.specs[-1].name == HEAD
        np.testing.assert_array_equal(plan.read(plan.specs[-1]), weights[HEAD])
        assert checkpoint.config.tie_word_embeddings, "the checkpoint's own configuration must not change"

        def from_pretrained():  # As in the backends.
            return plan_loading(checkpoint, with_head=True)

        with pytest.warns(UserWarning, match="untied") as warned:
            from_pretrained()
        assert warned[0].filename == __file__
        assert warned[0].lineno > from_pretrained.__code__.co_firstlineno + 1, "names the caller's line"

    def test_untied_by_configuration(self, tmp_path, recwarn):
        config = XGLMConfig.from_dict({**CONFIG.to_dict(), "tie_word_embeddings": False})
        weights = random_weights(with_head=True)
        weights[HEAD] = weights[EMBEDDING]
        save(tmp_path, weights, config)
        plan = self.plan(tmp_path)
        assert plan.specs[-1].name == HEAD
        assert not recwarn.list
        save(tmp_path, {name: array for name, array in weights.items() if name != HEAD}, config)
        with pytest.raises(CheckpointError, match=f"missing: {HEAD};"):
            self.plan(tmp_path)

    def test_equality_is_compared_to_the_end(self, tmp_path):
        """Large tensors are compared piece by piece."""
        config = XGLMConfig(vocab_size=70_001, d_model=64, ffn_dim=4, num_layers=1, attention_heads=1)
        weights = {name: np.zeros_like(array) for name, array in random_weights(config, with_head=True).items()}
        weights[HEAD][-1, -1] = 1
        save(tmp_path, weights, config)
        assert weights[HEAD].nbytes > 16 * 2**20
        with pytest.warns(UserWarning, match="differs"):
            assert not self.plan(tmp_path).config.tie_word_embeddings

    def test_equal_nan_is_equal(self, tmp_path, recwarn):
        weights = random_weights(with_head=True)
        weights[EMBEDDING][3, 3] = np.nan
        weights[HEAD] = weights[EMBEDDING]
        save(tmp_path, weights)
        assert self.plan(tmp_path).config.tie_word_embeddings
        assert not recwarn.list

    def test_bare_decoder_ignores_a_head(self, tmp_path, recwarn):
        weights = random_weights(with_head=True)
        save(tmp_path, weights)
        plan = self.plan(tmp_path, with_head=False)
        assert [spec.name for spec in plan.specs] == [name for name in weights if name != HEAD]
        assert not recwarn.list

    @pytest.mark.parametrize("prefix", ["model.", ""])
    def test_stored_positions_are_ignored(self, tmp_path, prefix):
        weights = {**random_weights(), POSITIONS: np.zeros((63, 35), np.float32)}
        write(tmp_path, {prefix + name.removeprefix("model."): array for name, array in weights.items()})
        assert POSITIONS not in {spec.name for spec in self.plan(tmp_path).specs}

    def test_all_problems_in_one_line(self, tmp_path):
        weights = random_weights()
        del weights["model.layers.1.fc1.bias"], weights["model.layer_norm.weight"]
        weights["model.layers.3.fc1.bias"] = weights["model.extra"] = np.zeros(1, np.float32)
        weights["model.layers.0.fc1.weight"] = np.zeros((35, 53), np.float32)
        weights["model.layers.2.fc2.bias"] = np.zeros((35, 1), np.float32)
        write(tmp_path, weights)
        with pytest.raises(CheckpointError) as error:
            self.plan(tmp_path)
        assert str(error.value) == (
            f"{tmp_path}: the weights do not fit config.json; "
            "missing: model.layers.1.fc1.bias, model.layer_norm.weight; "
            "unexpected: model.extra, model.layers.3.fc1.bias; "
            "wrong shape: model.layers.0.fc1.weight is [35, 53], expected [53, 35], "
            "model.layers.2.fc2.bias is [35, 1], expected [35]; "
            "check that config.json and the weights belong together"
        )

    def test_head_of_another_shape(self, tmp_path):
        weights = random_weights(with_head=True)
        weights[HEAD] = np.zeros((130, 35), np.float32)
        write(tmp_path, weights)
        with (
            pytest.warns(UserWarning, match="differs"),
            pytest.raises(CheckpointError, match=f"wrong shape: {HEAD} is"),
        ):
            self.plan(tmp_path)

    @pytest.mark.parametrize("stored", DTYPES.values(), ids=lambda dtype: dtype.name)
    @pytest.mark.parametrize("asked", ["float32", "float16", "bfloat16", "auto"])
    def test_dtype(self, tmp_path, stored, asked):
        weights = random_weights()
        save(tmp_path, weights, dtype=stored)
        plan = self.plan(tmp_path, dtype=asked)
        assert plan.dtype.name == (stored.name if asked == "auto" else asked)
        spec = plan.specs[2]
        array = plan.read(spec)
        assert array.dtype == plan.dtype.storage
        np.testing.assert_array_equal(array, convert(convert(weights[spec.name], FLOAT32, stored), stored, plan.dtype))

    def test_default_is_float32_whatever_the_file_holds(self, tmp_path):
        save(tmp_path, random_weights(), dtype=FLOAT16)
        assert self.plan(tmp_path).dtype is FLOAT32

    def test_same_type_is_not_copied(self, tmp_path):
        save(tmp_path, random_weights(), dtype=FLOAT16)
        plan = self.plan(tmp_path, dtype="float16")
        assert np.shares_memory(plan.read(plan.specs[0]), plan.read(plan.specs[0]))

    def test_unknown_dtype(self, tmp_path):
        save(tmp_path, random_weights())
        with pytest.raises(InputError, match="dtype is 'float64', expected one of float32, float16, bfloat16"):
            self.plan(tmp_path, dtype="float64")


class TestHugeConfigurations:
    """A small file must not make the reader list what no memory holds."""

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"num_layers": 10**12}, "config.json has 1000000000000 layers, but there are only 51 tensors"),
            (
                {"d_model": 10**12, "attention_heads": 10**12},
                r"model.embed_tokens.weight is \[131, 35\], expected \[131, 1",
            ),
            ({"vocab_size": 10**15}, r"model.embed_tokens.weight is \[131, 35\], expected \[1000000000000000, 35\]"),
        ],
    )
    def test_sizes(self, tmp_path, change, match):
        save(tmp_path, random_weights())
        XGLMConfig.from_dict({**CONFIG.to_dict(), **change}).save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=match):
            plan_loading(open_checkpoint(tmp_path), with_head=True)


class TestDtypeNames:
    @pytest.mark.parametrize("name", ["float32", "float16"])
    def test_numpy(self, name):
        for dtype in (name, np.dtype(name), getattr(np, name), np.dtype(name).newbyteorder(">"), f"torch.{name}"):
            assert float_type(dtype) is DTYPES[name]

    @pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
    @pytest.mark.parametrize("backend", backends_under_test())
    def test_frameworks(self, name, backend):
        module = {"torch": "torch", "tf": "tensorflow", "flax": "jax.numpy"}[backend]
        assert float_type(getattr(importlib.import_module(module), name)) is DTYPES[name]

    def test_ml_dtypes(self):
        assert float_type(pytest.importorskip("ml_dtypes").bfloat16) is BFLOAT16

    @pytest.mark.parametrize("dtype", ["auto", "fp16", "half", "int8", "", None, float, 16, np.float64])
    def test_unknown(self, dtype):
        with pytest.raises(InputError, match=r"dtype is .*, expected one of float32, float16, bfloat16"):
            float_type(dtype)


def bits_of(*words):
    return np.array(words, dtype=np.uint32).view(np.float32)


class TestConversion:
    """Rounding is to nearest, ties to even."""

    @pytest.mark.parametrize(
        ("float32", "bfloat16"),
        [
            (0x3F800000, 0x3F80),  # 1 is exact.
            (0x3F807FFF, 0x3F80),  # Below the middle: down.
            (0x3F808000, 0x3F80),  # The middle: to the even one, down.
            (0x3F808001, 0x3F81),  # Above it: up.
            (0x3F818000, 0x3F82),  # The middle: to the even one, up.
            (0xBF818000, 0xBF82),  # Signs do not matter.
            (0x3FFFFFFF, 0x4000),  # Up, across a power of two.
            (0x7F7F7FFF, 0x7F7F),  # The largest number.
            (0x7F7F8000, 0x7F80),  # Overflow.
            (0xFF7FFFFF, 0xFF80),
            (0x7F800000, 0x7F80),  # Infinities.
            (0xFF800000, 0xFF80),
            (0x00000000, 0x0000),
            (0x80000000, 0x8000),  # -0
            (0x00008000, 0x0000),  # The middle below the smallest subnormal.
            (0x00018000, 0x0002),
        ],
    )
    def test_float32_to_bfloat16(self, float32, bfloat16):
        assert convert(bits_of(float32), FLOAT32, BFLOAT16).tolist() == [bfloat16]

    @pytest.mark.parametrize("word", [0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0xFF808000])
    def test_nan_stays_nan(self, word):
        """Rounded like a number, some would become infinite or 0."""
        (bits,) = convert(bits_of(word), FLOAT32, BFLOAT16).tolist()
        assert bits & 0x7F80 == 0x7F80
        assert bits & 0x007F
        assert bits >> 15 == word >> 31
        assert np.isnan(convert(bits_of(word), FLOAT32, FLOAT16)).all()

    def test_bfloat16_is_exact_in_float32(self):
        bits = np.arange(2**16, dtype=np.uint16)
        values = convert(bits, BFLOAT16, FLOAT32)
        expected = np.frombuffer(b"".join(struct.pack("<HH", 0, word) for word in bits.tolist()), "<f4")
        np.testing.assert_array_equal(values, expected)
        numbers = ~np.isnan(values)
        np.testing.assert_array_equal(convert(values, FLOAT32, BFLOAT16)[numbers], bits[numbers])

    def test_float16_by_python(self):
        values = np.array([0.1, -65504, 65519.99, 6e-8, 2.98e-8, 1 / 3], dtype=np.float32)
        expected = [struct.unpack("<e", struct.pack("<e", value))[0] for value in values.tolist()]
        assert convert(values, FLOAT32, FLOAT16).tolist() == expected
        assert convert(np.array([65520, -1e9], np.float32), FLOAT32, FLOAT16).tolist() == [np.inf, -np.inf]

    @pytest.mark.parametrize("source", DTYPES.values(), ids=lambda dtype: dtype.name)
    @pytest.mark.parametrize("target", DTYPES.values(), ids=lambda dtype: dtype.name)
    def test_against_ml_dtypes(self, source, target):
        """All 2^16 patterns of the short types; random ones, and all next to a middle, of float32."""
        ml_dtypes = pytest.importorskip("ml_dtypes")
        types = {**{name: np.dtype(name) for name in ("float32", "float16")}, "bfloat16": np.dtype(ml_dtypes.bfloat16)}
        if source is FLOAT32:
            random = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
            middles = (np.arange(2**16, dtype=np.uint32)[:, None] << 16) + np.array([0x7FFF, 0x8000, 0x8001], np.uint32)
            array = np.concatenate([random, middles.reshape(-1)]).view(np.float32)
        else:
            array = np.arange(2**16, dtype=np.uint16).view(source.storage)
        with np.errstate(all="ignore"):
            expected = array.view(types[source.name]).astype(types[target.name]).astype(np.float32)
        converted = convert(array, source, target).view(types[target.name]).astype(np.float32)
        np.testing.assert_array_equal(converted, expected)
        np.testing.assert_array_equal(np.signbit(converted), np.signbit(expected))

    @pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (3, 5), (300, 700)])
    @pytest.mark.parametrize("target", [FLOAT16, BFLOAT16], ids=lambda dtype: dtype.name)
    def test_shapes(self, shape, target):
        array = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
        converted = convert(array, FLOAT32, target)
        assert converted.shape == shape
        assert converted.dtype == target.storage
        # 210,000 numbers are several blocks; those below 2^8 are exact in both types.
        small = array < 256
        np.testing.assert_array_equal(convert(converted, target, FLOAT32)[small], array[small])
        rows = [convert(row, FLOAT32, target) for row in array] if len(shape) == 2 and array.size else []
        np.testing.assert_array_equal(converted, rows or converted)

    @pytest.mark.parametrize("shape", [(3, 5), (100, 33), (33, 100), (1, 7), (0, 4), (257, 600), (512, 255)])
    @pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
    def test_copy_of_a_transposed_matrix(self, shape, dtype):
        array = np.random.default_rng(0).standard_normal(shape).astype(dtype)
        for source in (array, array.T, array[::2], array[:, ::-1]):
            target = np.full(source.shape, np.nan, dtype)
            copy_values(target, source)
            np.testing.assert_array_equal(target, source)

    def test_float64(self):
        values = np.array([1 / 3, 1e300, -1e300, np.nan, 2.0**-24, 1 + 2.0**-30])
        expected = [np.float32(1 / 3), np.inf, -np.inf, np.nan, 2.0**-24, 1]
        np.testing.assert_array_equal(convert(values, FLOAT64, FLOAT32), np.array(expected, np.float32))
        np.testing.assert_array_equal(
            convert(values, FLOAT64, BFLOAT16), convert(np.array(expected, np.float32), FLOAT32, BFLOAT16)
        )

    def test_transposed_matrix_stays_transposed(self):
        """In another order of its numbers, it would be copied once more on the way into Flax or Keras."""
        array = np.random.default_rng(0).standard_normal((300, 700)).astype(np.float32)
        converted = convert(array.T, FLOAT32, FLOAT16)
        assert converted.T.flags.c_contiguous
        np.testing.assert_array_equal(converted, array.T.astype(np.float16))

    def test_other_layouts(self):
        array = np.arange(12, dtype=np.float32).reshape(3, 4)
        np.testing.assert_array_equal(convert(array.T, FLOAT32, BFLOAT16), convert(array, FLOAT32, BFLOAT16).T)
        np.testing.assert_array_equal(convert(array[:, ::2], FLOAT32, FLOAT16), array[:, ::2])

    def test_same_type_is_the_same_array(self):
        array = np.zeros(3, np.float32)
        assert convert(array, FLOAT32, FLOAT32) is array
