"""Verbs on stores: info, stats, show, compare, estimate."""
