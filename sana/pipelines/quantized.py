"""Quantising the networks of a pipeline, before or after they are loaded. What a scheme does is in `sana.models`."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import nn

from sana.models.quantization.apply import check_patterns, check_quantizable, label, quantize
from sana.models.quantization.kernels import require
from sana.models.quantization.load import Wanted
from sana.models.quantization.schemes import scheme_of
from sana.models.text_encoder import PrecomputedTextEncoder
from sana.pipelines import loading

TEXT_PREFIX = "text_encoder."  # begins the patterns of `keep` that are the text encoder's


class Quantizable:
    """The part of `SanaPipeline` whose networks can be quantised."""

    _quantization: Mapping[str, Wanted] = {}  # network -> what it becomes when it is loaded
    config: Any
    device: torch.device
    dtype: torch.dtype
    transformer: nn.Module | None
    text_features: Any
    _text_encoder: loading.AnyTextEncoder | None
    _compiled: Any
    _weights_hash: str | None

    def quantize(
        self, transformer: str | None = "int8", text_encoder: str | None = None, *, keep: Sequence[str] = ()
    ) -> Self:
        """Stores the large weights of networks in fewer bits; pictures change a little. It cannot be undone.

        What is loaded is quantised at once, layer by layer. What is not, when it is loaded: call it before
        `from_pretrained` (and before the first prompt), and the exact network is never in memory as a whole. A model
        folder that `tools/quantize.py` wrote is quantised already. A network that is assigned later is taken as it is.

        Args:
            transformer: scheme of the denoiser, or None: "int8" (weights only), "int8-dynamic" (weights and inputs),
                "int4" (CUDA), "nf4" (bitsandbytes) or "fp8" (Hopper).
            text_encoder: scheme of the text encoder, or None.
            keep: patterns of layers that stay exact beside those that always do, for example "blocks.0.*"; those of the
                text encoder begin with "text_encoder.", as "text_encoder.layers.0.*".

        Returns:
            The pipeline.

        Raises:
            ValueError: see `sana.models.quantization.apply.quantize`; or a network is quantised already, nothing is
                asked for, or the text encoder is a file of embeddings. Nothing has changed then.
            QuantizationUnavailableError: the pipeline's device or a package is missing.
        """
        wanted = _wanted(transformer, text_encoder, keep)
        loaded = {name: network for name in wanted if (network := self._loaded(name)) is not None}
        for name, want in wanted.items():
            require(want.scheme, self.device)
            if name in self._quantization:
                already = self._quantization[name].scheme
                raise ValueError(f"quantize() was called already: the {label(name)} is or becomes {already}.")
            if name in loaded:
                check_quantizable(loaded[name], want.scheme, keep=want.keep, device=self.device)
        pipeline: Any = self
        for name, network in loaded.items():
            with pipeline.detached(name):
                quantize(network, wanted[name].scheme, keep=wanted[name].keep, device=self.device)
        self._quantization = {**self._quantization, **wanted}
        self._weights_hash = None
        self.text_features.clear()
        if self._compiled is not None and "transformer" in loaded:
            self._compiled.close()  # compiled blocks are those of the exact layers
        return self

    def _loaded(self, name: str) -> nn.Module | None:
        """Returns a network that is to be quantised, None before it is loaded; ValueError where there never is one."""
        if name == "transformer":
            return self.transformer
        encoder, source = self._text_encoder, str(self.config.text_encoder.text_encoder_name)
        if isinstance(encoder, PrecomputedTextEncoder) or (encoder is None and source.endswith(".safetensors")):
            raise ValueError("The text encoder is a file of embeddings: there is no network to quantise.")
        return encoder

    def _load_transformer(self, source: loading.ModelSource) -> nn.Module:
        """Returns the transformer of weights that were found, quantised if so asked."""
        pipeline: Any = self
        wanted = self._quantization.get("transformer")
        return loading.load_transformer(source, self.config, self.dtype, pipeline.load_device, wanted, self.device)

    def _load_text_encoder(self) -> loading.AnyTextEncoder:
        """Returns the config's text encoder, quantised if so asked."""
        pipeline: Any = self
        wanted = self._quantization.get("text_encoder")
        return loading.load_text_encoder(self.config, self.dtype, pipeline.load_device, wanted, self.device)


def _wanted(transformer: str | None, text_encoder: str | None, keep: Sequence[str]) -> dict[str, Wanted]:
    """Returns what is asked for by network.

    Raises:
        ValueError: a scheme is unknown, no network is named, or a pattern is one of a network that is not named.
    """
    check_patterns(keep)
    of_text = tuple(one.removeprefix(TEXT_PREFIX) for one in keep if one.startswith(TEXT_PREFIX))
    of_image = tuple(one for one in keep if not one.startswith(TEXT_PREFIX))
    asked = {"transformer": (transformer, of_image), "text_encoder": (text_encoder, of_text)}
    for name, (scheme, patterns) in asked.items():
        if scheme is not None:
            scheme_of(scheme)
        elif patterns:
            raise ValueError(f"keep: {patterns[0]!r} has no effect, for the {label(name)} is not quantised.")
    wanted = {name: Wanted(scheme, patterns) for name, (scheme, patterns) in asked.items() if scheme is not None}
    if not wanted:
        raise ValueError("quantize() needs a scheme for the transformer, the text encoder or both.")
    return wanted
