"""How fast the tokenizers are, beside the libraries they stand on, and beside transformers where that is installed.

    python bench/tokenizers.py                       # 10 MB made of the bundled corpus
    python bench/tokenizers.py --text corpus.txt --vocabulary sentencepiece.bpe.model --megabytes 10

Each line of the table is the best of several runs, in CPU time of one thread: other work on the machine disturbs that
least. "long" is the whole text at once, "lines" its lines one by one, "batch" all lines in one call. The second table
shows that the time per megabyte stays the same however long a text is.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# In place of this folder, where this file would be taken for the library of its name.
sys.path[0] = str(ROOT)

import sentencepiece  # noqa: E402

from xglm_core import XGLMTokenizer, XGLMTokenizerFast  # noqa: E402

TINY = ROOT / "examples" / "tiny_model"

Encode = Callable[[str], object]
EncodeBatch = Callable[[list[str]], object]


def corpus(path: Path | None, size: int) -> list[str]:
    """Lines of `size` bytes together: those of a file, over and over, or sentences of the bundled corpus."""
    choose: Iterator[str]
    if path is not None:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line]
        choose = itertools.cycle(lines)
    else:
        sentences = [
            line for file in sorted(TINY.glob("corpus/*.txt")) for line in file.read_text(encoding="utf-8").splitlines()
        ]
        rng = random.Random(0)
        choose = (" ".join(rng.choices(sentences, k=rng.randint(1, 6))) for _ in itertools.count())
    chosen: list[str] = []
    while size > 0:
        chosen.append(next(choose))
        size -= len(chosen[-1].encode()) + 1
    return chosen


def contenders(vocabulary: Path, folder: Path) -> dict[str, tuple[Encode, EncodeBatch, float]]:
    """Under each name, the functions that encode a text and a batch, and the share of the corpus that is bearable."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary))
    slow = XGLMTokenizer(vocabulary, sp_model_kwargs={"num_threads": 1})
    fast = XGLMTokenizerFast(vocabulary)
    fast.save_pretrained(folder)
    fast = XGLMTokenizerFast(tokenizer_file=folder / "tokenizer.json")
    backend = fast.backend_tokenizer
    found: dict[str, tuple[Encode, EncodeBatch, float]] = {
        "sentencepiece": (processor.encode, lambda lines: processor.encode(lines, num_threads=1), 1),
        "XGLMTokenizer": (slow.encode, lambda lines: slow(lines, return_attention_mask=False), 1),
        "  calls with mask": (slow, slow, 1),
        "XGLMTokenizerFast": (fast.encode, lambda lines: fast(lines, return_attention_mask=False), 1),
        "tokenizers": (
            lambda text: backend.encode(text).ids,
            lambda lines: [encoding.ids for encoding in backend.encode_batch(lines)],
            0.1,
        ),
    }
    if importlib.util.find_spec("transformers"):
        import transformers

        transformers.logging.set_verbosity_error()
        for name in ("XGLMTokenizer", "XGLMTokenizerFast"):
            theirs = getattr(transformers, name).from_pretrained(folder)
            found[f"transformers' {name}"] = (theirs.encode, theirs, 0.05)
    return found


def seconds(functions: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """The least CPU time of each function, which run in turns, so that all meet the same moods of the machine."""
    least = [float("inf")] * len(functions)
    for _ in range(repeats):
        for place, function in enumerate(functions):
            begin = time.process_time()
            function()
            least[place] = min(least[place], time.process_time() - begin)
    return least


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a file with one text per line; default: the bundled corpus")
    parser.add_argument("--vocabulary", type=Path, default=TINY / "checkpoint" / "sentencepiece.bpe.model")
    parser.add_argument("--megabytes", type=float, default=10, help="size of the corpus; default: 10")
    parser.add_argument("--repeats", type=int, default=3, help="runs of which the best counts; default: 3")
    arguments = parser.parse_args()
    lines = corpus(arguments.text, int(arguments.megabytes * 1e6))
    text = " ".join(lines)
    count = XGLMTokenizer(arguments.vocabulary)
    print(f"{len(text.encode()) / 1e6:.1f} MB in {len(lines)} lines, {len(count.encode(text)) / 1e6:.2f} M tokens")
    print(f"\n{'million tokens/s, one thread':34}{'long':>8}{'lines':>8}{'batch':>8}")
    with tempfile.TemporaryDirectory() as folder:
        found = contenders(arguments.vocabulary, Path(folder))
        functions, sizes = [], []
        for encode, encode_batch, share in found.values():
            part = lines[: max(int(len(lines) * share), 1)]
            whole = " ".join(part)
            functions += [
                functools.partial(encode, whole),
                functools.partial(each, encode, part),
                functools.partial(encode_batch, part),
            ]
            sizes += [len(count.encode(whole)) / 1e6] * 3
        rates = [size / least for size, least in zip(sizes, seconds(functions, arguments.repeats), strict=True)]
    for place, name in enumerate(found):
        print(f"{name:34}" + "".join(f"{rate:8.2f}" for rate in rates[3 * place : 3 * place + 3]))
    print("\none text of         seconds/MB")
    parts = [text[: int(len(text) * share)] for share in (0.125, 0.25, 0.5, 1)]
    times = seconds([functools.partial(count.encode, part) for part in parts], arguments.repeats)
    for part, least in zip(parts, times, strict=True):
        size = len(part.encode()) / 1e6
        print(f"{size:8.2f} MB {least / size:18.4f}")


def each(encode: Encode, texts: list[str]) -> list[object]:
    """Encodes texts one by one."""
    return [encode(text) for text in texts]


if __name__ == "__main__":
    main()
