"""Loading from the Hugging Face Hub, from a server on this machine in its place."""

import contextlib
import errno
import json
import re
import shutil
import sys

import numpy as np
import pytest

from conformance.random_weights import random_weights, write_checkpoint
from tests.helpers.checkpoint_files import write_flax, write_torch
from tests.helpers.commands import ROOT, run_xglm
from tests.helpers.frameworks import Framework, backends_under_test, needs
from tests.helpers.hub_server import HubServer, Repo
from tests.helpers.models import CONFIG, IDS
from xglm_core import XGLMConfig, XGLMTokenizer, XGLMTokenizerFast, open_checkpoint
from xglm_core.checkpoint import plan_loading, save_checkpoint
from xglm_core.checkpoint.dtypes import FLOAT32
from xglm_core.checkpoint.inspection import inspect_checkpoint
from xglm_core.cli import main
from xglm_core.errors import BackendError, CheckpointError, InputError
from xglm_core.hub import HubOptions, find_source
from xglm_core.weight_names import EMBEDDING, weight_specs

pytest.importorskip("huggingface_hub")

BUNDLED = ROOT / "examples" / "tiny_model" / "checkpoint"
TOY, SMALL = "toys/tiny_model", "small"


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """What tells huggingface_hub where to go; it reads this when it is imported, so tests get a fresh copy of it."""
    with HubServer() as server, pytest.MonkeyPatch.context() as patch:
        variables = {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path_factory.mktemp("hf")),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN_PATH"):
            patch.delenv(name, raising=False)
        for name, value in variables.items():
            patch.setenv(name, value)
        for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
            patch.delitem(sys.modules, name)
        yield server, variables
        for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
            del sys.modules[name]


@pytest.fixture
def hub(environment, tmp_path_factory):
    server, _ = environment
    server.repos = {TOY: Repo(), SMALL: Repo()}
    server.repos[TOY].commit({**files_of(BUNDLED), "tokenizer.json": b"{}", "flax_model.msgpack": b"other"})
    folder = tmp_path_factory.mktemp("small")
    for branch, seed in (("v1", 1), ("main", 2)):
        write_checkpoint(folder, CONFIG, seed=seed)
        server.repos[SMALL].commit({**files_of(folder), "generation_config.json": b"{}", "notes.txt": b""}, branch)
    server.cuts, server.ranges, server.down = [], [], False
    server.downloads()
    return server


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def assert_seed(checkpoint, seed):
    np.testing.assert_array_equal(checkpoint.read(EMBEDDING), random_weights(CONFIG, seed=seed)[EMBEDDING])


