"""`convert_checkpoint` and `xglm convert`: every pair of formats, and what is left when something goes wrong."""

import dataclasses
import itertools
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from conformance.random_weights import random_weights, write_checkpoint
from tests.helpers.checkpoint_files import fairseq_checkpoint, library, write_safetensors
from tests.helpers.commands import ROOT, assert_refused, run_xglm
from tests.helpers.frameworks import needs
from tests.helpers.models import CONFIG, changed
from xglm_core import XGLMConfig, convert_checkpoint, open_checkpoint
from xglm_core.checkpoint import plan_loading, writing
from xglm_core.checkpoint.convert import WRITABLE
from xglm_core.checkpoint.dtypes import DTYPES, FLOAT32, convert
from xglm_core.checkpoint.folder import WEIGHTS_FILE
from xglm_core.checkpoint.formats import FORMATS
from xglm_core.cli.progress import Progress
from xglm_core.config import CONFIG_FILE
from xglm_core.errors import CheckpointError, InputError
from xglm_core.weight_names import EMBEDDING, HEAD

UNTIED = changed(CONFIG, tie_word_embeddings=False)
WEIGHTS = random_weights(CONFIG, seed=1)
FC1 = "model.layers.1.fc1.weight"


def needed(*formats):
    """Skips the test where the library of a format is missing."""
    if "tf" in formats:
        library("h5py")


@pytest.fixture
def source(tmp_path):
    write_checkpoint(tmp_path / "source", CONFIG, seed=1)
    return tmp_path / "source"


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())} if folder.exists() else {}


def stored(folder, weights=None):
    checkpoint = open_checkpoint(folder, weights)
    return {name: np.ascontiguousarray(checkpoint.read(name)) for name in checkpoint.names}


def assert_holds(folder, weights, format=None):
    found = stored(folder, format)
    assert found.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name, strict=True)


