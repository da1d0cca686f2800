"""What the fine-tuning examples share. Those of each backend run in its own tests, and meet the same first losses."""

import sys

import pytest

from tests.helpers.commands import ROOT

sys.path.insert(0, str(ROOT / "examples"))

from finetune_data import CHECKPOINT, ROWS, batches, sentences

from xglm_core import XGLMTokenizer
from xglm_core.checkpoint import open_checkpoint
from xglm_core.compare import oracle


def test_the_first_loss_is_the_oracle_s():
    batch = next(batches(XGLMTokenizer.from_pretrained(CHECKPOINT), 1))
    checkpoint = open_checkpoint(CHECKPOINT)
    read = oracle.checkpoint_reader(checkpoint)
    logits = oracle.forward(checkpoint.config, read, batch["input_ids"], batch["attention_mask"]).logits
    assert oracle.loss(logits, batch["labels"]) == pytest.approx(9.4253, abs=5e-5)


def test_every_sentence_comes_once_before_any_comes_again():
    tokenizer, texts = XGLMTokenizer.from_pretrained(CHECKPOINT), sentences()
    assert len(set(texts)) == len(texts) == 108
    seen = [row for batch in batches(tokenizer, 27) for row in batch["input_ids"].tolist()]
    assert len(seen) == 27 * ROWS == 2 * len(texts)
    for half in (seen[:108], seen[108:]):
        assert len({tuple(row) for row in half}) == 108
