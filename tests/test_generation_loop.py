import numpy as np
import pytest

from xglm_core import GenerationConfig, XGLMConfig
from xglm_core.errors import InputError
from xglm_core.generation.loop import generate

CONFIG = XGLMConfig(vocab_size=10007, max_position_embeddings=61, d_model=4, attention_heads=1)
PAD = 1


def next_token(text):
    """What follows a text: any function of all its tokens and their order, never the padding id."""
    state = 7
    for token in text:
        state = (state * 7919 + token) % 1_000_003
    return 2 + state % 10005


def continuation(prompt, count, eos=()):
    """The oracle: one row alone, token by token."""
    text = list(prompt)
    while len(text) < len(prompt) + count:
        text.append(next_token(text))
        if text[-1] in eos:
            break
    return text[len(prompt) :]


class FakeEngine:
    """Continues rows by `next_token`, records what it is asked, and knows nothing but ids and mask."""

    def __init__(self, bucket=1):
        self.bucket = bucket
        self.steps = []

    def prefill(self, input_ids, attention_mask, capacity):
        assert input_ids.dtype == attention_mask.dtype == np.int64
        assert input_ids.shape == attention_mask.shape
        assert (np.diff(attention_mask, axis=1) >= 0).all(), "padding is on the left"
        assert (input_ids[attention_mask == 0] == PAD).all()
        self.length, self.capacity = input_ids.shape[1], capacity
        self.texts = [ids[mask == 1].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        return self.step()

    def advance(self, steps):
        self.steps.append(steps)
        return np.stack([self.step() for _ in range(steps)], axis=1)

    def step(self):
        for text in self.texts:
            text.append(next_token(text))
        return np.array([text[-1] for text in self.texts])


def run(ids, mask=None, engine=None, config=CONFIG, **options):
    ids = np.asarray(ids)
    mask = None if mask is None else np.asarray(mask)
    return generate(engine or FakeEngine(), ids, mask, config, GenerationConfig(**{"pad_token_id": PAD, **options}))


def padded(texts, side, length):
    """Texts as ids and mask of `length` columns."""
    ids, mask = np.full((len(texts), length), PAD), np.zeros((len(texts), length), int)
    for row, text in enumerate(texts):
        place = slice(length - len(text), length) if side == "left" else slice(len(text))
        ids[row, place], mask[row, place] = text, 1
    return ids, mask


TEXTS = [[5], [9, 8, 7, 6, 5, 4, 3], [40, 41, 42], [2, 100, 130]]


class TestText:
    @pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 18, 33, 40])
    def test_one_row(self, count):
        result = run([[5, 6, 7]], max_new_tokens=count)
        assert result.tolist() == [[5, 6, 7, *continuation([5, 6, 7], count)]]
        assert result.dtype == np.int64

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("length", [7, 8, 20])
    @pytest.mark.parametrize("bucket", [1, 4, 16])
    def test_a_row_does_not_depend_on_padding_or_neighbours(self, side, length, bucket):
        ids, mask = padded(TEXTS, side, length)
        result = run(ids, mask, FakeEngine(bucket), max_new_tokens=19)
        np.testing.assert_array_equal(result[:, :length], ids)
        assert result[:, length:].tolist() == [continuation(text, 19) for text in TEXTS]

    def test_holes_in_the_mask(self):
        result = run([[5, 99, 6, 99, 7, 99]], [[1, 0, 1, 0, 1, 0]], max_new_tokens=5)
        assert result.tolist() == [[5, 99, 6, 99, 7, 99, *continuation([5, 6, 7], 5)]]

    def test_mask_of_another_type(self):
        ids, mask = padded(TEXTS, "right", 9)
        for other in (mask.astype(bool), mask.astype(np.float32), mask.astype(np.uint8), mask * 5):
            np.testing.assert_array_equal(run(ids, other), run(ids, mask))

    @pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8, np.uint64])
    def test_ids_of_another_type(self, dtype):
        result = run(np.array([[5, 130]], dtype))
        assert result.dtype == np.int64
        assert result.tolist() == [[5, 130, *continuation([5, 130], 20)]]

    def test_padding_id_among_the_tokens_counts_as_a_token(self):
        assert run([[PAD, 5, PAD]], max_new_tokens=3).tolist() == [[PAD, 5, PAD, *continuation([PAD, 5, PAD], 3)]]

    def test_inputs_are_not_modified(self):
        ids, mask = padded(TEXTS, "right", 9)
        ids.flags.writeable = mask.flags.writeable = False
        run(ids, mask, eos_token_id=(3,))