class TestWhatIsDownloaded:
    def test_checkpoint(self, hub, cache):
        checkpoint = open_checkpoint(TOY, cache_dir=cache)
        assert hub.downloads() == ["config.json", "generation_config.json", "model.safetensors"]
        assert checkpoint.config == XGLMConfig.from_pretrained(BUNDLED)
        assert (checkpoint.folder / "model.safetensors").read_bytes() == (BUNDLED / "model.safetensors").read_bytes()

    def test_nothing_twice(self, hub, cache):
        for _ in range(2):
            open_checkpoint(TOY, cache_dir=cache)
        assert hub.downloads() == ["config.json", "generation_config.json", "model.safetensors"]
        open_checkpoint(TOY, cache_dir=cache, force_download=True)
        assert hub.downloads() == ["config.json", "generation_config.json", "model.safetensors"]

    def test_generation_config(self, hub, cache):
        folder = open_checkpoint(SMALL, cache_dir=cache).folder
        assert hub.downloads() == ["config.json", "generation_config.json", "model.safetensors"]
        assert (folder / "generation_config.json").read_bytes() == b"{}"

    def test_config(self, hub, cache):
        assert XGLMConfig.from_pretrained(TOY, cache_dir=cache) == XGLMConfig.from_pretrained(BUNDLED)
        assert hub.downloads() == ["config.json"]

    def test_subfolder(self, hub, cache):
        """Of the same names elsewhere in the repository nothing is taken; without a connection neither."""
        files = {"config.json": b"{}", "model.safetensors": b"", "notes/a/config.json": b"{}"}
        inside = {f"a/b/{name}": data for name, data in hub.repos[SMALL].commits[hub.repos[SMALL].refs["v1"]].items()}
        hub.repos[SMALL].commit({**files, **inside}, "main")
        for offline in (False, True):
            assert_seed(open_checkpoint(SMALL, cache_dir=cache, subfolder="a/b", local_files_only=offline), 1)
        assert hub.downloads() == ["config.json", "generation_config.json", "model.safetensors"]
        with pytest.raises(CheckpointError, match=r"has no c/config\.json in its revision"):
            XGLMConfig.from_pretrained(SMALL, cache_dir=cache, subfolder="c")

    @pytest.mark.parametrize(
        ("kind", "offered", "taken"),
        [
            (XGLMTokenizer, ["sentencepiece.bpe.model", "tokenizer.json"], "sentencepiece.bpe.model"),
            (XGLMTokenizer, ["tokenizer.json"], "tokenizer.json"),
            (XGLMTokenizerFast, ["sentencepiece.bpe.model", "tokenizer.json"], "tokenizer.json"),
            (XGLMTokenizerFast, ["sentencepiece.bpe.model"], "sentencepiece.bpe.model"),
        ],
    )
    def test_tokenizer(self, hub, cache, tmp_path, kind, offered, taken):
        settings = ["config.json", "special_tokens_map.json", "tokenizer_config.json"]
        if "tokenizer.json" in offered:
            pytest.importorskip("tokenizers")
            XGLMTokenizerFast.from_pretrained(BUNDLED).save_pretrained(tmp_path / "fast")
        files = {**(files_of(tmp_path / "fast") if "tokenizer.json" in offered else {}), **files_of(BUNDLED)}
        hub.repos[TOY].commit({name: files[name] for name in ["model.safetensors", *offered, *settings]})
        tokenizer = kind.from_pretrained(TOY, cache_dir=cache, padding_side="left")
        assert hub.downloads() == sorted([taken, *settings])
        assert tokenizer("The children").input_ids == XGLMTokenizer.from_pretrained(BUNDLED)("The children").input_ids
        assert (tokenizer.padding_side, tokenizer.init_kwargs.get("cache_dir")) == ("left", None)

    def test_shards_of_a_repository(self, hub, cache, tmp_path):
        weights = random_weights(CONFIG, seed=1)
        save_checkpoint(
            tmp_path / "sharded", CONFIG, weight_specs(CONFIG, with_head=False), FLOAT32, weights.__getitem__, "70KB"
        )
        files = files_of(tmp_path / "sharded")
        hub.repos[SMALL].commit({**files, "model-00009-of-00009.safetensors": b"of an older checkpoint"})
        assert len([name for name in files if name.startswith("model-")]) > 1
        plan_loading(open_checkpoint(SMALL, cache_dir=cache), with_head=True)
        assert hub.downloads() == sorted(files)
        assert_seed(open_checkpoint(SMALL, cache_dir=cache), 1)
        assert hub.downloads() == []

    @pytest.mark.parametrize(("weights", "file"), [("torch", "pytorch_model.bin"), ("flax", "flax_model.msgpack")])
    def test_format(self, hub, cache, tmp_path, weights, file):
        arrays = random_weights(CONFIG, seed=5)
        if weights == "torch":
            write_torch(tmp_path / file, arrays)
        else:
            write_flax(tmp_path / file, CONFIG, arrays)
        (before,) = [files for ref, files in hub.repos[SMALL].commits.items() if ref == hub.repos[SMALL].refs["main"]]
        hub.repos[SMALL].commit({**before, file: (tmp_path / file).read_bytes(), "tf_model.h5": b"other"})
        assert_seed(open_checkpoint(SMALL, weights, cache_dir=cache), 5)
        assert hub.downloads() == sorted(["config.json", file, "generation_config.json"])
        # Without a connection, the format that the cache has is the one to read.
        assert_seed(open_checkpoint(SMALL, cache_dir=cache, local_files_only=True), 5)
        with pytest.raises(CheckpointError, match=r"^small: no model\.safetensors here, found weights in the formats"):
            open_checkpoint(SMALL, "safetensors", cache_dir=cache, local_files_only=True)

    def test_fairseq_needs_no_configuration(self, hub, cache):
        """`model.pt` describes itself; whether it can be read is not asked here."""
        hub.repos[SMALL].commit({"model.pt": b"not read", "dict.txt": b""})
        with pytest.raises(CheckpointError, match=r"model\.pt: the pickle is damaged"):
            open_checkpoint(SMALL, cache_dir=cache)
        assert hub.downloads() == ["model.pt"]
        with pytest.raises(CheckpointError, match=r"model\.pt: the pickle is damaged"):
            open_checkpoint(SMALL, cache_dir=cache, local_files_only=True)

    @pytest.mark.parametrize("backend", backends_under_test())
    def test_models(self, hub, cache, backend):
        """All three classes hand the options on."""
        fw = Framework(backend)
        model = fw.causal_lm.from_pretrained(SMALL, revision="v1", cache_dir=cache)
        np.testing.assert_array_equal(fw.embedding_matrix(model), random_weights(CONFIG, seed=1)[EMBEDDING])
        decoder = fw.decoder.from_pretrained(SMALL, revision="v1", cache_dir=cache, local_files_only=True)
        assert fw.numpy(fw.call(decoder, IDS)[0]).shape == (*IDS.shape, CONFIG.d_model)
        with pytest.raises(InputError, match="revisoin: no option of from_pretrained"):
            fw.causal_lm.from_pretrained(SMALL, revisoin="v1")