class TestPairs:
    @pytest.mark.parametrize("size", ["5GB", "30KB"], ids=["one file", "shards"])
    @pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
    @pytest.mark.parametrize(("first", "second"), [*itertools.product(WRITABLE, WRITABLE)])
    def test_bits_stay(self, tmp_path, first, second, config, size):
        needed(first, second)
        write_checkpoint(tmp_path / "source", config, seed=1)
        weights = random_weights(config, seed=1)
        convert_checkpoint(tmp_path / "source", tmp_path / "first", to=first, max_shard_size=size)
        convert_checkpoint(tmp_path / "first", tmp_path / "second", to=second, max_shard_size=size)
        for name, format in (("first", first), ("second", second)):
            head = {HEAD: weights.get(HEAD, weights[EMBEDDING])} if format == "tf" else {}
            assert_holds(tmp_path / name, {**weights, **head}, format)
            assert plan_loading(open_checkpoint(tmp_path / name), with_head=True).config == config
            index = FORMATS[format].index in files(tmp_path / name)
            assert index == (size != "5GB")

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("to", WRITABLE)
    def test_types_of_every_pair(self, source, tmp_path, to, dtype):
        needed(to)
        if (to, dtype) == ("tf", "bfloat16"):
            pytest.skip("HDF5 has none; see TestInput")
        convert_checkpoint(source, tmp_path / "new", to=to, dtype=dtype)
        head = {HEAD: WEIGHTS[EMBEDDING]} if to == "tf" else {}
        assert_holds(
            tmp_path / "new",
            {name: convert(array, FLOAT32, DTYPES[dtype]) for name, array in {**WEIGHTS, **head}.items()},
        )

    def test_each_weight_keeps_its_type(self, tmp_path):
        """Of a file of two types, without `dtype`."""
        CONFIG.save_pretrained(tmp_path)
        types = {name: DTYPES["float16" if array.ndim == 2 else "float32"] for name, array in WEIGHTS.items()}
        arrays = {name: convert(array, FLOAT32, types[name]) for name, array in WEIGHTS.items()}
        with open(tmp_path / WEIGHTS_FILE, "wb") as file:
            write_safetensors(file, [(n, types[n], a.shape) for n, a in arrays.items()], arrays.__getitem__)
        convert_checkpoint(tmp_path, tmp_path, to="flax")
        assert_holds(tmp_path, arrays, "flax")

    def test_fairseq(self, tmp_path):
        (tmp_path / "source").mkdir()
        library("torch").save(fairseq_checkpoint(CONFIG, WEIGHTS), tmp_path / "source" / "model.pt")
        convert_checkpoint(tmp_path / "source", tmp_path / "new", to="safetensors")
        assert_holds(tmp_path / "new", WEIGHTS)
        assert XGLMConfig.from_pretrained(tmp_path / "new").ffn_dim == CONFIG.ffn_dim

    def test_bare_decoder(self, tmp_path):
        """Without "model." before its names, and with a position table, which is dropped."""
        CONFIG.save_pretrained(tmp_path)
        arrays = {name.removeprefix("model."): array for name, array in WEIGHTS.items()}
        arrays["embed_positions.weights"] = np.zeros((63, CONFIG.d_model), np.float32)
        with open(tmp_path / WEIGHTS_FILE, "wb") as file:
            write_safetensors(file, [(name, FLOAT32, a.shape) for name, a in arrays.items()], arrays.__getitem__)
        convert_checkpoint(tmp_path, tmp_path / "new", to="torch")
        assert_holds(tmp_path / "new", WEIGHTS)

    def test_head_that_the_configuration_ties_but_differs(self, tmp_path):
        write_checkpoint(tmp_path / "source", UNTIED, seed=1)
        CONFIG.save_pretrained(tmp_path / "source")
        with pytest.warns(UserWarning, match="the two stay untied"):
            convert_checkpoint(tmp_path / "source", tmp_path / "new", to="flax")
        assert XGLMConfig.from_pretrained(tmp_path / "new") == UNTIED

    def test_equal_head_is_dropped(self, tmp_path):
        arrays = {**WEIGHTS, HEAD: WEIGHTS[EMBEDDING]}
        UNTIED.save_pretrained(tmp_path)
        with open(tmp_path / WEIGHTS_FILE, "wb") as file:
            write_safetensors(file, [(name, FLOAT32, a.shape) for name, a in arrays.items()], arrays.__getitem__)
        convert_checkpoint(tmp_path, tmp_path / "new", to="torch")
        # Untied by its configuration: trained further, the two would part.
        assert_holds(tmp_path / "new", arrays)

    def test_tied_head_of_many_blocks(self, source, tmp_path, monkeypatch):
        """Of the head, which is stored transposed, and of the embedding, the blocks have different sizes."""
        needed("tf")
        monkeypatch.setattr("xglm_core.checkpoint.tensor_file._MAPPED_VALUES", 300)
        monkeypatch.setattr("xglm_core.checkpoint.tensor_file._BLOCK_VALUES", 100)
        convert_checkpoint(source, tmp_path / "tf", to="tf")
        convert_checkpoint(tmp_path / "tf", tmp_path / "new", to="safetensors")
        assert_holds(tmp_path / "new", WEIGHTS)

    def test_other_files_come_along(self, source, tmp_path):
        others = {"generation_config.json": b"{}", "tokenizer.json": b"{ }", "sentencepiece.bpe.model": b"\n"}
        for name, data in {**others, "README.md": b"about the old file"}.items():
            (source / name).write_bytes(data)
        convert_checkpoint(source, tmp_path / "new", to="torch")
        found = files(tmp_path / "new")
        assert found.keys() == {*others, CONFIG_FILE, "pytorch_model.bin"}
        assert {name: found[name] for name in others} == others

    def test_configuration_of_another_model_is_replaced(self, source, tmp_path):
        changed(CONFIG, num_layers=1).save_pretrained(tmp_path / "new")
        convert_checkpoint(source, tmp_path / "new", to="torch")
        assert_holds(tmp_path / "new", WEIGHTS)
        assert XGLMConfig.from_pretrained(tmp_path / "new") == CONFIG

    @pytest.mark.parametrize(("dtype", "named"), [("bfloat16", "bfloat16"), (None, "float32")])
    def test_configuration_names_the_type(self, source, tmp_path, dtype, named):
        changed(CONFIG, torch_dtype="float32").save_pretrained(source)
        convert_checkpoint(source, tmp_path / "new", to="torch", dtype=dtype)
        assert XGLMConfig.from_pretrained(tmp_path / "new") == changed(CONFIG, torch_dtype=named)

    def test_within_the_source(self, source):
        before = files(source)
        convert_checkpoint(source, source, to="torch", max_shard_size="30KB")
        assert {name: data for name, data in files(source).items() if not name.startswith("pytorch")} == before
        assert_holds(source, WEIGHTS, "torch")

    def test_equal_weights_make_equal_files(self, source, tmp_path):
        for to in ("torch", "flax", "safetensors"):
            convert_checkpoint(source, tmp_path / f"{to}1", to=to)
            convert_checkpoint(source, tmp_path / f"{to}2", to=to)
            assert files(tmp_path / f"{to}1") == files(tmp_path / f"{to}2")


