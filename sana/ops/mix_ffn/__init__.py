"""The operator `mix_ffn`; `reference.py` is its equation in plain PyTorch, `function.py` the same by Triton kernels."""
