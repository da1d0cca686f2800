"""What scripts that were written for transformers do with a tokenizer: its files, keywords, and calls."""

import copy
import json
import pickle
import unicodedata
import warnings

import numpy as np
import pytest
import tokenizers

from tests.helpers.frameworks import backends_under_test
from tests.helpers.tokenizers import CHECKPOINT, CORPUS, VOCABULARY, json_folder, tokenizer
from xglm_core import XGLMTokenizer, XGLMTokenizerFast
from xglm_core.errors import CheckpointError, InputError
from xglm_core.generation.streaming import texts_of

__all__ = ["json_folder", "tokenizer"]  # Fixtures.

BOTH = pytest.mark.parametrize("kind", [XGLMTokenizer, XGLMTokenizerFast])
CAT = "a cat in the catalog"


class TestTokenizerJson:
    """The file that version 5 of transformers reads, and finds four tokens without."""

    def test_the_tokenizers_library_gives_our_ids(self):
        theirs = tokenizers.Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
        ours = XGLMTokenizer.from_pretrained(CHECKPOINT)
        lines = [path.read_text(encoding="utf-8").splitlines()[0] for path in CORPUS]
        for text in [*lines, "", " a  b", "a</s>b <pad>", "x<madeupword3>", "ﬁn ＡＢＣ ½", "𐍈 q"]:
            assert theirs.encode(text).ids == ours.encode(text), text
        assert theirs.encode("a", "b").ids == ours.encode("a", "b")
        assert theirs.get_vocab() == ours.get_vocab()
        assert theirs.decode(ours.encode("The bread")) == "The bread"

    def test_both_files_are_the_same_vocabulary(self, tmp_path):
        XGLMTokenizer(VOCABULARY).save_pretrained(tmp_path)
        (tmp_path / VOCABULARY.name).unlink()
        text = unicodedata.normalize("NFD", "매일 아침, Tiếng Việt")
        assert XGLMTokenizer.from_pretrained(tmp_path).encode(text) == XGLMTokenizer(VOCABULARY).encode(text)

    @BOTH
    def test_one_file_alone(self, kind, tmp_path):
        for legacy, name in ((True, VOCABULARY.name), (False, "tokenizer.json")):
            paths = kind(VOCABULARY).save_pretrained(tmp_path / name, legacy_format=legacy)
            assert {path.rpartition("/")[2] for path in paths} & {VOCABULARY.name, "tokenizer.json"} == {name}
            assert kind.from_pretrained(tmp_path / name).encode("a cat") == kind(VOCABULARY).encode("a cat")
        with pytest.raises(InputError, match="push_to_hub is not offered; save, then call huggingface_hub"):
            kind(VOCABULARY).save_pretrained(tmp_path, push_to_hub=True)


