"""Which library computes products on a CPU: as measured once and kept in a file, or as the environment says."""

import json

import pytest
import torch

from xglm_torch.fast import choice

LARGE, SMALL = choice._SMALL, choice._SMALL - 1  # Elements of a matrix.

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("XGLM_PRODUCTS", raising=False)
    forget()
    yield
    forget()


def forget():
    """As in another process."""
    choice.takes_onednn.cache_clear()
    choice._ratio.cache_clear()


@pytest.fixture
def measured(monkeypatch):
    """The rows that were measured; oneDNN takes half of MKL's time for one row, about as much for more."""
    found = []

    def measure(rows):
        found.append(rows)
        return 0.5 if rows == 1 else 0.95

    monkeypatch.setattr(choice, "_measured", measure)
    return found


def test_by_a_clear_margin(measured):
    assert choice.takes_onednn(1, LARGE)
    assert not choice.takes_onednn(2, LARGE)
    assert not choice.takes_onednn(512, LARGE)


def test_each_kind_is_measured_once(measured):
    for rows in (1, 1, 2, 32, 33, 512):
        choice.takes_onednn(rows, LARGE)
    assert measured == [1, 8, 256]


def test_another_process_reads_what_was_measured(measured, tmp_path):
    first = [choice.takes_onednn(rows, LARGE) for rows in (1, 8)]
    forget()
    assert [choice.takes_onednn(rows, LARGE) for rows in (1, 8)] == first
    assert measured == [1, 8]
    (kinds,) = json.loads((tmp_path / "xglm" / "products.json").read_text()).values()
    assert kinds == {"one row": 0.5, "few rows": 0.95}


def test_another_number_of_threads_is_another_machine(measured, monkeypatch):
    choice.takes_onednn(1, LARGE)
    forget()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    choice.takes_onednn(1, LARGE)
    assert measured == [1, 1]


@pytest.mark.parametrize("library", ["mkl", "onednn"])
def test_the_environment_decides(measured, monkeypatch, library):
    monkeypatch.setenv("XGLM_PRODUCTS", library)
    assert [choice.takes_onednn(rows, elements) for rows in (1, 512) for elements in (LARGE, SMALL)] == [
        library == "onednn"
    ] * 4
    assert measured == []


def test_small_matrices_are_left_alone(measured):
    assert not choice.takes_onednn(1, SMALL)
    assert measured == []


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1'])
def test_a_broken_file(measured, tmp_path, content):
    (tmp_path / "xglm").mkdir()
    (tmp_path / "xglm" / "products.json").write_text(content)
    assert choice.takes_onednn(1, LARGE)


def test_no_folder_to_write_into(measured, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert choice.takes_onednn(1, LARGE)


def test_what_is_measured():
    assert 0.05 < choice._measured(1) < 20
