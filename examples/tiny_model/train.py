"""Trains the checkpoint of this folder: `make tiny-model`, some minutes on two cores.

The corpus is 16 languages of short sentences, and the model learns them nearly by heart. As in the training of XGLM
itself, a text is a stream of sentences with `</s>` before each, in a new order each epoch.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Sequence
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
BLOCK = 64  # Tokens that one training sequence reads; the longest sentence has 48.
BATCH = 8  # Sequences in one step.
EPOCHS = 80
LEARNING_RATE = 2e-3
WARM_UP = 0.02  # Part of the training.
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


def blocks(texts: Sequence[list[int]], generator: torch.Generator) -> torch.Tensor:
    """One epoch: ids [sequences, BLOCK + 1]; each row begins with a sentence, its last id is only predicted."""
    rows: list[list[int]] = []
    row: list[int] = []
    for index in torch.randperm(len(texts), generator=generator).tolist():
        row += texts[index]
        if len(row) > BLOCK:
            rows.append(row[: BLOCK + 1])
            row = list(texts[index])  # The sentence that was cut begins the next block.
    return torch.tensor(rows)[torch.randperm(len(rows), generator=generator)]


def learning_rate(progress: float) -> float:
    """Linear warm-up, then half a cosine down to zero, for a progress from 0 to 1."""
    return LEARNING_RATE * min(progress / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * progress))


def train(model: XGLMForCausalLM, texts: Sequence[list[int]]) -> None:
    """Trains in place, and prints the mean loss of an epoch in nats per token."""
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    start = time.perf_counter()
    model.train()
    for epoch in range(EPOCHS):
        batches = blocks(texts, generator).split(BATCH)
        total = 0.0
        for step, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate((epoch + step / len(batches)) / EPOCHS)
            logits = model(batch[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item()
        if (epoch + 1) % 5 == 0:
            seconds = time.perf_counter() - start
            print(f"epoch {epoch + 1:2} of {EPOCHS}: loss {total / len(batches):.3f}, {seconds:.0f} s", flush=True)


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
    config = XGLMConfig(
        vocab_size=len(tokenizer),
        d_model=128,
        ffn_dim=512,
        num_layers=3,
        attention_heads=8,
        dropout=0.0,  # The model is to learn the sentences by heart.
        attention_dropout=0.0,
        architectures=["XGLMForCausalLM"],
    )
    model = XGLMForCausalLM(config)
    print(f"{len(sentences)} sentences, {sum(map(len, texts))} tokens; {model.num_parameters():,} parameters")
    train(model, texts)
    # No text has the words that fill up the vocabulary, as in the published one.
    model.generation_config.suppress_tokens = tokenizer.additional_special_tokens_ids
    model.save_pretrained(CHECKPOINT, dtype="float16")  # The type of the published files.


if __name__ == "__main__":
    main()
