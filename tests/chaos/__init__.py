"""Chaos: real processes, real faults, histories judged by checkers that are themselves tested (docs/chaos.md)."""
