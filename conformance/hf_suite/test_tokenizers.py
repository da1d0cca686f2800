"""The tokenizer tests."""

from __future__ import annotations

import tempfile
import unittest
from pathlib import Path

import sentencepiece
import transformers
from hf_tests import test_tokenization_common as common  # Not the mixin itself, which would be collected as a test.

CORPUS = Path(__file__).parents[2] / "examples" / "tiny_model" / "corpus"
FOLDER = tempfile.mkdtemp(prefix="hf-suite-")
# The tests decode each id by itself, so it is small; what they write has to be in it.
WRITTEN = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789 .,;:!?'\"()[]<>|#_-/"


def setUpModule():
    """Makes a vocabulary of 600 pieces, and a folder with a tokenizer of the class under test."""
    lines = [
        line for name in ("en", "de", "fr", "es", "tr") for line in (CORPUS / f"{name}.txt").open(encoding="utf-8")
    ]
    model = Path(FOLDER) / "sentencepiece.bpe.model"
    with model.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([*lines, *[WRITTEN] * 3]),
            model_writer=file,
            vocab_size=600,
            character_coverage=1.0,
            normalization_rule_name="nmt_nfkc",
            num_threads=1,
            minloglevel=2,
        )
    transformers.XGLMTokenizer(str(model)).save_pretrained(FOLDER)


class XGLMTokenizationTest(common.TokenizerTesterMixin, unittest.TestCase):
    tokenizer_class = transformers.XGLMTokenizer
    rust_tokenizer_class = transformers.XGLMTokenizerFast
    test_rust_tokenizer = True
    test_sentencepiece = True
    from_pretrained_id = FOLDER

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.tokenizer_class(f"{FOLDER}/sentencepiece.bpe.model").save_pretrained(cls.tmpdirname)
