"""Fused operations, each with a plain one beside it."""
