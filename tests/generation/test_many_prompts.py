"""More prompts than a batch holds: their order, their texts, and what the engine does for them."""

import itertools

import numpy as np
import pytest

from tests.generation.test_loop import CONFIG, FakeEngine, continuation
from tests.helpers.models import IDS, core_decides
from xglm_core import GenerationConfig
from xglm_core.errors import InputError
from xglm_core.generation.many import generate_many
from xglm_core.generation.surface import GenerationSurface

SAMPLE = {"do_sample": True, "temperature": 2.0, "top_k": 0}


class FakeModel(GenerationSurface):
    """Continues prompts by `FakeEngine`, and keeps the engines of all batches."""

    def __init__(self, bucket=1):
        self.config, self.generation_config = CONFIG, GenerationConfig(pad_token_id=1)
        self.bucket, self.engines, self.seeds = bucket, [], []

    def _engine(self, past, prompts, options, **own):
        self.engines.append(FakeEngine(self.bucket))
        return self.engines[-1]

    def _as_cache(self, past_key_values):
        return past_key_values

    def _is_traced(self, *values):
        return False

    def _draw_seed(self):
        self.seeds.append(len(self.seeds))
        return self.seeds[-1]


PROMPTS = [[5 + place, *range(3, 3 + place * 7 % 11)] for place in range(21)]


class TestOrder:
    @pytest.mark.parametrize("batch_size", [1, 2, 5, 8, 100])
    @pytest.mark.parametrize("bucket", [1, 8])
    def test_is_that_of_the_prompts(self, batch_size, bucket):
        found = [*generate_many(FakeModel(bucket), PROMPTS, batch_size, max_new_tokens=9)]
        assert [row.tolist() for row in found] == [continuation(prompt, 9) for prompt in PROMPTS]
        assert all(row.dtype == np.int64 for row in found)

    def test_prompts_of_like_length_go_together_the_longest_first(self):
        model = FakeModel()
        [*generate_many(model, PROMPTS, 3, max_new_tokens=2)]
        lengths = sorted(map(len, PROMPTS), reverse=True)
        assert [engine.length for engine in model.engines] == lengths[::3]

    def test_few_are_read_ahead(self):
        read = []
        prompts = (read.append(place) or [5 + place] for place in itertools.count())
        found = generate_many(FakeModel(), prompts, 2, max_new_tokens=3)
        assert read == []
        assert next(found).tolist() == continuation([5], 3)
        assert len(read) == 16

    def test_texts_end(self):
        eos = (continuation(PROMPTS[0], 2)[-1], continuation(PROMPTS[9], 5)[-1])
        found = [*generate_many(FakeModel(), PROMPTS, 4, max_new_tokens=20, eos_token_id=eos)]
        assert [row.tolist() for row in found] == [continuation(prompt, 20, eos) for prompt in PROMPTS]
        assert len({len(row) for row in found}) > 1

    def test_of_some_alone(self):
        found = [*generate_many(FakeModel(), PROMPTS, 4, max_new_tokens=3, begin=7)]
        assert [row.tolist() for row in found] == [continuation(prompt, 3) for prompt in PROMPTS[7:]]
        assert [*generate_many(FakeModel(), PROMPTS, begin=30)] == []
        assert [*generate_many(FakeModel(), [])] == []


def test_one_seed_is_drawn_for_all():
    model = FakeModel()
    [*generate_many(model, PROMPTS, 4, do_sample=True, max_new_tokens=2)]
    assert model.seeds == [0]


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch_size": 0}, "batch_size is 0, expected a positive integer"),
            ({"batch_size": 2.0}, "batch_size is 2.0, expected a positive integer"),
            ({"past_key_values": ()}, "generate_many takes no past_key_values, which belongs to the rows of one batch"),
            ({"prefix_allowed_tokens_fn": list}, "generate_many takes no prefix_allowed_tokens_fn"),
            ({"max_length": 30}, "generate_many takes no max_length, which counts columns of padding"),
            ({"min_length": 9}, "generate_many takes no min_length, which is for one batch; use min_new_tokens"),
            (
                {"num_return_sequences": 2, "do_sample": True},
                "takes no num_return_sequences, .*; use the prompt several",
            ),
            ({"return_dict_in_generate": True}, "generate_many takes no return_dict_in_generate"),
            ({"max_new_tokens": 0}, "max_new_tokens is 0"),
            ({"speed": 1}, "speed is not an option of generate"),
        ],
    )
    def test_of_options(self, options, message):
        with pytest.raises(InputError, match=message):
            next(generate_many(FakeModel(), PROMPTS, **options))

    def test_of_prompts(self):
        for prompts, message in (
            ([[5], []], r"prompts\[1\] is empty, expected ids"),
            ([[5], [CONFIG.vocab_size]], "input_ids"),
            ([[5] * 60], "position 79 is past the limit of 61 tokens"),
        ):
            with pytest.raises(InputError, match=message):
                next(generate_many(FakeModel(), prompts))