class TestCommands:
    def test_compare(self, hub, capsys):
        """Everything but the comparison, for which there is no backend of this name."""
        assert main(["compare", TOY, "--text", "The children", "--backends", "none"]) == 2
        assert capsys.readouterr().err == "xglm: error: no backend 'none'; expected one of torch, tf, flax\n"
        needed = {"config.json", "model.safetensors", "sentencepiece.bpe.model"}
        assert needed <= {*hub.downloads()}

    def test_inspect(self, hub, cache):
        found = inspect_checkpoint(TOY, cache_dir=cache)
        assert (found.error, found.format, found.other_formats) == (None, "safetensors", ["flax"])
        assert (found.parameters["total"], found.tokenizer_length) == (927_872, 2600)
        assert found.files["model.safetensors"] == (BUNDLED / "model.safetensors").stat().st_size
        assert found.files["flax_model.msgpack"] is None
        assert "flax_model.msgpack" not in hub.downloads()

    def test_revision(self, hub, capsys):
        assert main(["inspect", SMALL, "--revision", "v1"]) == 0
        assert main(["inspect", SMALL, "--revision", "v3"]) == 2
        assert "the repository has no revision 'v3'" in capsys.readouterr().err


def test_documented_example(hub, cache, capsys, monkeypatch):
    """It runs as it stands, with the bundled checkpoint under the name of the published one."""
    needs("torch")
    hub.repos["facebook/xglm-564M"] = hub.repos[TOY]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "hub.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(block, {})
    assert capsys.readouterr().out.startswith("['The children")


class TestRevisions:
    def test_branches_tags_and_commits(self, hub, cache):
        commit = hub.repos[SMALL].refs["v1"]
        for revision, seed in (("v1", 1), (None, 2), ("main", 2), (commit, 1)):
            assert_seed(open_checkpoint(SMALL, revision=revision, cache_dir=cache), seed)
            assert_seed(open_checkpoint(SMALL, revision=revision, cache_dir=cache, local_files_only=True), seed)

    def test_no_mixture(self, hub, cache, monkeypatch):
        """A commit that is pushed between two downloads has no part in them."""
        source = find_source(SMALL, cache_dir=cache)
        hub.repos[SMALL].commit({"config.json": b"new", "model.safetensors": b"new"})
        folder = source.fetch(["config.json"])
        assert XGLMConfig.from_json_file(folder / "config.json") == CONFIG
        assert source.fetch(["model.safetensors"]) == folder
        assert len((folder / "model.safetensors").read_bytes()) > 3

    def test_update(self, hub, cache):
        assert_seed(open_checkpoint(SMALL, cache_dir=cache), 2)
        hub.repos[SMALL].refs["main"] = hub.repos[SMALL].refs["v1"]
        assert_seed(open_checkpoint(SMALL, cache_dir=cache, local_files_only=True), 2)
        assert_seed(open_checkpoint(SMALL, cache_dir=cache), 1)
        assert_seed(open_checkpoint(SMALL, cache_dir=cache, local_files_only=True), 1)


