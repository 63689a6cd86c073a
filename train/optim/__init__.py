"""Optimizers, and how their state is shared out."""
