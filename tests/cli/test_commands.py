"""The command line: what users see when something is wrong, and `xglm bench make-checkpoint`."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from conformance.random_weights import random_weights, write_checkpoint
from tests.helpers.checkpoint_files import write_safetensors
from tests.helpers.commands import ROOT, assert_refused, run_xglm
from xglm_core import XGLMConfig, __version__, open_checkpoint
from xglm_core.checkpoint import DTYPES, plan_loading
from xglm_core.checkpoint.dtypes import convert
from xglm_core.checkpoint.folder import WEIGHTS_FILE
from xglm_core.cli import bench, main
from xglm_core.cli.bench import write_random_checkpoint
from xglm_core.config import PRESETS
from xglm_core.errors import InputError

CONFIG = XGLMConfig(vocab_size=131, max_position_embeddings=61, d_model=35, ffn_dim=53, num_layers=3, attention_heads=5)
FC1 = "model.layers.1.fc1.weight"
FLOAT32 = DTYPES["float32"]


@pytest.fixture
def checkpoint(tmp_path):
    write_checkpoint(tmp_path, CONFIG, seed=1)
    return tmp_path


def write_weights(folder, weights):
    with open(folder / WEIGHTS_FILE, "wb") as file:
        write_safetensors(file, [(name, FLOAT32, array.shape) for name, array in weights.items()], weights.__getitem__)


class TestEntry:
    def test_without_a_command(self, capsys):
        assert main([]) == 0
        assert "compare" in capsys.readouterr().out

    def test_version(self):
        run = run_xglm("--version")
        assert (run.returncode, run.stdout) == (0, f"xglm {__version__}\n")

    @pytest.mark.parametrize(
        "command",
        [[], ["inspect"], ["compare"], ["bench"], ["bench", "make-checkpoint"]],
        ids=lambda words: " ".join(words) or "xglm",
    )
    def test_help(self, command, capsys):
        with pytest.raises(SystemExit) as caught:
            main([*command, "--help"])
        assert caught.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: {' '.join(['xglm', *command])} ")

    def test_help_imports_no_numpy(self):
        """Which is what makes it quick."""
        code = "import sys\nfrom xglm_core.cli import main\nmain([])\nsys.exit('numpy' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False).returncode == 0

    def test_reader_that_has_seen_enough(self):
        code = "import sys; from xglm_core.cli import main; sys.exit(main(['compare', '--help']))"
        with subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            process.stdout.close()
            assert process.stderr.read() == b""

    def test_interrupt(self, monkeypatch):
        def interrupt(arguments):
            raise KeyboardInterrupt

        monkeypatch.setattr(bench, "_make_checkpoint", interrupt)
        assert main(["bench", "make-checkpoint", "--size", "564M", "folder"]) == 130

    def test_terminal_without_the_script(self, monkeypatch):
        """A text that the terminal cannot show is no reason to stop."""
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
        monkeypatch.setattr(bench, "_make_checkpoint", lambda arguments: print("孩子们") or 0)
        assert main(["bench", "make-checkpoint", "--size", "564M", "folder"]) == 0
        assert sys.stdout.buffer.getvalue() == rb"\u5b69\u5b50\u4eec" + b"\n"


class TestWrongUse:
    def test_no_such_command(self):
        assert_refused(run_xglm("compere"), "compere", "xglm --help")

    def test_no_such_option(self, checkpoint):
        assert_refused(run_xglm("compare", checkpoint, "--ids", "2", "--fast"), "--fast")

    def test_neither_text_nor_ids(self, checkpoint):
        assert_refused(run_xglm("compare", checkpoint), "--text", "--ids", "xglm compare --help")

    def test_bad_backend_name(self, checkpoint):
        assert_refused(
            run_xglm("compare", checkpoint, "--ids", "2", "--backends", "keras,torch"),
            "no backend 'keras'",
            "torch, tf, flax",
        )

    @pytest.mark.parametrize(("backend", "framework"), [("torch", "torch"), ("tf", "keras"), ("flax", "jax")])
    def test_backend_not_installed(self, checkpoint, backend, framework):
        run = run_xglm(
            *("compare", checkpoint, "--ids", "2", "--backends", backend),
            before=f"import sys; sys.modules['{framework}'] = None; ",
        )
        assert_refused(run, f"the {backend} backend needs", framework, f"pip install 'xglm[{backend}]'")

    def test_no_backend_installed(self, checkpoint):
        run = run_xglm(
            *("compare", checkpoint, "--ids", "2"),
            before="import sys; sys.modules.update(torch=None, keras=None, jax=None); ",
        )
        assert_refused(run, "no backend is installed", "pip install 'xglm[torch]'")

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            ("2,x", "--ids 2,x: expected token ids"),
            ("", "expected token ids"),
            ("2,131", "input_ids[0, 1] is 131, expected 0 to 130"),
            ("-1", "is -1, expected 0 to 130"),
            (",".join(["2"] * 62), "position 61 is past the limit of 61 tokens"),
        ],
    )
    def test_bad_ids(self, checkpoint, ids, message):
        assert_refused(run_xglm("compare", checkpoint, f"--ids={ids}"), message)

    def test_too_many_new_tokens(self, checkpoint):
        """60 tokens and a new one fill the 61 positions; a second one is too many, as `generate` has it."""
        run = run_xglm("compare", checkpoint, "--ids", ",".join(["2"] * 60), "--new-tokens", 2)
        assert_refused(run, "position 61 is past the limit of 61 tokens")

    def test_negative_new_tokens(self, checkpoint):
        assert_refused(run_xglm("compare", checkpoint, "--ids", "2", "--new-tokens", "-3"), "max_new_tokens is -3")

    def test_text_without_a_tokenizer(self, checkpoint):
        run = run_xglm("compare", checkpoint, "--text", "The children")
        assert_refused(run, str(checkpoint / "sentencepiece.bpe.model"), "--ids")


class TestBadCheckpoints:
    def compare(self, folder):
        return run_xglm("compare", folder, "--ids", "2")

    def test_no_folder(self, tmp_path):
        assert_refused(self.compare(tmp_path / "absent"), str(tmp_path / "absent"), "no such folder")

    def test_no_checkpoint(self, tmp_path):
        (tmp_path / "notes.txt").touch()
        assert_refused(self.compare(tmp_path), "no checkpoint here", "config.json", "notes.txt")

    def test_truncated(self, checkpoint):
        weights = checkpoint / WEIGHTS_FILE
        weights.write_bytes(weights.read_bytes()[:-100])
        assert_refused(self.compare(checkpoint), str(weights), "truncated")

    def test_missing_unexpected_and_misshaped_weights(self, checkpoint):
        weights = random_weights(CONFIG, seed=1)
        weights["surplus"] = weights.pop("model.layers.2.fc2.bias")
        weights[FC1] = weights[FC1].T.copy()
        write_weights(checkpoint, weights)
        assert_refused(
            self.compare(checkpoint),
            "missing: model.layers.2.fc2.bias;",
            "unexpected: surplus;",
            f"wrong shape: {FC1} is [35, 53], expected [53, 35];",
        )

    def test_config_that_is_not_json(self, checkpoint):
        (checkpoint / "config.json").write_text("{\n'd_model': 8}")
        assert_refused(self.compare(checkpoint), "config.json", "expected a JSON object")

    def test_other_model(self, checkpoint):
        (checkpoint / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
        assert_refused(self.compare(checkpoint), "model_type is 'gpt2', expected 'xglm'")

    def test_warning_is_one_line(self, checkpoint):
        """An untied head is no error: the command warns, without a line of our source, and goes on."""
        weights = random_weights(CONFIG, seed=1)
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
        write_weights(checkpoint, weights)
        run = run_xglm("compare", checkpoint, "--ids", "2", "--backends", "none")
        warning, error = run.stderr.splitlines()
        assert warning.startswith("xglm: warning: ")
        assert "lm_head.weight differs" in warning
        assert error.startswith("xglm: error: no backend 'none'")


class TestMakeCheckpoint:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_layout(self, tmp_path, dtype):
        """Exactly the weights of the configuration, and no other file."""
        write_random_checkpoint(tmp_path, CONFIG, DTYPES[dtype], seed=3)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", WEIGHTS_FILE]
        checkpoint = open_checkpoint(tmp_path)
        plan = plan_loading(checkpoint, with_head=True)  # Raises if a weight is missing or has another shape.
        assert plan.config == CONFIG
        assert {checkpoint.info(spec.name).dtype.name for spec in plan.specs} == {dtype}

    def test_distribution(self, tmp_path):
        write_random_checkpoint(tmp_path, CONFIG, FLOAT32, seed=3)
        weights = load_file(tmp_path / WEIGHTS_FILE)
        # The mean of n numbers strays by std / sqrt(n), their deviation by std / sqrt(2 n): five times that.
        for name, mean, std in (
            ("model.embed_tokens.weight", 0, 0.1),
            (FC1, 0, CONFIG.d_model**-0.5),
            ("model.layers.1.fc2.weight", 0, 20 * CONFIG.ffn_dim**-0.5),
            ("model.layers.0.fc1.bias", 0, 0.02),
            ("model.layer_norm.weight", 1, 0.02),
            ("model.layers.2.final_layer_norm.bias", 0, 0.02),
        ):
            n = weights[name].size
            assert weights[name].mean() == pytest.approx(mean, abs=5 * std / np.sqrt(n)), name
            assert weights[name].std() == pytest.approx(std, abs=5 * std / np.sqrt(2 * n)), name
        assert len({array.tobytes() for array in weights.values()}) == len(weights)

    def test_seed(self, tmp_path):
        for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
            write_random_checkpoint(tmp_path / folder, CONFIG, FLOAT32, seed)
        a, b, c = ((tmp_path / folder / WEIGHTS_FILE).read_bytes() for folder in "abc")
        assert a == b
        assert a != c

    def test_dtype_rounds_the_same_weights(self, tmp_path):
        for dtype in ("float32", "bfloat16"):
            write_random_checkpoint(tmp_path / dtype, CONFIG, DTYPES[dtype], seed=3)
        wide, narrow = open_checkpoint(tmp_path / "float32"), open_checkpoint(tmp_path / "bfloat16")
        expected = convert(wide.read(FC1), FLOAT32, DTYPES["bfloat16"])
        np.testing.assert_array_equal(narrow.read(FC1), expected)

    def test_blocks_do_not_show(self, tmp_path, monkeypatch):
        write_random_checkpoint(tmp_path / "one", CONFIG, FLOAT32, seed=3)
        monkeypatch.setattr(bench, "_BLOCK_VALUES", 64)
        write_random_checkpoint(tmp_path / "many", CONFIG, FLOAT32, seed=3)
        assert (tmp_path / "one" / WEIGHTS_FILE).read_bytes() == (tmp_path / "many" / WEIGHTS_FILE).read_bytes()

    def test_keeps_what_is_there(self, checkpoint):
        before = (checkpoint / WEIGHTS_FILE).read_bytes()
        with pytest.raises(InputError, match=r"already holds config\.json.*--force"):
            write_random_checkpoint(checkpoint, CONFIG, FLOAT32, seed=3)
        assert (checkpoint / WEIGHTS_FILE).read_bytes() == before
        write_random_checkpoint(checkpoint, CONFIG, FLOAT32, seed=3, force=True)
        assert (checkpoint / WEIGHTS_FILE).read_bytes() != before

    def test_command(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setitem(
            PRESETS,
            "tiny",
            {
                name: getattr(CONFIG, name)
                for name in ("vocab_size", "d_model", "ffn_dim", "num_layers", "attention_heads")
            },
        )
        folder = tmp_path / "new" / "folder"
        arguments = ["bench", "make-checkpoint", "--size", "tiny", "--dtype", "float16", "--max-shard-size", "30KB"]
        assert main([*arguments, str(folder)]) == 0
        printed = capsys.readouterr().out
        for path in folder.iterdir():
            assert f"{path.name}  {path.stat().st_size:,} bytes" in printed
        assert open_checkpoint(folder).info(FC1).dtype.name == "float16"
        assert len(list(folder.glob("model-*.safetensors"))) > 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--size", "600M"], "no preset '600M'; the published sizes are 564M, 1.7B, 2.9B, 4.5B, 7.5B"),
            (["--size", "564M", "--seed", "-1"], "--seed: '-1' is not an integer of 0 or more"),
            (["--size", "564M", "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
            (["--size", "564M", "--max-shard-size", "huge"], "max_shard_size is 'huge'"),
            ([], "--size"),
        ],
    )
    def test_wrong_use(self, tmp_path, arguments, message):
        assert_refused(run_xglm("bench", "make-checkpoint", tmp_path / "folder", *arguments), message)
        assert not (tmp_path / "folder").exists()
