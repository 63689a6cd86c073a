"""Losses, metrics and evaluation of a draft."""
