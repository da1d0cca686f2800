"""Scoring: how likely token ids, texts, pairs of texts and words are."""

from xglm_core.scoring.texts import TextScore, score_texts
from xglm_core.scoring.words import Word

__all__ = ["TextScore", "Word", "score_texts"]
