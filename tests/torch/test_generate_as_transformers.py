"""The same calls of transformers' class, where the environment has it: the same texts."""

import itertools

import numpy as np
import pytest
import torch

FOLDER = "examples/tiny_model/checkpoint"
CALLS = 60

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def models():
    from xglm_torch import XGLMForCausalLM

    theirs = transformers.XGLMForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    return XGLMForCausalLM.from_pretrained(FOLDER), theirs


def allowed(prompt, ids):
    """Any rule that depends on all that it is told, and leaves a choice."""
    return [number for number in range(4, 2600) if (number + int(ids[-1]) + prompt) % 3]


def ends(ids, scores):
    """Any rule for each row by itself."""
    return ids.sum(dim=-1) % 7 == 0


def some_options(chance, columns, vocab_size):
    """Options drawn at random, for prompts of so many columns."""

    def ids(count):
        return chance.integers(4, vocab_size, int(count)).tolist()

    new = int(chance.integers(2, 9))
    beams = int(chance.choice([1, 1, 2, 3]))
    options = {
        "min_length": lambda: columns + int(chance.integers(0, new)),
        "sequence_bias": lambda: {(number,): float(chance.normal() * 8) for number in ids(300)},
        "begin_suppress_tokens": lambda: ids(900),
        # Beams that end in either have the same score: which of them wins is nobody's rule.
        "forced_eos_token_id": lambda: [2, 5][: 1 if beams > 1 else 2],
        "renormalize_logits": lambda: True,
        "repetition_penalty": lambda: float(chance.uniform(0.7, 2)),
        "no_repeat_ngram_size": lambda: int(chance.integers(1, 4)),
        "suppress_tokens": lambda: ids(800),
        "prefix_allowed_tokens_fn": lambda: allowed,
        "stopping_criteria": lambda: transformers.StoppingCriteriaList([ends]),
        "eos_token_id": lambda: [2, *ids(40)],
    }
    chosen = chance.choice(sorted(options), int(chance.integers(1, 5)), replace=False)
    return {"max_new_tokens": new, "num_beams": beams, **{name: options[name]() for name in chosen}}


@pytest.mark.parametrize("seed", range(CALLS))
def test_random_options(models, seed):
    chance = np.random.default_rng(seed)
    ours, theirs = models
    rows, columns = int(chance.integers(1, 3)), int(chance.integers(2, 8))
    vocab_size = ours.config.vocab_size
    prompts = torch.from_numpy(chance.integers(4, vocab_size, (rows, columns)))
    options = some_options(chance, columns, vocab_size)
    if "sequence_bias" in options:
        word = tuple(prompts[0, -1:].tolist())
        options["sequence_bias"][(*word, 77)] = 30.0
    call = {"return_dict_in_generate": True, "output_scores": True, **options}
    got = ours.generate(prompts, **call)
    expected = theirs.generate(prompts, attention_mask=torch.ones_like(prompts), pad_token_id=1, **call)
    assert got.sequences.equal(expected.sequences), options
    assert len(got.scores) == len(expected.scores)
    for score, other in zip(got.scores, expected.scores, strict=True):
        live = (score > -1e8) & (other > -1e8)
        assert ((score > -1e8) == (other > -1e8)).float().mean() > 0.999
        torch.testing.assert_close(score[live], other[live], rtol=1e-4, atol=1e-4)
    if options["num_beams"] > 1:
        torch.testing.assert_close(got.sequences_scores, expected.sequences_scores, rtol=1e-4, atol=1e-4)
        assert got.beam_indices.equal(expected.beam_indices[:, : got.beam_indices.shape[1]])
    for normalize, output in itertools.product((False, True), (got, expected)):
        arguments = (output.sequences, output.scores, getattr(output, "beam_indices", None), normalize)
        # Theirs adds up the whole vocabulary in float32, number by number.
        torch.testing.assert_close(
            ours.compute_transition_scores(*arguments),
            theirs.compute_transition_scores(*arguments),
            rtol=1e-4,
            atol=1e-4,
        )


def test_criteria_of_transformers(models):
    ours, _ = models
    prompts = torch.tensor([[5, 6, 7], [8, 9, 10]])
    for criteria in (
        [transformers.MaxLengthCriteria(5)],
        transformers.StoppingCriteriaList([transformers.MaxLengthCriteria(9), transformers.MaxLengthCriteria(5)]),
    ):
        for beams in (1, 2):
            got = ours.generate(prompts, stopping_criteria=criteria, num_beams=beams, stop_at_eos=False)
            assert got.shape == (2, 5)
    got = ours.generate(prompts, stopping_criteria=[transformers.MaxTimeCriteria(1e-9)], stop_at_eos=False)
    assert got.shape == (2, 4)
