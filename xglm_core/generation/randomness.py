"""Random sampling that is the same in every framework.

A token is drawn by the Gumbel-max trick: with independent noise g_i = -log(-log(u_i)), the index of the largest
score_i + g_i has the distribution softmax(score) (Gumbel 1954; Maddison et al., A* Sampling, 2014), and the indices of
the n largest are n draws without replacement. If the scores of two backends differ in the last bit, they draw different
tokens only where two of these sums are that close. With running sums of 256,008 probabilities they often would.

The values u_i depend on a key of two 32-bit words and on the id i. The device computes them by 32-bit arithmetic
(`noise_bits`). The key depends on the seed, the prompt, the number of the prompt's copy, and the step. So the text of a
row depends neither on its place in the batch nor on its neighbours.
"""

from __future__ import annotations

import collections
import hashlib
import secrets
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

# For `noise_bits`. The golden ratio spreads neighbouring ids; the others belong to a well-tested 32-bit mixing function
# (Wellons, "lowbias32", 2018).
GOLDEN = 0x9E3779B9
MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
SHIFTS = (16, 15, 16)


def noise_bits(key: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Computes 32 random bits for each index. This is the definition; `Selection` computes the same on the device.

    Args:
        key: two words, uint32 [..., 2].
        index: integers that broadcast with [...].

    Returns:
        uint32.
    """
    with np.errstate(over="ignore"):
        bits: np.ndarray = index.astype(np.uint32) * np.uint32(GOLDEN) + key[..., 0]
        return _mixed(_mixed(bits) ^ key[..., 1])


def gumbel(bits: np.ndarray) -> np.ndarray:
    """Gumbel noise from random bits, float32: -log(-log(1 - u)) with u = (bits + 1/2) / 2^32, finest near 0."""
    uniform = (bits.astype(np.float32) + np.float32(0.5)) * np.float32(2**-32)
    with np.errstate(divide="ignore"):
        noise: np.ndarray = -np.log(-np.log1p(-uniform))
    return noise


def drawn_seed() -> int:
    """An unpredictable seed."""
    return secrets.randbits(63)


def numbered(prompts: Iterable[bytes]) -> Iterator[int]:
    """Yields for each prompt how many equal ones were before it."""
    seen: collections.Counter[bytes] = collections.Counter()
    for prompt in prompts:
        yield seen[prompt]
        seen[prompt] += 1


class Keys:
    """The keys of the rows of a batch.

    Args:
        seed: the seed of the call; None if nothing is drawn.
        prompts: the prompt of each row, as bytes. Equal prompts get different keys, by their numbers.
        numbers: which copy of its prompt each row is; None counts them in order.
    """

    def __init__(self, seed: int | None, prompts: Sequence[bytes], numbers: Sequence[int] | None = None) -> None:
        seed = 0 if seed is None else seed
        numbers = [*numbered(prompts)] if numbers is None else numbers
        self._bases = [
            hashlib.blake2b(b"%d %d %b" % (seed, number, prompt))
            for number, prompt in zip(numbers, prompts, strict=True)
        ]

    def of_steps(self, begin: int, count: int) -> np.ndarray:
        """The keys of `count` steps from `begin` on, uint32 [rows, count, 2]."""
        keys = np.empty((len(self._bases), count, 2), np.uint32)
        for row, base in enumerate(self._bases):
            for step in range(count):
                state = base.copy()
                state.update((begin + step).to_bytes(8, "little"))
                keys[row, step] = np.frombuffer(state.digest()[:8], "<u4")
        return keys


def _mixed(bits: np.ndarray) -> np.ndarray:
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        bits = (bits ^ (bits >> np.uint32(shift))) * np.uint32(multiplier)
    return bits
