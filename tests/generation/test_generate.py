"""What `generate` promises in every backend."""

import functools

import numpy as np
import pytest

from conformance.generation import CONFIG as GOLDEN_CONFIG
from conformance.generation import GENERATE_CASES, SEEDS, prompts
from conformance.golden import GENERATE_PATH, generate_digest
from conformance.random_weights import random_weights, write_checkpoint
from tests.helpers.models import CONFIG, IDS, LEFT, ONE_BLOCK, RIGHT, core_decides
from xglm_core import GenerationConfig
from xglm_core.compare import oracle
from xglm_core.errors import InputError
from xglm_core.generation.randomness import Keys, gumbel, noise_bits
from xglm_core.generation.rules import Rules

COMPILED_CASES = ("greedy", "repetition_penalty", "penalties", "sequences", "beams_with_penalties")
SAMPLE = {"do_sample": True, "seed": 7, "max_new_tokens": 11, "stop_at_eos": False}


@pytest.fixture(scope="module")
def golden_models(fw, tmp_path_factory):
    @functools.cache
    def load(seed):
        path = tmp_path_factory.mktemp("golden")
        write_checkpoint(path, GOLDEN_CONFIG, seed)
        return fw.causal_lm.from_pretrained(path)

    return load


@pytest.fixture(scope="module")
def golden_texts():
    with np.load(GENERATE_PATH) as file:
        texts = dict(file)
    assert texts.pop("digest").item() == generate_digest(), "the cases have changed: make golden"
    assert "transformers 4.57.6" in texts.pop("versions").item()
    return texts


class TestGreedy:
    def test_is_repeated_argmax(self, fw, model):
        got = fw.generate(model, IDS, max_new_tokens=19, stop_at_eos=False)
        assert got.dtype.kind == "i"
        assert np.array_equal(got[:, :11], IDS)
        # In one call: what follows a token does not change its logits.
        assert np.array_equal(got[:, 11:], fw.logits(model, got, use_cache=False)[:, 10:-1].argmax(-1))

    def test_ends_at_eos(self, fw, model):
        free = fw.generate(model, IDS, max_new_tokens=9, stop_at_eos=False)
        eos = int(free[0, 13])
        ended = fw.generate(model, IDS, max_new_tokens=9, eos_token_id=eos)
        for row, full in zip(ended, free, strict=True):
            stop = list(full[11:]).index(eos) + 12 if eos in full[11:] else len(full)
            assert np.array_equal(row[:stop], full[:stop])
            assert (row[stop:] == CONFIG.pad_token_id).all()

    @pytest.mark.parametrize("case", GENERATE_CASES, ids=lambda case: case.name)
    def test_texts_are_those_of_transformers(self, fw, golden_models, golden_texts, case):
        # Compiling takes most of the time: where that is needed, one model, and those cases that a backend has a part
        # in. The others are decided in the core.
        is_compiled = fw.name != "torch"
        if case.name not in COMPILED_CASES:
            core_decides(fw)
        for seed in SEEDS[:1] if is_compiled else SEEDS:
            options = {name: value for name, value in case.options.items() if value is not None}
            got = fw.generate(golden_models(seed), *prompts(seed), **options)
            np.testing.assert_array_equal(got, golden_texts[f"{case.name}/{seed}"])


class TestRows:
    @pytest.mark.parametrize("options", [{"max_new_tokens": 17, "stop_at_eos": False}, SAMPLE])
    @pytest.mark.parametrize(("mask", "tokens"), [(LEFT, slice(3, None)), (RIGHT, slice(None, -3))])
    def test_do_not_depend_on_neighbours_or_padding(self, fw, model, mask, tokens, options):
        together = fw.generate(model, IDS, mask, **options)
        alone = fw.generate(model, IDS[:1, tokens], **options)
        assert np.array_equal(together[0, 11:], alone[0, 8:])
        assert np.array_equal(together[:, :11], IDS)
        other_order = fw.generate(model, IDS[::-1], mask[::-1], **options)
        assert np.array_equal(other_order, together[::-1])

    def test_beams_do_not_depend_on_neighbours_or_padding(self, fw, model):
        options = {"num_beams": 3, "max_new_tokens": 9, "stop_at_eos": False}
        together = fw.generate(model, IDS, LEFT, **options)
        alone = fw.generate(model, IDS[:1, 3:], **options)
        assert np.array_equal(together[0, 11:], alone[0, 8:])


def oracle_scores(text, *, seed=1):
    read = random_weights(ONE_BLOCK, seed).__getitem__
    return oracle.forward(ONE_BLOCK, read, np.array([text])).logits[0, -1]


