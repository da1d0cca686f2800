"""Both tokenizers, judged by SentencePiece itself and by numbers of transformers."""

import pickle
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import sentencepiece

from tests.helpers.frameworks import Framework, backends_under_test
from tests.helpers.tokenizers import CHECKPOINT, CORPUS, VOCABULARY, json_folder, piece_ids, tokenizer
from xglm_core import XGLMTokenizer
from xglm_core.errors import InputError

__all__ = ["json_folder", "tokenizer"]  # Fixtures.

# The argument that asks for a backend's tensors.
RETURN_TENSORS = {"torch": "pt", "tf": "tf", "flax": "jax"}

# Texts and the ids that transformers 4.57.6 gives with the bundled vocabulary, by
#   import sys, transformers
#   print(transformers.XGLMTokenizer.from_pretrained("examples/tiny_model/checkpoint")(sys.argv[1]).input_ids)
GOLDEN = [
    ("Hello World!", [2, 4, 2571, 1798, 28, 4, 2577, 401, 110, 407, 3]),
    ("The children ", [2, 4, 2581, 154, 518]),
    ("  a \t b\nc", [2, 50, 69, 63]),
    ("Дети играют у реки.", [2, 4, 3, 176, 202, 1846, 2230, 461, 4, 290, 1155, 5]),
    ("孩子们在河边玩，非常开心。", [2, 4, 429, 1851, 1248, 6, 3, 1586, 1506, 2360, 9]),
    ("子どもたちは川であそびます", [2, 4, 965, 1873, 187, 343, 508, 1240, 25, 33]),
    ("เด็กทำอาหาร", [2, 4, 43, 55, 214, 49, 1514]),
    ("बच्चे बस से स्कूल जाते हैं।", [2, 4, 34, 74, 57, 74, 17, 4, 1736, 4, 29, 17, 4, 29, 57, 22, 812, 4, 89, 132, 17, 61, 26]),
    ("매일 아침", [2, 4, 1257, 576, 626]),
    ("\u1106\u1162\u110b\u1175\u11af \u110b\u1161\u110e\u1175\u11b7", [2, 4, 1257, 576, 626]),
    ("Tie\u0302\u0301ng Vie\u0323\u0302t", [2, 4, 2581, 16, 2567, 52, 4, 2542, 16, 1215, 10]),
    ("كُلَّ صباحٍ", [2, 1711, 3, 232, 3, 4, 1168, 3]),
    ("Κάθε πρωί", [2, 4, 514, 1045, 155, 764]),
    ("ﬁn ＡＢＣ ㌔ ½", [2, 223, 590, 4, 2587, 2589, 2573, 4, 3, 4, 3]),
    ("x</s>y <pad><madeupword3>", [2, 4, 2564, 2, 111, 1, 2596]),
    ("𐍈𐍉 q", [2, 4, 3, 4, 2580]),
    ("\U0001f469\u200d\U0001f469\u200d\U0001f467 no", [2, 4, 3, 1699]),
    ("▁a▁", [2, 50]),
    ("＜ｓ＞", [2, 4, 3, 7, 3]),
    ("a\x00b", [2, 50, 3, 1733]),
    ("", [2]),
]


@pytest.fixture(scope="module")
def processor():
    return sentencepiece.SentencePieceProcessor(model_file=str(VOCABULARY))


class TestIds:
    @pytest.mark.parametrize(("text", "ids"), GOLDEN, ids=[repr(text) for text, _ in GOLDEN])
    def test_same_as_transformers(self, tokenizer, text, ids):
        assert tokenizer(text).input_ids == ids
        assert [2, *tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))] == ids

    @pytest.mark.parametrize("path", CORPUS, ids=[path.stem for path in CORPUS])
    def test_same_as_sentencepiece(self, tokenizer, processor, path):
        for line in path.read_text(encoding="utf-8").splitlines():
            ids = tokenizer.encode(line)
            assert ids == [2, *piece_ids(processor, line)]
            assert 3 not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == unicodedata.normalize("NFKC", line)

    def test_trailing_space_adds_no_token(self, tokenizer, processor):
        assert tokenizer("a ") == tokenizer("a")
        assert tokenizer("a ").input_ids == [2, *piece_ids(processor, "a ")]

    def test_special_tokens_in_a_text(self, tokenizer, processor):
        a, b = piece_ids(processor, "a"), piece_ids(processor, "b")
        madeup = len(processor) + 1 + 6
        assert tokenizer.encode("a</s>b <pad><s>\n<unk><madeupword6>") == [2, *a, 2, *b, 1, 0, 3, madeup]
        assert tokenizer.encode("a</s >", add_special_tokens=False) == piece_ids(processor, "a</s >")

    def test_pair(self, tokenizer):
        assert tokenizer.build_inputs_with_special_tokens([7], [8, 9]) == [2, 7, 2, 2, 8, 9]
        assert tokenizer.build_inputs_with_special_tokens([], []) == [2, 2, 2]

    def test_options_reach_sentencepiece(self):
        sampling = {"enable_sampling": True, "nbest_size": -1, "alpha": 0.1}
        tokenizer = XGLMTokenizer(VOCABULARY, sp_model_kwargs=sampling)
        for sampled in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
            assert len({tuple(sampled.tokenize("In the morning the kitchen smells")) for _ in range(20)}) > 1

    @pytest.mark.parametrize("text", ["a\ud800b", "\udcff"])
    def test_lone_surrogates_are_refused(self, tokenizer, text):
        with pytest.raises(InputError, match=rf"lone surrogate '\\u.*' at character {len(text) // 2}, .* UTF-8"):
            tokenizer(text)
        with pytest.raises(InputError, match="lone surrogate"):
            tokenizer.tokenize(text)

    def test_batches_are_checked_too(self, tokenizer):
        for bad, message in ((None, r"a text is None \(NoneType\)"), (b"a", "a text is b'a'"), ("\ud800", "lone surr")):
            with pytest.raises(InputError, match=message):
                tokenizer(["a"] * 99 + [bad])

    @pytest.mark.parametrize("text", [None, 3, b"bytes", ["a", None], [["a"]]])
    def test_what_is_no_text_is_refused(self, tokenizer, text):
        with pytest.raises(InputError, match=r"a text is .*, expected a string"):
            tokenizer(text)


