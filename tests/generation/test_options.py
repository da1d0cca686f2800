"""The options of transformers' `generate`: offered, harmless, or refused in one line."""

from pathlib import Path

import numpy as np
import pytest

from tests.helpers.models import CONFIG, IDS, LEFT, core_decides
from xglm_core import GenerationConfig
from xglm_core.errors import InputError
from xglm_core.generation.config import NOT_OFFERED, WITHOUT_EFFECT
from xglm_core.generation.rules import RuleMaker

GREEDY = {"max_new_tokens": 6, "stop_at_eos": False}
COLUMNS = IDS.shape[1]


@pytest.fixture(scope="module")
def plain(fw, model):
    return fw.generate(model, IDS, LEFT, **GREEDY)


def by_definition(fw, model, sequences, change):
    """The likeliest ids after each part of the given texts, when `change` has had its say on the logits.

    Where the texts are those that come out, so is the next token of each.
    """
    mask = np.concatenate([LEFT, np.ones((2, sequences.shape[1] - COLUMNS), int)], axis=1)
    logits = fw.logits(model, sequences, mask)
    return [
        [
            int(change(row, sequences[row, :place], place - COLUMNS, logits[row, place - 1].copy()).argmax())
            for place in range(COLUMNS, sequences.shape[1])
        ]
        for row in range(len(sequences))
    ]