class TestFlagsOfSpecialTokens:
    """A token that is found as a whole word alone stays so: "catalog" has no cat in it."""

    @BOTH
    @pytest.mark.parametrize("how", ["constructor", "add_special_tokens", "add_tokens", "role"])
    def test_saving_and_loading(self, kind, how, tmp_path):
        token = tokenizers.AddedToken("cat", single_word=True, special=True, normalized=False)
        first = kind(VOCABULARY, additional_special_tokens=[token] if how == "constructor" else None)
        if how == "add_special_tokens":
            first.add_special_tokens({"additional_special_tokens": [token]})
        elif how == "add_tokens":
            first.add_tokens([token])
        elif how == "role":
            first.add_special_tokens({"mask_token": token})
            assert (first.mask_token, first.mask_token_id) == ("cat", 2600)
        ids = first.encode(CAT)
        assert ids.count(2600) == 1
        first.save_pretrained(tmp_path)
        for other in (XGLMTokenizer, XGLMTokenizerFast):
            again = other.from_pretrained(tmp_path)
            assert again.encode(CAT) == ids
            assert again.added_tokens_decoder[2600] == token
            assert again.special_tokens_map == first.special_tokens_map

    @BOTH
    def test_files_of_transformers(self, kind, tmp_path):
        """Version 4 puts the flags into tokenizer_config.json or, before that, into special_tokens_map.json."""
        flags = {"content": "cat", "single_word": True, "lstrip": False, "rstrip": False, "normalized": False}
        (tmp_path / VOCABULARY.name).write_bytes(VOCABULARY.read_bytes())
        expected = kind(VOCABULARY, additional_special_tokens=[flags]).encode(CAT)
        config = {"additional_special_tokens": ["cat"], "added_tokens_decoder": {"2600": {**flags, "special": True}}}
        for files in (
            {"tokenizer_config.json": config, "special_tokens_map.json": {"additional_special_tokens": ["cat"]}},
            {"tokenizer_config.json": config, "special_tokens_map.json": {"additional_special_tokens": [flags]}},
            {
                "tokenizer_config.json": {},
                "special_tokens_map.json": {"additional_special_tokens": [flags]},
                "added_tokens.json": {"cat": 2600},
            },
        ):
            for name, content in files.items():
                (tmp_path / name).write_text(json.dumps(content))
            assert kind.from_pretrained(tmp_path).encode(CAT) == expected

    @BOTH
    def test_files_of_version_5(self, kind, tmp_path):
        """Only `tokenizer.json` has the tokens, and the list has another name."""
        first = kind(VOCABULARY, additional_special_tokens=[{"content": "cat", "single_word": True}])
        first.save_pretrained(tmp_path, legacy_format=False)
        (tmp_path / "special_tokens_map.json").unlink()
        (tmp_path / "added_tokens.json").unlink()
        (tmp_path / "tokenizer_config.json").write_text('{"extra_special_tokens": ["cat"], "backend": "tokenizers"}')
        again = kind.from_pretrained(tmp_path)
        assert again.encode(CAT) == first.encode(CAT)
        assert again.additional_special_tokens == ["cat"]

    def test_a_string_keeps_the_flags(self, tokenizer):
        tokenizer.add_tokens({"content": "cat", "single_word": True})
        tokenizer.add_special_tokens({"additional_special_tokens": ["cat"]})
        assert tokenizer.encode(CAT).count(2600) == 1
        tokenizer.add_tokens({"content": "cat"}, special_tokens=True)
        assert tokenizer.encode(CAT).count(2600) == 2

    def test_a_string_is_no_list_of_tokens(self, tokenizer):
        with pytest.raises(InputError, match="additional_special_tokens is 'cat', expected a list of tokens"):
            tokenizer.add_special_tokens({"additional_special_tokens": "cat"})


