"""Codecs: hidden states to the arrays that are stored, and back."""
