"""Engines that run the target, behind one protocol."""
