"""The ratios that walship promises, each measured against its floor in one run (docs/performance.md)."""
