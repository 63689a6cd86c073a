"""Fused operations, each with a plain reference."""
