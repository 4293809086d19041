"""The operator `fp8_linear`; `reference.py` is its equation in plain PyTorch."""
