"""An HTML page that shows how surprising each word is: one file, without scripts, for light and dark screens."""

from __future__ import annotations

import itertools
from html import escape
from typing import BinaryIO

from xglm_core.scoring.texts import TextScore
from xglm_core.scoring.words import Word

# From so many bits on, a word has the next darker shade; below the first, it has none.
STEPS = (2, 4, 6, 8, 12, 16)

# The colours of text, page and shades, for light and for dark screens. Text on each shade has a contrast of at least
# 4.5.
LIGHT = ("#1a1a1a", "#ffffff", "#fff1d6", "#ffe0ad", "#ffcb85", "#ffb067", "#ff9457", "#f57a4e")
DARK = ("#f2f2f2", "#16181c", "#2c2a2a", "#43302b", "#5c362a", "#763b29", "#8e4027", "#a34526")

_LINE_BREAK = "↵"


class Page:
    """Writes a page, text by text.

    Args:
        file: the file to write, in UTF-8.
        title: the title of the page.
    """

    def __init__(self, file: BinaryIO, title: str) -> None:
        self._file = file
        self._put(
            f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        )
        self._put('<meta name="viewport" content="width=device-width, initial-scale=1">\n')
        self._put(f"<style>\n{_style()}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n{_legend()}")

    def add(self, score: TextScore) -> None:
        """Adds a text; parts that are not scored, such as the context of a pair, have no shade."""
        done, parts = 0, []
        for word in score.words:
            parts += [escape(score.text[done : word.begin]), _marked(word)]
            done = word.end
        parts.append(escape(score.text[done:]))
        note = f"{score.count:,} tokens, perplexity {score.perplexity:,.2f}"
        self._put(f'<section>\n<p class="note">{note}</p>\n<p class="text" dir="auto" lang="">{"".join(parts)}</p>\n')
        self._put("</section>\n")

    def end(self) -> None:
        """Closes the page."""
        self._put("</body>\n</html>\n")

    def _put(self, text: str) -> None:
        self._file.write(text.encode())


def _marked(word: Word) -> str:
    shade = sum(word.bits >= step for step in STEPS)
    return f'<span class="s{shade}" title="{word.bits:.2f} bits">{escape(word.text) or _LINE_BREAK}</span>'


def _legend() -> str:
    bounds = [0, *STEPS]
    names = [f"{low} to {high}" for low, high in itertools.pairwise(bounds)] + [f"{bounds[-1]} or more"]
    items = " ".join(f'<span class="s{shade}">{name}</span>' for shade, name in enumerate(names))
    return (
        f'<p class="legend">Surprisal of each word, -log<sub>2</sub> of its probability, in bits: {items}. '
        "Hover a word for its number.</p>\n"
    )


def _style() -> str:
    def variables(colours: tuple[str, ...]) -> str:
        names = ("text", "page", *(f"s{shade}" for shade in range(1, len(STEPS) + 1)))
        return " ".join(f"--{name}: {colour};" for name, colour in zip(names, colours, strict=True))

    shades = "".join(f".s{shade} {{ background: var(--s{shade}); }}\n" for shade in range(1, len(STEPS) + 1))
    return (
        f":root {{ color-scheme: light dark; {variables(LIGHT)} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {variables(DARK)} }} }}\n"
        "body { color: var(--text); background: var(--page); font: 1.1rem/1.9 system-ui, sans-serif; "
        "max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }\n"
        "h1 { font-size: 1.3rem; }\n"
        ".note, .legend { font-size: 0.85rem; }\n"
        ".note { margin: 1.5rem 0 0; opacity: 0.8; }\n"
        ".text { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }\n"
        ".text span, .legend span { padding: 0.1em 0; border-radius: 0.2em; box-decoration-break: clone; }\n"
        ".legend span { padding: 0.1em 0.4em; white-space: nowrap; }\n"
        f"{shades}"
    )
