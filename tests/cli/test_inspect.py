"""`xglm inspect`: the facts, what is odd, and what is left to say of damaged checkpoints."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest

from conformance.random_weights import random_weights, write_checkpoint
from tests.helpers.checkpoint_files import fairseq_checkpoint, library, write_flax, write_safetensors, write_torch
from tests.helpers.commands import ROOT, run_xglm
from tests.helpers.models import CONFIG, changed
from xglm_core import XGLMConfig, open_checkpoint
from xglm_core.checkpoint import DTYPES, plan_loading, save_checkpoint
from xglm_core.checkpoint.inspection import Inspection, inspect_checkpoint
from xglm_core.cli import main
from xglm_core.weight_names import EMBEDDING, HEAD, weight_specs

BUNDLED = ROOT / "examples" / "tiny_model" / "checkpoint"
WEIGHTS = random_weights(CONFIG, seed=1)
FC1 = "model.layers.1.fc1.weight"
NO_TOKENIZER = "there is no tokenizer: neither sentencepiece.bpe.model nor tokenizer.json"
FLOAT32 = DTYPES["float32"]


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(tmp_path, CONFIG, seed=1)
    return tmp_path


@pytest.fixture
def toy(tmp_path):
    return shutil.copytree(BUNDLED, tmp_path / "toy")


def write_weights(folder, weights, types=None):
    """Any tensors, in float32 but for those that `types` names."""
    specs = [(name, (types or {}).get(name, FLOAT32), array.shape) for name, array in weights.items()]
    stored = {name: weights[name].astype(dtype.storage) for name, dtype, _ in specs}
    with open(folder / "model.safetensors", "wb") as file:
        write_safetensors(file, specs, stored.__getitem__)


def write_sharded(folder):
    (folder / "model.safetensors").unlink()
    save_checkpoint(folder, CONFIG, weight_specs(CONFIG, with_head=False), FLOAT32, WEIGHTS.__getitem__, "70KB")
    return sorted(path.name for path in folder.glob("model-*"))


class TestFacts:
    def test_bundled(self):
        found = inspect_checkpoint(BUNDLED)
        assert (found.error, found.notes) == (None, [])
        assert found.config == XGLMConfig.from_pretrained(BUNDLED).to_dict()
        # Counted by hand, from the sizes: per block 4 attention projections, 2 of the feed-forward, 2 norms.
        block = 4 * (128 * 128 + 128) + (128 * 512 + 512) + (512 * 128 + 128) + 2 * 2 * 128
        embedding, blocks = 2600 * 128, 3 * block + 2 * 128
        assert found.parameters == {"total": 927_872, "embedding": embedding, "blocks": blocks, "head": 0}
        assert embedding + blocks == 927_872
        assert (found.format, found.other_formats, found.head) == ("safetensors", [], "none stored")
        assert (found.tensors, found.tensor_bytes) == ({"float16": 51}, 2 * 927_872)
        assert (found.published_size, found.tokenizer_length) == (None, 2600)
        assert found.files == {path.name: path.stat().st_size for path in BUNDLED.iterdir()}

    @pytest.mark.parametrize("size", ["564M", "1.7B", "2.9B", "4.5B", "7.5B"])
    def test_published_sizes(self, tmp_path, size):
        """By the configuration alone: the weights are missing, which is said, too."""
        XGLMConfig.from_preset(size, dropout=0.3).save_pretrained(tmp_path)
        found = inspect_checkpoint(tmp_path)
        assert found.published_size == size
        assert found.notes == [NO_TOKENIZER]
        assert "no checkpoint here; expected config.json and model.safetensors" in found.error
        billions = {"564M": 0.564, "1.7B": 1.73, "2.9B": 2.94, "4.5B": 4.55, "7.5B": 7.49}[size]
        assert found.parameters["total"] == pytest.approx(billions * 1e9, rel=0.01)

    def test_activation_of_another_size(self, tmp_path):
        XGLMConfig.from_preset("4.5B", activation_function="gelu").save_pretrained(tmp_path)
        found = inspect_checkpoint(tmp_path)
        assert found.published_size == "4.5B"
        assert "activation_function is 'gelu', but the published 4.5B model has 'relu'" in found.notes[0]

    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("head", ["none stored", "equal", "differs"])
    def test_head(self, folder, tied, head):
        changed(CONFIG, tie_word_embeddings=tied).save_pretrained(folder)
        values = {"equal": WEIGHTS[EMBEDDING], "differs": -WEIGHTS[EMBEDDING]}
        write_weights(folder, {**WEIGHTS, **({HEAD: values[head]} if head in values else {})})
        found = inspect_checkpoint(folder)
        assert found.head == head
        assert (found.missing == [HEAD]) == (found.error is not None) == (head == "none stored" and not tied)
        # As loading has it: a head of its own, or not.
        own = not tied or head == "differs"
        assert found.parameters["head"] == (131 * 35 if own else 0)
        assert found.parameters["total"] == sum(array.size for array in WEIGHTS.values()) + found.parameters["head"]
        notes = {
            (
                True,
                "differs",
            ): f"tie_word_embeddings is true, but the stored {HEAD} differs from {EMBEDDING}: the two stay",
            (False, "equal"): f"tie_word_embeddings is false, but the stored {HEAD} equals {EMBEDDING}: there are two",
        }
        assert [note[: len(notes.get((tied, head), ""))] for note in found.notes[:-1]] == (
            [notes[tied, head]] if (tied, head) in notes else []
        )
        if found.error is None:
            with warnings.catch_warnings(action="ignore"):
                plan = plan_loading(open_checkpoint(folder), with_head=True)
            assert sum(math.prod(spec.shape) for spec in plan.specs) == found.parameters["total"]

    def test_facts_of_shards(self, folder):
        shards = write_sharded(folder)
        found = inspect_checkpoint(folder)
        assert (found.error, found.format, found.notes) == (None, "safetensors", [NO_TOKENIZER])
        assert {*found.files} == {"config.json", "model.safetensors.index.json", *shards}
        assert found.tensors == {"float32": len(WEIGHTS)}

    @pytest.mark.parametrize("format", ["torch", "flax", "fairseq"])
    def test_formats(self, folder, format):
        if format == "torch":
            write_torch(folder / "pytorch_model.bin", WEIGHTS, "bfloat16")
        elif format == "flax":
            write_flax(folder / "flax_model.msgpack", CONFIG, WEIGHTS)
        else:
            library("torch").save(fairseq_checkpoint(CONFIG, WEIGHTS), folder / "model.pt")
        assert inspect_checkpoint(folder).other_formats == [format]
        found = inspect_checkpoint(folder, format)
        assert (found.error, found.format, found.other_formats) == (None, format, ["safetensors"])
        # fairseq stores the head as the embedding once more.
        stored = len(WEIGHTS) + (format == "fairseq")
        assert found.tensors == {"bfloat16" if format == "torch" else "float32": stored}
        assert found.head == ("equal" if format == "fairseq" else "none stored")

    def test_weights_are_not_read(self, folder, monkeypatch):
        def read(*arguments):
            raise AssertionError("a tensor was read")

        monkeypatch.setattr("xglm_core.checkpoint.tensor_file.TensorFile.read", read)
        assert inspect_checkpoint(folder).error is None


class TestNotes:
    def test_notes_on_types(self, folder):
        write_weights(folder, WEIGHTS, {FC1: DTYPES["float16"]})
        found = inspect_checkpoint(folder)
        assert found.notes[0] == f"the tensors are of different types: {len(WEIGHTS) - 1} in float32, 1 in float16"
        assert found.tensor_bytes == sum(array.nbytes for array in WEIGHTS.values()) - WEIGHTS[FC1].nbytes // 2

    def test_position_table(self, folder):
        write_weights(folder, {**WEIGHTS, "model.embed_positions.weights": np.zeros((63, 35), np.float32)})
        found = inspect_checkpoint(folder)
        assert found.notes[0].startswith("model.embed_positions.weights is stored; it is ignored")
        assert found.error is None

    def test_leftovers(self, folder):
        shards = write_sharded(folder)
        strays = [".model.safetensors.0123abcd", "model-00009-of-00009.safetensors"]
        kept = ["model-last.safetensors", "notes.txt", "optimizer.pt", "pytorch_model-00001-of-00002.bin"]
        for name in (*strays, *kept):
            (folder / name).touch()
        assert f"no part of the checkpoint, left over from another one: {', '.join(strays)}" in (
            inspect_checkpoint(folder).notes
        )
        write_weights(folder, WEIGHTS)  # The single file is what is read.
        (note,) = [note for note in inspect_checkpoint(folder).notes if note.startswith("no part")]
        assert note.endswith(": " + ", ".join(sorted([*strays, *shards, "model.safetensors.index.json"])))

    @pytest.mark.parametrize(
        ("vocab_size", "what"), [(2599, "some of which the model does not have"), (2608, "fewer than the model has")]
    )
    def test_tokenizer_of_another_size(self, toy, vocab_size, what):
        config = json.loads((toy / "config.json").read_text())
        (toy / "config.json").write_text(json.dumps({**config, "vocab_size": vocab_size}))
        (toy / "model.safetensors").unlink()
        found = inspect_checkpoint(toy)
        assert found.notes == [f"the tokenizer knows 2,600 tokens, {what}: vocab_size is {vocab_size:,}"]

    def test_tokenizer_that_cannot_be_read(self, toy):
        (toy / "sentencepiece.bpe.model").write_bytes(b"\0")
        (note,) = inspect_checkpoint(toy).notes
        assert note.startswith("the tokenizer cannot be read: ")
        assert inspect_checkpoint(toy).error is None


class TestDamage:
    def test_misfits(self, folder):
        weights = dict(WEIGHTS)
        weights["surplus"] = weights.pop("model.layers.2.fc2.bias")
        weights[FC1] = weights[FC1].T.copy()
        write_weights(folder, weights)
        found = inspect_checkpoint(folder)
        assert (found.missing, found.unexpected) == (["model.layers.2.fc2.bias"], ["surplus"])
        assert found.wrong_shape == [f"{FC1} is [35, 53], expected [53, 35]"]
        assert found.error == (
            f"{folder}: the weights do not fit config.json; missing: model.layers.2.fc2.bias; unexpected: surplus; "
            f"wrong shape: {FC1} is [35, 53], expected [53, 35]"
        )
        assert found.tensors == {"float32": len(WEIGHTS)}

    def test_truncated(self, folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        found = inspect_checkpoint(folder)
        assert "the file is truncated" in found.error
        assert (found.format, found.config, found.tensors) == ("safetensors", CONFIG.to_dict(), {})
        assert found.files["model.safetensors"] == path.stat().st_size

    def test_missing_shard(self, folder):
        shards = write_sharded(folder)
        (folder / shards[1]).unlink()
        found = inspect_checkpoint(folder)
        assert f"names the file '{shards[1]}', which is not in the folder; is a download incomplete?" in found.error
        assert found.parameters["total"] == sum(array.size for array in WEIGHTS.values())

    def test_tensor_in_two_files(self, folder):
        first, second, *_ = write_sharded(folder)
        shutil.copy(folder / first, folder / second)
        assert "index and files disagree on" in inspect_checkpoint(folder).error

    def test_pad_outside_the_vocabulary(self, folder):
        values = {**CONFIG.to_dict(), "pad_token_id": 131}
        (folder / "config.json").write_text(json.dumps(values))
        found = inspect_checkpoint(folder)
        assert found.error.endswith("pad_token_id is 131, expected an id below vocab_size=131")
        assert (found.config, found.format) == ({}, "safetensors")

    def test_claimed_layers(self, folder):
        """Nothing takes long, or much memory, because a configuration claims it."""
        (folder / "config.json").write_text(json.dumps({**CONFIG.to_dict(), "num_layers": 10**12}))
        found = inspect_checkpoint(folder)
        assert f"config.json has {10**12} layers, but there are only {len(WEIGHTS)} tensors" in found.error
        assert (found.config["num_layers"], found.parameters) == (10**12, {})


class TestCommand:
    def test_documentation(self, capsys, monkeypatch):
        """The page shows what is printed, and names every key of the JSON."""
        page = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
        monkeypatch.chdir(ROOT)
        monkeypatch.setenv("COLUMNS", "80")
        assert main(["inspect", "examples/tiny_model/checkpoint"]) == 0
        assert f"$ xglm inspect examples/tiny_model/checkpoint\n{capsys.readouterr().out}```" in page
        rows = re.findall(
            r"^\| (`.*`) \| .* \|$", page.partition("`--json` prints")[2].partition("\n## ")[0], re.MULTILINE
        )
        keys = [key for row in rows for key in re.findall("`(.*?)`", row)]
        assert keys == [key.name for key in dataclasses.fields(Inspection)]

    def test_text(self, toy, capsys, monkeypatch):
        for columns in (80, 120):
            monkeypatch.setenv("COLUMNS", str(columns))
            assert main(["inspect", str(toy)]) == 0
            lines = capsys.readouterr().out.splitlines()
            assert lines[0] == str(toy)
            assert max(map(len, lines[1:])) <= columns
            for fact in ("parameters    927,872: 595,072 in the blocks", "format        safetensors", "51 in float16"):
                assert any(fact in line for line in lines)
            assert "  model.safetensors        1,860,920" in lines

    def test_long_facts_are_wrapped(self, folder, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        write_weights(folder, {"model.layers.0.fc1.weight": WEIGHTS[FC1]})
        assert main(["inspect", str(folder)]) == 2
        printed = capsys.readouterr()
        assert max(map(len, printed.out.splitlines()[1:])) <= 80
        assert "  missing       50: model.embed_tokens.weight" in printed.out
        assert printed.err.startswith(f"xglm: error: {folder}: the weights do not fit config.json; missing: ")
        assert printed.err.count("\n") == 1

    def test_json(self, toy, capsys):
        assert main(["inspect", str(toy), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(vars(inspect_checkpoint(str(toy)))))

    def test_json_of_what_is_damaged(self, toy, capsys):
        (toy / "model.safetensors").write_bytes(b"12345678")
        assert main(["inspect", str(toy), "--json"]) == 2
        printed = capsys.readouterr()
        assert printed.err == f"xglm: error: {json.loads(printed.out)['error']}\n"

    def test_nothing_there(self, tmp_path):
        run = run_xglm("inspect", tmp_path / "absent")
        assert (run.returncode, run.stdout) == (2, "")
        assert "no such folder" in run.stderr

    def test_no_framework_is_imported(self):
        code = (
            "import sys\nfrom xglm_core.cli import main\nmain(['inspect', sys.argv[1]])\n"
            "sys.exit(bool({'torch', 'tensorflow', 'keras', 'jax', 'flax', 'huggingface_hub'} & {*sys.modules}))"
        )
        run = subprocess.run([sys.executable, "-c", code, BUNDLED], cwd=ROOT, capture_output=True, check=False)
        assert run.returncode == 0, run.stderr
