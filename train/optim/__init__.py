"""Optimizers, and how their state is divided among ranks."""
