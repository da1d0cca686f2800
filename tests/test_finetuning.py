"""The fine-tuning examples, run as a user runs them: with the same first losses, whatever trains."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.commands import ROOT
from tests.frameworks import Framework, backends_under_test

sys.path.insert(0, str(ROOT / "examples"))

from finetune_data import CHECKPOINT, ROWS, batches, sentences

from xglm_core import XGLMTokenizer
from xglm_core.checkpoint import open_checkpoint
from xglm_core.compare import oracle

# The first of PyTorch's own AdamW. float32 in another order moves the third by 1e-6.
FIRST = [9.4253, 7.8322, 6.4078]

# Example: the backend that it needs, the command's last part, how many of the first losses are those of plain training.
EXAMPLES = {
    "finetune_torch.py": ("torch", [], 3),
    "finetune_torch_lora.py": ("torch", [], 1),
    "finetune_keras.py": ("tf", [], 3),
    "finetune_jax.py": ("flax", [], 3),
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_example(example, tmp_path):
    backend, options, same = EXAMPLES[example]
    if backend not in backends_under_test():
        pytest.skip(f"{backend} is not in XGLM_TEST_BACKENDS")
    script = ROOT / "examples" / example.split()[0]
    assert len(script.read_text().splitlines()) < 120
    command = [sys.executable, str(script), "--steps", "3", "--output", str(tmp_path), *options]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "step    3 of 3" in result.stdout
    losses = json.loads((tmp_path / "losses.json").read_text())["losses"]
    np.testing.assert_allclose(losses[:same], FIRST[:same], rtol=2e-5)
    assert losses == sorted(losses, reverse=True)
    assert (tmp_path / "losses.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    fw = Framework(backend)
    trained, batch = fw.causal_lm.from_pretrained(tmp_path), next(batches(XGLMTokenizer.from_pretrained(tmp_path), 1))
    assert float(fw.numpy(fw.call(trained, **batch, return_logits=False).loss)) < FIRST[0] - 1


def test_the_first_loss_is_the_oracle_s():
    batch = next(batches(XGLMTokenizer.from_pretrained(CHECKPOINT), 1))
    checkpoint = open_checkpoint(CHECKPOINT)
    read = oracle.checkpoint_reader(checkpoint)
    logits = oracle.forward(checkpoint.config, read, batch["input_ids"], batch["attention_mask"]).logits
    assert oracle.loss(logits, batch["labels"]) == pytest.approx(FIRST[0], abs=5e-5)


def test_every_sentence_comes_once_before_any_comes_again():
    tokenizer, texts = XGLMTokenizer.from_pretrained(CHECKPOINT), sentences()
    assert len(set(texts)) == len(texts) == 108
    seen = [row for batch in batches(tokenizer, 27) for row in batch["input_ids"].tolist()]
    assert len(seen) == 27 * ROWS == 2 * len(texts)
    for half in (seen[:108], seen[108:]):
        assert len({tuple(row) for row in half}) == 108
