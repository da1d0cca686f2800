"""Compares the backends with an independent float64 oracle."""
