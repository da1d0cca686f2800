"""Rows that have ended leave the batch, unless somebody looks at all of them; the texts stay the same."""

import dataclasses

import numpy as np
import pytest

from tests.generation.test_loop import PAD, TEXTS, FakeEngine, continuation, padded, request
from tests.helpers.models import IDS
from xglm_core.generation.loop import generate, stream

# Where each text ends: in the first block, in the second, in the third, and never.
STEPS = (3, 18, 35)
EOS = tuple(continuation(text, step)[-1] for text, step in zip(TEXTS, STEPS, strict=False))
COUNT = 50
NEW = [continuation(text, COUNT, EOS) for text in TEXTS]


class Engine(FakeEngine):
    """Notes how many rows each step computes."""

    def __init__(self, bucket=1):
        super().__init__(bucket)
        self.rows = []

    def feed(self, tokens):
        self.rows.append(len(tokens))
        super().feed(tokens)


def call(**options):
    return request(*padded(TEXTS, "right", 9), max_new_tokens=COUNT, eos_token_id=EOS, **options)


def expected():
    longest = max(map(len, NEW))
    return [row + [PAD] * (longest - len(row)) for row in NEW]


def test_texts_end_where_these_tests_need_it():
    assert [len(row) for row in NEW] == [*STEPS, COUNT]


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 1}, {"repetition_penalty": 1.5}])
def test_after_each_block(options):
    engine = Engine()
    assert generate(engine, call(**options)).sequences[:, 9:].tolist() == expected()
    # The first token comes from the prompt. Blocks are of 16 steps.
    assert engine.rows == [4] * 16 + [3] * 16 + [2] * 16 + [1]


def test_after_each_token_of_a_stream():
    engine = Engine()
    assert np.stack([*stream(engine, call())], axis=1).tolist() == expected()
    alive = [sum(len(row) > step for row in NEW) for step in range(1, COUNT)]
    assert engine.rows == alive


def test_in_any_order():
    for order in ([3, 0, 1, 2], [0, 3, 2, 1]):
        ids, mask = padded([TEXTS[place] for place in order], "left", 9)
        engine = Engine()
        found = generate(engine, request(ids, mask, max_new_tokens=COUNT, eos_token_id=EOS)).sequences[:, 9:]
        assert found.tolist() == [expected()[place] for place in order]
        assert sum(engine.rows) == 16 * (4 + 3 + 2) + 1


class TestCompiled:
    def test_powers_of_two_remain_where_programs_are_used_again(self):
        engine, many = Engine(16), call()
        many.numbers = [0] * len(TEXTS)
        assert generate(engine, many).sequences[:, 9:].tolist() == expected()
        assert engine.rows == [4] * 32 + [2] * 16 + [1]

    def test_none_leaves_for_which_a_program_would_have_to_be_compiled(self):
        engine = Engine(16)
        assert generate(engine, call()).sequences[:, 9:].tolist() == expected()
        assert engine.rows == [4] * 49


class TestStay:
    @pytest.mark.parametrize(
        "seen", [{"criteria": [lambda ids, scores: False]}, {"prefix": lambda row, ids: range(99)}]
    )
    def test_where_a_function_sees_them(self, seen, monkeypatch):
        engine = Engine()
        monkeypatch.setattr(engine, "ids", lambda ids: ids, raising=False)
        generate(engine, dataclasses.replace(call(), **seen))
        assert {*engine.rows} == {4}

    def test_where_the_result_holds_their_cache(self, monkeypatch):
        engine = Engine()
        monkeypatch.setattr(engine, "cache", lambda places, mask: len(mask), raising=False)
        assert generate(engine, call(return_dict_in_generate=True)).past_key_values == 4
        assert {*engine.rows} == {4}

    def test_where_a_method_of_the_user_prepares_each_step(self):
        engine = Engine()
        engine.shows_rows = True
        assert generate(engine, call()).sequences[:, 9:].tolist() == expected()
        assert {*engine.rows} == {4}


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 7, "temperature": 2.0, "repetition_penalty": 1.2}])
def test_texts_of_models_are_those_of_each_prompt_alone(fw, model, options):
    """In PyTorch rows leave; elsewhere see test_many_prompts.py."""
    if fw.name != "torch":
        pytest.skip("one call compiles for one number of rows")
    prompts = np.concatenate([IDS, IDS[:, ::-1], (IDS + 1) % 131])
    free = fw.generate(model, prompts, max_new_tokens=40, stop_at_eos=False, **options)[:, 11:]
    eos = [int(free[0, 2]), int(free[3, 20])]
    options = {**options, "max_new_tokens": 40, "eos_token_id": eos}
    together = fw.generate(model, prompts, **options)
    alone = [fw.generate(model, prompts[row : row + 1], **options)[0] for row in range(len(prompts))]
    assert len({len(row) for row in alone}) > 1
    for row, text in zip(together, alone, strict=True):
        assert row[: len(text)].tolist() == text.tolist()
        assert (row[len(text) :] == PAD).all()
