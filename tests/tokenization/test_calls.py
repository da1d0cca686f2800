"""What a call of a tokenizer takes and gives: pairs, truncation, padding, words, offsets, masks, newlines."""

import copy
import gc
import itertools
import pickle

import numpy as np
import pytest

from tests.helpers.frameworks import needs
from tests.helpers.tokenizers import VOCABULARY, json_folder, tokenizer
from xglm_core import XGLMTokenizer
from xglm_core.errors import CheckpointError, InputError
from xglm_core.tokenization.batching import Truncation
from xglm_core.tokenization.encoding import BatchEncoding

__all__ = ["json_folder", "tokenizer"]  # Fixtures.

LONG = "The children like bread and the bread likes them"
SHORT = "The bread"


def plain(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


class TestPairs:
    def test_layout(self, tokenizer):
        a, b = plain(tokenizer, SHORT), plain(tokenizer, LONG)
        assert tokenizer(SHORT, LONG).input_ids == [2, *a, 2, 2, *b]
        assert tokenizer.encode(SHORT, LONG) == [2, *a, 2, 2, *b]
        assert tokenizer(SHORT, LONG, add_special_tokens=False).input_ids == [*a, *b]
        assert tokenizer.num_special_tokens_to_add() == 1
        assert tokenizer.num_special_tokens_to_add(pair=True) == 3
        assert tokenizer.tokenize("a", "b", add_special_tokens=True) == ["</s>", "▁a", "</s>", "</s>", "▁b"]

    def test_batches(self, tokenizer):
        expected = [tokenizer.encode(SHORT, LONG), tokenizer.encode(LONG, "a")]
        assert tokenizer([SHORT, LONG], [LONG, "a"]).input_ids == expected
        assert tokenizer([(SHORT, LONG), (LONG, "a")]).input_ids == expected
        with pytest.raises(InputError, match=r"text_pair is \['a'\], expected a second text for each of 2"):
            tokenizer([SHORT, LONG], ["a"])

    def test_masks(self, tokenizer):
        a, b = [7, 8], [9]
        assert tokenizer.get_special_tokens_mask(a) == [1, 0, 0]
        assert tokenizer.get_special_tokens_mask(a, b) == [1, 0, 0, 1, 1, 0]
        complete = tokenizer.build_inputs_with_special_tokens(a, b)
        assert tokenizer.get_special_tokens_mask(complete, already_has_special_tokens=True) == [1, 0, 0, 1, 1, 0]
        assert tokenizer.create_token_type_ids_from_sequences(a) == [0] * 3
        assert tokenizer.create_token_type_ids_from_sequences(a, b) == [0] * 6
        batch = tokenizer("a", "b", return_special_tokens_mask=True, return_token_type_ids=True)
        assert batch.special_tokens_mask == [1, 0, 1, 1, 0]
        assert batch.token_type_ids == [0] * 5

    def test_without_sep_token(self, tokenizer):
        tokenizer.sep_token = None
        assert tokenizer("a", "b").input_ids == plain(tokenizer, "a") + plain(tokenizer, "b")
        assert tokenizer.encode("a") == plain(tokenizer, "a")


def one_by_one(first, second, room):
    """How much of a pair is left if each token that goes is the longer text's, or the second's if there is none."""
    while first + second > room:
        if first > second:
            first -= 1
        else:
            second -= 1
    return first, second


class TestTruncation:
    def test_sides(self, tokenizer):
        ids = plain(tokenizer, LONG)
        assert tokenizer(LONG, truncation=True, max_length=6).input_ids == [2, *ids[:5]]
        assert tokenizer(LONG, max_length=6).input_ids == [2, *ids[:5]]
        assert tokenizer(LONG, truncation=False, max_length=6).input_ids == [2, *ids]
        assert tokenizer(SHORT, truncation=True, max_length=60) == tokenizer(SHORT)
        tokenizer.truncation_side = "left"
        assert tokenizer(LONG, truncation="only_first", max_length=6).input_ids == [2, *ids[-5:]]

    def test_model_max_length(self, tokenizer):
        with pytest.warns(UserWarning, match="truncation has no effect without max_length, as the tokenizer's"):
            assert tokenizer(LONG, truncation=True) == tokenizer(LONG)
        tokenizer.model_max_length = 4
        assert len(tokenizer(LONG, truncation=True).input_ids) == 4
        assert len(tokenizer("a", padding="max_length").input_ids) == 4

    def test_longest_first(self):
        for first, second, room in itertools.product(range(9), range(9), range(18)):
            ((a, b),) = Truncation(room, "longest_first", "right").spans(first, second)
            assert (a[1] - a[0], b[1] - b[0]) == one_by_one(first, second, room), (first, second, room)

    def test_pairs(self, tokenizer):
        a, b = plain(tokenizer, SHORT), plain(tokenizer, LONG)
        room = len(a) + 4
        limit = room + 3
        for strategy in ("longest_first", "only_second", True):
            assert tokenizer(SHORT, LONG, truncation=strategy, max_length=limit).input_ids == [2, *a, 2, 2, *b[:4]]
        assert tokenizer(LONG, SHORT, truncation="only_first", max_length=limit).input_ids == [2, *b[:4], 2, 2, *a]
        with pytest.raises(InputError, match=r"truncation is 'only_first', but of \d+ tokens \d+ would have to go"):
            tokenizer(SHORT, LONG, truncation="only_first", max_length=limit)

    @pytest.mark.parametrize("side", ["right", "left"])
    @pytest.mark.parametrize("stride", [0, 2])
    def test_overflow(self, tokenizer, side, stride):
        tokenizer.truncation_side = side
        ids = plain(tokenizer, LONG)
        batch = tokenizer([SHORT, LONG], truncation=True, max_length=6, stride=stride, return_overflowing_tokens=True)
        rows = [row[1:] for row in batch.input_ids]
        assert batch.overflow_to_sample_mapping == [0] + [1] * (len(rows) - 1)
        assert all(row[0] == 2 and len(row) <= 6 for row in batch.input_ids)
        rows = rows[1:] if side == "right" else rows[:0:-1]
        for row, following in itertools.pairwise(rows):
            assert row[len(row) - stride :] == following[:stride]
        assert rows[0][:stride] + [number for row in rows for number in row[stride:]] == ids

    def test_overflow_of_one_text_and_of_pairs(self, tokenizer):
        batch = tokenizer(LONG, max_length=6, return_overflowing_tokens=True, return_offsets_mapping=True)
        assert [row[1:] for row in batch.input_ids[:-1]] == np.reshape(plain(tokenizer, LONG)[:15], (3, 5)).tolist()
        assert batch.overflow_to_sample_mapping == [0, 0, 0, 0]
        assert batch.offset_mapping[1][1][0] == batch.offset_mapping[0][-1][1]
        a = plain(tokenizer, SHORT)
        pairs = tokenizer(SHORT, LONG, truncation="only_second", max_length=13, return_overflowing_tokens=True)
        assert all(row[: len(a) + 3] == [2, *a, 2, 2] for row in pairs.input_ids)
        assert len(pairs.input_ids) == -(-len(plain(tokenizer, LONG)) // (13 - 3 - len(a)))
        assert tokenizer("a", return_overflowing_tokens=True).overflow_to_sample_mapping == [0]

    def test_wrong_truncation(self, tokenizer):
        for arguments, message in (
            ({"truncation": "all"}, "truncation is 'all', expected 'longest_first', 'only_first' or 'only_second'"),
            ({"max_length": 0}, "max_length is 0, expected at least 1, the number of special tokens"),
            ({"max_length": 3, "stride": -1}, "stride is -1, expected a number of tokens"),
            ({"padding": True, "pad_to_multiple_of": 0}, "pad_to_multiple_of is 0, expected at least 1"),
            ({"max_length": -1}, "max_length is -1, expected a number of tokens"),
            ({"max_length": 3, "truncation": "only_second"}, "'only_second', but there is no second text"),
            (
                {"max_length": 3, "stride": 2, "return_overflowing_tokens": True},
                "stride is 2, expected less than the 2",
            ),
            ({"max_length": 9, "text_pair": LONG, "return_overflowing_tokens": True}, "only one text can overflow"),
        ):
            with pytest.raises(InputError, match=message):
                tokenizer(LONG, **arguments)
        tokenizer.truncation_side = "top"
        with pytest.raises(InputError, match="truncation_side is 'top', expected 'right' or 'left'"):
            tokenizer(LONG, max_length=3)


class TestPadding:
    def test_lengths(self, tokenizer):
        ids = tokenizer.encode("a")
        assert tokenizer("a", padding="max_length", max_length=5).input_ids == [*ids, 1, 1, 1]
        assert tokenizer(["a"], padding=True, pad_to_multiple_of=8).attention_mask == [[1, 1] + [0] * 6]
        padded = tokenizer("a", padding="max_length", max_length=5, pad_to_multiple_of=4, padding_side="left")
        assert padded.input_ids == [1] * 6 + ids
        long = tokenizer(LONG, padding="max_length", max_length=5)
        assert long == tokenizer(LONG)
        assert len(tokenizer(LONG, padding="max_length", max_length=5, truncation=True).input_ids) == 5
        assert tokenizer(["a", LONG], padding="do_not_pad") == tokenizer(["a", LONG])

    def test_other_columns(self, tokenizer):
        batch = tokenizer(
            ["a", SHORT],
            padding=True,
            return_special_tokens_mask=True,
            return_offsets_mapping=True,
            return_length=True,
            return_token_type_ids=True,
            return_tensors="np",
        )
        size = len(tokenizer.encode(SHORT))
        assert batch.length.tolist() == [2, size]
        assert batch.special_tokens_mask[0].tolist() == [1, 0] + [1] * (size - 2)
        assert batch.offset_mapping.shape == (2, size, 2)
        assert batch.offset_mapping[0, 2:].tolist() == [[0, 0]] * (size - 2)
        assert batch.token_type_ids.tolist() == [[0] * size] * 2
        assert "attention_mask" not in tokenizer("a", return_attention_mask=False)
        assert tokenizer("a", return_length=True).length == 2

    def test_pad(self, tokenizer):
        texts = ["a", SHORT]
        expected = tokenizer(texts, padding=True)
        assert tokenizer.pad([tokenizer(text) for text in texts]) == expected
        assert tokenizer.pad(tokenizer(texts)) == expected
        arrays = tokenizer.pad({"input_ids": [np.array(row) for row in tokenizer(texts).input_ids]})
        assert {name: array.tolist() for name, array in arrays.items()} == expected
        assert tokenizer.pad(tokenizer("a"), padding="max_length", max_length=4).attention_mask == [1, 1, 0, 0]
        left = tokenizer.pad(tokenizer(texts), padding_side="left", pad_to_multiple_of=8, return_tensors="np")
        assert left.input_ids.shape == (2, 8)
        assert left.input_ids[0].tolist() == [1] * 6 + tokenizer.encode("a")
        with pytest.raises(InputError, match="encoded_inputs has ids, expected input_ids"):
            tokenizer.pad({"ids": [[1]]})
        with pytest.raises(InputError, match="not all examples have attention_mask, input_ids"):
            tokenizer.pad([tokenizer("a"), {"input_ids": [1]}])
        tokenizer.pad_token = None
        with pytest.raises(InputError, match="padding needs a pad token"):
            tokenizer.pad([tokenizer("a")])


class TestOffsets:
    @pytest.mark.parametrize(
        ("text", "parts"),
        [
            ("The bread", ["T", "T", "he", " bread"]),
            ("  The\n\n bread ", ["T", "T", "he", "\n\n bread"]),
            ("x</s> y", ["x", "x", "</s>", "y"]),
            ("a ﬁ b", ["a", " ﬁ", "ﬁ", " b"]),
            ("\u1106\u1162\u110b\u1175\u11af", ["\u1106\u1162"] * 2 + ["\u110b\u1175\u11af"]),
            ("a\U0001f469b", ["a", "\U0001f469", "b"]),
            ("", []),
        ],
    )
    def test_characters(self, tokenizer, text, parts):
        batch = tokenizer(text, return_offsets_mapping=True)
        assert batch.input_ids == tokenizer.encode(text)
        assert batch.offset_mapping[0] == (0, 0)
        assert [text[start:stop] for start, stop in batch.offset_mapping[1:]] == parts

    def test_pair(self, tokenizer):
        assert tokenizer("a", "b c", return_offsets_mapping=True).offset_mapping == [
            *[(0, 0), (0, 1), (0, 0), (0, 0), (0, 1), (1, 3)]
        ]

    def test_newlines(self, tokenizer):
        text = "a\n \nb"
        assert tokenizer(text, newline="eos", return_offsets_mapping=True).offset_mapping[1:] == [
            (0, 1),
            (1, 4),
            (4, 5),
        ]


class TestWords:
    def test_words(self, tokenizer):
        words = ["The", "children,", "bread"]
        batch = tokenizer(words, is_split_into_words=True, return_offsets_mapping=True)
        rows = [plain(tokenizer, word) for word in words]
        assert batch.input_ids == [2, *itertools.chain(*rows)]
        assert batch.word_ids() == [None, *(number for number, row in enumerate(rows) for _ in row)]
        assert batch.offset_mapping[-1] == (0, len("bread"))

    def test_batches(self, tokenizer):
        batch = tokenizer(
            [["The", "bread"], [], ["a"]],
            is_split_into_words=True,
            padding=True,
            truncation=True,
            max_length=4,
            return_tensors="np",
        )
        assert batch.input_ids.tolist() == [
            [2, *plain(tokenizer, "The")],
            [2, 1, 1, 1],
            [2, *plain(tokenizer, "a"), 1, 1],
        ]
        assert [batch.word_ids(row) for row in range(3)] == [[None, 0, 0, 0], [None] * 4, [None, 0, None, None]]

    def test_pairs(self, tokenizer):
        batch = tokenizer(["a", "b"], ["c"], is_split_into_words=True)
        assert batch.input_ids == [2, *plain(tokenizer, "a b"), 2, 2, *plain(tokenizer, "c")]

    def test_wrong_words(self, tokenizer):
        with pytest.raises(InputError, match="a text is 'The bread', expected a list of words"):
            tokenizer("The bread", is_split_into_words=True)
        with pytest.raises(InputError, match=r"a text is 3 \(int\), expected a string"):
            tokenizer([["a", 3]], is_split_into_words=True)


class TestNewlines:
    def test_space_is_the_default(self, tokenizer):
        assert tokenizer("a\n\nb") == tokenizer("a b", newline="space")

    @pytest.mark.parametrize("breaks", ["\n", "\r\n", "\r", "\n\n\n", "\n \t\n", "\u2028\n"])
    def test_a_run_is_one_token(self, tokenizer, breaks):
        a, b = plain(tokenizer, "a"), plain(tokenizer, "b")
        assert tokenizer(f"a{breaks}b", newline="eos").input_ids == [2, *a, 2, *b]
        assert tokenizer([f"a {breaks} b"] * 99, newline="eos").input_ids[98] == [2, *a, 2, *b]
        assert tokenizer.tokenize(f"a{breaks}b", newline="eos") == ["▁a", "</s>", "▁b"]

    @pytest.mark.parametrize(
        "text", ["a", "The bread\na", "a\nb\nThe", "\na", "a\n", "\n", "", "a </s>", "孩子\n川 a", "\na\nb\n"]
    )
    def test_round_trip(self, tokenizer, text):
        tokenizer.newline = "eos"
        expected = text.replace(" </s>", "\n")
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == expected
        batch = tokenizer([text, LONG], padding=True, padding_side="left").input_ids
        assert tokenizer.batch_decode(batch, skip_special_tokens=True) == [expected, LONG]

    def test_ids_without_a_beginning(self, tokenizer):
        ids = tokenizer.encode("a\nb", add_special_tokens=False, newline="eos")
        assert tokenizer.decode(ids, newline="eos") == "a\nb"

    def test_special_tokens_remain(self, tokenizer):
        ids = [1, *tokenizer.encode("a\nb<unk>", newline="eos")]
        assert tokenizer.decode(ids, newline="eos") == "<pad></s> a\nb<unk>"
        assert tokenizer.decode(ids) == "<pad></s> a</s> b<unk>"

    def test_wrong_newlines(self, tokenizer):
        with pytest.raises(InputError, match="newline is 'keep', expected 'space' or 'eos'"):
            tokenizer("a", newline="keep")
        with pytest.raises(InputError, match="newline is 'keep', expected 'space' or 'eos'"):
            XGLMTokenizer(VOCABULARY, newline="keep")
        tokenizer.eos_token = None
        with pytest.raises(InputError, match="newline='eos' needs an end-of-sequence token, but eos_token is None"):
            tokenizer("a", newline="eos")


class TestAddedTokens:
    def test_tokens(self, tokenizer):
        size = len(tokenizer)
        assert tokenizer.add_tokens(["<n>", "bread", "</s>", "<n>"]) == 2
        assert (len(tokenizer), tokenizer.vocab_size) == (size + 2, size)
        assert tokenizer("a<n>bread").input_ids == [2, *plain(tokenizer, "a"), size, size + 1]
        assert list(tokenizer.get_added_vocab().items())[-2:] == [("<n>", size), ("bread", size + 1)]
        assert tokenizer.get_vocab()["bread"] == size + 1
        assert tokenizer.convert_ids_to_tokens(size) == "<n>"
        assert tokenizer.convert_tokens_to_ids(["<n>", "▁a"]) == [size, *plain(tokenizer, "a")]
        assert tokenizer.decode([size, *plain(tokenizer, "a")], skip_special_tokens=True) == "<n> a"

    def test_special_tokens(self, tokenizer):
        size = len(tokenizer)
        added = tokenizer.add_special_tokens({"pad_token": "<|pad|>", "additional_special_tokens": ["<a>"]})
        assert added == 2
        assert tokenizer.pad_token_id == size
        assert tokenizer.additional_special_tokens == ["<a>"]
        assert tokenizer.additional_special_tokens_ids == [size + 1]
        assert tokenizer.all_special_ids[-2:] == [size, size + 1]
        assert tokenizer.special_tokens_map["pad_token"] == "<|pad|>"
        assert tokenizer.decode(tokenizer.encode("a<a>"), skip_special_tokens=True) == "a"
        tokenizer.add_special_tokens({"additional_special_tokens": ["<b>"]}, replace_additional_special_tokens=False)
        assert tokenizer.additional_special_tokens == ["<a>", "<b>"]

    def test_many_tokens(self, tokenizer):
        """As many as fine-tuning may add are found where they stand, in a time that does not depend on their number."""
        names = [f"[{number}]" for number in range(3000)]
        assert tokenizer.add_tokens(names) == 3000
        assert tokenizer.add_tokens([*names, "[", "[1"]) == 2
        order = [*range(0, 3000, 7), 3000, *range(1, 3000, 11)]
        text = "".join([*names, "["][number] for number in order)
        assert plain(tokenizer, text) == [tokenizer.vocab_size + number for number in order]

    def test_the_longest_one_is_found(self, tokenizer):
        tokenizer.add_tokens(["<n", "<n>"])
        assert tokenizer.tokenize("<n><n") == ["<n>", "<n"]
        tokenizer.add_tokens(["xyzzy", "xy", "x.y", "xyzzy(", "*"])
        tokens = ["xy", *tokenizer.tokenize("zz"), "xyzzy", "xyzzy(", "x.y", "xy", "*"]
        assert tokenizer.tokenize("xyzzxyzzyxyzzy(x.yxy*") == tokens

    def test_whole_words(self, tokenizer):
        tokenizer.add_tokens({"content": "bread", "single_word": True})
        size = tokenizer.vocab_size
        assert plain(tokenizer, "bread,breads bread").count(size) == 2

    def test_a_known_piece_becomes_special(self, tokenizer):
        number = tokenizer.convert_tokens_to_ids("▁bread")
        assert tokenizer.add_tokens("▁bread", special_tokens=True) == 0
        assert number in tokenizer.all_special_ids
        again = pickle.loads(pickle.dumps(tokenizer))
        assert again.all_special_ids == tokenizer.all_special_ids

    def test_by_constructor(self):
        tokenizer = XGLMTokenizer(VOCABULARY, eos_token="<end>", additional_special_tokens=["<n>"])
        assert (tokenizer.eos_token_id, tokenizer.additional_special_tokens_ids[0]) == (2600, 2601)
        decoder = {2600: {"content": "<n>", "special": True}}
        assert XGLMTokenizer(VOCABULARY, added_tokens_decoder=decoder)("<n>").input_ids == [2, 2600]

    @pytest.mark.parametrize("token", ["", 3, None, b"a", {"special": True}])
    def test_what_is_no_token_is_refused(self, tokenizer, token):
        with pytest.raises(InputError, match=r"a token is .*, expected a string that is not empty"):
            tokenizer.add_tokens([token])

    def test_wrong_added_tokens(self, tokenizer):
        with pytest.raises(InputError, match=r"'pad' is not a role, expected bos_token, .* or additional_special_to"):
            tokenizer.add_special_tokens({"pad": "<p>"})
        with pytest.raises(InputError, match="lone surrogate"):
            tokenizer.add_tokens("\ud800")
        with pytest.raises(CheckpointError, match="added token '<n>' has id 2601, expected 2600"):
            XGLMTokenizer(VOCABULARY, added_tokens_decoder={"2601": "<n>"})
        with pytest.raises(CheckpointError, match="added token '<n>' has id 2, but that is '</s>'"):
            XGLMTokenizer(VOCABULARY, added_tokens_decoder={"2": "<n>"})


class TestObjects:
    def test_copies(self, tokenizer):
        tokenizer.add_tokens("<n>")
        tokenizer.padding_side, tokenizer.newline, tokenizer.pad_token = "left", "eos", "</s>"
        texts = ["a\nb<n>", LONG]
        for again in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
            assert again(texts, padding=True) == tokenizer(texts, padding=True)
            assert again.special_tokens_map == tokenizer.special_tokens_map

    def test_batch_encoding(self, tokenizer):
        batch = tokenizer(["a", "b"], return_tensors="np")
        assert batch.data == dict(batch)
        again = pickle.loads(pickle.dumps(batch))
        assert isinstance(again, BatchEncoding)
        assert again.input_ids.tolist() == batch.input_ids.tolist()
        with pytest.raises(InputError, match="input_ids is a list, which moves nowhere; use return_tensors='pt'"):
            tokenizer("a").to("cpu")

    def test_to(self, tokenizer):
        needs("torch")
        batch = tokenizer(["a", "b"], return_tensors="pt")
        assert batch.to("meta") is batch
        assert all(tensor.device.type == "meta" for tensor in batch.values())

    def test_sampling(self):
        options = {"enable_sampling": True, "nbest_size": -1, "alpha": 0.1}
        tokenizer = XGLMTokenizer(VOCABULARY, sp_model_kwargs=options)
        samples = {tuple(tokenizer.encode(LONG)) for _ in range(20)}
        assert len(samples) > 1
        assert {tokenizer.decode(ids, skip_special_tokens=True) for ids in samples} == {LONG}
        for _ in range(20):
            batch = tokenizer(LONG, return_offsets_mapping=True)
            parts = [LONG[start:stop] for start, stop in batch.offset_mapping]
            tokens = tokenizer.convert_ids_to_tokens(batch.input_ids)
            assert all(token.lstrip("▁") in part for token, part in zip(tokens[1:], parts[1:], strict=True))
        with pytest.raises(
            InputError, match="sp_model_kwargs has 'speed', expected enable_sampling, nbest_size, alpha"
        ):
            XGLMTokenizer(VOCABULARY, sp_model_kwargs={"speed": 2})

        with pytest.raises(InputError, match=r"sp_model_kwargs is .*, which fails: "):
            XGLMTokenizer(VOCABULARY, sp_model_kwargs={"enable_sampling": True, "nbest_size": 0})

    def test_published_numbers(self):
        tokenizer = XGLMTokenizer(VOCABULARY)
        assert tokenizer.sp_model.encode("a") == [tokenizer.encode("a")[1] - 1]
        assert tokenizer.sp_model.id_to_piece([0, 1, 2]) == ["<unk>", "<s>", "</s>"]
        options = {"enable_sampling": True, "nbest_size": -1, "alpha": 0.1}
        tokenizer = XGLMTokenizer(VOCABULARY, sp_model_kwargs=options)
        assert tokenizer.sp_model is tokenizer.sp_model
        again = pickle.loads(pickle.dumps(tokenizer)).sp_model
        assert len({tuple(again.encode(LONG)) for _ in range(20)}) > 1

    def test_garbage_collector(self, tokenizer):
        runs = []
        gc.callbacks.append(lambda phase, info: runs.append(phase))
        try:
            tokenizer([SHORT] * 5_000)  # Some rows: the collector would come a dozen times.
        finally:
            gc.callbacks.pop()
        assert len(runs) <= 2  # One run, when it is started again.
        with pytest.raises(InputError, match="expected a string"):
            tokenizer([1])
        assert gc.isenabled()
        gc.disable()
        try:
            tokenizer("a")
            assert not gc.isenabled()
        finally:
            gc.enable()

    def test_texts_of_tokens(self, tokenizer):
        assert tokenizer.convert_tokens_to_string(["▁a", "b", "▁c"]) == "ab c"
        ids = plain(tokenizer, "Hello , a test .")
        assert tokenizer.decode(ids) == "Hello , a test ."
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=True) == "Hello, a test."
        with pytest.raises(InputError, match="tokens is 3, expected a string or a list of strings"):
            tokenizer.convert_tokens_to_ids(3)
