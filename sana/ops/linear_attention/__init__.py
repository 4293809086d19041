"""The operator `linear_attention`: `reference.py` is its equation in plain PyTorch, `function.py` its Triton form."""
