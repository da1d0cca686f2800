"""The files of tokenizers: what is written, what is read, what is refused."""

import base64
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece

from tests.helpers.tokenizers import CHECKPOINT, CORPUS, VOCABULARY, json_folder, tokenizer
from xglm_core import XGLMTokenizer, XGLMTokenizerFast
from xglm_core.errors import CheckpointError, InputError
from xglm_core.tokenization.protobuf import Field, bytes_field, fields, float_field, float_value, int_field

__all__ = ["json_folder", "tokenizer"]  # Fixtures.

BOTH = pytest.mark.parametrize("kind", [XGLMTokenizer, XGLMTokenizerFast])
TEXTS = ["The children", "a</s><pad> b", ""]


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


class TestSaving:
    def test_slow(self, tmp_path):
        paths = XGLMTokenizer(VOCABULARY).save_pretrained(tmp_path / "new")
        names = [VOCABULARY.name, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
        assert paths == tuple(str(tmp_path / "new" / name) for name in names)
        assert (tmp_path / "new" / VOCABULARY.name).read_bytes() == VOCABULARY.read_bytes()
        roles = {
            "additional_special_tokens": [f"<madeupword{i}>" for i in range(7)],
            "bos_token": "<s>",
            "cls_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "sep_token": "</s>",
            "unk_token": "<unk>",
        }
        assert read(tmp_path / "new" / "special_tokens_map.json") == roles
        config = read(tmp_path / "new" / "tokenizer_config.json")
        special = config.pop("added_tokens_decoder")
        assert {token["content"] for token in special.values()} == {*XGLMTokenizer(VOCABULARY).all_special_tokens}
        assert config == {**roles, "sp_model_kwargs": {}, "tokenizer_class": "XGLMTokenizer"}
        for path in map(Path, paths):
            assert path.read_bytes() == (CHECKPOINT / path.name).read_bytes()

    def test_fast(self, tmp_path):
        paths = XGLMTokenizerFast(VOCABULARY).save_pretrained(tmp_path)
        assert [path.rpartition("/")[2] for path in paths] == [
            *("tokenizer.json", "sentencepiece.bpe.model", "tokenizer_config.json", "special_tokens_map.json")
        ]
        data = read(tmp_path / "tokenizer.json")
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(VOCABULARY))
        assert data["model"]["vocab"][:4] == [["<s>", 0.0], ["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0]]
        assert data["model"]["vocab"][4:-7] == [
            [pieces.id_to_piece(i), pieces.get_score(i)] for i in range(3, len(pieces))
        ]
        assert [token["content"] for token in data["added_tokens"]] == XGLMTokenizer(VOCABULARY).all_special_tokens
        charsmap = data["normalizer"]["normalizers"][0]["precompiled_charsmap"]
        assert base64.b64decode(charsmap) in VOCABULARY.read_bytes()

    @BOTH
    def test_all_settings_survive(self, kind, tmp_path):
        with pytest.warns(UserWarning, match="custom changes nothing; it is kept in init_kwargs and saved"):
            first = kind(
                VOCABULARY, padding_side="left", truncation_side="left", newline="eos", model_max_length=9, custom=[1]
            )
        first.add_tokens(["<n>", {"content": "bread", "single_word": True}])
        first.add_special_tokens({"pad_token": "<|pad|>", "additional_special_tokens": ["<a>"], "cls_token": None})
        first.save_pretrained(tmp_path)
        added = read(tmp_path / "added_tokens.json")
        assert added == {
            token.content: number for number, token in first.added_tokens_decoder.items() if number >= 2600
        }
        for other in (XGLMTokenizer, XGLMTokenizerFast):
            again = other.from_pretrained(tmp_path)
            for name in ("padding_side", "truncation_side", "newline", "model_max_length", "special_tokens_map"):
                assert getattr(again, name) == getattr(first, name)
            assert again.init_kwargs["custom"] == [1]
            assert again.added_tokens_decoder == first.added_tokens_decoder
            assert again.all_special_ids == first.all_special_ids
            texts = ["a\nb<n>", "bread<a>", "no bread no"]
            assert again(texts, padding=True) == first(texts, padding=True)

    def test_added_tokens_are_in_tokenizer_json(self, tmp_path):
        first = XGLMTokenizerFast(VOCABULARY)
        first.add_tokens("<n>")
        first.add_special_tokens({"additional_special_tokens": ["<a>"]})
        (path, *_) = first.save_vocabulary(tmp_path, filename_prefix="my")
        assert path == str(tmp_path / "my-tokenizer.json")
        for again in (XGLMTokenizerFast(tokenizer_file=path), XGLMTokenizer(path)):
            assert again.encode("a<n>b<a>") == first.encode("a<n>b<a>")
            assert again.added_tokens_decoder == first.added_tokens_decoder
        assert first.backend_tokenizer.encode("a<n>b<a>").ids == first.encode("a<n>b<a>")

    @BOTH
    def test_save_vocabulary(self, kind, tmp_path):
        paths = kind(VOCABULARY).save_vocabulary(tmp_path / "new", filename_prefix="my")
        assert all("/my-" in path for path in paths)
        assert kind(paths[0])(TEXTS) == kind(VOCABULARY)(TEXTS)


class TestReading:
    def test_each_reads_the_other_folder(self, json_folder, tmp_path):
        shutil.copy(VOCABULARY, tmp_path)
        expected = XGLMTokenizer(VOCABULARY)(TEXTS)
        for folder in (json_folder, tmp_path):
            assert XGLMTokenizer.from_pretrained(folder)(TEXTS) == expected
            assert XGLMTokenizerFast.from_pretrained(folder)(TEXTS) == expected

    def test_model_max_length_is_that_of_the_model(self):
        assert XGLMTokenizer.from_pretrained(CHECKPOINT).model_max_length == 2048
        assert XGLMTokenizer(VOCABULARY).model_max_length == int(1e30)

    def test_keys_survive(self, tmp_path):
        shutil.copy(VOCABULARY, tmp_path)
        config = {"model_max_length": 2048, "tokenizer_file": None, "padding_side": "left"}
        # transformers writes some tokens as objects.
        config |= {"eos_token": {"__type": "AddedToken", "content": "<s>"}, "sp_model_kwargs": {"alpha": 0.5}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = XGLMTokenizer.from_pretrained(tmp_path, cls_token=None)
        assert tokenizer.eos_token_id == 0
        tokenizer.save_pretrained(tmp_path)
        saved = read(tmp_path / "tokenizer_config.json")
        assert saved == saved | config | {"eos_token": "<s>", "cls_token": None}
        assert XGLMTokenizerFast.from_pretrained(tmp_path).init_kwargs["sp_model_kwargs"] == {"alpha": 0.5}

    def test_files_of_older_versions(self, tmp_path):
        """Roles in `special_tokens_map.json`, added tokens in `added_tokens.json` alone."""
        shutil.copy(VOCABULARY, tmp_path)
        (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "<n>", "eos_token": {"content": "<unk>"}}')
        (tmp_path / "added_tokens.json").write_text('{"word": 2601, "<n>": 2600}')
        tokenizer = XGLMTokenizer.from_pretrained(tmp_path)
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (2600, 3)
        assert tokenizer.encode("a word<n>")[-2:] == [2601, 2600]
        assert 2601 not in tokenizer.all_special_ids

    def test_which_roles_take_precedence(self, tmp_path):
        shutil.copy(VOCABULARY, tmp_path)
        (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "<s>"}')
        config = {"pad_token": "<unk>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert XGLMTokenizer.from_pretrained(tmp_path).pad_token == "<s>"
        # Newer versions of transformers list the added tokens, and keep the roles beside them.
        config["added_tokens_decoder"] = {"3": {"content": "<unk>", "special": True}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert XGLMTokenizer.from_pretrained(tmp_path).pad_token == "<unk>"

    def test_forms_of_tokenizer_json(self, json_folder, tmp_path):
        """Older files name no scheme for the space before a text, or divide the text at spaces first."""
        data = read(json_folder / "tokenizer.json")
        expected = XGLMTokenizer(VOCABULARY)(TEXTS)
        precompiled = data["normalizer"]["normalizers"][0]
        metaspace = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
        path = tmp_path / "tokenizer.json"
        for normalizer, pre_tokenizer in (
            (precompiled, metaspace),
            (precompiled, {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]}),
        ):
            path.write_text(json.dumps(data | {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer}))
            assert XGLMTokenizerFast(tokenizer_file=path)(TEXTS) == expected

    @BOTH
    def test_missing_files(self, kind, tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read: No such file or directory; expected"):
            kind.from_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match="nowhere: no such folder; expected a checkpoint folder"):
            kind.from_pretrained(tmp_path / "nowhere")
        with pytest.raises(InputError, match="needs vocab_file or tokenizer_file, but both are None"):
            XGLMTokenizerFast()

    @BOTH
    @pytest.mark.parametrize("content", [b"", b"\0", b"no model", VOCABULARY.read_bytes()[:-1], b"\x0a\xff" * 9])
    def test_damaged_vocabulary(self, kind, tmp_path, content):
        path = tmp_path / "vocabulary"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"vocabulary: (expected a SentencePiece model, but|the vocabulary)"):
            kind(path)

    @BOTH
    def test_vocabulary_in_another_order(self, kind, tmp_path):
        path = str(tmp_path / "vocabulary")
        text = iter(CORPUS[0].read_text(encoding="utf-8").splitlines())
        with open(path, "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=text, model_writer=file, vocab_size=100, pad_id=0, unk_id=3, minloglevel=2
            )
        with pytest.raises(CheckpointError, match=r"begin with .*'<pad>'.*, expected <unk>, <s>, </s>"):
            kind(path)

    @BOTH
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda data: data.pop("model"), "'model' is missing"),
            (lambda data: data["model"].update(type="BPE"), "the model is BPE, expected Unigram"),
            (lambda data: data["model"].update(vocab=3), "object is not iterable"),
            (lambda data: data["model"].update(vocab=[["a"]]), "values to unpack"),
            (lambda data: data["model"]["vocab"][9].__setitem__(0, "\ud800"), "surrogates not allowed"),
            (
                lambda data: data.update(normalizer={"type": "NFKC"}),
                "NFKC is not part of SentencePiece's normalizat",
            ),
            (lambda data: data["model"].update(unk_id=None), "unk_id is None, expected the id of a token"),
            (lambda data: data["added_tokens"][0].update(id=10**6), "has id 1000000, expected 2600"),
        ],
    )
    def test_damaged_tokenizer_json(self, kind, json_folder, tmp_path, change, message):
        data = read(json_folder / "tokenizer.json")
        change(data)
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(data))
        with pytest.raises(CheckpointError, match=message):
            kind(path)

    @BOTH
    @pytest.mark.parametrize("text", ["{", '{"a": 1}', "{" * 10**5])
    def test_no_tokenizer_json(self, kind, tmp_path, text):
        path = tmp_path / "tokenizer.json"
        path.write_text(text)
        with pytest.raises(
            CheckpointError, match=r"tokenizer\.json: expected tokenizer\.json of an XGLM tokenizer, but"
        ):
            kind(path)

    @BOTH
    @pytest.mark.parametrize("added", [["a"], {"a": "b"}, {"3": "b"}, {"2600": 5}])
    def test_damaged_added_tokens(self, kind, tmp_path, added):
        shutil.copy(VOCABULARY, tmp_path)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
        with pytest.raises((CheckpointError, InputError), match=r"added_tokens|the vocabulary cannot be|a token is 5"):
            kind.from_pretrained(tmp_path)

    @BOTH
    @pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
    @pytest.mark.parametrize("text", ["{", "[]", '"text"', "[" * 10**5])
    def test_damaged_settings(self, kind, tmp_path, name, text):
        shutil.copy(VOCABULARY, tmp_path)
        (tmp_path / name).write_text(text)
        with pytest.raises(CheckpointError, match=rf"{name}: expected a JSON object"):
            kind.from_pretrained(tmp_path)