class TestVocabulary:
    def test_numbering(self, tokenizer, processor):
        last = len(processor)
        assert tokenizer.vocab_size == len(tokenizer) == last + 8
        assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<s>", "<pad>", "</s>", "<unk>"]
        assert tokenizer.convert_ids_to_tokens([4, last]) == processor.id_to_piece([3, last - 1])
        madeup = [f"<madeupword{i}>" for i in range(7)]
        assert tokenizer.convert_ids_to_tokens(range(last + 1, last + 8)) == madeup
        assert tokenizer.all_special_tokens == ["<s>", "<pad>", "</s>", "<unk>", *madeup]
        assert tokenizer.all_special_ids == [0, 1, 2, 3, *range(last + 1, last + 8)]

    def test_tokens_and_ids_are_one_to_one(self, tokenizer):
        vocabulary = tokenizer.get_vocab()
        assert sorted(vocabulary.values()) == list(range(tokenizer.vocab_size))
        assert tokenizer.convert_tokens_to_ids(list(vocabulary)) == list(vocabulary.values())
        assert tokenizer.convert_tokens_to_ids("no such token") == 3

    def test_special_ids(self, tokenizer):
        roles = ("bos", "pad", "eos", "unk", "sep", "cls")
        assert [getattr(tokenizer, f"{role}_token_id") for role in roles] == [0, 1, 2, 3, 2, 0]
        tokenizer.pad_token = "</s>"
        assert tokenizer.pad_token_id == 2
        tokenizer.pad_token_id = 0
        assert tokenizer.pad_token == "<s>"
        tokenizer.pad_token = None
        assert tokenizer.pad_token_id is None

    def test_a_role_needs_a_special_token(self, tokenizer):
        with pytest.raises(
            InputError, match=r"eos_token is '<end>', expected None or one of <s>, <pad>.*; add_special"
        ):
            tokenizer.eos_token = "<end>"


class TestDecode:
    def test_special_tokens_are_text_or_dropped(self, tokenizer):
        ids = tokenizer.encode("The children</s>The <unk> bread<madeupword0>")
        assert tokenizer.decode(ids) == "</s> The children</s> The<unk> bread<madeupword0>"
        assert tokenizer.decode(ids, skip_special_tokens=True) == "The children The bread"

    def test_forms_of_ids(self, tokenizer):
        ids = tokenizer.encode("The children")
        for form in (ids, tuple(ids), np.array(ids), np.array(ids, np.uint16)):
            assert tokenizer.decode(form) == "</s> The children"
        assert tokenizer.decode(2) == tokenizer.convert_ids_to_tokens(2) == "</s>"
        assert tokenizer.decode([]) == ""

    def test_batch(self, tokenizer):
        batch = tokenizer(["The children", "a"], padding=True, return_tensors="np").input_ids
        assert tokenizer.batch_decode(batch, skip_special_tokens=True) == ["The children", "a"]

    @pytest.mark.parametrize("ids", [[-1], [4, 10**6], [2**70], [1.5], ["a"], [True], None])
    def test_what_is_no_id_is_refused(self, tokenizer, ids):
        with pytest.raises(InputError, match=r"is not a token id, expected integers from 0 to \d+"):
            tokenizer.decode(ids)

    @pytest.mark.parametrize("ids", [[[1, 2], [3, 4]], [[1], [2, 3]], np.ones((2, 1), int)])
    def test_a_batch_is_refused(self, tokenizer, ids):
        with pytest.raises(InputError, match=r"the ids are a batch.*use batch_decode"):
            tokenizer.decode(ids)


