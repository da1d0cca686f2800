"""The loop, its options and its prompts, over an engine that is a few lines of Python."""

import numpy as np
import pytest

from tests.helpers.models import changed
from xglm_core import GenerationConfig, XGLMConfig, XGLMTokenizer
from xglm_core.errors import ConfigError, InputError
from xglm_core.generation.loop import Request, generate, stream
from xglm_core.generation.prompts import Prompts
from xglm_core.generation.streaming import TextStreamer, texts_of

CONFIG = XGLMConfig(vocab_size=10007, max_position_embeddings=61, d_model=4, attention_heads=1)
PAD = 1
TINY = "examples/tiny_model/checkpoint"


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

    logits = None
    shows_rows = False

    def __init__(self, bucket=1):
        self.bucket = bucket
        self.steps = []

    def prefill(self, tokens, attention_mask, capacity, seen):
        assert tokens.dtype == attention_mask.dtype == np.int64
        assert tokens.shape == attention_mask.shape
        assert (np.diff(attention_mask, axis=1) >= 0).all(), "padding is on the left"
        assert (tokens[attention_mask == 0] == PAD).all()
        self.length, self.capacity, self.seen = tokens.shape[1], capacity, seen
        self.texts = [ids[mask == 1].tolist() for ids, mask in zip(tokens, attention_mask, strict=True)]

    def reorder(self, rows):
        self.texts = [list(self.texts[row]) for row in rows]

    def feed(self, tokens):
        for text, token in zip(self.texts, tokens.tolist(), strict=True):
            text.append(token)

    def select(self, rules, keys):
        self.rules = rules
        assert keys.shape == (len(self.texts), 2)
        assert rules.banned.shape[0] == len(self.texts)
        return np.array([next_token(text) for text in self.texts])

    def advance(self, tokens, rules, keys):
        self.steps.append(keys.shape[1])
        selected = []
        for step in range(keys.shape[1]):
            self.feed(tokens)
            tokens = self.select(rules, keys[:, step])
            selected.append(tokens)
        return np.stack(selected, axis=1)


def request(ids, mask=None, config=CONFIG, tokenizer=None, **options):
    prompts = Prompts.of(config, np.asarray(ids), None if mask is None else np.asarray(mask))
    generation = GenerationConfig(pad_token_id=PAD).updated(options)
    return Request(config, generation, prompts, tokenizer=tokenizer)


def run(ids, mask=None, engine=None, **options):
    return generate(engine or FakeEngine(), request(ids, mask, **options)).sequences


def padded(texts, side, length):
    """Texts as ids and mask of `length` columns."""
    ids, mask = np.full((len(texts), length), PAD), np.zeros((len(texts), length), int)
    for row, text in enumerate(texts):
        place = slice(length - len(text), length) if side == "left" else slice(len(text))
        ids[row, place], mask[row, place] = text, 1
    return ids, mask


TEXTS = [[5], [9, 8, 7, 6, 5, 4, 3], [40, 41, 42], [2, 100, 130]]


