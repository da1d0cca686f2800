"""How likely texts are: scoring of ids in any backend, and of texts, pairs and words on top of it."""

from xglm_core.scoring.texts import TextScore, score_texts
from xglm_core.scoring.words import Word

__all__ = ["TextScore", "Word", "score_texts"]
