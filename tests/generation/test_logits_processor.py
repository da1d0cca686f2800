"""What a hook of `generate` is given and may return, in every backend."""

import numpy as np
import pytest

from tests.helpers.models import CONFIG, IDS, LEFT, RIGHT
from xglm_core import XGLMTokenizer
from xglm_core.errors import InputError

TINY = "examples/tiny_model/checkpoint"
PAD = CONFIG.pad_token_id
OPTIONS = {"max_new_tokens": 5, "stop_at_eos": False}


def forbidding(fw, tokens):
    """A hook that forbids what `tokens` names after the last id of a row; and a list of the ids that it was given."""
    seen = []

    def hook(input_ids, logits):
        ids = fw.numpy(input_ids)
        seen.append(ids)
        changed = fw.numpy(logits).copy()
        for row, last in enumerate(ids[:, -1:].tolist()):
            for token in last:
                changed[row, tokens.get(token, [])] = -np.inf
        return fw.tensor(changed)

    return hook, seen


class TestIdsOfAHook:
    def test_of_a_shorter_text_end_with_its_last_token(self, fw, tiny_model):
        """After 781 no 4: in a batch as for the text alone."""
        tokenizer, model = XGLMTokenizer.from_pretrained(TINY), tiny_model
        hook, seen = forbidding(fw, {781: [4]})
        both = tokenizer(
            ["The little dog found a fish", "Every"], padding=True, padding_side="left", return_tensors="np"
        )
        got = fw.generate(model, **both.data, logits_processor=[hook], **OPTIONS)
        assert got[1, -5:].tolist() == [781, 15, 502, 269, 476]
        length = both["input_ids"].shape[1]
        for step, ids in enumerate(seen):
            assert np.array_equal(ids, got[:, : length + step])

    @pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
    @pytest.mark.parametrize(
        "options", [{}, {"do_sample": True, "seed": 3, "num_return_sequences": 2}, {"num_beams": 2}], ids=str
    )
    def test_are_those_of_the_row_alone_after_padding(self, fw, model, mask, options):
        plain = fw.generate(model, IDS, mask, **options, **OPTIONS)
        # Forbids what followed the first new token of each row, so that the hook acts in the middle of a text.
        tokens = {int(row[11]): [int(row[12])] for row in plain}
        hook, together = forbidding(fw, tokens)
        batch = fw.generate(model, IDS, mask, logits_processor=[hook], **options, **OPTIONS)
        assert not np.array_equal(batch, plain)
        hook, alone = forbidding(fw, tokens)
        prompt = IDS[:1, mask[0] == 1]
        single = fw.generate(model, prompt, logits_processor=[hook], **options, **OPTIONS)
        rows = len(single)
        assert np.array_equal(batch[:rows, 11:], single[:, 8:])
        for shared, own in zip(together, alone, strict=True):
            assert np.array_equal(shared[: len(own), 3:], own)
            assert (shared[: len(own), :3] == PAD).all()

    def test_grow_by_one_column_for_each_token(self, fw, model):
        """As in transformers, so that a hook can count: also after the longest row has ended."""
        free = fw.generate(model, IDS, LEFT, **OPTIONS)
        eos = int(free[1, 11])
        assert eos not in free[0, 11:]
        hook, seen = forbidding(fw, {})
        got = fw.generate(model, IDS, LEFT, logits_processor=[hook], max_new_tokens=5, eos_token_id=eos)
        assert [ids.shape[1] for ids in seen] == [11, 12, 13, 14, 15]
        assert seen[-1][1, 11:].tolist() == got[1, 11:-1].tolist() == [eos, PAD, PAD, PAD]
        assert np.array_equal(seen[-1][0, 3:], got[0, 3:-1])

    def test_of_embeddings_are_the_new_ones(self, fw, model):
        hook, seen = forbidding(fw, {})
        got = fw.generate(model, inputs_embeds=fw.embedded(model, IDS), logits_processor=[hook], **OPTIONS)
        assert [ids.shape for ids in seen] == [(2, 0), (2, 1), (2, 2), (2, 3), (2, 4)]
        assert np.array_equal(seen[-1], got[:, :-1])


class TestResultOfAHook:
    @pytest.mark.parametrize("beams", [1, 2])
    def test_leaves_the_recorded_logits_as_they_were(self, fw, model, beams):
        """Also if it is written into the logits, which tensors of the other frameworks do not allow."""

        def in_place(input_ids, logits):
            if fw.name != "torch":
                return logits * 0 - 1
            logits[:, 9:] = -np.inf
            return logits

        options = {"return_dict_in_generate": True, "output_logits": True, "num_beams": beams, **OPTIONS}
        output = model.generate(fw.tensor(IDS), logits_processor=[in_place], **options)
        assert len(output.logits) == 5
        expected = fw.logits(model, IDS)[:, -1].repeat(beams, axis=0)
        # Cached and full passes; float32 sums of another order.
        np.testing.assert_allclose(fw.numpy(output.logits[0]), expected, rtol=0, atol=2e-5)
        assert all(np.isfinite(fw.numpy(logits)).all() for logits in output.logits)

    @pytest.mark.parametrize("beams", [1, 2])
    def test_of_another_kind_is_refused(self, fw, model, beams):
        for hook, found in (
            (lambda input_ids, logits: None, "NoneType"),
            (lambda input_ids, logits: logits[:, :-1], rf"\[{2 * beams}, 130\]"),
            (lambda input_ids, logits: logits[0], r"\[131\]"),
        ):
            message = rf"logits_processor\[1\] returned {found}, expected the logits \[{2 * beams}, 131\]; return them"
            hooks = [lambda input_ids, logits: logits, hook]
            with pytest.raises(InputError, match=message):
                fw.generate(model, IDS, logits_processor=hooks, num_beams=beams)