class TestModels:
    """Texts of models; compiled programs are for powers of two."""

    PROMPTS = tuple(row[: 11 - cut].tolist() for cut in range(3) for row in (*IDS, (IDS[0] * 7 + 5) % 131))

    @pytest.mark.parametrize(("size", "options"), [(2, {}), (4, {**SAMPLE, "seed": 3})], ids=["greedy", "sampled"])
    def test_are_those_of_each_prompt_alone(self, fw, model, size, options, monkeypatch):
        engine = type(fw.engine(model))
        steps = []
        advance = engine.advance

        def counted(self, tokens, rules, keys):
            steps.append((len(tokens), keys.shape[1]))
            return advance(self, tokens, rules, keys)

        monkeypatch.setattr(engine, "advance", counted)
        options = {**options, "max_new_tokens": 40}

        def alone(**more):
            ids = [np.array([prompt]) for prompt in self.PROMPTS]
            texts = [fw.generate(model, row, np.ones_like(row), **options, **more)[0] for row in ids]
            return [text[len(prompt) :].tolist() for text, prompt in zip(texts, self.PROMPTS, strict=True)]

        free = alone(stop_at_eos=False)
        ends = {"eos_token_id": [free[0][2], free[4][9], free[6][20]]}
        expected = alone(**ends)
        assert len({-(-(len(row) - 1) // 16) for row in expected}) > 1, "rows end in different blocks"
        steps.clear()
        found = [row.tolist() for row in generate_many(model, self.PROMPTS, size, **options, **ends)]
        assert found == expected
        work = sum(rows * count for rows, count in steps)
        # Without leaving: each batch is computed until its last row has ended.
        order = sorted(range(len(expected)), key=lambda place: -len(self.PROMPTS[place]))
        batches = [
            [len(expected[place]) for place in order[begin : begin + size]] for begin in range(0, len(order), size)
        ]
        assert work < sum(len(batch) * (min(40, -(-(max(batch) - 1) // 16) * 16 + 1) - 1) for batch in batches)
        if fw.name != "torch":
            assert {rows for rows, _ in steps} <= {4, 2, 1}

    def test_copies_of_a_prompt_are_those_of_one_batch(self, fw, model):
        """Wherever they are, and also if the first ones were continued before."""
        core_decides(fw)
        prompts = [self.PROMPTS[0]] * 3 + [self.PROMPTS[1]] + [self.PROMPTS[0]]
        options = {**SAMPLE, "seed": 3, "max_new_tokens": 5, "stop_at_eos": False}
        together = fw.generate(model, np.array(prompts), **options)[:, 11:].tolist()
        assert len({tuple(row) for row in together}) == 5
        for begin, batch_size in ((0, 4), (2, 4), (4, 1)):
            found = generate_many(model, prompts, batch_size, begin=begin, **options)
            assert [row.tolist() for row in found] == together[begin:]

    def test_beams(self, fw, model):
        core_decides(fw)
        options = {"num_beams": 2, "max_new_tokens": 7}
        ids = [np.array([prompt]) for prompt in self.PROMPTS[:3]]
        options["eos_token_id"] = int(fw.generate(model, ids[0], **options, stop_at_eos=False)[0, 13])
        expected = [fw.generate(model, row, np.ones_like(row), **options)[0, 11:].tolist() for row in ids]
        found = [row.tolist() for row in generate_many(model, self.PROMPTS[:3], 3, **options)]
        assert found == expected