class TestScores:
    def test_sequence_bias(self, fw, model, plain):
        biases = {(7,): 0.5, (int(plain[0, COLUMNS]),): float("-inf"), (*plain[1, -4:-1].tolist(), 8): 40.0}
        first = int(fw.generate(model, IDS, LEFT, sequence_bias=biases, **GREEDY)[0, COLUMNS])
        biases[first, 9] = 40.0

        def change(row, text, step, logits):
            for (*begin, last), bias in biases.items():
                if not begin or text[-len(begin) :].tolist() == begin:
                    logits[last] += bias
            return logits

        got = fw.generate(model, IDS, LEFT, sequence_bias=biases, **GREEDY)
        assert got[0, COLUMNS : COLUMNS + 2].tolist() == [first, 9]
        assert 8 in got[1]
        assert got[:, COLUMNS:].tolist() == by_definition(fw, model, got, change)
        pairs = [[list(word), bias] for word, bias in biases.items()]
        assert np.array_equal(fw.generate(model, IDS, LEFT, sequence_bias=pairs, **GREEDY), got)

    def test_prefix_allowed_tokens_fn(self, fw, model):
        seen = []

        def allowed(prompt, ids):
            seen.append((prompt, fw.numpy(ids).tolist()))
            return [number for number in range(4, CONFIG.vocab_size) if (number + seen[-1][1][-1]) % 5 == prompt]

        def change(row, text, step, logits):
            others = (np.arange(len(logits)) + text[-1]) % 5 != row
            logits[others | (np.arange(len(logits)) < 4)] = -np.inf
            return logits

        got = fw.generate(model, IDS, LEFT, prefix_allowed_tokens_fn=allowed, **GREEDY)
        assert got[:, COLUMNS:].tolist() == by_definition(fw, model, got, change)
        # What it is told: each row as the model reads it.
        rows = np.where(np.concatenate([LEFT, np.ones((2, 6), int)], axis=1) == 1, got, CONFIG.pad_token_id)
        assert seen == [(row, rows[row, : COLUMNS + step].tolist()) for step in range(6) for row in range(2)]
        if fw.name != "torch":
            return  # The core decides the rest.
        seen.clear()
        beams = fw.generate(model, IDS, LEFT, prefix_allowed_tokens_fn=allowed, num_beams=3, **GREEDY)
        assert ((beams[:, COLUMNS:] + beams[:, COLUMNS - 1 : -1]) % 5 == [[0], [1]]).all()
        assert [prompt for prompt, _ in seen] == [0, 0, 0, 1, 1, 1] * 6

    @pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
    def test_prefix_allowed_tokens_fn_that_returns_nothing_of_use(self, fw, model, options):
        core_decides(fw)
        for found, message in (
            ([], "row 0 has no token left at new token 0: all are banned; loosen .*prefix_allowed_tokens_fn"),
            (None, "prefix_allowed_tokens_fn returned a NoneType for prompt 0, expected ids"),
            ([5, 131], "prefix_allowed_tokens_fn returned ids for prompt 0 beyond 0 to 130"),
        ):
            with pytest.raises(InputError, match=message):
                fw.generate(model, IDS, prefix_allowed_tokens_fn=lambda *_, found=found: found, **GREEDY, **options)

    def test_first_and_last_tokens(self, fw, model, plain):
        """`begin_suppress_tokens`, and `forced_eos_token_id` in the last column of rows that have not ended."""
        core_decides(fw)
        unwanted = sorted({*plain[:, COLUMNS].tolist()})
        options = {"begin_suppress_tokens": unwanted, "forced_eos_token_id": 2, "suppress_tokens": [2]}

        def change(row, text, step, logits):
            logits[unwanted if step == 0 else []] = -np.inf
            logits[2] = -np.inf if step < 5 else 1e9
            return logits

        got = fw.generate(model, IDS, LEFT, **options, **GREEDY)
        assert got[:, COLUMNS:].tolist() == by_definition(fw, model, got, change)
        assert (got[:, -1] == 2).all()
        beams = fw.generate(model, IDS, LEFT, num_beams=3, **{**options, "forced_eos_token_id": [2, 5]}, **GREEDY)
        assert np.isin(beams[:, -1], [2, 5]).all()
        # After a forced first token, what must not begin is the second.
        got = fw.generate(model, IDS, forced_bos_token_id=9, begin_suppress_tokens=[9], **GREEDY)
        after = np.concatenate([IDS, [[9], [9]]], axis=1)
        assert (got[:, COLUMNS] == 9).all()
        assert np.array_equal(
            got, fw.generate(model, after, begin_suppress_tokens=[9], **{**GREEDY, "max_new_tokens": 5})
        )

    def test_min_length_counts_columns(self, fw, model, plain):
        core_decides(fw)
        options = {"max_new_tokens": 6, "eos_token_id": plain[:, COLUMNS : COLUMNS + 2].ravel().tolist()}
        assert fw.generate(model, IDS, LEFT, **options).shape[1] < COLUMNS + 5
        got = fw.generate(model, IDS, LEFT, min_length=COLUMNS + 4, **options)
        assert got.shape[1] > COLUMNS + 4
        assert np.array_equal(got, fw.generate(model, IDS, LEFT, min_new_tokens=4, **options))
        assert np.array_equal(fw.generate(model, IDS, LEFT, min_length=COLUMNS, **options).shape, (2, COLUMNS + 1))

    def test_renormalized_scores(self, fw, model):
        options = {**GREEDY, "return_dict_in_generate": True, "output_scores": True}
        for more in ({"do_sample": True, "seed": 3, "top_k": 5}, {"num_beams": 3, "suppress_tokens": [*range(60)]}):
            output = model.generate(fw.tensor(IDS), renormalize_logits=True, **options, **more)
            for scores in map(fw.numpy, output.scores):
                np.testing.assert_allclose(np.exp(scores).sum(axis=1), 1, rtol=1e-5)  # Of 131 float32 numbers.
            if "num_beams" not in more:
                assert np.array_equal(fw.numpy(output.sequences), fw.generate(model, IDS, **GREEDY, **more))

    def test_of_a_forced_token_are_recorded(self, fw, model):
        options = {"forced_bos_token_id": 9, "return_dict_in_generate": True, "output_scores": True, **GREEDY}
        for more in ({"num_beams": 2}, {}):
            scores = model.generate(fw.tensor(IDS), **options, **more).scores
            assert len(scores) == 6
            assert (np.isfinite(fw.numpy(scores[0])).sum(axis=1) == 1).all()
            assert (fw.numpy(scores[0])[:, 9] == 0).all()