def limited(scores, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0):
    """The definition, on float64: scores [vocab_size], minus infinity where nothing is drawn."""
    scores = scores / temperature

    def probabilities():
        exponentials = np.exp(scores - scores.max())
        return exponentials / exponentials.sum()

    def keep_first(order, share):
        mass = probabilities()[order].cumsum()
        last = int(np.searchsorted(mass, share))
        dropped = order[last + 1 :]
        scores[dropped] = -np.inf

    if top_k:
        scores[np.argsort(-scores)[top_k:]] = -np.inf
    if top_p < 1:
        keep_first(np.argsort(-scores, kind="stable"), top_p)
    if min_p:
        present = probabilities()
        scores[present < min_p * present.max()] = -np.inf
    if typical_p < 1:
        present = probabilities()
        information = -np.log(np.maximum(present, 1e-300))
        keep_first(np.argsort(np.abs(information - (present * information).sum()), kind="stable"), typical_p)
    return scores


LIMITS = [
    {},
    {"temperature": 0.6, "top_k": 5},
    {"top_k": 0, "top_p": 0.7},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.05},
    {"top_k": 0, "min_p": 0.2},
    {"top_k": 0, "typical_p": 0.5, "temperature": 1.3},
    {"top_k": 20, "top_p": 0.8, "typical_p": 0.7},
]


class TestSampling:
    @pytest.mark.parametrize("limits", LIMITS, ids=str)
    def test_is_that_of_the_definition(self, fw, model, limits):
        """The oracle's logits and numpy's noise: the same text in every backend."""
        prompt = IDS[0].tolist()
        for seed in (1, 2):
            keys = Keys(seed, [np.array(prompt, "<i8").tobytes()])
            text = list(prompt)
            for step in range(7):
                noise = gumbel(noise_bits(keys.of_steps(step, 1)[0], np.arange(CONFIG.vocab_size)))
                scores = limited(oracle_scores(text), **{"top_k": 50, **limits})
                text.append(int((scores + noise).argmax()))
            got = fw.generate(model, IDS[:1], do_sample=True, seed=seed, max_new_tokens=7, stop_at_eos=False, **limits)
            assert got[0].tolist() == text

    @pytest.mark.parametrize("limits", LIMITS, ids=str)
    def test_statistics(self, fw, model, limits):
        """100,000 draws follow the filtered distribution (chi-square)."""
        logits = np.random.RandomState(3).standard_normal(CONFIG.vocab_size).astype(np.float32) * 2
        rules = Rules(np.zeros((10_000, 0), np.int32), sample=True, **{"top_k": 50, **limits})
        engine = fw.engine(model)
        engine.logits = fw.tensor(np.tile(logits, (10_000, 1)))
        keys = Keys(5, [b"a"] * 10_000).of_steps(0, 10)
        drawn = np.concatenate([engine.select(rules, keys[:, step]) for step in range(10)])
        counts = np.bincount(drawn, minlength=CONFIG.vocab_size)
        scores = limited(logits.astype(np.float64), **{"top_k": 50, **limits})
        expected = np.exp(scores - scores.max())
        expected *= len(drawn) / expected.sum()
        assert (counts[expected == 0] == 0).all()
        common = expected >= 5  # As the approximation by chi-square asks for; the others are taken together.
        observed = [*counts[common], counts[~common].sum()]
        wanted = [*expected[common], expected[~common].sum()]
        pairs = [(o, w) for o, w in zip(observed, wanted, strict=True) if w >= 5]
        statistic = sum((o - w) ** 2 / w for o, w in pairs)
        # 5 standard deviations of a chi-square above its mean; the draws are always the same.
        degrees = len(pairs) - 1
        assert statistic < degrees + 5 * np.sqrt(2 * degrees) + 1e-9

    def test_seeds(self, fw, model):
        draw = functools.partial(fw.generate, model, IDS, LEFT)
        assert np.array_equal(draw(**SAMPLE), draw(**SAMPLE))
        assert not np.array_equal(draw(**SAMPLE), draw(**{**SAMPLE, "seed": 8}))
        unseeded = {**SAMPLE, "seed": None}
        assert not np.array_equal(draw(**unseeded), draw(**unseeded))

    def test_copies(self, fw, model):
        """Copies of a prompt differ, however they are made."""
        several = fw.generate(model, IDS, LEFT, num_return_sequences=3, **SAMPLE)
        assert len({tuple(row) for row in several.tolist()}) == 6
        repeated = fw.generate(model, IDS.repeat(3, axis=0), LEFT.repeat(3, axis=0), **SAMPLE)
        assert np.array_equal(several, repeated)

    def test_beam_sampling(self, fw, model):
        options = {**SAMPLE, "num_beams": 3, "top_k": 0, "temperature": 1.5}
        first = fw.generate(model, IDS, LEFT, **options)
        assert np.array_equal(first, fw.generate(model, IDS, LEFT, **options))
        assert not np.array_equal(first, fw.generate(model, IDS, LEFT, **{**options, "seed": 8}))
        # So narrow a choice leaves the beams of the search without chance.
        narrow = {**SAMPLE, "num_beams": 3, "top_k": 1, "temperature": 1e-3, "stop_at_eos": True, "eos_token_id": 5}
        assert fw.generate(model, IDS, **narrow).shape[0] == 2


