"""Checks of the engine's states before anything is written."""
