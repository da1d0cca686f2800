"""What the fine-tuning examples share: sentences to learn, batches of them, and the learning curve.

The sentences are about the weather, of which the bundled model has read little. All examples get the same batches in
the same order, so their first losses are the same, whatever the framework.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from xglm_core import XGLMTokenizer
from xglm_core.loss import labels_for

CHECKPOINT = Path(__file__).parent / "tiny_model" / "checkpoint"
ROWS = 8  # Of a batch, in all processes together.
LENGTH = 32  # Tokens of a row, padded: one shape, so that compiled code is compiled once.

# For each language: when, where, what.
_PARTS = (
    (
        ("Tomorrow", "At noon", "In the evening"),
        ("in the old town", "by the sea", "in the mountains"),
        ("it will rain.", "the wind is cold.", "the sun is out again."),
    ),
    (
        ("Mañana", "Al mediodía", "Por la tarde"),
        ("en la ciudad vieja", "junto al mar", "en la montaña"),
        ("va a llover.", "el viento es frío.", "sale otra vez el sol."),
    ),
    (
        ("Besok", "Siang hari", "Malam hari"),
        ("di kota tua", "di dekat laut", "di gunung"),
        ("akan turun hujan.", "angin terasa dingin.", "matahari keluar lagi."),
    ),
    (
        ("Kesho", "Saa sita mchana", "Jioni"),
        ("katika mji wa kale", "karibu na bahari", "mlimani"),
        ("mvua itanyesha.", "upepo ni baridi.", "jua litatoka tena."),
    ),
)


def sentences() -> list[str]:
    """All 108 of them."""
    return [" ".join(parts) for language in _PARTS for parts in itertools.product(*language)]


def arguments(description: str) -> argparse.ArgumentParser:
    """The command line of an example, which may add to it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", default=str(CHECKPOINT), help="folder, or repository of the hub (bundled model)"
    )
    parser.add_argument("--steps", type=int, default=60, help="batches of 8 sentences (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of AdamW (%(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoint and learning curve")
    return parser


def batches(tokenizer: XGLMTokenizer, steps: int, seed: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Batches of int64 arrays [ROWS, LENGTH]: ids, mask and labels; every sentence once before any comes again."""
    texts, stream, order = sentences(), np.random.default_rng(seed), np.array([], int)
    for _ in range(steps):
        if len(order) < ROWS:
            order = np.concatenate([order, stream.permutation(len(texts))])
        chosen, order = order[:ROWS], order[ROWS:]
        encoded = tokenizer(
            [texts[index] for index in chosen],
            padding="max_length",
            max_length=LENGTH,
            padding_side="right",
            return_tensors="np",
        )
        ids, mask = (np.asarray(encoded[name], np.int64) for name in ("input_ids", "attention_mask"))
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels_for(ids, mask)}


class Curve:
    """The losses of a run: printed as they come, then saved as `losses.json` and, with matplotlib, `losses.png`."""

    def __init__(self, name: str, steps: int) -> None:
        self.name, self.steps = name, steps
        self.losses: list[float] = []

    def add(self, loss: Any) -> None:
        """Takes the loss of the next step [nats per token]."""
        self.losses.append(float(loss))
        step = len(self.losses)
        if step <= 3 or step % 10 == 0 or step == self.steps:
            print(f"{self.name}  step {step:4d} of {self.steps}  loss {self.losses[-1]:.4f}", flush=True)

    def save(self, folder: Path) -> None:
        """Writes the files."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "losses.json").write_text(json.dumps({"name": self.name, "losses": self.losses}) + "\n")
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError:
            print("no losses.png: run pip install matplotlib to have the curve drawn")
            return
        figure = Figure(figsize=(6, 3.5), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel="loss [nats per token]", title=self.name)
        axes.plot(range(1, len(self.losses) + 1), self.losses)
        axes.set_ylim(bottom=0)
        figure.savefig(folder / "losses.png", dpi=150)
