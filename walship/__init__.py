"""Walship: one SQLite database, replicated by its WAL frames to followers, behind a SQL proxy."""

__version__ = "0.1.0"
