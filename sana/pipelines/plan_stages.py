"""What every stage of making pictures holds under given settings: sums of a `MemoryModel`'s numbers, each asked once.

Which settings to take is decided in `plan_search.py`; what a network needs is computed in `sana.pipelines.memory`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from sana.ops.packing import pack_budget
from sana.pipelines.memory.networks import NetworkWeights
from sana.pipelines.plan_request import Job

TEXT, ENCODE, DENOISE, DECODE = "text encoding", "encoding", "denoising", "decoding"
# In the order in which they need most: what comes before them for a small picture needs less.
NETWORKS = {TEXT: "text_encoder", ENCODE: "autoencoder", DENOISE: "transformer", DECODE: "autoencoder"}


class MemoryModel(Protocol):
    """What is read of `sana.pipelines.memory.stages.MemoryModel`."""

    def weights(self, network: str) -> NetworkWeights: ...
    def encode_text(self, prompts: int, *, null: bool = True) -> int: ...
    def denoise(self, height: int, width: int, batch: int, *, guidance: bool = True, pag: bool = False) -> int: ...
    def decode(self, height: int, width: int, batch: int, *, tiling: Any = None) -> int: ...
    def encode(self, height: int, width: int, batch: int, *, tiling: Any = None) -> int: ...


MakeModel = Callable[[str | None, str | None], MemoryModel]  # (quantization, text_quantization) -> model


@dataclass(frozen=True)
class Settings:
    """What decides how much memory a call of the pipeline needs.

    Attributes:
        batch: pictures of one call.
        tile: side of the decoder's tiles in pixels; None: whole pictures.
        slicing: pictures of a batch are decoded one by one.
        offload: "none", "model", "group" or "sequential".
        quantization, text_quantization: scheme of the transformer's and the text encoder's weights, or None.
        packing: a CPU keeps copies of weights in its own layout.
    """

    batch: int = 1
    tile: int | None = None
    slicing: bool = False
    offload: str = "none"
    quantization: str | None = None
    text_quantization: str | None = None
    packing: bool = False


@dataclass(frozen=True)
class Stage:
    """The memory of one stage, in bytes.

    Attributes:
        name: "text encoding", "encoding" (of a small picture that was enlarged), "denoising" or "decoding".
        held: what stays on the device meanwhile -> its bytes. In a pipeline these are weights by network, a CPU's
            packed copies included.
        peak: the most that is allocated above them.
    """

    name: str
    held: Mapping[str, int]
    peak: int

    @property
    def resident(self) -> int:
        """All that is held."""
        return sum(self.held.values())

    @property
    def total(self) -> int:
        """What is held, and the peak above it."""
        return self.resident + self.peak


class Estimator:
    """Stages of one job under any settings. Every number of a memory model is computed once.

    Args:
        job: what is to be made.
        make_model: (quantization, text_quantization) -> memory model. Each network has its own, since the scheme of one
            changes nothing in the others.
    """

    def __init__(self, job: Job, make_model: MakeModel) -> None:
        self.job = job
        self._make_model = make_model
        self._models: dict[tuple[str | None, str | None], MemoryModel] = {}
        self._known: dict[tuple[Any, ...], Any] = {}

    def for_job(self, job: Job) -> "Estimator":
        """Returns an estimator of a job that differs in size or open settings only; it shares all that is known."""
        other = Estimator(job, self._make_model)
        other._models, other._known = self._models, self._known
        return other

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of the job, in their order."""
        absent = {TEXT: not self.job.text_encoder, ENCODE: self.job.small is None}
        return tuple(stage for stage in NETWORKS if not absent.get(stage))

    @property
    def networks(self) -> tuple[str, ...]:
        """The networks of the job, in the order of their first use."""
        return tuple(NETWORKS[stage] for stage in (TEXT, DENOISE, DECODE) if stage in self.stages)

    def stage(self, name: str, settings: Settings) -> Stage:
        """Returns what a stage holds."""
        return Stage(name, self.resident(name, settings), self.peak(name, settings))

    def all_stages(self, settings: Settings) -> tuple[Stage, ...]:
        """Returns what every stage holds."""
        return tuple(self.stage(name, settings) for name in self.stages)

    def worst(self, settings: Settings) -> Stage:
        """Returns the stage that needs most; of equal ones the first."""
        return max(self.all_stages(settings), key=lambda stage: stage.total)

    def resident(self, name: str, settings: Settings) -> dict[str, int]:
        """Returns network -> bytes of its weights that are on the device during a stage (at their greatest)."""
        if settings.offload != "none":
            network = NETWORKS[name]
            return {network: kept_by_offload(self._weights(network, settings), settings.offload)}
        held = {network: self._weights(network, settings).total for network in self.networks}
        if settings.packing:
            budget, ran = pack_budget(), self.networks  # copies are made when a network first runs
            if self.job.small is None or name == TEXT:
                ran = ran[: ran.index(NETWORKS[name]) + 1]
            for network in ran:
                copies = min(self._weights(network, settings).packed, budget)
                held[network] += copies
                budget -= copies
        return held

    def host(self, settings: Settings) -> int:
        """Returns the bytes of weights that offload keeps in the machine's memory."""
        if settings.offload == "none":
            return 0
        return sum(self._weights(network, settings).total for network in self.networks)

    def peak(self, name: str, settings: Settings) -> int:
        """Returns the bytes above the weights."""
        if name == TEXT:
            return self._ask(
                (name, settings.batch, self._schemes(name, settings)),
                lambda: self._model(TEXT, settings).encode_text(settings.batch, null=self.job.guidance),
            )
        if name == DENOISE:
            return self._ask(
                (name, self.job.size, settings.batch, self._schemes(name, settings)),
                lambda: self._model(DENOISE, settings).denoise(
                    self.job.size.model_height, self.job.size.model_width, settings.batch,
                    guidance=self.job.guidance, pag=self.job.request.pag,
                ),
            )  # fmt: skip
        if name == ENCODE:
            return self._encode(settings)
        if settings.batch > 1 and self._singly(settings):
            return self._decode_singly(settings)
        return self._decode(settings)

    def _encode(self, settings: Settings) -> int:
        """Returns the peak of one enlarged picture after the other, beside all small ones and the latents made."""
        assert self.job.small is not None
        size, tile, factor = self.job.size, settings.tile, self.job.factor
        height, width = size.model_height, size.model_width
        small = 3 * self.job.small[0] * self.job.small[1] * 4  # float32, as are the latents
        latents = self.job.latent_channels * (height // factor) * (width // factor) * 4
        one = self._ask(
            (ENCODE, size, tile),
            lambda: self._model(ENCODE, settings).encode(
                height, width, 1, tiling=None if tile is None else make_tiling(tile)
            ),
        )
        return int(one + settings.batch * (small + latents))

    def _singly(self, settings: Settings) -> bool:
        """Whether the autoencoder takes the pictures of a batch one by one, see `Autoencoder.decode`."""
        size = self.job.size
        tiled = settings.tile is not None and max(size.model_height, size.model_width) > settings.tile
        return settings.slicing or tiled or self.job.request.device == "cpu"

    def _decode(self, settings: Settings) -> int:
        size, tile = self.job.size, settings.tile
        return self._ask(
            (DECODE, size, settings.batch, tile),
            lambda: self._model(DECODE, settings).decode(
                size.model_height, size.model_width, settings.batch, tiling=None if tile is None else make_tiling(tile)
            ),
        )

    def _decode_singly(self, settings: Settings) -> int:
        """Returns the peak of one picture after the other: while the last is made, joined, or turned to numbers."""
        size, factor, dtype = self.job.size, self.job.factor, self.job.autoencoder_dtype
        count, pixels = settings.batch, 3 * size.model_height * size.model_width
        latents = self.job.latent_channels * (size.model_height // factor) * (size.model_width // factor) * 4
        waiting = 2 * latents + (0 if dtype == torch.float32 else latents * dtype.itemsize // 4)  # scaled, and cast
        made = self._decode(replace(settings, batch=1)) + (count - 1) * (waiting + pixels * dtype.itemsize)
        joined = count * (waiting + 2 * pixels * dtype.itemsize)
        finished = count * (latents + 3 * pixels * 4)  # float32, and what scales them to [0, 1]
        return max(made, joined, finished)

    def _weights(self, network: str, settings: Settings) -> NetworkWeights:
        stage = next(one for one in self.stages if NETWORKS[one] == network)
        schemes = self._schemes(stage, settings)
        return self._ask((network, schemes), lambda: self._model(stage, settings).weights(network))

    def _schemes(self, stage: str, settings: Settings) -> tuple[str | None, str | None]:
        return (
            settings.quantization if stage == DENOISE else None,
            settings.text_quantization if stage == TEXT else None,
        )

    def _model(self, stage: str, settings: Settings) -> MemoryModel:
        schemes = self._schemes(stage, settings)
        if schemes not in self._models:
            self._models[schemes] = self._make_model(*schemes)
        return self._models[schemes]

    def _ask(self, key: tuple[Any, ...], compute: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]


def make_tiling(tile: int) -> Any:
    """Returns square tiles of a side in pixels."""
    from sana.models.autoencoder.tiling import Tiling

    return Tiling(height=tile, width=tile, stride_height=tile, stride_width=tile)


def kept_by_offload(weights: NetworkWeights, offload: str) -> int:
    """Returns the most bytes of a running network's weights that are on the device, by the kind of offload."""
    kept = {"none": weights.total, "model": weights.total, "group": weights.pair, "sequential": weights.unit}[offload]
    return kept if offload in ("none", "model") else min(weights.total, weights.rest + kept)
