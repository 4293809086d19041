"""The operator `rms_norm`; `reference.py` is its equation in plain PyTorch."""