class TestTransitions:
    def test_are_the_scores_of_the_tokens(self, fw, model):
        output = model.generate(fw.tensor(IDS), return_dict_in_generate=True, output_logits=True, **GREEDY)
        sequences = fw.numpy(output.sequences)
        logits = fw.logits(model, sequences)[:, COLUMNS - 1 : -1].astype(np.float64)
        expected = np.take_along_axis(logits, sequences[:, COLUMNS:, None], axis=2)[:, :, 0]
        got = model.compute_transition_scores(output.sequences, output.logits)
        np.testing.assert_allclose(fw.numpy(got), expected, rtol=0, atol=2e-5)
        got = model.compute_transition_scores(output.sequences, output.logits, normalize_logits=True)
        np.testing.assert_allclose(
            fw.numpy(got), expected - np.log(np.exp(logits).sum(axis=2)), rtol=0, atol=2e-5
        )  # Cached and full passes.

    @pytest.mark.parametrize("more", [{}, {"renormalize_logits": True, "suppress_tokens": [*range(40)]}], ids=str)
    def test_of_beams_sum_up_to_theirs(self, fw, model, more):
        """Whatever the penalties: they are what the search has added up."""
        core_decides(fw)
        options = {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5, "max_new_tokens": 7}
        eos = fw.generate(model, IDS, **GREEDY)[:, COLUMNS + 2].tolist()
        output = model.generate(
            fw.tensor(IDS), eos_token_id=eos, return_dict_in_generate=True, output_scores=True, **options, **more
        )
        got = fw.numpy(model.compute_transition_scores(output.sequences, output.scores, output.beam_indices))
        lengths = (fw.numpy(output.beam_indices) >= 0).sum(axis=1)
        assert len({*lengths.tolist()}) > 1
        assert got.shape == (6, lengths.max())
        np.testing.assert_allclose(got.sum(axis=1) / lengths**0.5, fw.numpy(output.sequences_scores), rtol=1e-5)

    def test_of_nothing_that_belongs_together(self, fw, model):
        output = model.generate(fw.tensor(IDS), return_dict_in_generate=True, output_scores=True, **GREEDY)
        with pytest.raises(InputError, match=r"beam_indices \[2, 7\], but scores of 6 steps and 2 rows; give all"):
            model.compute_transition_scores(output.sequences, output.scores, fw.tensor(np.zeros((2, 7), int)))
        with pytest.raises(InputError, match="scores is empty; expected those of generate"):
            model.compute_transition_scores(output.sequences, ())


class TestStopping:
    def test_rows_end_where_a_function_says(self, fw, model):
        seen = []

        def is_even(ids, scores):
            seen.append((ids, scores))
            return [bool(last % 2 == 0) for last in fw.numpy(ids)[:, -1]]

        options = {"max_new_tokens": 12, "stop_at_eos": False}
        free = fw.generate(model, IDS, LEFT, **options)[:, COLUMNS:]
        ends = [next((step for step, token in enumerate(row) if token % 2 == 0), 11) for row in free.tolist()]
        got = fw.generate(model, IDS, LEFT, stopping_criteria=[is_even], **options)[:, COLUMNS:]
        assert got.shape[1] == max(ends) + 1
        for row, (whole, end) in enumerate(zip(free, ends, strict=True)):
            assert got[row, : end + 1].tolist() == whole[: end + 1].tolist()
            assert (got[row, end + 1 :] == CONFIG.pad_token_id).all()
        assert [scores for _, scores in seen] == [None] * len(seen)
        ids = fw.numpy(seen[-1][0])
        assert ids.shape == (2, COLUMNS + max(ends) + 1)
        assert np.array_equal(ids[:, COLUMNS:], got)
        assert np.array_equal(ids[:, :COLUMNS], np.where(LEFT == 1, IDS, CONFIG.pad_token_id))

    def test_with_beams_and_scores(self, fw, model):
        core_decides(fw)

        def is_long(ids, scores):
            assert len(scores) == ids.shape[1] - COLUMNS
            return ids.shape[1] >= 15

        for more in ({}, {"num_beams": 3}):
            options = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 12, **more}
            output = model.generate(fw.tensor(IDS), stop_at_eos=False, stopping_criteria=[is_long], **options)
            assert output.sequences.shape == (2, 15)
            expected = fw.generate(model, IDS, max_new_tokens=4, stop_at_eos=False, **more)
            assert np.array_equal(fw.numpy(output.sequences), expected)

    @pytest.mark.parametrize("more", [{}, {"num_beams": 2}, {"do_sample": True, "seed": 1}], ids=str)
    def test_by_the_clock(self, fw, model, more):
        if more:
            core_decides(fw)
        assert fw.generate(model, IDS, max_time=1e-9, **GREEDY, **more).shape == (2, COLUMNS + 1)
        assert fw.generate(model, IDS, max_time=3600, **GREEDY, **more).shape == (2, COLUMNS + 6)

    def test_functions_that_are_none(self, fw, model):
        core_decides(fw)
        for criteria, message in (
            (lambda ids, scores: True, "stopping_criteria is a function, expected a list of functions"),
            ([5], "stopping_criteria is a list, expected a list of functions"),
            (
                [lambda ids, scores: None],
                r"stopping_criteria\[0\] returned object \[\], expected True or False, or one",
            ),
            ([lambda ids, scores: [True] * 3], r"stopping_criteria\[0\] returned bool \[3\], .* for each row \[2\]"),
        ):
            with pytest.raises(InputError, match=message):
                fw.generate(model, IDS, stopping_criteria=criteria, **GREEDY)
        with pytest.raises(InputError, match="prefix_allowed_tokens_fn is a list, expected a function"):
            fw.generate(model, IDS, prefix_allowed_tokens_fn=[5], **GREEDY)
        assert fw.generate(model, IDS, stopping_criteria=[], **GREEDY).shape == (2, COLUMNS + 6)


