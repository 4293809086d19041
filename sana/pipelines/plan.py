"""What a picture will need in memory, said before anything is loaded."""


class Plannable:
    """The part of `SanaPipeline` that plans its memory."""
