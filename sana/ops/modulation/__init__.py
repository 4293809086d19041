"""The operators `modulated_layer_norm` and `gated_residual` (adaLN); `reference.py` has the equations."""
