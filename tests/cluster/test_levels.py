"""Consistency levels on real processes (docs/consistency.md, R17, R18)."""
