"""What needs no framework: conversions, and tokenizers beside the libraries on which they stand."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from xglm_core.bench.cases import NO_SUCH_CASE, Job, Run
from xglm_core.checkpoint.convert import WRITABLE, convert_checkpoint
from xglm_core.errors import BackendError

PACKAGES = ("sentencepiece", "tokenizers")

Encode = Callable[[str], list[int]]
EncodeBatch = Callable[[list[str]], list[list[int]]]


def written(job: Job, format: str, dtype: str | None = None) -> Path:
    """The folder that holds the weights in another format or type; it is written if it is missing."""
    if format == WRITABLE[0] and dtype is None:
        return Path(job.checkpoint)
    folder = Path(job.work) / "-".join(filter(None, (Path(job.checkpoint).name, format, dtype)))
    if not folder.exists():
        convert_checkpoint(job.checkpoint, folder, to=format, dtype=dtype, max_shard_size="100GB")
    return folder


def prepare(job: Job) -> None:
    """Writes the files from which a case converts."""
    if job.case.startswith("convert"):
        for format in job.case.split("-")[1:]:
            written(job, format)


class Engine:
    """Runs the cases; those of tokenizers by the library that the engine's name says."""

    def __init__(self, job: Job) -> None:
        if job.case.startswith("convert") and job.engine != "core":
            raise BackendError(NO_SUCH_CASE)
        self.job = job

    def convert(self) -> Run:
        """Writes, reads back, and compares."""
        source, target = self.job.case.split("-")[1:]
        folder, result = written(self.job, source), Path(self.job.work) / "converted"
        return Run(
            lambda: convert_checkpoint(folder, result, to=target, weights=source, max_shard_size="100GB"),
            before=lambda: shutil.rmtree(result, ignore_errors=True),
        )

    def tokenize(self) -> Run:
        """Encodes lines of the corpus."""
        return tokenize(self.job, *self._encoders())

    def _encoders(self) -> tuple[Encode, EncodeBatch]:
        from xglm_core import XGLMTokenizer, XGLMTokenizerFast

        if self.job.engine == "sentencepiece":
            import sentencepiece

            processor = sentencepiece.SentencePieceProcessor(model_file=self.job.vocabulary)
            return processor.encode, lambda lines: processor.encode(lines, num_threads=1)
        if self.job.engine == "core":
            tokenizer = XGLMTokenizer(self.job.vocabulary, sp_model_kwargs={"num_threads": 1})
            return tokenizer.encode, lambda lines: tokenizer(lines, return_attention_mask=False)["input_ids"]
        fast = XGLMTokenizerFast(self.job.vocabulary)
        if self.job.engine == "core-fast":
            return fast.encode, lambda lines: fast(lines, return_attention_mask=False)["input_ids"]
        backend = fast.backend_tokenizer
        return (
            lambda text: backend.encode(text).ids,
            lambda lines: [encoding.ids for encoding in backend.encode_batch(lines)],
        )


def tokenize(job: Job, encode: Encode, encode_batch: EncodeBatch) -> Run:
    """Encodes lines of one to six sentences, in the way that the case says; the tokens are counted."""
    text = Path(job.text)
    files = sorted(text.glob("*.txt")) if text.is_dir() else [text]
    sentences = [line for file in files for line in file.read_text(encoding="utf-8").splitlines() if line]
    draw = random.Random(0)
    lines = [" ".join(draw.choices(sentences, k=draw.randint(1, 6))) for _ in range(job.rows)]
    whole = " ".join(lines)
    return Run(
        {
            "tokenize-batch": lambda: sum(map(len, encode_batch(lines))),
            "tokenize-lines": lambda: sum(len(encode(line)) for line in lines),
            "tokenize-text": lambda: len(encode(whole)),
        }[job.case]
    )
