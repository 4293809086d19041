"""Networks with quantised weights: fp8 in `fp8.py`. Nothing is imported here."""
