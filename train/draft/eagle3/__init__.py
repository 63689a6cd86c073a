"""EAGLE-3 and P-EAGLE."""
