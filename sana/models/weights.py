"""Loading weights into a model: strict but for a named tuple of keys, with an architecture check that names the field.

Reading files is in `checkpoint.py`, metadata in `metadata.py`; both are offered here as well.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sana.models.checkpoint import CheckpointError, find_weights, load_state_dict, normalise_keys
from sana.models.diffusers_folder import read_folder_metadata
from sana.models.diffusers_keys import EXTRA_KEYS
from sana.models.metadata import CheckpointMetadata, fp16_lineage, read_file_metadata, save_checkpoint
from sana.models.quantization.schemes import is_stored_key
from sana.utils import hub
from sana.utils.logging import get_logger

__all__ = [
    "CheckpointError",
    "CheckpointMetadata",
    "fp16_lineage",
    "load_state_dict",
    "load_weights",
    "read_metadata",
    "save_checkpoint",
]

logger = get_logger(__name__)

IGNORABLE = ("pos_embed",)
_WIDTH = "model.model (its hidden size)"
# Which config field decides each dimension of a tensor; a shorter tuple leaves the last dimensions to its last entry.
_SHAPE_FIELDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"x_embedder\.proj\.weight", (_WIDTH, "vae.vae_latent_dim", "model.model (its patch size)")),
    (r"y_embedder\.y_embedding", ("text_encoder.model_max_length", "text_encoder.caption_channels")),
    (r"y_embedder\.y_proj\.fc1\.weight", (_WIDTH, "text_encoder.caption_channels")),
    (r"final_layer\.linear\.", ("vae.vae_latent_dim or scheduler.pred_sigma", _WIDTH)),
    (r"pos_embed", ("model.image_size", "model.image_size", _WIDTH)),
    (r"blocks\.\d+\.mlp\.point_conv\.conv\.weight", (_WIDTH, "model.mlp_ratio")),
    (r"blocks\.\d+\.mlp\.fc2\.weight", (_WIDTH, "model.mlp_ratio")),
    (r"blocks\.\d+\.mlp\.", ("model.mlp_ratio", _WIDTH)),
    (r".*", (_WIDTH,)),
)
# Which config field decides whether a tensor exists at all.
_PRESENCE_FIELDS: tuple[tuple[str, str], ...] = (
    (r"controlnet\.", "model.model (the file is a ControlNet, or the model is)"),
    (r"blocks\.\d+\.cross_attn\.[qk]_norm\.", "model.cross_norm"),
    (r"blocks\.\d+\.attn\.[qk]_norm\.", "model.qk_norm"),
    (r"blocks\.\d+\.attn\.", "model.attn_type"),
    (r"blocks\.\d+\.mlp\.", "model.ffn_type"),
    (r"attention_y_norm\.", "text_encoder.y_norm"),
    (r"cfg_embedder\.", "model.cfg_embed"),
    (r"logvar_linear\.", "model.logvar"),
    (r"pos_embed", "model.use_pe"),
    (r".*", "model.model"),
)


def read_metadata(ref: str | Path, *, variant: str | None = None) -> CheckpointMetadata | None:
    """What a checkpoint says about itself: our own files and folders, and diffusers folders.

    Args:
        ref: as for `load_state_dict`.
        variant: weight variant of a folder.

    Returns:
        None when the file carries no such data (an official .pth): a config is needed then.

    Raises:
        CheckpointError: it is damaged, or the folder is no model.
        FetchError: it could not be had.
    """
    path = hub.resolve(ref, kind="any", variant=variant)
    if path.is_file():
        return read_file_metadata(path)
    weights = find_weights(path, variant)
    return read_file_metadata(weights) or read_folder_metadata(path, weights)


def load_weights(
    model: nn.Module,
    ref_or_state: str | Path | Mapping[str, Tensor],
    *,
    ignorable: Sequence[str] = IGNORABLE,
    ema: bool = False,
    variant: str | None = None,
    state: Mapping[str, Tensor] | None = None,
    inference_device: torch.device | None = None,
) -> tuple[str, ...]:
    """Loads weights strictly; everything that does not fit is an error that names key, shape and config field.

    A diffusers folder written by others lacks `y_embedder.y_embedding` and `logvar_linear` (diffusers has no place
    for them); they keep the model's own initial values, which is logged.

    Args:
        model: a transformer with official keys; on the meta device it receives the tensors themselves.
        ref_or_state: as for `load_state_dict`, or a state dict.
        ignorable: keys that may be absent, strange or of another shape.
        ema: take the averaged weights of a training checkpoint.
        variant: weight variant of a folder.
        state: what `load_state_dict` gave for this reference, so that a large file is not read twice.
        inference_device: for a model on the meta device whose weights are only read: each tensor goes straight to this
            device and the model's dtype. What has both already is used where it lies, in the mapped file, which is
            never written to. None: tensors of the model's own, on the CPU.

    Returns:
        The keys that keep the model's own values.

    Raises:
        CheckpointError: the weights do not fit, or cannot be read.
        FetchError: they could not be had.
    """
    if isinstance(ref_or_state, Mapping):
        source, found = "The state dict", normalise_keys(ref_or_state, "The state dict")
    else:
        source, path = str(ref_or_state), hub.resolve(ref_or_state, kind="any", variant=variant)
        found = dict(state) if state is not None else load_state_dict(path, ema=ema, variant=variant)
        weights = find_weights(path, variant) if path.is_dir() else path
        if weights.name.startswith("diffusion_pytorch_model"):  # a layout without these tensors
            ignorable = (*ignorable, *EXTRA_KEYS)
    return _load(model, found, tuple(ignorable), source, inference_device)


def _load(
    model: nn.Module,
    state: dict[str, Tensor],
    ignorable: tuple[str, ...],
    source: str,
    inference_device: torch.device | None,
) -> tuple[str, ...]:
    own = model.state_dict()
    if any(map(is_stored_key, state)) and not any(map(is_stored_key, own)):
        raise CheckpointError(
            f"{source} holds quantised weights, which only SanaPipeline.from_pretrained loads; load exact ones here."
        )
    check_architecture(type(model).__name__, own, state, ignorable, source)
    fitting = {key: state[key] for key in own if key in state and state[key].shape == own[key].shape}
    kept = tuple(key for key in own if key not in fitting)
    on_meta = any(tensor.is_meta for tensor in own.values())
    if on_meta:
        lost = [key for key in kept if own[key].is_meta]
        if lost:
            raise CheckpointError(
                f"{source} has no {', '.join(lost)}, and the model is on the meta device where they have no values: "
                "build it on a real device."
            )
        fitting = {key: _like(tensor, own[key], inference_device) for key, tensor in fitting.items()}
    model.load_state_dict(fitting, strict=False, assign=on_meta)  # every difference was judged above
    if kept:
        logger.warning("%s: re-initialised %s (not in the file, or of another size)", source, ", ".join(kept))
    return kept


def check_architecture(
    model_name: str,
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    ignorable: Sequence[str],
    source: str,
) -> None:
    """Compares keys and shapes of a file with those of a model.

    Raises:
        CheckpointError: one sentence with the first difference, its shapes, the config field that decides it, and how
            many more there are.
    """
    shared = [key for key in own if key in state and key not in ignorable]
    differing = [key for key in shared if own[key].shape != state[key].shape]
    missing = [key for key in own if key not in state and key not in ignorable]
    strange = [key for key in state if key not in own and key not in ignorable]
    count = len(differing) + len(missing) + len(strange)
    if not count:
        return
    depths = _depth(state), _depth(own)
    if differing:
        key = differing[0]
        theirs, ours = tuple(state[key].shape), tuple(own[key].shape)
        what = f"{key} is {theirs} in the file and {ours} in the model; check {_shape_field(key, theirs, ours)}"
    elif depths[0] != depths[1] and depths[0]:
        what = f"it has {depths[0]} blocks and the model {depths[1]}; check model.model (its depth)"
    elif not shared:
        what = f"none of its keys (such as {strange[0] if strange else 'none'}) is a key of the model"
    else:
        key = missing[0] if missing else strange[0]
        place = "the model and not in the file" if missing else "the file and not in the model"
        shape = tuple((own if missing else state)[key].shape)
        what = f"{key} of shape {shape} is in {place}; check {_presence_field(key)}"
    more = f" ({count - 1} more differences)" if count > 1 else ""
    raise CheckpointError(f"{source} does not fit {model_name}: {what}{more}.")


def _shape_field(key: str, theirs: tuple[int, ...], ours: tuple[int, ...]) -> str:
    fields = next(fields for pattern, fields in _SHAPE_FIELDS if re.match(pattern, key))
    if len(theirs) != len(ours):
        return _presence_field(key)
    dimension = next(i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b)
    return fields[min(dimension, len(fields) - 1)]


def _presence_field(key: str) -> str:
    return next(name for pattern, name in _PRESENCE_FIELDS if re.match(pattern, key))


def _depth(state: Mapping[str, Tensor]) -> int:
    return 1 + max((int(m[1]) for key in state if (m := re.match(r"blocks\.(\d+)\.", key))), default=-1)


def _like(tensor: Tensor, target: Tensor, inference_device: torch.device | None) -> Tensor:
    """The tensor in the target's dtype, in memory of its own unless it is for inference on a given device."""
    if inference_device is not None:
        return tensor.to(inference_device, target.dtype).contiguous()
    return torch.empty_like(target, device="cpu").copy_(tensor)  # a memory-mapped one must not be trained