class TestOtherVocabularies:
    def train(self, path, vocab_size=300, **options):
        lines = (line for corpus in CORPUS[:4] for line in corpus.read_text(encoding="utf-8").splitlines())
        with open(path, "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=lines, model_writer=file, vocab_size=vocab_size, minloglevel=2, **options
            )
        return path

    def test_bpe(self, tmp_path):
        path = self.train(tmp_path / "bpe", model_type="bpe")
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        assert XGLMTokenizer(path).encode("The")[1:] == [piece + 1 for piece in processor.encode("The")]
        with pytest.raises(
            CheckpointError, match=r"tokenizer\.json cannot express a model that is not a unigram model"
        ):
            XGLMTokenizerFast(path).save_pretrained(tmp_path)

    def test_spaces_that_are_kept(self, tmp_path):
        path = self.train(tmp_path / "spaces", remove_extra_whitespaces=False)
        assert XGLMTokenizer(path).decode(XGLMTokenizer(path).encode("a  b")[1:]) == "a  b"
        with pytest.raises(CheckpointError, match=r"cannot express remove_extra_whitespaces=false"):
            XGLMTokenizerFast(path).save_pretrained(tmp_path)

    def test_control_symbols_are_special(self, tmp_path):
        tokenizer = XGLMTokenizer(self.train(tmp_path / "control", control_symbols=["<c>"]))
        assert tokenizer.encode("a<c>")[-1] == 4
        assert "<c>" in tokenizer.all_special_tokens

    def test_other_special_tokens(self, json_folder, tmp_path):
        """A vocabulary that is not laid out as fairseq's can be read, but is none for SentencePiece's file."""
        data = read(json_folder / "tokenizer.json")
        data["model"]["vocab"] = data["model"]["vocab"][:-7]
        data["added_tokens"] = data["added_tokens"][:-7]
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(data))
        tokenizer = XGLMTokenizer(path)
        assert tokenizer.additional_special_tokens == []
        assert tokenizer.encode("The") == XGLMTokenizer(VOCABULARY).encode("The")
        with pytest.raises(
            CheckpointError, match=r"begin with <s>, <pad>.* and end with <madeupword0> to <madeupword6>"
        ):
            tokenizer.save_pretrained(tmp_path)

    def test_bytes(self, tmp_path):
        tokenizer = XGLMTokenizer(self.train(tmp_path / "bytes", byte_fallback=True, vocab_size=500))
        batch = tokenizer("a 𐍈", return_offsets_mapping=True, add_special_tokens=False)
        assert tokenizer.convert_ids_to_tokens(batch.input_ids)[-4:] == [f"<0x{byte:02X}>" for byte in "𐍈".encode()]
        assert batch.offset_mapping[-4:] == [(2, 3)] * 4
        assert tokenizer.decode(batch.input_ids) == "a 𐍈"
        assert tokenizer.decode(batch.input_ids[:-1]) == "a �"


class TestWire:
    def test_round_trip(self):
        message = int_field(1, 0) + int_field(40, 2**40) + bytes_field(2, b"x" * 300) + float_field(3, -0.5)
        read = list(fields(message))
        assert [field.number for field in read] == [1, 40, 2, 3]
        assert [read[0].value, read[1].value, read[2].value] == [0, 2**40, b"x" * 300]
        assert float_value(read[3].value) == -0.5
        assert read[3] == Field(3, b"\0\0\0\xbf", len(message) - 5, len(message))

    @pytest.mark.parametrize(
        ("message", "error"),
        [
            (b"\x0a\x05abc", "the field at byte 0 is cut off"),
            (b"\x08", "no integer at byte 1"),
            (b"\x08" + b"\xff" * 12, "no integer at byte 11"),
            (b"\x0b", "unknown form 3 of a field at byte 0"),
        ],
    )
    def test_damage(self, message, error):
        with pytest.raises(ValueError, match=error):
            list(fields(message))
        with pytest.raises(ValueError, match="expected a float32, found 3"):
            float_value(3)
