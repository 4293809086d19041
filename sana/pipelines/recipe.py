"""What makes a picture: the recipe stored in its PNG, its hash, how two differ. No picture is made here."""

import dataclasses
import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from sana import __version__

FORMAT = 1


class HasState(Protocol):
    """A network, or a table of embeddings in its place."""

    def state_dict(self) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class Recipe:
    """Everything that decides one picture, and beside it how it came about.

    Attributes:
        prompt, negative_prompt: in full.
        seed: of the picture's own noise.
        height, width: in pixels.
        num_inference_steps, sampler, guidance_scale, pag_scale, interval_guidance, flow_shift: of the sampling.
        use_resolution_binning: whether a trained shape was generated, then resized and cropped.
        dtype: what the transformer computed in.
        weights: hash of the weights, see `weights_hash`.
        step_cache, max_text_tokens: approximations, see `sana.pipelines.request.Request`.
        upscale_from, upscale_strength: the small picture that was made first, and how much of it was kept.
        quantization, text_quantization: schemes of the weights; None for exact ones.
        compile: mode of `SanaPipeline.compile`; compiled code rounds otherwise.
        made_with: model and config as they were named, versions, device, threads. Not part of the hash.
    """

    prompt: str
    negative_prompt: str
    seed: int
    height: int
    width: int
    num_inference_steps: int
    sampler: str
    guidance_scale: float
    pag_scale: float
    interval_guidance: tuple[float, float]
    flow_shift: float
    use_resolution_binning: bool
    dtype: str
    weights: str
    step_cache: float = 0.0
    max_text_tokens: int | None = None
    upscale_from: int | None = None
    upscale_strength: float | None = None
    quantization: str | None = None
    text_quantization: str | None = None
    compile: str = "off"
    made_with: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Returns a dict that JSON can hold, with the format number and the hash."""
        stored = dataclasses.asdict(self)
        stored["interval_guidance"] = list(self.interval_guidance)
        return {"format": FORMAT, **stored, "hash": self.hash}

    @property
    def hash(self) -> str:
        """64 hexadecimal digits; equal for equal recipes, whatever `made_with` says.

        Entries that have a default enter when they differ from it: a new one leaves the hashes of older pictures alone.
        """
        decisive = dataclasses.asdict(self)
        del decisive["made_with"]
        for name, default in _optional().items():
            if decisive[name] == default:
                del decisive[name]
        decisive["interval_guidance"] = list(self.interval_guidance)
        text = json.dumps(decisive, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Recipe":
        """Reads what `as_dict` wrote.

        Raises:
            ValueError: another format, or an entry is missing.
        """
        if stored.get("format") != FORMAT:
            raise ValueError(f"The recipe has format {stored.get('format')!r}; only {FORMAT} is known.")
        names = [one.name for one in dataclasses.fields(cls)]
        known = {**_optional(), **stored}
        missing = [name for name in names if name not in known]
        if missing:
            raise ValueError(f"The recipe lacks {', '.join(missing)}.")
        values = {name: known[name] for name in names}
        low, high = values["interval_guidance"]
        return cls(**{**values, "interval_guidance": (float(low), float(high))})


def _optional() -> dict[str, Any]:
    """Returns the entries of a recipe that older pictures lack, with what they mean there."""
    return {one.name: one.default for one in dataclasses.fields(Recipe) if one.default is not dataclasses.MISSING}


def weights_hash(modules: Iterable[HasState], settings: Mapping[str, Any]) -> str:
    """Returns 32 hexadecimal digits over the names, dtypes and bytes of every tensor, and over settings beside them.

    Args:
        modules: networks, in a fixed order.
        settings: what decides a picture and is no tensor; JSON values.
    """
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def environment(device: torch.device) -> dict[str, Any]:
    """Returns what may change the last bits of a picture: versions, device and number of threads."""
    return {
        "sana": __version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Returns one line for every entry in which two recipes (as dicts) differ, `made_with` included."""
    lines = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{prefix}{name}.")
        elif before != after and name != "hash":
            lines.append(f"{prefix}{name}: {before!r} before, {after!r} now")
    return lines
