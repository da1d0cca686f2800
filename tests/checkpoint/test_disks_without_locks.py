"""Disks that know no `flock`, such as NFS, Lustre and some of FUSE: everything can be saved on them."""

import errno
import sys

import pytest

from conformance.random_weights import write_checkpoint
from tests.helpers.commands import ROOT
from tests.helpers.models import CONFIG
from xglm_core import GenerationConfig, XGLMTokenizer, convert_checkpoint, open_checkpoint
from xglm_core.files import remove_leftovers, replacing

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")

TINY = ROOT / "examples" / "tiny_model" / "checkpoint"


@pytest.fixture(
    params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL], ids=errno.errorcode.get, autouse=True
)
def no_locks(request, monkeypatch):
    def flock(file, operation):
        raise OSError(request.param, "no locks here")

    monkeypatch.setattr("fcntl.flock", flock)


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_configurations(tmp_path):
    CONFIG.save_pretrained(tmp_path)
    GenerationConfig().save_pretrained(tmp_path)
    assert names(tmp_path) == ["config.json", "generation_config.json"]


def test_tokenizer(tmp_path):
    XGLMTokenizer.from_pretrained(TINY).save_pretrained(tmp_path)
    assert len(XGLMTokenizer.from_pretrained(tmp_path)) == 2600


def test_weights_and_conversions(tmp_path):
    write_checkpoint(tmp_path / "a", CONFIG, seed=1)
    convert_checkpoint(tmp_path / "a", tmp_path / "b", to="torch")
    assert open_checkpoint(tmp_path / "b").names == open_checkpoint(tmp_path / "a").names
    assert names(tmp_path / "b") == ["config.json", "pytorch_model.bin"]


def test_a_file_that_is_being_written_is_no_leftover(tmp_path):
    with replacing(tmp_path / "file") as file:
        remove_leftovers(tmp_path)
        file.write(b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"
