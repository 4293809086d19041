"""The operator `mix_ffn`; `reference.py` is its equation in plain PyTorch."""