@pytest.fixture(scope="module")
def tokenizer():
    return XGLMTokenizer.from_pretrained(TINY)


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
        assert result.dtype == (np.int64 if dtype is np.uint8 else dtype)  # Which cannot hold all ids.
        assert result.tolist() == [[5, 130, *continuation([5, 130], 20)]]

    def test_padding_id_among_the_tokens_counts_as_a_token(self):
        for text, mask in (([PAD, 5, PAD], [[1, 1, 1]]), ([5, PAD, PAD, 6], None), ([PAD], [[1]])):
            assert run([text], mask, max_new_tokens=3).tolist() == [[*text, *continuation(text, 3)]]

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_id_at_an_end_of_a_row_without_mask(self, side):
        ids, _ = padded([*TEXTS, [5, PAD, 6]], side, 8)
        result = run(ids, max_new_tokens=5)
        assert result[:, 8:].tolist() == [continuation(text, 5) for text in [*TEXTS, [5, PAD, 6]]]
        assert run([[PAD, 5, PAD]], max_new_tokens=5)[0, 3:].tolist() == continuation([5], 5)

    @pytest.mark.parametrize("options", [{"eos_token_id": PAD}, {"eos_token_id": (3, PAD)}, {"pad_token_id": None}])
    def test_padding_id_that_may_be_text_without_mask(self, options):
        """It ends texts as well, or there is none."""
        for more in ({}, {"stop_at_eos": False}):
            if {*options, *more} != {"eos_token_id", "stop_at_eos"}:
                expected = continuation([PAD, 5], 3, eos=(PAD,))
                assert run([[PAD, 5]], max_new_tokens=3, **options, **more)[0, 2:].tolist() == expected

    def test_inputs_are_not_modified(self):
        ids, mask = padded(TEXTS, "right", 9)
        ids.flags.writeable = mask.flags.writeable = False
        run(ids, mask, eos_token_id=(3,))

    def test_several_of_each_prompt(self):
        result = run(*padded(TEXTS, "left", 7), do_sample=True, num_return_sequences=3, max_new_tokens=4)
        assert result[:, 7:].tolist() == [continuation(text, 4) for text in TEXTS for _ in range(3)]


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
        assert run([[2, 5, 2]], max_new_tokens=6, eos_token_id=2).shape == (1, 9)

    def test_no_end(self):
        eos = self.eos_at([5, 6], 2)
        config = changed(CONFIG, eos_token_id=eos)
        generation = GenerationConfig.from_model(config)
        for stop, length in ((True, 4), (False, 32)):
            options = generation.updated({"stop_at_eos": stop, "max_new_tokens": 30})
            result = generate(FakeEngine(), Request(config, options, Prompts.of(config, np.array([[5, 6]]), None)))
            assert result.sequences.shape == (1, length)

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

    def test_blocks_end_where_rules_change(self):
        engine = FakeEngine()
        run([[5]], engine=engine, max_new_tokens=40, min_new_tokens=10, eos_token_id=3)
        assert engine.steps == [9, 16, 14]
        engine = FakeEngine()
        run([[5]], engine=engine, max_new_tokens=4, no_repeat_ngram_size=2)
        assert engine.steps == [1, 1, 1]

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

    def test_a_stream_goes_no_further_than_it_is_asked(self):
        engine = FakeEngine()
        tokens = stream(engine, request([[5, 6]], max_new_tokens=30))
        assert [next(tokens).tolist() for _ in range(3)] == [[token] for token in continuation([5, 6], 3)]
        assert len(engine.texts[0]) == 4


class TestRules:
    def test_banned_ids(self):
        engine = FakeEngine()
        run([[5, 6]], engine=engine, max_new_tokens=1, suppress_tokens=[7, 9], bad_words_ids=[[8], [5, 6, 30], [6, 31]])
        assert engine.rules.banned.tolist() == [[7, 8, 9, 30, 31, *[CONFIG.vocab_size] * 3]]
        assert engine.rules.banned.dtype == np.int32
        assert engine.seen is None

    def test_seen_ids(self):
        engine = FakeEngine()
        run(*padded([[5, 6], [7]], "left", 4), engine, max_new_tokens=1, repetition_penalty=1.1)
        assert engine.seen.tolist() == [[5, 6], [7, CONFIG.vocab_size]]

    def test_no_ban_is_no_column(self):
        engine = FakeEngine()
        run([[5, 6]], engine=engine, max_new_tokens=1)
        assert engine.rules.banned.shape == (1, 0)

    def test_ngrams(self):
        engine = FakeEngine()
        run([[5, 6, 7, 5, 6, 8, 5, 6]], engine=engine, max_new_tokens=1, no_repeat_ngram_size=3)
        assert {*engine.rules.banned[0].tolist()} - {CONFIG.vocab_size} == {7, 8}
        run([[5, 6, 5]], engine=engine, max_new_tokens=1, no_repeat_ngram_size=1)
        assert {*engine.rules.banned[0].tolist()} - {CONFIG.vocab_size} == {5, 6}


