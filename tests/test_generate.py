"""What `generate` promises in every backend."""

import numpy as np
import pytest

from conformance.random_weights import write_checkpoint
from tests.models import CONFIG, IDS, LEFT, RIGHT
from xglm_core import XGLMConfig
from xglm_core.errors import InputError


class TestGenerate:
    def test_is_repeated_argmax(self, fw, model):
        ids = IDS
        for _ in range(19):
            ids = np.concatenate([ids, fw.logits(model, ids, use_cache=False)[:, -1:].argmax(-1)], 1)
        got = fw.generate(model, IDS, max_new_tokens=19, stop_at_eos=False)
        assert got.dtype.kind == "i"
        assert np.array_equal(got, ids)

    @pytest.mark.parametrize(("mask", "tokens"), [(LEFT, slice(3, None)), (RIGHT, slice(None, -3))])
    def test_rows_do_not_depend_on_neighbours_or_padding(self, fw, model, mask, tokens):
        together = fw.generate(model, IDS, mask, max_new_tokens=17, stop_at_eos=False)
        alone = fw.generate(model, IDS[:1, tokens], max_new_tokens=17, stop_at_eos=False)
        assert np.array_equal(together[0, 11:], alone[0, 8:])
        assert np.array_equal(together[:, :11], IDS)

    def test_ends_at_eos(self, fw, model, tmp_path):
        free = fw.generate(model, IDS, max_new_tokens=9, stop_at_eos=False)
        eos = int(free[0, 13])
        config = XGLMConfig.from_dict({**CONFIG.to_dict(), "eos_token_id": eos})
        write_checkpoint(tmp_path, config, seed=1)
        ended = fw.generate(fw.causal_lm.from_pretrained(tmp_path), IDS, max_new_tokens=9)
        for row, full in zip(ended, free, strict=True):
            stop = list(full[11:]).index(eos) + 12 if eos in full[11:] else len(full)
            assert np.array_equal(row[:stop], full[:stop])
            assert (row[stop:] == config.pad_token_id).all()

    def test_past_the_limit_is_refused_before_computing(self, fw, model):
        with pytest.raises(InputError, match=r"position 61 is past the limit of 61 tokens; shorten"):
            fw.generate(model, IDS, max_new_tokens=51)
        assert fw.generate(model, IDS, max_new_tokens=50, stop_at_eos=False).shape == (2, 61)

    @pytest.mark.parametrize("count", [0, -1, 2.5, True])
    def test_number_of_tokens(self, fw, model, count):
        with pytest.raises(InputError, match=r"max_new_tokens is .* expected a positive integer"):
            fw.generate(model, IDS, max_new_tokens=count)
