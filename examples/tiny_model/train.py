"""Trains the checkpoint of this folder: `make tiny-model`, some minutes on two cores.

The corpus is 16 languages of short sentences; the model learns them nearly by heart. As in the training of XGLM itself, a
text is a stream of sentences with `</s>` before each, in a new order each epoch, cut into blocks wherever they begin.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F

from xglm_core import XGLMConfig, XGLMTokenizer
from xglm_core.files import replacing
from xglm_core.tokenization.sentencepiece import VOCAB_FILE
from xglm_torch import XGLMForCausalLM

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
CHECKPOINT = HERE / "checkpoint"

PIECES = 2592  # With 8 more special tokens, 2,600 ids.
BLOCK = 96  # Tokens that one training sequence reads.
BATCH = 16  # Sequences in one step.
EPOCHS = 120
LEARNING_RATE = 3e-3
WARM_UP = 100  # Steps.
SEED = 0


def read_corpus() -> list[str]:
    """All sentences, language by language in the order of the file names."""
    return [line for path in sorted(CORPUS.glob("*.txt")) for line in path.read_text(encoding="utf-8").splitlines()]


def train_vocabulary(sentences: list[str]) -> bytes:
    """A SentencePiece unigram model, as XGLM's is, that knows each character of the corpus."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="unigram",
        vocab_size=PIECES,
        character_coverage=1.0,
        normalization_rule_name="nmt_nfkc",
        num_threads=1,  # Several threads add up their counts in an order that changes from run to run.
        minloglevel=1,
    )
    return model.getvalue()


def batches(texts: list[list[int]], generator: torch.Generator) -> Iterator[torch.Tensor]:
    """One epoch: token ids [sequences, BLOCK + 1], of which the last column is only predicted."""
    order = torch.randperm(len(texts), generator=generator).tolist()
    stream = torch.tensor([token for index in order for token in texts[index]])
    # A new phase each time, so that no token is always the first or the last of a block.
    phase = int(torch.randint(BLOCK, (), generator=generator))
    blocks = stream[phase:].unfold(0, BLOCK + 1, BLOCK)
    yield from blocks[torch.randperm(len(blocks), generator=generator)].split(BATCH)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    return LEARNING_RATE * min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def train(model: XGLMForCausalLM, texts: list[list[int]]) -> None:
    """Trains in place, and prints the loss in nats per token."""
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    steps = EPOCHS * (sum(map(len, texts)) // (BLOCK * BATCH) + 1)
    step, start = 0, time.perf_counter()
    model.train()
    for epoch in range(1, EPOCHS + 1):
        losses = []
        for batch in batches(texts, generator):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            logits = model(batch[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            step += 1
        if epoch % 5 == 0:
            mean = sum(losses) / len(losses)
            print(f"epoch {epoch:3} of {EPOCHS}: loss {mean:.3f}, {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    """Writes vocabulary and model into `CHECKPOINT`."""
    sentences = read_corpus()
    CHECKPOINT.mkdir(exist_ok=True)
    with replacing(CHECKPOINT / VOCAB_FILE) as file:
        file.write(train_vocabulary(sentences))
    tokenizer = XGLMTokenizer(CHECKPOINT / VOCAB_FILE)
    tokenizer.save_pretrained(CHECKPOINT)
    texts = [tokenizer.encode(sentence) for sentence in sentences]

    torch.manual_seed(SEED)
    config = XGLMConfig(vocab_size=len(tokenizer), d_model=128, ffn_dim=512, num_layers=3, attention_heads=8)
    model = XGLMForCausalLM(config)
    print(f"{len(sentences)} sentences, {sum(map(len, texts))} tokens; {model.num_parameters():,} parameters")
    train(model, texts)
    model.save_pretrained(CHECKPOINT, dtype="float16")  # The type of the published files.


if __name__ == "__main__":
    main()