class TestStopStrings:
    def run(self, tokenizer, text, **options):
        """Continues "The" by a text, token by token."""
        ids = tokenizer.encode(text)
        begin = len(tokenizer.encode("The"))
        assert tokenizer.encode("The") == ids[:begin]

        class Engine(FakeEngine):
            def select(self, rules, keys):
                return np.array([(ids + [2] * 50)[len(row)] for row in self.texts])

        config = changed(CONFIG, vocab_size=len(tokenizer))
        result = run([ids[:begin]], engine=Engine(), config=config, tokenizer=tokenizer, **options)
        return tokenizer.decode(result[0, begin:])

    @pytest.mark.parametrize(
        ("stops", "begin"),
        [("dog", "little dog"), (["cat", " dog"], "little dog"), (" little", "little"), ("The", "little dog and the")],
    )
    def test_ends_with_the_token_that_completes_one(self, tokenizer, stops, begin):
        text = self.run(tokenizer, "The little dog and the bread", max_new_tokens=12, stop_strings=stops)
        assert text.startswith(begin)
        assert len(text) < len(begin) + 6 or stops == "The"

    def test_impossible(self, tokenizer):
        for stops, message in (
            ("\n", r"stop_strings has '\\n', which the tokenizer's texts never contain; newlines"),
            (["a", "a  b"], "stop_strings has 'a  b', which"),
            ([""], r"stop_strings is \[''\], expected a string that is not empty, or a list of such"),
        ):
            with pytest.raises(InputError, match=message):
                self.run(tokenizer, "The dog", stop_strings=stops)


class TestStreaming:
    @pytest.mark.parametrize(
        "text", ["The little dog", "После школы дети", "子どもたちは学校で本を読む", "हर सुबह", "كل صباح"]
    )
    def test_pieces_are_the_text(self, tokenizer, text):
        ids = tokenizer.encode(text)
        pieces = list(texts_of(tokenizer, ids))
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True) == text
        assert len([piece for piece in pieces if piece]) > 1

    def test_streamer(self, tokenizer, capsys):
        ids = np.array([tokenizer.encode("The little dog")])
        for skip, expected in ((False, "The little dog and\n"), (True, " and\n")):
            streamer = TextStreamer(tokenizer, skip_prompt=skip)
            for _ in range(2):  # It can be used again.
                streamer.put(ids)
                for token in tokenizer.encode("and", add_special_tokens=False):
                    streamer.put(np.array([token]))
                streamer.end()
                assert capsys.readouterr().out == expected
        with pytest.raises(InputError, match="TextStreamer prints one row, but the batch has 2"):
            streamer.put(ids.repeat(2, axis=0))


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

    def test_max_length(self):
        assert run([[5, 6, 7]], max_length=9).shape == (1, 9)
        with pytest.raises(InputError, match="max_length is 3, but the prompt has 3 columns; expected more"):
            run([[5, 6, 7]], max_length=3)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_new_tokens": 0}, "max_new_tokens is 0, expected a positive integer"),
            ({"max_new_tokens": "5"}, "max_new_tokens is '5', expected a positive integer"),
            ({"max_new_tokens": True}, "max_new_tokens is True, expected a positive integer"),
            ({"max_length": 5, "max_new_tokens": 5}, "max_length and max_new_tokens are both given"),
            ({"max_new_tokens": 5, "min_new_tokens": 6}, "min_new_tokens is 6, expected at most max_new_tokens=5"),
            ({"temperature": 0.0, "do_sample": True}, "temperature is 0.0, expected a positive number"),
            ({"top_p": 1.1, "do_sample": True}, "top_p is 1.1, expected a number above 0, at most 1"),
            ({"min_p": 2, "do_sample": True}, "min_p is 2, expected a number from 0 to 1, or None"),
            ({"typical_p": 0, "do_sample": True}, "typical_p is 0, expected a number above 0"),
            ({"top_k": -1, "do_sample": True}, "top_k is -1, expected an integer, 0 or more"),
            ({"seed": -1, "do_sample": True}, "seed is -1, expected an integer, 0 or more, or None"),
            ({"top_p": 0.5}, "top_p=0.5 has no effect without do_sample=True"),
            ({"seed": 5}, "seed=5 has no effect without do_sample=True"),
            ({"length_penalty": 2.0}, "length_penalty=2.0 has no effect without num_beams of 2 or more"),
            (
                {"early_stopping": "always", "num_beams": 2},
                "early_stopping is 'always', expected True, False or 'never'",
            ),
            ({"output_scores": True}, "output_scores=True has no effect without return_dict_in_generate=True"),
            ({"num_return_sequences": 2}, "num_return_sequences is 2, but without do_sample=True or as many num_beams"),
            (
                {"num_return_sequences": 3, "num_beams": 2, "do_sample": True},
                "num_return_sequences is 3, expected at most num_beams=2",
            ),
            ({"eos_token_id": 5, "stop_at_eos": False}, "eos_token_id and stop_at_eos=False are both given"),
            ({"repetition_penalty": 0}, "repetition_penalty is 0, expected a positive number"),
            ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1, expected an integer, 0 or more"),
            ({"bad_words_ids": [[]]}, "bad_words_ids is .*, expected a list of lists of ids, none of them empty"),
            ({"bad_words_ids": [[20_000]]}, "bad_words_ids has 20000, expected ids from 0 to 10006"),
            ({"suppress_tokens": [-1]}, "suppress_tokens has -1, expected ids from 0 to 10006"),
            ({"forced_bos_token_id": 10007}, "forced_bos_token_id has 10007, expected ids from 0 to 10006"),
            ({"pad_token_id": 10007}, "pad_token_id has 10007, expected ids from 0 to 10006"),
            ({"stop_strings": "a"}, "stop_strings needs the tokenizer; give generate"),
            (
                {"speed": 1},
                "speed is not an option of generate; expected some of bad_words_ids, begin_sup",
            ),
        ],
    )
    def test_wrong_options_of_the_loop(self, options, message):
        with pytest.raises(InputError, match=message):
            run([[5, 6]], **options)

    def test_beams_do_not_stream(self):
        with pytest.raises(InputError, match="num_beams is above 1, but no token of a beam is final before the end"):
            stream(FakeEngine(), request([[5]], num_beams=2))
        with pytest.raises(InputError, match="streamer is given, but num_beams is above 1"):
            generate(FakeEngine(), request([[5]], num_beams=2), TextStreamer(None))


