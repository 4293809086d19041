"""Benchmarks that anyone can rerun: `python -m tools.bench`. Every part is one file; sana imports nothing of it."""
