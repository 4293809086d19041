"""Convolutions: `cpu.py` for inference on a CPU. Everywhere else a convolution is PyTorch's own."""