class TestConfig:
    @pytest.mark.parametrize(
        ("eos", "pad", "expected"),
        [
            (2, 1, ((2,), 1)),
            ([2, 7], 1, ((2, 7), 1)),
            (None, 3, ((), 3)),
            (5, None, ((5,), 5)),
            ([6, 5], None, ((6, 5), 6)),
            (None, None, ((), 0)),
        ],
    )
    def test_from_model(self, eos, pad, expected):
        model = XGLMConfig(vocab_size=131, eos_token_id=eos, pad_token_id=pad)
        options = GenerationConfig.from_model(model)
        assert (options.eos_ids, options.pad_id) == expected
        free = options.updated({"stop_at_eos": False})
        assert (free.eos_ids, free.pad_id) == ((), expected[1])
        assert options.suppress_tokens is None

    def test_madeup_words_are_not_generated(self):
        options = GenerationConfig.from_model(XGLMConfig.from_preset("564M"))
        assert options.suppress_tokens == [*range(256_001, 256_008)]

    def test_file(self, tmp_path):
        options = GenerationConfig.from_dict(
            {"max_length": 30, "top_p": 0.9, "eos_token_id": [2, 3], "transformers_version": "4.57.6", "top_k": None}
        )
        assert (options.max_length, options.top_k) == (30, 50)
        options.save_pretrained(tmp_path)
        assert GenerationConfig.from_pretrained(tmp_path) == options
        again = GenerationConfig.from_model(XGLMConfig(vocab_size=131, pad_token_id=7), tmp_path)
        assert (again.pad_token_id, again.top_p, again.eos_ids) == (7, 0.9, (2, 3))
        assert again.updated({"max_new_tokens": 4}).new_tokens(10) == 4
        assert again.new_tokens(10) == 20

    @pytest.mark.parametrize("text", ["{", "[1]", ""])
    def test_damaged_file(self, tmp_path, text):
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(
            ConfigError, match=r"generation_config.json: (cannot be read as JSON|expected a JSON object)"
        ):
            GenerationConfig.from_pretrained(tmp_path)

    def test_no_file(self, tmp_path):
        with pytest.raises(ConfigError, match=r"generation_config.json: cannot be read"):
            GenerationConfig.from_pretrained(tmp_path)

    def test_a_call_changes_no_options(self):
        options = GenerationConfig()
        options.updated({"max_new_tokens": 3})
        assert options == GenerationConfig()
