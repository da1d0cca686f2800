"""Runs EleutherAI's lm-evaluation-harness on any backend: its tasks, metrics and tables with our models."""

from xglm_core.evaluation.harness import register

__all__ = ["register"]