class TestNames:
    def test_inputs(self, fw, model, plain):
        ids = fw.tensor(IDS)
        assert np.array_equal(fw.numpy(model.generate(inputs=ids, attention_mask=fw.tensor(LEFT), **GREEDY)), plain)
        with pytest.raises(InputError, match="input_ids and inputs are both given, expected one of the two"):
            model.generate(ids, inputs=ids)

    def test_options_in_the_second_place(self, fw, model):
        options, ids = GenerationConfig(**GREEDY), fw.tensor(IDS)
        assert np.array_equal(fw.numpy(model.generate(ids, options)), fw.generate(model, IDS, **GREEDY))
        with pytest.raises(InputError, match="generation_config is given twice; attention_mask comes second"):
            model.generate(ids, options, options)


class TestConfiguration:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"min_length": -1}, "min_length is -1, expected an integer, 0 or more"),
            ({"min_length": 9, "max_length": 8}, "min_length is 9, expected at most max_length=8"),
            ({"max_time": 0}, "max_time is 0, expected a positive number of seconds"),
            ({"sequence_bias": {(): 1.0}}, r"sequence_bias is .*, expected a dictionary of tuples of ids to numbers"),
            ({"sequence_bias": {(5,): float("inf")}}, "sequence_bias is .*, expected a dictionary"),
            ({"sequence_bias": {(5,): float("nan")}}, "sequence_bias is .*, expected a dictionary"),
            ({"sequence_bias": [[5, 1.0]]}, "sequence_bias is .*, or a list of pairs of such"),
            ({"begin_suppress_tokens": 5}, "begin_suppress_tokens is 5, expected a list of ids, or None"),
            ({"forced_eos_token_id": "2"}, "forced_eos_token_id is '2', expected an id, a list of ids, or None"),
            ({"renormalize_logits": 1}, "renormalize_logits is 1, expected True or False"),
        ],
        ids=str,
    )
    def test_impossible(self, options, message):
        with pytest.raises(InputError, match=message):
            GenerationConfig().updated(options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"begin_suppress_tokens": [131]}, "begin_suppress_tokens has 131, expected ids from 0 to 130"),
            ({"forced_eos_token_id": [2, 131]}, "forced_eos_token_id has 131, expected ids from 0 to 130"),
            ({"sequence_bias": {(5, 131): 1.0}}, "sequence_bias has 131, expected ids from 0 to 130"),
            ({"min_length": 21}, "min_length is 21, but the text has at most 20 columns"),
        ],
        ids=str,
    )
    def test_that_does_not_fit(self, options, message):
        with pytest.raises(InputError, match=message):
            RuleMaker(GenerationConfig(eos_token_id=2, **options), CONFIG, columns=11, limit=9)

    def test_survives_its_file(self, tmp_path):
        options = GenerationConfig(
            min_length=5, sequence_bias={(3, 4): 1.5, (5,): -2.0}, forced_eos_token_id=[2, 3], use_cache=False
        )
        options.save_pretrained(tmp_path)
        again = GenerationConfig.from_pretrained(tmp_path)
        assert again.sequence_bias == [[[3, 4], 1.5], [[5], -2.0]]
        assert again.biases == options.biases
        assert (again.min_length, again.last_ids, again.use_cache) == (5, (2, 3), False)

    def test_min_length_makes_room(self):
        assert GenerationConfig(min_length=50).new_tokens(11) == 39
        assert GenerationConfig(min_length=5).new_tokens(11) == 20


class TestRefused:
    @pytest.mark.parametrize("name", NOT_OFFERED)
    def test_by_name_with_the_way_round(self, name):
        off, instead = NOT_OFFERED[name]
        with pytest.raises(InputError) as error:
            GenerationConfig().updated({name: np.full((2, 3), 5)})
        assert str(error.value) == f"{name} is not offered here; {instead}"
        assert f"`{name}`" in Path("docs/generation.md").read_text()
        for value in (None, False, off, None if off is None else np.float32(off)):
            assert GenerationConfig().updated({name: value}) == GenerationConfig()

    @pytest.mark.parametrize("name", sorted(WITHOUT_EFFECT))
    def test_how_to_compute_is_ours_to_say(self, name):
        assert GenerationConfig().updated({name: 5, "max_new_tokens": 3}).max_new_tokens == 3
