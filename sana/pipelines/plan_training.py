"""What a training run needs in memory, and the batch size that fits. Placeholder until the numbers are there."""
