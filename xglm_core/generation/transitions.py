"""The scores of the tokens of a generated text."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from xglm_core.errors import InputError


def transition_scores(
    sequences: np.ndarray, scores: Iterable[np.ndarray], beam_indices: np.ndarray | None = None, *, normalize: bool
) -> np.ndarray:
    """The score of each new token, in the step that chose it.

    Args:
        sequences: ids [rows, prompt + new].
        scores: the scores of each step [rows or beams, vocab_size].
        beam_indices: of a beam search, the beam that each new token continued [rows, new]; -1 after the end.
        normalize: whether to turn the scores into log-probabilities.

    Returns:
        float32 [rows, new]; 0 after the end of a beam.

    Raises:
        InputError: there are no scores, or the arguments do not fit together.
    """
    steps = [np.asarray(array, np.float32) for array in scores]
    if not steps:
        raise InputError("scores is empty; expected those of generate(..., output_scores=True)")
    if beam_indices is None:
        beam_indices = np.repeat(np.arange(len(sequences))[:, None], len(steps), axis=1)
    count = int((beam_indices >= 0).sum(axis=1).max())
    if len(beam_indices) != len(sequences) or count > len(steps) or int(beam_indices.max()) >= len(steps[0]):
        raise InputError(
            f"sequences is {list(sequences.shape)} and beam_indices {list(beam_indices.shape)}, but scores of "
            f"{len(steps)} steps and {len(steps[0])} rows; give all three of one call, beam_indices if it had beams"
        )
    beams, tokens = beam_indices[:, :count], sequences[:, sequences.shape[1] - count :]
    result = np.zeros(tokens.shape, np.float32)
    for step in range(count):
        live = beams[:, step] >= 0
        rows = steps[step][beams[live, step]]
        found = np.take_along_axis(rows, tokens[live, step : step + 1], axis=1)
        if normalize:
            largest = rows.max(axis=1, keepdims=True)
            found = found - largest - np.log(np.exp(rows - largest).sum(axis=1, keepdims=True))
        result[live, step] = found[:, 0]
    return result