class TestInputs:
    def test_embeddings(self, fw, model):
        expected = fw.generate(model, IDS, LEFT, max_new_tokens=9, stop_at_eos=False)
        embeddings = fw.embedded(model, IDS)
        got = fw.generate(model, inputs_embeds=embeddings, attention_mask=LEFT, max_new_tokens=9, stop_at_eos=False)
        assert np.array_equal(got, expected[:, 11:])

    def test_cache(self, fw, model):
        options = {"max_new_tokens": 9, "stop_at_eos": False}
        expected = fw.generate(model, IDS, LEFT, **options)
        cache = fw.call(model, IDS[:, :6], LEFT[:, :6], use_cache=True).past_key_values
        for _ in range(2):  # The cache stays as it was.
            got = fw.generate(model, IDS, LEFT, past_key_values=cache, **options)
            assert np.array_equal(got, expected)
        assert np.array_equal(
            fw.generate(model, IDS, LEFT, past_key_values=cache, num_beams=3, **options),
            fw.generate(model, IDS, LEFT, num_beams=3, **options),
        )
        with pytest.raises(InputError, match="input_ids has 6 columns, of which past_key_values holds 6; expected all"):
            fw.generate(model, IDS[:, :6], past_key_values=cache)
        with pytest.raises(InputError, match="past_key_values holds 2 rows, expected 3, as many as the input has"):
            fw.generate(model, IDS[[0, 1, 0]], past_key_values=cache)

    def test_processors(self, fw, model):
        plain = fw.generate(model, IDS, max_new_tokens=5, stop_at_eos=False)
        seen = []

        def negate(input_ids, scores):
            seen.append(fw.numpy(input_ids))
            return -scores

        got = fw.generate(model, IDS, logits_processor=[negate, negate], max_new_tokens=5, stop_at_eos=False)
        assert np.array_equal(got, plain)
        assert np.array_equal(seen[-1], plain[:, :-1])
        got = fw.generate(model, IDS, logits_processor=[negate], max_new_tokens=1, stop_at_eos=False)
        assert np.array_equal(got[:, -1], fw.logits(model, IDS)[:, -1].argmin(-1))

    def test_forced_first_token(self, fw, model):
        got = fw.generate(model, IDS, max_new_tokens=6, forced_bos_token_id=9, stop_at_eos=False)
        assert (got[:, 11] == 9).all()
        after = np.concatenate([IDS, [[9], [9]]], axis=1)
        assert np.array_equal(got, fw.generate(model, after, max_new_tokens=5, stop_at_eos=False))
        beams = fw.generate(model, IDS, max_new_tokens=6, forced_bos_token_id=9, stop_at_eos=False, num_beams=2)
        assert (beams[:, 11] == 9).all()

    def test_configuration(self, fw, model):
        options = GenerationConfig(max_new_tokens=3, repetition_penalty=2.0, pad_token_id=1)
        got = fw.generate(model, IDS, generation_config=options, stop_at_eos=False)
        assert np.array_equal(got, fw.generate(model, IDS, max_new_tokens=3, repetition_penalty=2.0, stop_at_eos=False))


