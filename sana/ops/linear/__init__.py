"""The operator `linear`; PyTorch's own is its reference, `cpu.py` calls oneDNN on packed weights."""
