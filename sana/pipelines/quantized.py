"""Quantising the networks of a pipeline."""


class Quantizable:
    """The part of `SanaPipeline` whose networks can be quantised."""