class TestInput:
    def test_unknown_format(self, source, tmp_path):
        with pytest.raises(InputError, match=r"to is 'fairseq', expected one of safetensors, torch, flax, tf$"):
            convert_checkpoint(source, tmp_path / "new", to="fairseq")

    def test_unknown_type(self, source, tmp_path):
        with pytest.raises(InputError, match="dtype is 'int4', expected one of"):
            convert_checkpoint(source, tmp_path / "new", to="torch", dtype="int4")

    def test_bfloat16_in_hdf5(self, source, tmp_path):
        with pytest.raises(InputError, match=r"tf_model\.h5 cannot hold bfloat16, only float32, float16, float64"):
            convert_checkpoint(source, tmp_path / "new", to="tf", dtype="bfloat16")
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize("held", ["safetensors", "torch"])
    def test_destination_with_weights(self, source, tmp_path, held):
        convert_checkpoint(source, tmp_path / "new", to=held, max_shard_size="30KB")
        before = files(tmp_path / "new")
        with pytest.raises(CheckpointError, match=f"new: already holds weights in the format {held}; choose another"):
            convert_checkpoint(source, tmp_path / "new", to="torch")
        assert files(tmp_path / "new") == before

    def test_source_in_the_same_format(self, source):
        with pytest.raises(CheckpointError, match="source: already holds weights in the format safetensors"):
            convert_checkpoint(source, source, to="safetensors")

    def test_destination_is_a_file(self, source, tmp_path):
        (tmp_path / "new").touch()
        with pytest.raises(CheckpointError, match=r"new: is a file, expected a folder to write pytorch_model\.bin"):
            convert_checkpoint(source, tmp_path / "new", to="torch")

    @pytest.mark.parametrize("to", ["torch", "flax"])
    def test_overflow(self, tmp_path, to):
        arrays = {**WEIGHTS, FC1: WEIGHTS[FC1] * 1e6}
        CONFIG.save_pretrained(tmp_path)
        with open(tmp_path / WEIGHTS_FILE, "wb") as file:
            write_safetensors(file, [(name, FLOAT32, a.shape) for name, a in arrays.items()], arrays.__getitem__)
        before = files(tmp_path)
        with pytest.raises(CheckpointError, match=f"{FC1} has numbers beyond the range of float16, which would become"):
            convert_checkpoint(tmp_path, tmp_path, to=to, dtype="float16")
        assert files(tmp_path) == before
        convert_checkpoint(tmp_path, tmp_path, to=to, dtype="bfloat16")

    def test_infinity_stays(self, tmp_path):
        array = WEIGHTS[FC1].copy()
        array[3, 5] = -np.inf
        arrays = {**WEIGHTS, FC1: array}
        CONFIG.save_pretrained(tmp_path)
        with open(tmp_path / WEIGHTS_FILE, "wb") as file:
            write_safetensors(file, [(name, FLOAT32, a.shape) for name, a in arrays.items()], arrays.__getitem__)
        convert_checkpoint(tmp_path, tmp_path, to="torch", dtype="float16")
        assert stored(tmp_path, "torch")[FC1][3, 5] == -np.inf


# A conversion that stops for good at the moment `WHEN`: it says so, and waits to be killed.
_STOPPING = """
import os, signal, sys, time
from xglm_core import convert_checkpoint, files
from xglm_core.checkpoint import tensor_writing, writing
source, destination, to, when = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)  # Shells have it ignored by what runs in the background.
def stop(*arguments):
    print("now", flush=True)
    time.sleep(60)
if when == "writing":
    whole, blocks = tensor_writing._write_block, []
    def write(*arguments):
        blocks.append(1)
        stop() if len(blocks) == 20 else whole(*arguments)
    tensor_writing._write_block = write
elif when == "verifying":
    writing._verify = stop
else:
    replace, count = os.replace, []
    def rename(*arguments):
        if len(count) == int(when):
            stop()
        count.append(1)
        replace(*arguments)
    os.replace = rename
convert_checkpoint(source, destination, to=to, max_shard_size="30KB" if to == "flax" else "5GB")
"""


