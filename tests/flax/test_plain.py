"""What exists only for speed computes what its plain form does, which `XGLM_PLAIN=1` takes."""

import jax
import numpy as np
import pytest

from tests.helpers.models import CONFIG, IDS, LEFT, SAME, changed
from xglm_flax import FlaxXGLMForCausalLM, make_loss_fn
from xglm_flax.fast import few_rows

BATCH = {"input_ids": IDS, "attention_mask": LEFT, "labels": np.where(LEFT == 1, IDS, -100)}
TREE = {"fc1": {"kernel": np.arange(6.0).reshape(2, 3), "bias": np.zeros(3)}}


@pytest.fixture
def both(monkeypatch):
    """Runs a function of a new model twice: as it is, and with the plain forms."""

    def run(function, **options):
        config = changed(CONFIG, num_layers=2, **options)
        fast = function(FlaxXGLMForCausalLM(config, seed=3))
        monkeypatch.setenv("XGLM_PLAIN", "1")
        return fast, function(FlaxXGLMForCausalLM(config, seed=3))

    return run


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.slow
def test_generated_texts(both, tied, rows):
    options = {"max_new_tokens": 20, "stop_at_eos": False}
    fast, plain = both(lambda model: model.generate(IDS[:rows], **options), tie_word_embeddings=tied)
    assert np.array_equal(fast, plain)


def test_losses_and_gradients(both):
    options = {"dropout": 0.0, "attention_dropout": 0.0}
    fast, plain = both(lambda model: jax.value_and_grad(make_loss_fn(model))(model.params, BATCH), **options)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **SAME), fast, plain)


def test_kernels_are_transposed_for_few_rows_and_many_steps_alone(monkeypatch):
    transposed = few_rows.transposed({"model": {"layers": {"0": TREE}}})["model"]["layers"]["0"]["fc1"]
    assert transposed.keys() == {"transposed_kernel", "bias"}
    assert np.array_equal(transposed["transposed_kernel"], TREE["fc1"]["kernel"].T)
    on_cpu = jax.default_backend() == "cpu"
    assert [few_rows.is_worth_transposing(*given) for given in ((2, 8), (16, 9), (1, 8), (17, 8), (2, 7))] == [
        *(on_cpu, on_cpu),
        *(False, False, False),
    ]
    monkeypatch.setenv("XGLM_PLAIN", "1")
    assert not few_rows.is_worth_transposing(2, 8)