class TestKeywords:
    """Each keyword of `from_pretrained` acts, is refused by name, or is said to change nothing."""

    @BOTH
    def test_split_special_tokens(self, kind, tmp_path):
        first = kind.from_pretrained(CHECKPOINT, split_special_tokens=True)
        assert first.tokenize("a</s>") == ["▁a", "</", "s", ">"]
        assert 2 not in first("a</s>", add_special_tokens=False).input_ids
        assert first.tokenize("a</s>", split_special_tokens=False) == ["▁a", "</s>"]
        first.save_pretrained(tmp_path)
        assert kind.from_pretrained(tmp_path).encode("a</s>") == first.encode("a</s>")
        usual = kind.from_pretrained(CHECKPOINT)
        assert usual(["a</s>"] * 99, split_special_tokens=True).input_ids[98] == first.encode("a</s>")
        usual.add_tokens("cat")  # Which is no special token.
        assert usual.encode("a cat</s>", split_special_tokens=True)[:3] == usual.encode("a cat")

    @BOTH
    def test_clean_up_tokenization_spaces(self, kind, tmp_path):
        first = kind.from_pretrained(CHECKPOINT, clean_up_tokenization_spaces=True)
        ids = first.encode("Hello , a test .")[1:]
        assert first.decode(ids) == "Hello, a test."
        assert first.decode(ids, clean_up_tokenization_spaces=False) == "Hello , a test ."
        assert "".join(texts_of(first, ids)) == "Hello , a test ."  # Text that was printed cannot change any more.
        first.save_pretrained(tmp_path)
        assert kind.from_pretrained(tmp_path).decode(ids) == "Hello, a test."

    @BOTH
    def test_add_prefix_space(self, kind, tmp_path):
        first = kind.from_pretrained(CHECKPOINT, add_prefix_space=False)
        assert first.tokenize("bread a") == [*first.tokenize("bread"), "▁a"]
        assert not first.tokenize("bread")[0].startswith("▁")
        first.save_pretrained(tmp_path)
        for other in (XGLMTokenizer, XGLMTokenizerFast):
            assert other.from_pretrained(tmp_path).encode("bread a") == first.encode("bread a")
        assert kind.from_pretrained(CHECKPOINT, add_prefix_space=True).encode("a") == kind(VOCABULARY).encode("a")

    @BOTH
    def test_model_input_names(self, kind, tmp_path):
        first = kind.from_pretrained(CHECKPOINT, model_input_names=["input_ids", "token_type_ids"])
        assert list(first("a")) == ["input_ids", "token_type_ids"]
        first.save_pretrained(tmp_path)
        assert list(kind.from_pretrained(tmp_path)("a")) == ["input_ids", "token_type_ids"]
        assert list(kind.from_pretrained(CHECKPOINT)("a")) == ["input_ids", "attention_mask"]

    @BOTH
    @pytest.mark.parametrize(("given", "limit"), [(1e30, int(1e30)), (512.0, 512), (np.int64(9), 9), (None, 2048)])
    def test_model_max_length(self, kind, given, limit):
        assert kind.from_pretrained(CHECKPOINT, model_max_length=given or 2048).model_max_length == limit
        for bad in (-1, 0.5, True):
            with pytest.raises(InputError, match=f"model_max_length is {bad}, expected a number of tokens"):
                kind(VOCABULARY, model_max_length=bad)

    @BOTH
    def test_no_effect_is_said(self, kind, tmp_path):
        with pytest.warns(UserWarning, match=r"XGLMTokenizer(Fast)?: do_lower_case changes nothing; it is kept"):
            kind.from_pretrained(CHECKPOINT, do_lower_case=True)
        with pytest.raises(InputError, match=r"add_bos_token is not offered by XGLM.*: a text begins with sep_token"):
            kind.from_pretrained(CHECKPOINT, add_bos_token=True)
        with pytest.raises(InputError, match=r"get_vocab is a method of XGLM.*, not an argument"):
            kind.from_pretrained(CHECKPOINT, get_vocab=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            kind.from_pretrained(CHECKPOINT, use_fast=True, legacy=False, trust_remote_code=False, proxies=None)
            (tmp_path / VOCABULARY.name).write_bytes(VOCABULARY.read_bytes())
            (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_file": null, "legacy": true, "x": 1}')
            assert kind.from_pretrained(tmp_path).init_kwargs["x"] == 1

    @BOTH
    def test_subfolder(self, kind):
        found = kind.from_pretrained(CHECKPOINT.parent, subfolder="checkpoint")
        assert found.encode("a") == kind(VOCABULARY).encode("a")
        assert found.name_or_path == str(CHECKPOINT)
        with pytest.raises(CheckpointError, match="no such folder"):
            kind.from_pretrained(CHECKPOINT, subfolder="nowhere")


class TestLengths:
    def test_truncation_to_what_padding_would_exceed(self, tokenizer):
        """16 tokens would be more than the 12 that were asked for."""
        with pytest.raises(InputError, match="max_length is 12, to which texts are truncated, expected a multiple of"):
            tokenizer(["a", CAT], padding=True, truncation=True, max_length=12, pad_to_multiple_of=8)
        batch = tokenizer([CAT * 9], padding=True, truncation=True, max_length=16, pad_to_multiple_of=8)
        assert len(batch.input_ids[0]) == 16
        # Without truncation, max_length is no limit.
        assert len(tokenizer("a", padding="max_length", max_length=12, pad_to_multiple_of=8).input_ids) == 16

    def test_padding_does_not_truncate(self, tokenizer):
        with pytest.warns(UserWarning, match="max_length has no effect beside padding=True; set truncation=True"):
            assert tokenizer([CAT], padding=True, max_length=3) == tokenizer([CAT])

    def test_too_long_texts_are_told_once(self, tokenizer):
        tokenizer.model_max_length = 4
        with pytest.warns(UserWarning, match=r"a row has \d+ tokens, more than the 4 that the model takes") as told:
            tokenizer(["a", CAT])
        assert [warning.filename for warning in told] == [__file__]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tokenizer(CAT)
            tokenizer.encode(CAT)
        again = copy.deepcopy(tokenizer)
        again._warned.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again(CAT, verbose=False)
            again(CAT, truncation=True)
            again(CAT, max_length=9)
        with pytest.warns(UserWarning, match="more than the 4"):
            again.encode(CAT)

    def test_numbers_of_numpy(self, tokenizer):
        assert tokenizer(CAT, max_length=np.int64(5)) == tokenizer(CAT, max_length=5)
        padded = tokenizer("a", padding="max_length", max_length=np.int32(5), pad_to_multiple_of=np.int16(4))
        assert len(padded.input_ids) == 8

    def test_room_for_texts(self, tokenizer):
        tokenizer.model_max_length = 10
        assert (tokenizer.max_len_single_sentence, tokenizer.max_len_sentences_pair) == (9, 7)


class TestCalls:
    def test_older_names(self, tokenizer):
        pairs = [("a", CAT), ("b", "c")]
        assert tokenizer.encode_plus("a", CAT, padding=True) == tokenizer("a", CAT, padding=True)
        assert tokenizer.batch_encode_plus(pairs, padding=True) == tokenizer(["a", "b"], [CAT, "c"], padding=True)
        for wrong in (None, "a"):
            with pytest.raises(TypeError, match="expected a list of texts"):
                tokenizer.batch_encode_plus(wrong)
        for call in (tokenizer, tokenizer.encode, tokenizer.tokenize, tokenizer.encode_plus):
            with pytest.raises(TypeError, match=r"a text is None \(NoneType\), expected a string"):
                call(None)
        with tokenizer.as_target_tokenizer():
            assert tokenizer.encode("a") == tokenizer("a").input_ids

    def test_targets(self, tokenizer):
        batch = tokenizer(["a", CAT], text_target=["b", "c"], padding=True, return_tensors="np")
        assert batch.labels.tolist() == tokenizer(["b", "c"]).input_ids
        assert tokenizer(text_target="a") == tokenizer("a")
        batch = tokenizer.prepare_seq2seq_batch(
            [CAT, CAT], ["a", CAT], max_length=3, max_target_length=5, tgt_lang="en"
        )
        assert batch.input_ids == [tokenizer.encode(CAT)[:3]] * 2
        assert batch.labels == tokenizer(["a", CAT], padding=True, truncation=True, max_length=5).input_ids

    def test_pairs_of_words(self, tokenizer):
        words = (["a", "cat"], ["b"])
        batch = tokenizer([words], is_split_into_words=True)
        assert batch.input_ids == [tokenizer(*words, is_split_into_words=True).input_ids]

    def test_prepare_for_model(self, tokenizer):
        ids = tokenizer.encode(CAT, add_special_tokens=False)
        assert tokenizer.prepare_for_model(ids) == tokenizer(CAT)
        assert tokenizer.prepare_for_model(ids, [7], truncation="only_first", max_length=6).input_ids == [
            *[2, *ids[:2], 2, 2, 7]
        ]
        assert tokenizer.prepare_for_model(ids, return_tensors="np").input_ids.tolist() == [2, *ids]
        axis = tokenizer.prepare_for_model(ids, return_tensors="np", prepend_batch_axis=True)
        assert axis.input_ids.tolist() == [[2, *ids]]
        with pytest.raises(InputError, match="-1 is not a token id"):
            tokenizer.prepare_for_model([-1])

    def test_truncate_sequences(self, tokenizer):
        assert tokenizer.truncate_sequences([1, 2, 3, 4], None, 2, stride=1) == ([1, 2], None, [2, 3, 4])
        assert tokenizer.truncate_sequences([1, 2, 3], [4, 5], 1) == ([1, 2], [4, 5], [])
        assert tokenizer.truncate_sequences([1, 2], [4, 5, 6], 1, "only_second") == ([1, 2], [4, 5], [6])
        assert tokenizer.truncate_sequences([1, 2], None, 0) == ([1, 2], None, [])
        tokenizer.truncation_side = "left"
        assert tokenizer.truncate_sequences([1, 2, 3, 4], None, 2) == ([3, 4], None, [1, 2])

    def test_pad_follows_the_type_of_the_ids(self, tokenizer):
        batch = tokenizer.pad([tokenizer(text, return_tensors="np") for text in ("a", "b")])
        assert isinstance(batch.input_ids, np.ndarray)
        if "torch" in backends_under_test():
            import torch

            rows = [{"input_ids": torch.tensor(tokenizer.encode(text))} for text in ("a", CAT)]
            assert isinstance(tokenizer.pad(rows).input_ids, torch.Tensor)
            assert (
                tokenizer.pad(rows, return_tensors="np").input_ids.tolist()
                == tokenizer(["a", CAT], padding=True).input_ids
            )

    def test_pad_keeps_other_numbers(self, tokenizer):
        rows = [{**tokenizer(text), "labels": label} for text, label in (("a", 0.5), (CAT, 2.0))]
        batch = tokenizer.pad(rows, return_tensors="np")
        assert batch.labels.tolist() == [0.5, 2.0]
        ragged = [{**tokenizer(text), "labels": tokenizer.encode(text)} for text in ("a", CAT)]
        with pytest.raises(InputError, match=r"labels has rows of 2 to \d+ tokens, so they fit no tensor"):
            tokenizer.pad(ragged, return_tensors="np")

    def test_spaces_between_special_tokens(self, tokenizer):
        ids = tokenizer.encode("a</s>b<pad>")[1:]
        assert tokenizer.decode(ids, spaces_between_special_tokens=True) == "a </s> b <pad>"
        assert tokenizer.decode(ids, spaces_between_special_tokens=True, skip_special_tokens=True) == "a b"

    def test_no_chat(self, tokenizer):
        with pytest.raises(InputError, match="apply_chat_template is not offered, as XGLM knows no chats"):
            tokenizer.apply_chat_template([{"role": "user", "content": "a"}])


class TestTraining:
    TEXTS = (["The bread is good.", "The cat likes bread."], ["A cat in the catalog."], "The end.")

    def test_new_vocabulary(self, tokenizer, tmp_path):
        tokenizer.padding_side = "left"
        tokenizer.add_tokens(["<n>"])
        new = tokenizer.train_new_from_iterator(self.TEXTS, 60, new_special_tokens=["<new>"])
        assert type(new) is type(tokenizer)
        assert new.vocab_size <= 60
        assert new.decode(new.encode("The cat<n><new>"), skip_special_tokens=True) == "The cat<n>"
        assert new.padding_side == "left"
        assert new.encode("")[0] == new.eos_token_id == 2
        new.save_pretrained(tmp_path)
        assert type(new).from_pretrained(tmp_path).encode("The cat<n>") == new.encode("The cat<n>")

    def test_new_names(self, tokenizer):
        new = tokenizer.train_new_from_iterator(self.TEXTS, 60, special_tokens_map={"<s>": "<begin>"})
        assert (new.bos_token, new.cls_token, new.eos_token) == ("<begin>", "<begin>", "</s>")
        assert new.bos_token_id == new.get_vocab()["<begin>"]

    def test_wrong_training_of_a_tokenizer(self, tokenizer):
        with pytest.raises(InputError, match=r"no vocabulary of 12 can be made: .*[Vv]ocabulary size"):
            tokenizer.train_new_from_iterator(self.TEXTS, 12)


class TestTokens:
    def test_all_that_were_added(self, tokenizer):
        tokenizer.add_tokens(["<n>"])
        tokenizer.mask_token = None
        assert tokenizer.mask_token is None
        assert tokenizer.mask_token_id is None
        assert tokenizer.get_added_vocab() == tokenizer.added_tokens_encoder
        assert list(tokenizer.added_tokens_encoder)[:4] == ["<s>", "<pad>", "</s>", "<unk>"]
        assert [str(token) for token in tokenizer.added_tokens_decoder.values()] == list(tokenizer.added_tokens_encoder)
        assert tokenizer.added_tokens_encoder["<n>"] == 2600
        assert [token.content for token in tokenizer.all_special_tokens_extended] == tokenizer.all_special_tokens
        assert tokenizer.special_tokens_map_extended["eos_token"] == tokenizer.added_tokens_decoder[2]
        assert tokenizer.vocab == tokenizer.get_vocab()
        assert (tokenizer.pad_token_type_id, tokenizer.sanitize_special_tokens()) == (0, 0)

    def test_additional_special_tokens(self, tokenizer):
        tokenizer.additional_special_tokens_ids = [0, 2]
        assert tokenizer.additional_special_tokens == ["<s>", "</s>"]
        tokenizer.additional_special_tokens.append("<n>")  # A list of the caller's own.
        assert tokenizer.additional_special_tokens_ids == [0, 2]
        tokenizer.additional_special_tokens = None
        assert tokenizer.additional_special_tokens is None
        assert tokenizer.additional_special_tokens_ids == []
        with pytest.raises(InputError, match="additional_special_tokens has '<n>', which is not a special token"):
            tokenizer.additional_special_tokens = ["<n>"]

    def test_init_kwargs(self, tokenizer):
        assert tokenizer.init_kwargs["pad_token"] == "<pad>"
        assert tokenizer.init_inputs == ()

    def test_tokens_equal_those_of_the_library(self, tokenizer):
        theirs = tokenizers.AddedToken("<s>", special=True, normalized=False)
        ours = tokenizer.added_tokens_decoder[0]
        assert ours == theirs
        assert theirs == ours
        assert ours != tokenizers.AddedToken("<s>", special=True, normalized=True)
        assert ours != "<s>"
        assert ours in {ours}


class TestAlignment:
    """Where tokens come from; the fast tokenizer of transformers says the same."""

    TEXT = "The bread</s> is good"

    def test_rows(self, tokenizer):
        batch = tokenizer(self.TEXT, "a cat")
        size = len(batch.input_ids)
        tokens = tokenizer.convert_ids_to_tokens(batch.input_ids)
        assert batch.tokens() == batch[0].tokens == tokens
        assert batch[0].ids == batch.input_ids
        assert len(batch.encodings) == 1
        assert batch.is_fast
        assert batch.n_sequences == 2
        second = size - tokens[::-1].index("</s>")
        assert batch.sequence_ids() == [None, *[0] * (second - 3), None, None, *[1] * (size - second)]
        assert batch.word_ids()[:8] == batch.words()[:8] == [None, 0, 0, 0, 1, 2, 3, 4]
        assert (
            batch[0].special_tokens_mask
            == tokenizer(self.TEXT, "a cat", return_special_tokens_mask=True)["special_tokens_mask"]
        )
        assert batch[0].offsets == tokenizer(self.TEXT, "a cat", return_offsets_mapping=True).offset_mapping

    def test_characters_and_words(self, tokenizer):
        batch = tokenizer([self.TEXT, "a cat"], padding=True)
        place = self.TEXT.index("bread")
        token = batch.char_to_token(place)
        assert batch.tokens()[token] == "▁bread"
        assert batch.token_to_chars(token) == (place - 1, place + 5)
        assert batch.char_to_word(place) == batch.token_to_word(token) == 1
        assert batch.word_to_tokens(0, 1) == (token, token + 1)
        assert batch.word_to_chars(1).end == place + 5
        assert batch.token_to_sequence(1, 1) == 0
        assert batch.char_to_token(1, 99) is None
        assert batch.word_to_tokens(1, 9) is None
        assert batch.token_to_chars(1, -1) is None  # Padding.
        pair = tokenizer("a cat", "the cat")
        assert pair.char_to_token(2, sequence_index=1) > pair.char_to_token(2)

    def test_truncation_padding_and_tensors(self, tokenizer):
        options = {"truncation": True, "max_length": 4, "padding": True, "padding_side": "left"}
        batch = tokenizer(["a", self.TEXT], return_tensors="np", **options)
        assert batch.word_ids(0) == [None, None, None, 0]
        assert [batch.tokens(row) for row in (0, 1)] == [
            tokenizer.convert_ids_to_tokens(row) for row in batch.input_ids.tolist()
        ]
        over = tokenizer(self.TEXT, return_overflowing_tokens=True, truncation=True, max_length=4)
        assert [row.ids for row in over.encodings] == over.input_ids

    def test_slices(self, tokenizer):
        batch = tokenizer(["a", "b", "c"])
        assert batch[:2] == {"input_ids": batch.input_ids[:2], "attention_mask": batch.attention_mask[:2]}

    def test_later_tensors(self, tokenizer):
        batch = tokenizer(["a", "b"]).convert_to_tensors("np")
        assert batch.input_ids.shape == (2, 2)
        assert tokenizer("a").convert_to_tensors("np", prepend_batch_axis=True).input_ids.shape == (1, 2)

    def test_not_known(self, tokenizer):
        for batch in (tokenizer.pad(tokenizer("a")), pickle.loads(pickle.dumps(tokenizer("a")))):
            assert not batch.is_fast
            with pytest.raises(InputError, match="tokens and words are known of what a tokenizer has returned for"):
                batch.tokens()
        known = tokenizer("a")
        assert known.tokens() == pickle.loads(pickle.dumps(known)).tokens()

    def test_subword_sampling(self):
        """What is told is of the division that was drawn."""
        sampling = XGLMTokenizer(VOCABULARY, sp_model_kwargs={"enable_sampling": True, "nbest_size": -1, "alpha": 0.1})
        for _ in range(10):
            batch = sampling(CAT)
            assert list(batch) == ["input_ids", "attention_mask"]
            assert batch.tokens() == sampling.convert_ids_to_tokens(batch.input_ids)
            assert len(batch.word_ids()) == len(batch.input_ids)
        assert sampling.prepare_for_model([7]).input_ids == [2, 7]

    def test_words_of_the_caller(self, tokenizer):
        batch = tokenizer(["The", "bread", "is"], is_split_into_words=True)
        assert batch.word_to_tokens(1).start == batch.word_ids().index(1)
