"""What a plan is asked for, with its checks, and how amounts of memory are written. Nothing is estimated here."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch

from sana.config import SanaConfig
from sana.ops.backend import plain_kind
from sana.ops.packing import pack_budget
from sana.pipelines import inputs
from sana.pipelines.upscale import check_upscale, small_size
from sana.registry import suggest
from sana.utils.dtype import parse_dtype

AUTO, NONE = "auto", "none"
OFFLOADS = ("none", "model", "group", "sequential")  # in the order of what they cost
DEVICES = ("cpu", "cuda")
MIN_TILE = 64  # pixels: two latent pixels of a DC-AE
MAX_BATCH = 10_000
UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_AMOUNT = re.compile(r"\s*(?P<number>\d+(\.\d*)?|\.\d+)\s*(?P<unit>[A-Za-z]*)\s*")


def parse_memory(name: str, amount: int | str) -> int:
    """Returns an amount of memory in bytes.

    Args:
        name: of the argument, for messages.
        amount: bytes as an int, or a number with a unit: kB, MB, GB, TB (powers of 1000), KiB, MiB, GiB, TiB (of 1024).
            A text without a unit is refused: "8" may mean either.

    Raises:
        ValueError: it is none of these, or negative.
    """
    if isinstance(amount, int) and not isinstance(amount, bool):
        if amount < 0:
            raise ValueError(f"{name} must not be negative, and is {amount}.")
        return amount
    found = _AMOUNT.fullmatch(amount) if isinstance(amount, str) else None
    if found is None:
        raise ValueError(f"{name} must be an amount of memory such as 8GB or 7.5GiB, not {amount!r}.")
    number = found["number"]
    if not found["unit"]:
        raise ValueError(f"{name} {number} has no unit; write {number}GB (10^9 bytes) or {number}GiB (2^30).")
    factor = UNITS.get(found["unit"].upper())
    if factor is None:
        raise ValueError(f"{name} {amount!r} has an unknown unit; use MB, GB (powers of 1000), MiB or GiB (of 1024).")
    return math.floor(Fraction(number) * factor)


def parse_limit(max_vram: int | str | None, margin: int | str) -> int | None:
    """Returns the bytes that may be allocated: `max_vram` less the margin; None where there is no bound.

    Raises:
        ValueError: one of them is no amount of memory, nothing is left, or there is a margin of nothing.
    """
    kept = parse_memory("margin", margin)
    if max_vram is None:
        if kept:
            raise ValueError("margin keeps memory free below max_vram, and no max_vram was given.")
        return None
    limit = parse_memory("max_vram", max_vram) - kept
    if limit <= 0:
        raise ValueError(f"margin {margin} leaves nothing of max_vram {max_vram}.")
    return limit


def format_memory(amount: int, *, up: bool = False) -> str:
    """Returns bytes as text that `parse_memory` reads: GB with two decimals, below 0.1 GB in MB with one.

    Args:
        amount: bytes.
        up: round up, so that the amount that is read from the text is enough.
    """
    unit, digits = ("GB", 2) if amount >= 10**8 else ("MB", 1)
    steps = amount * 10**digits / UNITS[unit]
    return f"{(math.ceil(steps) if up else round(steps)) / 10**digits:.{digits}f}{unit}"


@dataclass(frozen=True)
class PlanRequest:
    """What is to be made, on what, and which settings are left to the planner ("auto").

    Attributes:
        height, width: of a picture in pixels; None for the model's own size. Binned as the pipeline bins them.
        batch: pictures that are wanted. The plan may make them in several calls, see `split`.
        device: "cuda" or "cpu". It need not be there: a plan can be made for another machine.
        dtype: of the transformer and the text encoder; None as `SanaPipeline` takes it: fp32 on a CPU, else the
            config's `model.mixed_precision`.
        max_vram: bytes, or a text such as "8GB": what may be allocated on the device. None: nothing is chosen, and
            "auto" stands for what the pipeline does by itself.
        margin: bytes or text: kept free below `max_vram`. Nothing else is kept free in secret.
        guidance: whether there is classifier-free guidance; None: yes, except for a Sprint model, which has none.
        pag: whether there is perturbed-attention guidance.
        text_encoder: False where every call brings its embeddings.
        use_resolution_binning: as in a call of the pipeline.
        tiling: side of the decoder's tiles in pixels, "none" or "auto".
        offload: "none", "model", "group", "sequential" or "auto".
        quantization, text_quantization: scheme of the transformer's and the text encoder's weights, "none" or "auto".
        packing: whether a CPU keeps copies of weights in its own layout: True, False or "auto".
        split: whether the pictures may be made in several calls.
        upscale_from: as in a call of the pipeline: a small picture comes first, and is encoded at the full size.

    Raises:
        ValueError: a value is not allowed, or cannot take effect.
    """

    height: int | None = None
    width: int | None = None
    batch: int = 1
    device: str = "cuda"
    dtype: str | torch.dtype | None = None
    max_vram: int | str | None = None
    margin: int | str = 0
    guidance: bool | None = None
    pag: bool = False
    text_encoder: bool = True
    use_resolution_binning: bool = True
    tiling: int | str = AUTO
    offload: str = AUTO
    quantization: str | None = AUTO
    text_quantization: str | None = AUTO
    packing: bool | str = AUTO
    split: bool = True
    upscale_from: int | None = None

    def __post_init__(self) -> None:
        inputs.check_count("batch", self.batch, MAX_BATCH)
        check_choice("device", self.device, DEVICES)
        check_choice("offload", self.offload, (AUTO, *OFFLOADS))
        if self.dtype is not None:
            parse_dtype(self.dtype)
        parse_limit(self.max_vram, self.margin)
        check_upscale(self.upscale_from, None, None)
        self._check_tiling()
        if self.packing not in (True, False, AUTO):
            raise ValueError(f"packing must be true, false or auto, not {self.packing!r}.")
        self._check_device()

    def _check_tiling(self) -> None:
        if self.tiling in (AUTO, NONE):
            return
        if isinstance(self.tiling, bool) or not isinstance(self.tiling, int) or self.tiling < MIN_TILE:
            raise ValueError(
                f"tiling must be auto, none or the side of a tile in pixels (at least {MIN_TILE}), not {self.tiling!r}."
            )

    def _check_device(self) -> None:
        if self.device == "cpu" and self.offload not in (AUTO, NONE):
            raise ValueError(
                f"offload {self.offload!r} keeps weights in the machine's memory, where a CPU has them already; it "
                "has no effect with device cpu. Leave it out."
            )
        if self.device != "cpu" and self.packing is not AUTO and self.packing != AUTO:
            raise ValueError("packing is what a CPU does with weights; it has no effect with device cuda.")
        if self.packing is True and pack_budget() == 0:
            raise ValueError("packing true has no effect: set_pack_budget(0) has switched it off in this process.")
        if not self.text_encoder and self.text_quantization not in (AUTO, NONE, None):
            raise ValueError(f"text_quantization {self.text_quantization!r} has no effect without the text encoder.")
        for name, scheme in (("quantization", self.quantization), ("text_quantization", self.text_quantization)):
            if scheme not in (AUTO, NONE, None):
                check_scheme(name, str(scheme), self.device)

    @property
    def margin_bytes(self) -> int:
        """`margin` in bytes."""
        return parse_memory("margin", self.margin)

    @property
    def limit(self) -> int | None:
        """Bytes that may be allocated; None where there is no bound."""
        return parse_limit(self.max_vram, self.margin)


@dataclass(frozen=True)
class Job:
    """A request with everything known that the config decides.

    Attributes:
        request: as it was asked for.
        size: of the pictures, in pixels.
        factor: image pixels per latent pixel.
        latent_channels: of a latent.
        image_size: the resolution the model was trained for, in pixels.
        dtype: of the transformer and the text encoder.
        autoencoder_dtype: of the autoencoder.
        guidance: whether there is an unconditional branch.
        text_encoder: whether there is one in memory.
        packing: whether copies of weights in a CPU's layout can be kept.
        small: (height, width) in pixels of the picture that comes first, with `upscale_from`.
    """

    request: PlanRequest
    size: inputs.ImageSize
    factor: int
    latent_channels: int
    image_size: int
    dtype: torch.dtype
    autoencoder_dtype: torch.dtype
    guidance: bool
    text_encoder: bool
    packing: bool
    small: tuple[int, int] | None = None


def make_job(config: SanaConfig, request: PlanRequest) -> Job:
    """Checks a request against a config, as the pipeline would check the call.

    Raises:
        ValueError: the size is impossible, or the model cannot do what is asked for.
    """
    model, vae = config.model, config.vae
    if model.model.startswith("SanaMSControlNet"):
        raise ValueError(f"{model.model} needs a control image, and the pipeline makes none yet: no plan for it.")
    sprint = model.model.startswith("SanaMSCM")
    if sprint and (request.guidance or request.pag):
        raise ValueError("guidance and pag have no effect with a Sprint model: its guidance scale is an input.")
    attention = plain_kind(model.attn_type)[0]
    if request.pag and (attention != "linear" or not model.pag_applied_layers):
        raise ValueError(
            f"pag needs attn_type linear and pag_applied_layers; {model.model} has {model.attn_type!r} and "
            f"{model.pag_applied_layers}."
        )
    factor = vae.vae_downsample_rate
    size = inputs.plan_size(
        request.height,
        request.width,
        factor=factor,
        image_size=model.image_size,
        binning=request.use_resolution_binning and request.upscale_from is None,
    )
    small = None
    if request.upscale_from is not None:
        if sprint:
            raise ValueError("upscale_from works with samplers of the flow only, and a Sprint model has none.")
        small = small_size(size.model_height, size.model_width, request.upscale_from, factor)
    if request.tiling not in (AUTO, NONE) and int(request.tiling) % factor:
        raise ValueError(f"tiling {request.tiling} is no multiple of {factor}, the autoencoder's downsampling factor.")
    default = torch.float32 if request.device == "cpu" else parse_dtype(model.mixed_precision)
    precomputed = config.text_encoder.text_encoder_name.endswith(".safetensors")
    if precomputed and request.text_quantization not in (AUTO, NONE, None):
        raise ValueError("text_quantization has no effect: this config reads embeddings from a file.")
    return Job(
        request=request,
        size=size,
        factor=factor,
        latent_channels=vae.vae_latent_dim,
        image_size=model.image_size,
        dtype=default if request.dtype is None else parse_dtype(request.dtype),
        autoencoder_dtype=parse_dtype(vae.weight_dtype),
        guidance=not sprint and request.guidance is not False,
        text_encoder=request.text_encoder and not precomputed,
        packing=request.device == "cpu" and request.packing is not False and pack_budget() > 0,
        small=small,
    )


def with_size(job: Job, height: int, width: int) -> Job:
    """Returns the job for pictures of exactly this size, without binning."""
    request = replace(job.request, height=height, width=width, use_resolution_binning=False)
    return replace(job, request=request, size=inputs.ImageSize(height, width, height, width))


def check_scheme(name: str, scheme: str, device: str) -> None:
    """Checks the name of a quantisation scheme.

    Raises:
        ValueError: it is unknown (the nearest is named), or the device has no such arithmetic.
    """
    from sana.models.quantization.schemes import SCHEMES

    known: Any = SCHEMES
    if scheme not in known:
        check_choice(name, scheme, (AUTO, NONE, *known))
    if device not in known[scheme].devices:
        usable = [one for one in known if device in known[one].devices]
        raise ValueError(f"{name} {scheme!r} does not run on {device}; these do: {', '.join(usable)}.")


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    """Raises ValueError, naming the nearest, unless `value` is one of the known ones."""
    names = list(known)
    if value not in names:
        raise ValueError(f"Unknown {name} {value!r}.{suggest(str(value), names)} Allowed: {', '.join(names)}.")