class TestWithoutAConnection:
    def test_hub_that_is_down(self, hub, cache):
        open_checkpoint(SMALL, cache_dir=cache)
        hub.down = True
        assert_seed(open_checkpoint(SMALL, cache_dir=cache), 2)

    def test_offline_mode(self, environment, hub, cache):
        """In a process of its own, as huggingface_hub reads the variable when it is imported."""
        open_checkpoint(SMALL, cache_dir=cache)
        hub.requests.clear()
        _, variables = environment
        run = run_xglm("inspect", SMALL, "--json", **variables, HF_HUB_CACHE=str(cache), HF_HUB_OFFLINE="1")
        assert run.returncode == 0, run.stderr
        assert json.loads(run.stdout)["format"] == "safetensors"
        run = run_xglm("inspect", TOY, **variables, HF_HUB_CACHE=str(cache), HF_HUB_OFFLINE="1")
        assert (run.returncode, run.stdout) == (2, "")
        assert f"{TOY}: no such folder here, and the revision 'main' of the repository of that name" in run.stderr
        assert "HF_HUB_OFFLINE" in run.stderr
        assert hub.requests == []

    def test_not_in_the_cache(self, hub, cache):
        message = (
            f"^{TOY}: no such folder here, and the revision 'main' of .* is not in the cache .*{cache.name}, while"
        )
        with pytest.raises(CheckpointError, match=f"{message} the hub cannot be reached: local_files_only is True$"):
            open_checkpoint(TOY, cache_dir=cache, local_files_only=True)
        hub.down = True
        with pytest.raises(CheckpointError, match=f"{message} the hub cannot be reached: .*500"):
            open_checkpoint(TOY, cache_dir=cache)

    def test_file_not_in_the_cache(self, hub, cache):
        XGLMConfig.from_pretrained(TOY, cache_dir=cache)
        message = f"{TOY}: no such folder here, and sentencepiece.bpe.model of the repository of that name is not in"
        with pytest.raises(CheckpointError, match=message):
            XGLMTokenizer.from_pretrained(TOY, cache_dir=cache, local_files_only=True)

    def test_force_download(self, hub, cache):
        open_checkpoint(SMALL, cache_dir=cache)
        with pytest.raises(InputError, match="force_download and local_files_only are both True"):
            open_checkpoint(SMALL, cache_dir=cache, local_files_only=True, force_download=True)
        hub.down = True
        with pytest.raises(
            CheckpointError, match=r"^small: force_download needs the hub, which cannot be reached: .*500"
        ):
            open_checkpoint(SMALL, cache_dir=cache, force_download=True)


class TestDownloads:
    def test_connection_that_breaks(self, hub, cache, capfd, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
        monkeypatch.setenv("TQDM_POSITION", "-1")  # Has huggingface_hub show progress although nobody watches.
        hub.cuts = [100_000]
        with contextlib.suppress(CheckpointError):  # Older versions of huggingface_hub resume in the next call.
            open_checkpoint(TOY, cache_dir=cache)
        weights = open_checkpoint(TOY, cache_dir=cache).folder / "model.safetensors"
        assert weights.read_bytes() == (BUNDLED / "model.safetensors").read_bytes()
        assert hub.ranges == ["bytes=100000-"]
        assert "model.safetensors: 100%" in capfd.readouterr().err  # The progress bar.

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (OSError(errno.ENOSPC, "No space left"), r"no space left in .*cache for config\.json; make room, or give"),
            (
                OSError("too short\nretry"),
                r"config\.json could not be downloaded: too short retry; try again",
            ),
            (RuntimeError(), r"config\.json could not be downloaded: RuntimeError; try again"),
        ],
    )
    def test_failures(self, hub, cache, monkeypatch, error, message):
        def fail(*arguments, **options):
            raise error

        monkeypatch.setattr("huggingface_hub.file_download.http_get", fail)
        with pytest.raises(CheckpointError, match=f"^{TOY}: {message}"):
            open_checkpoint(TOY, cache_dir=cache)

    def test_cache_that_cannot_be_written(self, hub, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(CheckpointError, match=rf"^{TOY}: config\.json could not be downloaded: .*Not a directory"):
            open_checkpoint(TOY, cache_dir=tmp_path / "file")

    @pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", "folder/model.safetensors", "..", ""])
    def test_index_that_leads_elsewhere(self, hub, cache, name):
        index = json.dumps({"weight_map": {EMBEDDING: name}}).encode()
        files = {"config.json": CONFIG.to_json_string().encode(), "model.safetensors.index.json": index, name: b"!"}
        hub.repos[SMALL].commit(files)
        with pytest.raises(CheckpointError, match=r"index\.json: names the file '.*', which is not in the folder"):
            open_checkpoint(SMALL, cache_dir=cache)
        assert hub.downloads() == ["config.json", "model.safetensors.index.json"]

    def test_shard_that_is_missing(self, hub, cache):
        index = json.dumps({"weight_map": {EMBEDDING: "model-1.safetensors"}}).encode()
        hub.repos[SMALL].commit(
            {"config.json": CONFIG.to_json_string().encode(), "model.safetensors.index.json": index}
        )
        with pytest.raises(
            CheckpointError, match=r"^small: the repository has no model-1\.safetensors in its revision"
        ):
            open_checkpoint(SMALL, cache_dir=cache)


class TestRefusals:
    def test_no_such_repository(self, hub, cache):
        message = "^nobody/nothing: no such folder here, and no such repository on the hub, or a private one; check"
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint("nobody/nothing", cache_dir=cache)
        with pytest.raises(CheckpointError, match=message):
            XGLMTokenizer.from_pretrained("nobody/nothing", cache_dir=cache, token="hf_good")

    def test_no_such_revision(self, hub, cache):
        with pytest.raises(CheckpointError, match=r"^small: the repository has no revision 'v3'; expected a branch"):
            open_checkpoint(SMALL, revision="v3", cache_dir=cache)

    def test_gated(self, hub, cache):
        hub.repos[SMALL].gated = True
        with pytest.raises(CheckpointError, match=r"^small: a gated repository; ask for access on its page, then"):
            open_checkpoint(SMALL, cache_dir=cache)

    def test_private(self, hub, cache):
        hub.repos[SMALL].token = "hf_good"
        with pytest.raises(CheckpointError, match="no such repository on the hub, or a private one"):
            open_checkpoint(SMALL, cache_dir=cache)
        with pytest.raises(CheckpointError, match=r"^small: the hub refuses the token; give another `token`, or run"):
            open_checkpoint(SMALL, cache_dir=cache, token="hf_bad")
        assert_seed(open_checkpoint(SMALL, cache_dir=cache, token="hf_good"), 2)

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            (["notes.txt"], r"^small: no checkpoint here; expected config\.json and .*, found notes\.txt$"),
            (["config.json"], r"^small: no checkpoint here; expected .*, found config\.json$"),
            (["model.safetensors"], r"^small: no checkpoint here; expected .*, found model\.safetensors$"),
        ],
    )
    def test_no_checkpoint(self, hub, cache, files, message):
        hub.repos[SMALL].commit(dict.fromkeys(files, b""))
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(SMALL, cache_dir=cache)

    def test_no_tokenizer(self, hub, cache):
        with pytest.raises(CheckpointError, match=r"^small: the repository has no sentencepiece\.bpe\.model in its"):
            XGLMTokenizer.from_pretrained(SMALL, cache_dir=cache)
        with pytest.raises(
            CheckpointError, match=r"^small: the repository has no tokenizer\.json in its revision 'v1'"
        ):
            XGLMTokenizerFast.from_pretrained(SMALL, cache_dir=cache, revision="v1")