class TestEnd:
    def eos_at(self, text, step):
        """The token that `text` reaches at a step and not before."""
        reached = continuation(text, step)
        assert reached[-1] not in reached[:-1]
        return reached[-1]

    @pytest.mark.parametrize("step", [1, 2, 5, 16, 17, 18, 20])
    def test_stops_right_after_the_end(self, step):
        eos = self.eos_at([5, 6], step)
        engine = FakeEngine()
        result = run([[5, 6]], engine=engine, max_new_tokens=20, eos_token_id=(eos,))
        assert result.tolist() == [[5, 6, *continuation([5, 6], step)]]
        assert result[0, -1] == eos
        # Never more than one block of 16 past the end.
        assert sum(engine.steps) + 1 <= step + 16

    def test_rows_that_ended_are_padded(self):
        eos = tuple(self.eos_at(text, step) for text, step in zip(TEXTS, (1, 3, 18, 7), strict=True))
        ids, mask = padded(TEXTS, "left", 7)
        expected = [continuation(text, 30, eos) for text in TEXTS]
        longest = max(map(len, expected))
        result = run(ids, mask, max_new_tokens=30, eos_token_id=eos)
        assert len({len(row) for row in expected}) > 1
        assert result[:, 7:].tolist() == [row + [PAD] * (longest - len(row)) for row in expected]

    def test_one_row_never_ends(self):
        eos = (self.eos_at(TEXTS[0], 2),)
        expected = [continuation(text, 40, eos) for text in TEXTS[:2]]
        assert [len(row) for row in expected] == [2, 40]
        ids, mask = padded(TEXTS[:2], "left", 7)
        result = run(ids, mask, max_new_tokens=40, eos_token_id=eos)
        assert result[:, 7:].tolist() == [expected[0] + [PAD] * 38, expected[1]]

    def test_end_of_text_in_the_prompt_is_no_end(self):
        eos = 2
        assert run([[2, 5, 2]], max_new_tokens=6, eos_token_id=(eos,)).tolist()[0][:3] == [2, 5, 2]
        assert run([[2, 5, 2]], max_new_tokens=6, eos_token_id=(eos,)).shape == (1, 9)

    def test_no_end(self):
        eos = self.eos_at([5, 6], 2)
        assert eos in run([[5, 6]], max_new_tokens=30, eos_token_id=()).tolist()[0][2:]
        assert run([[5, 6]], max_new_tokens=30, eos_token_id=()).shape == (1, 32)

    def test_padding_id_that_is_an_end(self):
        """Models without a padding id fill with their end of text."""
        texts = [[5, 6], [9, 8]]
        eos = self.eos_at(texts[0], 3)
        expected = [continuation(text, 9, (eos,)) for text in texts]
        result = run(np.array(texts), max_new_tokens=9, eos_token_id=(eos,), pad_token_id=eos)
        assert result[:, 2:].tolist() == [row + [eos] * (9 - len(row)) for row in expected]


