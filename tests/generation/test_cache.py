"""The cache that `generate` returns, and one cache for many prompts."""

import numpy as np
import pytest

from tests.helpers.models import IDS, LEFT, RIGHT, SAME, core_decides

MORE = {"max_new_tokens": 5, "stop_at_eos": False, "return_dict_in_generate": True}
ONES = np.ones((2, 5), int)


class TestReturned:
    @pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
    def test_goes_on(self, fw, model, mask):
        if mask is RIGHT:
            core_decides(fw)
        output = model.generate(fw.tensor(IDS), attention_mask=fw.tensor(mask), **MORE)
        sequences, cache = fw.numpy(output.sequences), output.past_key_values
        expected = fw.generate(model, IDS, mask, max_new_tokens=9, stop_at_eos=False)
        for given in (None, np.concatenate([mask, ONES], axis=1)):  # The cache knows, and stays as it was.
            got = fw.generate(model, sequences, given, past_key_values=cache, max_new_tokens=4, stop_at_eos=False)
            assert np.array_equal(got, expected)
        if fw.name != "torch":
            return  # The core decides the rest.
        beams = {"num_beams": 3, "max_new_tokens": 4, "stop_at_eos": False}
        assert np.array_equal(
            fw.generate(model, sequences, past_key_values=cache, **beams),
            fw.generate(model, sequences, np.concatenate([mask, ONES], axis=1), **beams),
        )

    def test_is_that_of_the_columns(self, fw, model):
        mask = np.concatenate([RIGHT, ONES[:, :4]], axis=1)
        output = model.generate(fw.tensor(IDS), attention_mask=fw.tensor(RIGHT), **MORE)
        expected = fw.call(model, fw.numpy(output.sequences)[:, :-1], mask, use_cache=True).past_key_values
        for ours, theirs in zip(output.past_key_values, expected, strict=True):
            for item, other in zip(ours, theirs, strict=True):
                assert item.shape == (2, 5, 15, 7)
                there = mask[:, None, :, None] == 1
                np.testing.assert_allclose(fw.numpy(item) * there, fw.numpy(other) * there, **SAME)

    def test_what_follows_an_end_is_padding(self, fw, model):
        core_decides(fw)
        free = fw.generate(model, IDS, **{**MORE, "max_new_tokens": 6, "return_dict_in_generate": False})
        eos = int(free[0, 13])
        assert eos not in free[1, 11:-1]
        output = model.generate(fw.tensor(IDS), eos_token_id=eos, return_dict_in_generate=True, max_new_tokens=6)
        turn = np.array([[7, 8, 9], [9, 8, 7]])
        ids = np.concatenate([fw.numpy(output.sequences), turn], axis=1)
        mask = np.ones_like(ids)
        mask[0, 14:17] = 0
        options = {"max_new_tokens": 4, "stop_at_eos": False}
        expected = fw.generate(model, ids, mask, **options)
        assert np.array_equal(
            fw.generate(model, ids, mask, past_key_values=output.past_key_values, **options), expected
        )
        alone = fw.generate(model, np.concatenate([ids[:1, :14], turn[:1]], axis=1), **options)
        assert np.array_equal(expected[0, 20:], alone[0, 17:])

    def test_of_copies(self, fw, model):
        core_decides(fw)
        more = {**MORE, "do_sample": True, "seed": 4}
        output = model.generate(fw.tensor(IDS), attention_mask=fw.tensor(LEFT), num_return_sequences=2, **more)
        got = fw.generate(model, fw.numpy(output.sequences), past_key_values=output.past_key_values, max_new_tokens=3)
        mask = np.concatenate([LEFT.repeat(2, axis=0), ONES.repeat(2, axis=0)], axis=1)
        assert np.array_equal(got, fw.generate(model, fw.numpy(output.sequences), mask, max_new_tokens=3))

    def test_of_embeddings_and_an_earlier_cache(self, fw, model):
        first = model.generate(fw.tensor(IDS[:, :8]), attention_mask=fw.tensor(LEFT[:, :8]), **MORE)
        second = model.generate(
            inputs_embeds=fw.tensor(fw.embedded(model, fw.numpy(first.sequences)[:, -1:])),
            past_key_values=first.past_key_values,
            **MORE,
        )
        ids = np.concatenate([fw.numpy(first.sequences), fw.numpy(second.sequences)], axis=1)
        mask = np.concatenate([LEFT[:, :8], ONES, ONES], axis=1)
        options = {"max_new_tokens": 3, "stop_at_eos": False}
        got = fw.generate(model, ids, past_key_values=second.past_key_values, **options)
        assert np.array_equal(got, fw.generate(model, ids, mask, **options))

    def test_only_where_it_is_wanted(self, fw, model):
        for more in ({"use_cache": False}, {"num_beams": 2}):
            assert model.generate(fw.tensor(IDS), **MORE, **more).past_key_values is None


class TestOneForManyPrompts:
    @pytest.mark.parametrize("more", [{}, {"num_beams": 2}, {"do_sample": True, "seed": 2}], ids=str)
    def test_is_repeated(self, fw, model, more):
        if more:
            core_decides(fw)
        prefix, mask = IDS[:1, :6], np.array([[0, 0, 1, 1, 1, 1]])
        cache = fw.call(model, prefix, mask, use_cache=True).past_key_values
        tails = np.random.RandomState(5).randint(4, 131, (3, 4))
        ids = np.concatenate([prefix.repeat(3, axis=0), tails], axis=1)
        rest = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
        whole = np.concatenate([mask.repeat(3, axis=0), rest], axis=1)
        options = {"max_new_tokens": 6, "stop_at_eos": False, **more}
        expected = fw.generate(model, ids, whole, **options)
        for _ in range(2):  # The cache stays as it was.
            assert np.array_equal(fw.generate(model, ids, whole, past_key_values=cache, **options), expected)
        assert cache.batch == 1
        if fw.name != "torch":
            return  # The core decides the rest.
        # Its own mask is repeated, too.
        got = fw.generate(model, ids[:, :7], past_key_values=cache, **options)
        assert np.array_equal(got, fw.generate(model, ids[:, :7], whole[:, :7], **options))

    def test_of_fixed_size(self, fw, model):
        if fw.name != "flax":
            pytest.skip("Flax alone has caches of fixed size")
        cache = model(fw.tensor(IDS[:1, :6]), past_key_values=model.init_cache(1, 8)).past_key_values
        ids = np.concatenate([IDS[[0, 0], :6], IDS[:, 6:]], axis=1)
        output = model.generate(fw.tensor(ids), past_key_values=cache, **MORE)
        options = {"max_new_tokens": 4, "stop_at_eos": False}
        got = fw.generate(model, fw.numpy(output.sequences), past_key_values=output.past_key_values, **options)
        assert np.array_equal(got, fw.generate(model, ids, **{**options, "max_new_tokens": 9}))