def stopped_conversion(source, destination, to, when):
    process = subprocess.Popen(
        [sys.executable, "-c", _STOPPING, str(source), str(destination), to, str(when)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout.readline() == "now\n"
    return process


class TestKilled:
    @pytest.mark.parametrize(
        ("to", "when"),
        [("torch", "writing"), ("torch", "verifying"), ("torch", 0), ("torch", 1), ("flax", 3), ("flax", 5)],
    )
    def test_nothing_loads_and_the_next_run_cleans_up(self, source, tmp_path, to, when):
        before = files(source)
        process = stopped_conversion(source, tmp_path / "new", to, when)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert any(name.endswith(".partial") for name in files(tmp_path / "new"))
        with pytest.raises(CheckpointError, match="no checkpoint here"):
            open_checkpoint(tmp_path / "new")
        convert_checkpoint(source, tmp_path / "new", to=to)
        assert files(tmp_path / "new").keys() == {CONFIG_FILE, FORMATS[to].file}
        assert_holds(tmp_path / "new", WEIGHTS)
        assert files(source) == before

    def test_within_the_source(self, source):
        before = files(source)
        process = stopped_conversion(source, source, "flax", 3)
        process.kill()
        process.communicate()
        assert {name: data for name, data in files(source).items() if name in before} == before
        assert_holds(source, WEIGHTS)
        with pytest.raises(CheckpointError, match=r"no flax_model\.msgpack here"):
            open_checkpoint(source, "flax")

    def test_files_of_a_running_conversion_stay(self, source, tmp_path):
        process = stopped_conversion(source, tmp_path / "new", "torch", "verifying")
        others = files(tmp_path / "new")
        assert others
        convert_checkpoint(source, tmp_path / "new", to="safetensors")
        assert files(tmp_path / "new").items() >= others.items()
        process.kill()
        process.communicate()

    def test_interrupted(self, source, tmp_path):
        process = stopped_conversion(source, tmp_path / "new", "torch", "verifying")
        process.send_signal(signal.SIGINT)
        process.communicate()
        assert files(tmp_path / "new") == {}


def swap(file, first, second):
    """Swaps two places, each an offset and a size."""
    contents = []
    for begin, size in (first, second):
        file.seek(begin)
        contents.append(file.read(size))
    for (begin, _), content in zip((first, second), reversed(contents), strict=True):
        file.seek(begin)
        file.write(content)


def flip(file, place, _):
    """Flips one bit, in the last byte of a place."""
    position = sum(place) - 1
    file.seek(position)
    (byte,) = file.read(1)
    file.seek(position)
    file.write(bytes([byte ^ 1]))


_NUMBERS = r"new/.*: model\.layers\.0\.fc1\.weight was written with other numbers than it should have"
DAMAGES = {
    "flipped bit": (flip, _NUMBERS),
    "swapped numbers": (lambda file, place, _: swap(file, (place[0], 4), (place[0] + 4, 4)), _NUMBERS),
    "swapped blocks": (lambda file, place, _: swap(file, (place[0], 1000), (place[0] + 3000, 1000)), _NUMBERS),
    "swapped tensors": (swap, _NUMBERS),
    "truncated": (lambda file, place, _: file.truncate(sum(place) - 1), r"truncated|damaged|directory"),
}


class TestDisk:
    @pytest.mark.parametrize("to", ["torch", "flax", "tf"])
    @pytest.mark.parametrize("limit", [100, 4000, 60_000])
    def test_full(self, source, to, limit):
        """A limit to the size of files fails in the same places as a full disk."""
        needed(to)
        before = files(source)
        run = run_xglm(
            "convert", source, source, "--to", to,
            before=f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));",
        )  # fmt: skip
        assert_refused(run, f"{source}: cannot be written: ", "what the folder held before is unchanged")
        assert files(source) == before

    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
    def test_not_allowed(self, source, tmp_path):
        (tmp_path / "new").mkdir(mode=0o500)
        with pytest.raises(CheckpointError, match="new: cannot be written: Permission denied"):
            convert_checkpoint(source, tmp_path / "new", to="torch")

    @pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
    @pytest.mark.parametrize("to", WRITABLE)
    def test_what_was_written_is_read_back(self, source, tmp_path, to, damage, message, monkeypatch):
        needed(to)
        whole = writing.write_values

        def write(file, entries, layout, *others):
            whole(file, entries, layout, *others)
            kernels = [
                place
                for entry, (place,) in zip(entries, layout.places, strict=True)
                if "fc1" in entry.name and len(entry.shape) == 2
            ]
            with open(file.name, "r+b") as written:
                damage(written, *kernels[:2])

        monkeypatch.setattr(writing, "write_values", write)
        with pytest.raises(CheckpointError, match=message):
            convert_checkpoint(source, tmp_path / "new", to=to)
        assert files(tmp_path / "new") == {}

    def test_other_tensors_are_found(self, source, tmp_path, monkeypatch):
        writer = dataclasses.replace(FORMATS["torch"].writer, stored_name=lambda spec: spec.name.replace("fc1", "fc3"))
        monkeypatch.setitem(FORMATS, "torch", dataclasses.replace(FORMATS["torch"], writer=writer))
        with pytest.raises(CheckpointError, match="was written with other names, types or shapes"):
            convert_checkpoint(source, tmp_path / "new", to="torch")
        assert files(tmp_path / "new") == {}


