"""Beams over a vocabulary of which each id may end the text: there are fewer candidates than a search asks for."""

import numpy as np
import pytest

from tests.helpers.models import CONFIG, changed

ENDS = {"eos_token_id": [0, 1, 2], "num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 4}


@pytest.fixture(scope="module")
def tiny(fw):
    return fw.fresh(changed(CONFIG, vocab_size=3, num_layers=1))


def test_beams_that_all_end_are_the_likeliest_tokens(fw, tiny):
    ids = np.array([[2, 0, 2, 0]])
    logits = fw.logits(tiny, ids)[0, -1].astype(np.float64)
    expected = np.argsort(-logits)[:2]
    output = tiny.generate(fw.tensor(ids), pad_token_id=1, return_dict_in_generate=True, **ENDS)
    assert fw.numpy(output.sequences)[:, 4:].tolist() == expected[:, None].tolist()
    scores = logits - np.log(np.exp(logits).sum())
    np.testing.assert_allclose(fw.numpy(output.sequences_scores), scores[expected], rtol=1e-5)


@pytest.mark.parametrize("limits", [{"top_k": 0, "top_p": 0.1}, {"top_k": 1}, {"top_k": 0, "min_p": 0.9}], ids=str)
def test_beams_are_drawn(fw, tiny, limits):
    text = fw.generate(tiny, np.array([[2, 0, 2, 0]]), do_sample=True, seed=3, **limits, **ENDS)
    assert sorted(text[:, 4].tolist()) in ([0, 1], [0, 2], [1, 2])  # Without replacement.
