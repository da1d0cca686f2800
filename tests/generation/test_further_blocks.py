"""A further block of tokens is a short walk, where steps are compiled. (PyTorch, step by step: tests/torch.)"""

import pytest

from tests.helpers.models import IDS
from tests.helpers.walk import calls
from xglm_core.generation.engine import BLOCK


def walk(fw, model, count, **options):
    """The calls for so many new tokens."""
    return calls(lambda: fw.generate(model, IDS, max_new_tokens=count, stop_at_eos=False, **options))


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 3}], ids=["greedy", "sampled"])
def test_a_further_block_is_a_short_walk(fw, model, options):
    """What `generate` calls for 16 tokens more, everything compiled: each file of ours with a call that is one more.

    The first token and the first block are the same in both calls, and so is what comes before and after the loop.
    """
    if fw.name == "torch":
        pytest.skip("it has no blocks")
    counts = 1 + BLOCK, 1 + 2 * BLOCK
    for count in counts:
        walk(fw, model, count, **options)
    before, after = (walk(fw, model, count, **options) for count in counts)
    more = after - before
    assert more, "no call of ours for a further block"
    assert not [name for _, name in more if "check" in name]
    assert len({file for file, _ in more}) <= 12
    assert more.total() < 6 * BLOCK
