"""The two tokenizers, each from its own file."""

import pytest

from tests.helpers.commands import ROOT
from xglm_core import XGLMTokenizer, XGLMTokenizerFast

CHECKPOINT = ROOT / "examples" / "tiny_model" / "checkpoint"
VOCABULARY = CHECKPOINT / "sentencepiece.bpe.model"
CORPUS = sorted((CHECKPOINT.parent / "corpus").glob("*.txt"))


def piece_ids(processor, text):
    """fairseq's ids of SentencePiece's pieces."""
    return [piece + 1 if piece else 3 for piece in processor.encode(text)]


@pytest.fixture(scope="session")
def json_folder(tmp_path_factory):
    """`tokenizer.json` of the bundled vocabulary, without the SentencePiece model."""
    folder = tmp_path_factory.mktemp("fast")
    XGLMTokenizerFast(VOCABULARY).save_pretrained(folder)
    (folder / VOCABULARY.name).unlink()
    return folder


@pytest.fixture(params=["slow", "fast"])
def tokenizer(request, json_folder):
    if request.param == "slow":
        return XGLMTokenizer(VOCABULARY)
    return XGLMTokenizerFast.from_pretrained(json_folder)