class TestOutputs:
    def test_dictionary(self, fw, model):
        options = {"max_new_tokens": 4, "stop_at_eos": False, "return_dict_in_generate": True, "top_k": 3, **SAMPLE}
        output = model.generate(fw.tensor(IDS), output_scores=True, output_logits=True, **options)
        sequences = fw.numpy(output.sequences)
        assert len(output.scores) == len(output.logits) == 11
        expected = fw.logits(model, sequences)[:, 10:-1]
        for step, (scores, logits) in enumerate(zip(output.scores, output.logits, strict=True)):
            np.testing.assert_allclose(
                fw.numpy(logits), expected[:, step], rtol=0, atol=2e-5
            )  # Cached and full passes.
            kept = np.isfinite(fw.numpy(scores))
            assert (kept.sum(axis=1) == 3).all()
            assert kept[np.arange(2), sequences[:, 11 + step]].all()
        assert output.sequences_scores is None

    def test_beams(self, fw, model):
        options = {"max_new_tokens": 5, "stop_at_eos": False, "num_beams": 4, "num_return_sequences": 2}
        output = model.generate(fw.tensor(IDS), return_dict_in_generate=True, length_penalty=0.5, **options)
        sequences, scores = fw.numpy(output.sequences), fw.numpy(output.sequences_scores)
        logits = fw.logits(model, sequences).astype(np.float64)
        log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = np.take_along_axis(log_probabilities[:, 10:-1], sequences[:, 11:, None], -1).sum((1, 2)) / 5**0.5
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4)  # Five sums of float32 numbers around 5.
        assert (np.diff(scores.reshape(2, 2)) <= 0).all()
        parents = fw.numpy(output.beam_indices)
        assert parents.shape == (4, 5)
        assert set(parents[:2].ravel()) <= set(range(4))
        assert set(parents[2:].ravel()) <= set(range(4, 8))

    @pytest.mark.parametrize("options", [{"max_new_tokens": 7, "stop_at_eos": False}, SAMPLE])
    def test_stream(self, fw, model, options):
        expected = fw.generate(model, IDS, LEFT, **options)
        tokens = list(model.stream(fw.tensor(IDS), attention_mask=fw.tensor(LEFT), **options))
        assert np.array_equal(np.stack(tokens, axis=1), expected[:, 11:])
        first = next(model.stream(fw.tensor(IDS), attention_mask=fw.tensor(LEFT), **options))
        assert np.array_equal(first, expected[:, 11])

    def test_streamer(self, fw, model):
        events = []

        class Recorder:
            def put(self, value):
                events.append(value.tolist())

            def end(self):
                events.append("end")

        got = fw.generate(model, IDS, streamer=Recorder(), max_new_tokens=4, stop_at_eos=False)
        assert events == [IDS.tolist(), *got[:, 11:].T.tolist(), "end"]


class TestErrors:
    def test_past_the_limit_is_refused_before_computing(self, fw, model):
        with pytest.raises(InputError, match=r"position 61 is past the limit of 61 tokens; shorten"):
            fw.generate(model, IDS, max_new_tokens=51)
        assert fw.generate(model, IDS, max_new_tokens=50, stop_at_eos=False).shape == (2, 61)

    @pytest.mark.parametrize("count", [0, -1, 2.5, True])
    def test_number_of_tokens(self, fw, model, count):
        with pytest.raises(InputError, match=r"max_new_tokens is .* expected a positive integer"):
            fw.generate(model, IDS, max_new_tokens=count)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_tokens": 5}, "max_tokens is not an option of generate; expected some of bad_words_ids, "),
            ({"temperature": 0.5}, "temperature=0.5 has no effect without do_sample=True"),
            ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences is 3, but without do_sample=True"),
            ({"eos_token_id": 131}, "eos_token_id has 131, expected ids from 0 to 130"),
            ({"stop_strings": "x"}, "stop_strings needs the tokenizer"),
            ({"suppress_tokens": list(range(131))}, "suppress_tokens and bad_words_ids hold all ids"),
        ],
    )
    def test_wrong_options_of_generate(self, fw, model, options, message):
        with pytest.raises(InputError, match=message):
            fw.generate(model, IDS, **options)

    def test_prompts(self, fw, model):
        with pytest.raises(InputError, match=r"input_ids is .*, expected integers \[batch, length\], neither 0"):
            fw.generate(model, IDS[:0])
        with pytest.raises(InputError, match=r"input_ids\[0, 0\] is 131, expected 0 to 130"):
            fw.generate(model, np.full((1, 3), 131))
        with pytest.raises(InputError, match="neither input_ids nor inputs_embeds is given"):
            fw.generate(model, None, np.ones_like(IDS))
        with pytest.raises(InputError, match=r"attention_mask\[0\] is all 0"):
            fw.generate(model, IDS, np.zeros_like(IDS))

    def test_logits_that_are_no_numbers(self, fw, model):
        embeddings = fw.embedded(model, IDS)
        embeddings[1, 3] = np.nan
        for options in ({}, {"do_sample": True}, {"num_beams": 2}):
            with pytest.raises(InputError, match=r"the logits of row \d are not numbers at new token 0; check the"):
                fw.generate(model, inputs_embeds=embeddings, **options)

    def test_nothing_left(self, fw, model):
        def nothing(input_ids, scores):
            return scores - np.inf

        for options in ({}, {"do_sample": True}):
            with pytest.raises(InputError, match="row 0 has no token left at new token 0: all are banned"):
                fw.generate(model, IDS, logits_processor=[nothing], **options)
