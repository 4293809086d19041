"""What our checkpoints say about themselves, so that no YAML is needed; writing them; the fp16 lineage of weights.

Reading and loading weights is in `checkpoint.py` and `weights.py`; diffusers folders are in `diffusers_folder.py`.
"""

import json
import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sana.models.checkpoint import CheckpointError, read_safetensors_metadata
from sana.utils.dtype import parse_dtype
from sana.utils.logging import get_logger

logger = get_logger(__name__)

FORMAT = "sana_format"
FORMAT_VERSION = "1"

# Official repositories whose models were trained in fp16 (Nov 2024). Their activations need the clip to +-65504.
FP16_REPOSITORIES = (
    "Sana_600M_512px",
    "Sana_600M_1024px",
    "Sana_1600M_512px",
    "Sana_1600M_512px_MultiLing",
    "Sana_1600M_1024px",
    "Sana_1600M_1024px_MultiLing",
    "Sana_600M_1024px_ControlNet_HED",
)
# Official names outside the `*_BF16*` rule that were trained in bf16.
BF16_PREFIXES = ("SANA1.5_", "Sana_Sprint_", "SANA_Sprint_")


@dataclass
class CheckpointMetadata:
    """What is stored beside the weights of a transformer.

    Attributes:
        arch: {"class": "SanaMS", "kwargs": {official constructor arguments}}.
        precision: the precision it was trained in: "fp16", "bf16" or "fp32"; "fp16" asks for the clip.
        flow_shift: shift of the sampling schedule.
        chi_prompt: lines of the complex human instruction put before every prompt; empty for none.
        license: of the weights.
        config: the full `SanaConfig` as a dict; paths in it are relative to the folder of the file.
        quantization: what `sana.models.quantization.load.to_record` says of quantised weights; empty for exact ones.
    """

    arch: dict[str, Any]
    precision: str = "fp32"
    flow_shift: float = 3.0
    chi_prompt: list[str] = field(default_factory=list)
    license: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)

    def to_strings(self) -> dict[str, str]:
        """The string-to-string form that a .safetensors header can hold."""
        return {
            "format": "pt",
            FORMAT: FORMAT_VERSION,
            "arch": json.dumps(self.arch),
            "precision": self.precision,
            "flow_shift": repr(float(self.flow_shift)),
            "chi_prompt": json.dumps(self.chi_prompt, ensure_ascii=False),
            "license": self.license,
            "config": json.dumps(self.config, ensure_ascii=False),
            **({"quantization": json.dumps(self.quantization)} if self.quantization else {}),
        }

    @classmethod
    def from_strings(cls, strings: Mapping[str, str], source: str) -> "CheckpointMetadata | None":
        """Reads `to_strings` back; None when a header is not ours.

        Raises:
            CheckpointError: the header is ours and broken, or of a later version.
        """
        version = strings.get(FORMAT)
        if version is None:
            return None
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{source} has metadata of version {version}; this program reads {FORMAT_VERSION}.")
        try:
            return cls(
                arch=_dict(json.loads(strings["arch"])),
                precision=strings["precision"],
                flow_shift=float(strings["flow_shift"]),
                chi_prompt=list(json.loads(strings["chi_prompt"])),
                license=strings.get("license", ""),
                config=_dict(json.loads(strings["config"])),
                quantization=_dict(json.loads(strings.get("quantization", "{}"))),
            )
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"The metadata of {source} is broken ({type(error).__name__}: {error}).") from error


def save_checkpoint(
    path: str | Path,
    model: nn.Module | Mapping[str, Tensor],
    metadata: CheckpointMetadata,
    *,
    dtype: str | torch.dtype | None = None,
) -> Path:
    """Writes weights with their metadata as one .safetensors file; the old file stays until the new one is whole.

    Args:
        path: target; its folder is created.
        model: a model, or a state dict with official keys.
        metadata: see `CheckpointMetadata`.
        dtype: store floating-point tensors in this dtype; None keeps each tensor's own.

    Returns:
        The path.

    Raises:
        ValueError: the suffix is not .safetensors.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: our checkpoints end in .safetensors.")
    state = model.state_dict() if isinstance(model, nn.Module) else model
    write_safetensors(path, cast_state(state, dtype), metadata.to_strings())
    return path


def cast_state(state: Mapping[str, Tensor], dtype: str | torch.dtype | None) -> dict[str, Tensor]:
    """Casts the floating-point tensors of a state dict; None changes nothing."""
    target = None if dtype is None else parse_dtype(dtype)
    return {key: t.to(target) if target is not None and t.is_floating_point() else t for key, t in state.items()}


def write_safetensors(path: Path, state: Mapping[str, Tensor], strings: Mapping[str, str] | None = None) -> None:
    """Writes a .safetensors file under a temporary name and moves it in place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        plain = {key: t.detach().to("cpu").contiguous().clone() for key, t in state.items()}
        save_file(plain, temporary, metadata=dict(strings or {"format": "pt"}))
        _sort_strings(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _sort_strings(path: Path) -> None:
    """Puts the strings in a file's header in order: the library writes them in a random one, and equal weights with
    equal strings shall be equal files."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        content = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(content) <= length:  # spaces fill it up, as the format has it; else the order stays as it is
            file.seek(8)
            file.write(content.ljust(length))


def read_file_metadata(path: Path) -> CheckpointMetadata | None:
    """The metadata of one .safetensors file; None when the file is another kind or not ours.

    Raises:
        CheckpointError: the file or its metadata is damaged.
    """
    if path.suffix != ".safetensors":
        return None
    return CheckpointMetadata.from_strings(read_safetensors_metadata(path), str(path))


def official_precision(ref: str) -> tuple[str, str] | None:
    """The training precision of an official repository named anywhere in a reference, URL or path.

    Returns:
        (precision, repository name), or None when no official name occurs.
    """
    for part in reversed(re.split(r"[/\\@]|--", str(ref))):
        name = re.sub(r"\.(pth|pt|safetensors|bin)$", "", part).removesuffix("_diffusers").removesuffix("_ComfyUI")
        if name in FP16_REPOSITORIES:
            return "fp16", name
        if name.startswith(BF16_PREFIXES) or re.match(r"Sana_\d+M_\w*BF16", name):
            return "bf16", name
    return None


def fp16_lineage(ref: str | Path, metadata: CheckpointMetadata | None, mixed_precision: str | None) -> tuple[bool, str]:
    """Decides whether activations are clipped to the range of float16, by where the weights come from.

    The clip follows the training, not the dtype: weights trained in fp16 clip in every dtype. The order is our own
    metadata, the table of official repositories, `model.mixed_precision`.

    Args:
        ref: what the user gave as weights.
        metadata: of the checkpoint, or None.
        mixed_precision: the config's `model.mixed_precision`.

    Returns:
        (clip, what decided it); both are logged.
    """
    official = official_precision(str(ref))
    if metadata is not None and metadata.precision:
        precision, source = metadata.precision, f"metadata of {ref}"
    elif official is not None:
        precision, source = official[0], f"official repository {official[1]}"
    else:
        precision, source = mixed_precision or "no", "model.mixed_precision"
    clip = parse_dtype(precision) == torch.float16
    logger.info("trained in %s (%s): fp16 clip %s", precision, source, "on" if clip else "off")
    return clip, source


def _dict(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"expected a dict, found {type(value).__name__}")
    return value
