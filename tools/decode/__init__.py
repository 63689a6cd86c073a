"""Speculative decoding: the reference decoder, rejection sampling, prompts, vLLM."""
