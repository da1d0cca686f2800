"""Shows the progress of a long command on stderr."""

from __future__ import annotations

import sys
import time

_INTERVAL = 0.1  # Seconds between two updates.
_BAR = 24  # The width of the bar in characters.


class Progress:
    """A bar with bytes, rate and remaining time; only if stderr is a terminal.

    Args:
        total: the number of bytes to write; all of them are also read back.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._written = 0
        self._verified = 0
        self._begin = time.perf_counter()
        self._drawn = 0.0
        self._shown = sys.stderr.isatty()

    def advance(self, written: int, verified: int) -> None:
        """Counts bytes that were written, and bytes that were read back."""
        self._written += written
        self._verified += verified
        now = time.perf_counter()
        if self._shown and now - self._drawn >= _INTERVAL:
            self._drawn = now
            print(f"\r{self._line(now - self._begin)}\x1b[K", end="", file=sys.stderr, flush=True)

    def finish(self, text: str) -> None:
        """Replaces the bar by a last line: the text, bytes, seconds and rate."""
        seconds = time.perf_counter() - self._begin
        self.clear()
        print(
            f"{text}: {_gigabytes(self._total)} in {seconds:.1f} s ({_gigabytes(self._total / seconds)}/s)",
            file=sys.stderr,
        )

    def clear(self) -> None:
        """Removes the bar."""
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _line(self, seconds: float) -> str:
        done = (self._written + self._verified) / max(1, 2 * self._total)
        bar = "#" * round(done * _BAR)
        rate = self._written / max(seconds, 1e-9)
        left = f", {seconds / done - seconds:.0f} s left" if done > 0 else ""
        doing = "reading back" if self._written == self._total else f"{_gigabytes(rate)}/s"
        return f"[{bar:{_BAR}}] {_gigabytes(self._written)} of {_gigabytes(self._total)}, {doing}{left}"


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