class TestCommand:
    def test_help(self):
        run = run_xglm("convert", "--help")
        assert run.returncode == 0
        for part in ("CHECKPOINT", "DESTINATION", "--to {safetensors,torch,flax,tf}", "--verify", "Exit code"):
            assert part in run.stdout

    def test_piped(self, source, tmp_path):
        run = run_xglm("convert", source, tmp_path / "new", "--to", "torch", "--dtype", "float16")
        assert (run.returncode, run.stdout) == (0, "")
        pattern = rf"{re.escape(str(tmp_path))}/new: wrote torch, read back and found equal: .* MB in .* s \(.*/s\)\n"
        assert re.fullmatch(pattern, run.stderr)
        assert_holds(tmp_path / "new", {name: array.astype(np.float16) for name, array in WEIGHTS.items()})

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--to", "onnx"], "argument --to: invalid choice: 'onnx'"),
            ([], "the following arguments are required: --to"),
            (["--to", "torch", "--dtype", "int4"], "argument --dtype: invalid choice: 'int4'"),
            (["--to", "torch", "--weights", "tf"], "no tf_model.h5 here, found weights in the formats safetensors"),
            (["--to", "torch", "--max-shard-size", "5 apples"], "max_shard_size is '5 apples', expected a number"),
            (["--to", "safetensors"], "already holds weights in the format safetensors"),
        ],
    )
    def test_wrong_arguments(self, source, arguments, message):
        assert_refused(run_xglm("convert", source, source, *arguments), message)

    def test_without_a_checkpoint(self, tmp_path):
        assert_refused(run_xglm("convert", tmp_path, tmp_path / "new", "--to", "torch"), "no checkpoint here")

    def test_verify(self, source, tmp_path):
        needs("torch")
        others = "import xglm_core.cli.convert as c; c.installed_backends = lambda: (['torch'], []);"
        run = run_xglm("convert", source, tmp_path / "new", "--to", "flax", "--verify", before=others)
        assert run.returncode == 0, run.stderr
        assert re.search(r"\n  torch  0\.0e\+00  pass\n", run.stdout)

    def test_verify_without_a_framework(self, source, tmp_path):
        others = "import xglm_core.cli.convert as c; c.installed_backends = lambda: ([], ['no torch']);"
        run = run_xglm("convert", source, tmp_path / "new", "--to", "flax", "--verify", before=others)
        assert_refused(run, "--verify: no backend is installed; no torch")
        assert not (tmp_path / "new").exists()


class TestProgress:
    def test_terminal(self, monkeypatch, capsys):
        monkeypatch.setattr("sys.stderr.isatty", lambda: True)
        monkeypatch.setattr("xglm_core.cli.progress._INTERVAL", 0)
        clock = itertools.count()
        monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
        bar = Progress(4 * 10**9)
        bar.advance(10**9, 0)
        bar.advance(3 * 10**9, 0)
        bar.advance(0, 2 * 10**9)
        bar.finish("all")
        first, second, third, cleared, last = capsys.readouterr().err.split("\x1b[K")
        assert first == "\r[###                     ] 1.00 GB of 4.00 GB, 1.00 GB/s, 7 s left"
        assert second == "\r[############            ] 4.00 GB of 4.00 GB, reading back, 2 s left"
        assert third == "\r[##################      ] 4.00 GB of 4.00 GB, reading back, 1 s left"
        assert (cleared, last) == ("\r", "all: 4.00 GB in 4.0 s (1.00 GB/s)\n")

    def test_pipe(self, capsys):
        bar = Progress(2 * 10**6)
        bar.advance(10**6, 10**6)
        assert capsys.readouterr().err == ""
        bar.finish("all")
        assert re.fullmatch(r"all: 2\.00 MB in 0\.0 s \(.* GB/s\)\n", capsys.readouterr().err)


def test_memory_of_a_conversion(tmp_path):
    """Of a tensor of 67 MB, a conversion holds blocks."""
    config = changed(CONFIG, vocab_size=262_144, d_model=64, attention_heads=4)
    write_checkpoint(tmp_path, config, seed=1)
    code = (
        "import resource, sys; from xglm_core import convert_checkpoint;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "convert_checkpoint(sys.argv[1], sys.argv[1], to='torch');"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 50