class TestNames:
    """What is a folder, and what a repository."""

    @pytest.mark.parametrize(
        "name",
        [
            *("./small", "../small", "/small", "~/small", "~", ".", "..", "", "small/", "a/b/c", "a//b", "C:\\small"),
            *("a--b", "a..b", "small.git", "-small", "small-", ".small", "small.", "sm all", "klein/größe", "a" * 97),
            *("small\n", "hf://small", "https://huggingface.co/small", "small\0"),
        ],
    )
    def test_never_on_the_hub(self, hub, tmp_path, monkeypatch, name):
        monkeypatch.chdir(tmp_path)
        if name not in (".", "..", "~"):
            with pytest.raises(CheckpointError, match="no such folder; expected a checkpoint folder with"):
                find_source(name)
        with contextlib.suppress(CheckpointError):
            open_checkpoint(name)
        assert hub.requests == []

    def test_path_objects_are_folders(self, hub, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in (tmp_path / "small", type(tmp_path)(SMALL)):
            with pytest.raises(CheckpointError, match="small: no such folder; expected a checkpoint folder with"):
                open_checkpoint(name)
        assert hub.requests == []

    def test_folder_comes_first(self, hub, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        shutil.copytree(BUNDLED, tmp_path / TOY)
        assert open_checkpoint(TOY, revision="v9").folder == type(tmp_path)(TOY)
        XGLMTokenizer.from_pretrained(TOY, revision="v9", local_files_only=True)
        (tmp_path / SMALL).touch()
        with pytest.raises(CheckpointError, match=r"^small: is a file, expected the folder"):
            open_checkpoint(SMALL)
        assert hub.requests == []

    def test_ids_of_repositories(self, hub):
        """Whatever passes for an id is one to huggingface_hub."""
        from huggingface_hub.utils import validate_repo_id

        for name in ("facebook/xglm-564M", "small", "_a_/b.c-d_e", "a/b", "0", "a" * 96, "a.b/c.d", "x/_"):
            validate_repo_id(name)
            with pytest.raises(CheckpointError, match="no such repository on the hub, or a private one"):
                find_source(name) if name != SMALL else find_source("smaller")

    def test_without_huggingface_hub(self, hub, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(BackendError, match=r"no such folder here; .*run: pip install 'xglm\[hub\]'"):
            open_checkpoint(SMALL)

    def test_options_are_those_of_the_hub(self):
        """Tokenizers tell these from arguments of their own by name."""
        import inspect

        parameters = inspect.signature(find_source).parameters
        assert [*parameters][1:] == [*HubOptions.__annotations__]