class TestBatches:
    TEXTS = ("The children", "a")

    def test_lists(self, tokenizer):
        batch = tokenizer(list(self.TEXTS))
        assert list(batch) == ["input_ids", "attention_mask"]
        assert batch.input_ids == [tokenizer.encode(text) for text in self.TEXTS]
        assert batch.attention_mask == [[1] * len(row) for row in batch.input_ids]
        assert tokenizer([]).input_ids == []
        assert tokenizer(["a"]).input_ids == [tokenizer("a").input_ids]
        with pytest.raises(AttributeError, match="no 'token_type_ids', only input_ids, attention_mask"):
            _ = batch.token_type_ids

    @pytest.mark.parametrize("padding", [True, "longest"])
    def test_padding_sides(self, tokenizer, padding):
        long, short = (tokenizer.encode(text) for text in self.TEXTS)
        pads = [1] * (len(long) - len(short))
        right = tokenizer(self.TEXTS, padding=padding)
        assert right.input_ids == [long, short + pads]
        assert right.attention_mask == [[1] * len(long), [1] * len(short) + [0] * len(pads)]
        left = tokenizer(self.TEXTS, padding=padding, padding_side="left")
        assert left.input_ids == [long, pads + short]
        assert left.attention_mask == [[1] * len(long), [0] * len(pads) + [1] * len(short)]
        tokenizer.padding_side = "left"
        assert tokenizer(self.TEXTS, padding=padding) == left

    def test_a_pad_token_in_the_text_is_not_padding(self, tokenizer):
        assert tokenizer("a<pad>").attention_mask == [1, 1, 1]

    def test_numpy(self, tokenizer):
        batch = tokenizer(self.TEXTS, padding=True, return_tensors="np")
        lists = tokenizer(self.TEXTS, padding=True)
        for name, array in batch.items():
            assert array.dtype == np.int64
            assert array.tolist() == lists[name]
        assert tokenizer("a", return_tensors="np").input_ids.shape == (1, 2)
        assert tokenizer.encode("a", return_tensors="np").tolist() == [tokenizer.encode("a")]
        assert tokenizer("", add_special_tokens=False, return_tensors="np").input_ids.shape == (1, 0)
        assert tokenizer([], return_tensors="np").input_ids.shape == (0, 0)

    @pytest.mark.parametrize("name", backends_under_test())
    def test_tensors_of_frameworks(self, tokenizer, name):
        fw = Framework(name)
        batch = tokenizer(self.TEXTS, padding=True, return_tensors=RETURN_TENSORS[name])
        expected = tokenizer(self.TEXTS, padding=True, return_tensors="np")
        for key, tensor in batch.items():
            assert type(tensor) is type(fw.tensor(np.zeros(1, np.int32)))
            assert fw.numpy(tensor).dtype == (np.int64 if name == "torch" else np.int32)
            np.testing.assert_array_equal(fw.numpy(tensor), expected[key])
        assert tokenizer.batch_decode(batch.input_ids, skip_special_tokens=True) == list(self.TEXTS)
        assert tokenizer.decode(batch.input_ids[0]) == "</s> The children"

    def test_wrong_batches(self, tokenizer):
        with pytest.raises(InputError, match=r"have 2 to \d tokens, so they fit no tensor; use padding=True"):
            tokenizer(self.TEXTS, return_tensors="np")
        with pytest.raises(InputError, match="padding is 'most', expected True, False, 'longest' or 'max_length'"):
            tokenizer("a", padding="most")
        with pytest.warns(UserWarning, match="padding has no effect without max_length, as the tokenizer's model_max_"):
            assert tokenizer("a", padding="max_length") == tokenizer("a")
        with pytest.raises(InputError, match="padding_side is 'top', expected 'right' or 'left'"):
            tokenizer("a", padding=True, padding_side="top")
        with pytest.raises(InputError, match="return_tensors is 'mlx', expected None, 'np', 'pt', 'tf' or 'jax'"):
            tokenizer("a", return_tensors="mlx")
        tokenizer.pad_token = None
        with pytest.raises(InputError, match=r"pad_token is None; set tokenizer\.pad_token"):
            tokenizer(self.TEXTS, padding=True)


def test_only_the_framework_asked_for_is_imported():
    code = """
import sys, xglm_core
assert "sentencepiece" not in sys.modules
xglm_core.XGLMTokenizer.from_pretrained(sys.argv[1])("a", return_tensors="np")
xglm_core.XGLMTokenizerFast.from_pretrained(sys.argv[1])("a", return_tensors="np")
assert not {"torch", "tensorflow", "jax"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, CHECKPOINT], check=True)
