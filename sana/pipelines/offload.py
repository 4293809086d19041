"""Where the networks of a pipeline lie while they are not used."""

from contextlib import AbstractContextManager, nullcontext


class Offloadable:
    """The part of `SanaPipeline` that keeps networks away from its device while they are not used."""

    def stage(self, network: str) -> AbstractContextManager[None]:
        """Makes a network ready on the pipeline's device while it is used.

        Args:
            network: "text_encoder", "transformer" or "autoencoder".
        """
        return nullcontext()
