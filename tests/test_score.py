"""`score` in every backend: log-probabilities of given tokens, in tiles of the logits."""

import numpy as np

from tests.models import IDS, SAME
from xglm_core import open_checkpoint
from xglm_core.compare.oracle import checkpoint_reader, forward


def scores(fw, model, ids, mask=None, **kwargs):
    return fw.numpy(model.score(fw.tensor(ids), None if mask is None else fw.tensor(mask), **kwargs))


def log_softmax(logits):
    logits = logits.astype(np.float64)
    highest = logits.max(axis=-1, keepdims=True)
    return logits - highest - np.log(np.exp(logits - highest).sum(axis=-1, keepdims=True))


def of_targets(logits, ids):
    """The log-probability of each next token, from all logits."""
    return np.take_along_axis(log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=-1)[..., 0]


def expected(folder, ids):
    """By the float64 oracle."""
    checkpoint = open_checkpoint(folder)
    return of_targets(forward(checkpoint.config, checkpoint_reader(checkpoint), ids).logits, ids)


class TestNumbers:
    def test_oracle(self, fw, model, folder):
        found = scores(fw, model, IDS)
        assert (found.dtype, found.shape) == (np.float32, (2, 10))
        np.testing.assert_allclose(found, expected(folder, IDS), rtol=0, atol=1e-5)

    def test_own_logits(self, fw, model):
        np.testing.assert_allclose(scores(fw, model, IDS), of_targets(fw.logits(model, IDS), IDS), **SAME)
