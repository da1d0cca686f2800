"""The rows that `xglm score` writes: JSON or tab-separated values, beginning with the line's number."""

from __future__ import annotations

from xglm_core.compare.report import json_line
from xglm_core.scoring.texts import Item, TextScore

FORMATS = ("jsonl", "tsv")

_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


def header(form: str, with_words: bool) -> str:
    """The header; empty for JSON."""
    if form == "jsonl":
        return ""
    return "line\tbegin\tend\tbits\tword" if with_words else "line\tcount\tsum\tperplexity\ttext"


def rows(form: str, with_words: bool, number: int, item: Item, score: TextScore) -> list[str]:
    """The rows of one text: one, or with `with_words` in a table, one for each word.

    Args:
        form: one of `FORMATS`.
        with_words: whether to write the surprisal of words.
        number: the line of the text in the input.
        item: the text or the pair.
        score: its score.
    """
    if form == "jsonl":
        return [_record(with_words, number, item, score)]
    if with_words:
        return [
            f"{number}\t{word.begin}\t{word.end}\t{word.bits:.6f}\t{word.text.translate(_ESCAPES)}"
            for word in score.words
        ]
    text = score.text.translate(_ESCAPES)
    return [f"{number}\t{score.count}\t{score.sum:.6f}\t{score.perplexity:.6f}\t{text}"]


def _record(with_words: bool, number: int, item: Item, score: TextScore) -> str:
    values = {"line": number, "text": score.text}
    if not isinstance(item, str):
        values["context"], values["continuation"] = item
    values |= {
        "tokens": score.tokens,
        "ids": score.ids,
        "offsets": score.offsets,
        "log_probabilities": [round(value, 6) for value in score.log_probabilities],
        "sum": round(score.sum, 6),
        "count": score.count,
        "perplexity": round(score.perplexity, 6),
    }
    if with_words:
        values["words"] = [
            {"text": word.text, "begin": word.begin, "end": word.end, "bits": round(word.bits, 6)}
            for word in score.words
        ]
    return json_line(values, ensure_ascii=False)