class TestWork:
    @pytest.mark.parametrize("count", [1, 2, 16, 17, 18, 40])
    def test_blocks(self, count):
        engine = FakeEngine()
        run([[5]], engine=engine, max_new_tokens=count)
        assert sum(engine.steps) == count - 1
        assert all(steps == 16 for steps in engine.steps[:-1])
        assert all(1 <= steps <= 16 for steps in engine.steps)

    def test_stops_when_the_last_row_has_ended(self):
        """Even if the others ended in earlier blocks."""
        eos = (continuation(TEXTS[0], 2)[-1], continuation(TEXTS[1], 18)[-1])
        engine = FakeEngine()
        result = run(*padded(TEXTS[:2], "left", 7), engine, max_new_tokens=50, eos_token_id=eos)
        assert result.shape == (2, 7 + 18)
        assert engine.steps == [16, 16]

    @pytest.mark.parametrize(
        ("bucket", "longest", "count", "length", "capacity"),
        [
            (1, 7, 5, 7, 12),
            (8, 7, 5, 8, 16),
            (8, 8, 8, 8, 16),
            (8, 9, 9, 16, 32),
            (16, 1, 17, 16, 48),
            (64, 50, 3, 64, 128),
        ],
    )
    def test_rounding_to_buckets(self, bucket, longest, count, length, capacity):
        engine = FakeEngine(bucket)
        ids, mask = padded([[5], list(range(3, 3 + longest))], "right", longest + 2)
        run(ids, mask, engine, max_new_tokens=count)
        assert (engine.length, engine.capacity) == (length, capacity)

    def test_columns_of_padding_alone_are_not_computed(self):
        engine = FakeEngine()
        run(*padded([[5, 6], [7]], "left", 50), engine, max_new_tokens=3)
        assert engine.length == 2


class TestErrors:
    def test_limit(self):
        """The last token has position 60, the last of the table."""
        assert run([[5, 6, 7]], max_new_tokens=58).shape == (1, 61)
        with pytest.raises(InputError, match="position 61 is past the limit of 61 tokens"):
            run([[5, 6, 7]], max_new_tokens=59)

    def test_limit_counts_tokens_not_padding(self):
        ids, mask = padded([[5], [6, 7]], "right", 60)
        assert run(ids, mask, max_new_tokens=59).shape == (2, 119)
        with pytest.raises(InputError, match="position 61 is past the limit"):
            run(ids, mask, max_new_tokens=60)

    def test_row_without_tokens(self):
        with pytest.raises(InputError, match=r"attention_mask\[1\] is all 0, expected at least one token in each row"):
            run([[5, 6], [5, 6]], [[0, 1], [0, 0]])

    @pytest.mark.parametrize("mask", [[[1]], [[1, 1, 1]], [[1, 1], [1, 1]], [1, 1]])
    def test_mask_of_another_shape(self, mask):
        with pytest.raises(InputError, match=r"attention_mask is \[.*\], expected \[1, 2\]$"):
            run([[5, 6]], mask)

    @pytest.mark.parametrize("ids", [[[10007]], [[-1]], [5, 6], [[5.0]], [[]], [[True]]])
    def test_impossible_ids(self, ids):
        with pytest.raises(InputError, match="input_ids"):
            run(ids)

    @pytest.mark.parametrize("count", [0, -1, 1.0, "5", None, True])
    def test_impossible_count(self, count):
        with pytest.raises(InputError, match=r"max_new_tokens is .*, expected a positive integer"):
            GenerationConfig(max_new_tokens=count)
        with pytest.raises(InputError, match=r"max_new_tokens is .*, expected a positive integer"):
            GenerationConfig.from_model(CONFIG, max_new_tokens=count)


class TestConfig:
    def test_defaults(self):
        assert GenerationConfig() == GenerationConfig(max_new_tokens=20, eos_token_id=(), pad_token_id=1)

    @pytest.mark.parametrize(
        ("eos", "pad", "stop", "expected"),
        [
            (2, 1, True, ((2,), 1)),
            ([2, 7], 1, True, ((2, 7), 1)),
            (2, 1, False, ((), 1)),
            (None, 3, True, ((), 3)),
            (5, None, True, ((5,), 5)),
            ([6, 5], None, False, ((), 6)),
            (None, None, True, ((), 0)),
        ],
    )
    def test_from_model(self, eos, pad, stop, expected):
        model = XGLMConfig(vocab_size=131, eos_token_id=eos, pad_token_id=pad)
        options = GenerationConfig.from_model(model, max_new_tokens=3, stop_at_eos=stop)
        assert options == GenerationConfig(3, *expected)
