"""Which library computes products on a CPU: as measured once and kept in a file, or as the environment says."""

import json

import pytest
import torch

from xglm_torch.fast import choice
from xglm_torch.fast.linear import linear

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
    choice.takes_turned.cache_clear()
    choice._ratio.cache_clear()


@pytest.fixture
def measured(monkeypatch):
    """The rows that were measured; oneDNN takes half of MKL's time for one row, about as much for more."""
    found = []

    def measure(rows, *forms):
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


@pytest.mark.parametrize("library", ["mkl", "onednn", "turned"])
def test_the_environment_decides(measured, monkeypatch, library):
    monkeypatch.setenv("XGLM_PRODUCTS", library)
    assert [choice.takes_onednn(rows, elements) for rows in (1, 512) for elements in (LARGE, SMALL)] == [
        library != "mkl"
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


@pytest.mark.parametrize("kind", choice._KINDS)
def test_what_is_measured(kind):
    assert 0.05 < choice._measured(*choice._KINDS[kind]) < 20


def test_factors_in_the_other_order_for_few_rows_of_a_high_matrix(monkeypatch):
    monkeypatch.setattr(choice, "_measured", lambda rows, *forms: 0.5)
    assert choice.takes_turned(2, 1024, 256)
    assert choice.takes_turned(32, 512, 512)
    for rows, height, width in ((1, 1024, 256), (33, 1024, 256), (2, 256, 1024), (2, 64, 64)):
        assert not choice.takes_turned(rows, height, width)


@torch.inference_mode()
@pytest.mark.parametrize("shape", [(2, 7), (3, 5, 7)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_factors_in_the_other_order_give_the_same(monkeypatch, shape, with_bias):
    monkeypatch.setenv("XGLM_PRODUCTS", "turned")
    generator = torch.Generator().manual_seed(1)
    states, weight, bias = (torch.randn(size, generator=generator) for size in (shape, (11, 7), (11,)))
    assert choice.takes_turned(states.numel() // 7, 11, 7)
    result = linear(states, weight, bias if with_bias else None)
    assert result.is_contiguous()
    torch.testing.assert_close(result, torch.nn.functional.linear(states, weight, bias if with_bias else None))
