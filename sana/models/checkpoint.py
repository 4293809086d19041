"""Reading weight files into state dicts with official keys: .pth, .safetensors, FSDP .bin, shards, diffusers folders.

Nothing is loaded into a model here (`weights.py`), and no file is ever unpickled with code.
"""

import json
import pickle
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sana.models.diffusers_keys import from_diffusers, is_diffusers
from sana.utils import hub
from sana.utils.logging import get_logger

logger = get_logger(__name__)

WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
FOLDER_FILES = (  # in the order of search; {v} is "" or ".<variant>"
    "model{v}.safetensors",
    "diffusion_pytorch_model{v}.safetensors",
    "model.safetensors.index{v}.json",
    "diffusion_pytorch_model.safetensors.index{v}.json",
    "pytorch_model_fsdp{v}.bin",
    "model/pytorch_model_fsdp{v}.bin",
    "pytorch_model{v}.bin",
    "diffusion_pytorch_model{v}.bin",
    "pytorch_model.bin.index{v}.json",
    "diffusion_pytorch_model.bin.index{v}.json",
)
EXTRA_FILE = "sana_extra{v}.safetensors"  # beside diffusers' weights: tensors and metadata it has no place for
KNOWN_VARIANTS = ("bf16", "fp16", "fp32", "ema")


class CheckpointError(RuntimeError):
    """A weight file cannot be read, or does not fit the model; the message is one sentence for the user."""


def load_state_dict(ref: str | Path, *, ema: bool = False, variant: str | None = None) -> dict[str, Tensor]:
    """Reads weights from anywhere; the keys returned are the official ones.

    Args:
        ref: file or folder: local path, hf://owner/repo/path, hub id, http(s) URL (see `sana.utils.hub.resolve`).
        ema: take `state_dict_ema` of a training checkpoint instead of `state_dict`.
        variant: of a folder, the weight variant ("bf16", "fp16"); None takes the default files, or the only variant.

    Returns:
        Official key -> tensor, in the stored dtype, on the CPU. Tensors may be memory-mapped: do not write to them.

    Raises:
        CheckpointError: the file is truncated, holds code or no weights, or the folder is no model.
        FetchError: it could not be had.
    """
    path = hub.resolve(ref, kind="any", variant=variant)
    if path.is_dir():
        state = _read_folder(find_weights(path, variant))
    else:
        state = read_file(path, ema=ema)
    return normalise_keys(state, str(ref))


def read_file(path: Path, *, ema: bool = False) -> dict[str, Tensor]:
    """Reads one weight file (or a shard index), keys as stored.

    Raises:
        CheckpointError: see `load_state_dict`.
    """
    if path.name.endswith(".json"):
        return _read_shards(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        return _read_pickle(path, ema)
    raise CheckpointError(f"{path} has no known suffix of a weight file: allowed are .pth, .pt, .bin and .safetensors.")


def find_weights(folder: Path, variant: str | None = None) -> Path:
    """The weight file of the transformer in a folder: ours, diffusers' (whole pipeline or `transformer/`), or FSDP's.

    Raises:
        CheckpointError: there is none; the message says what was looked for.
    """
    if (folder / "transformer").is_dir():
        folder = folder / "transformer"
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no model folder: it does not exist.")
    found = _find(folder, variant)
    if found is None and variant is None:
        others = [v for v in KNOWN_VARIANTS if _find(folder, v)]
        if len(others) == 1:
            logger.info("%s has no default weights; taking its only variant %s", folder, others[0])
            found = _find(folder, others[0])
    if found is None and variant is not None:
        found = _find(folder, None)
        if found is not None:
            logger.warning("%s has no variant %s; taking %s", folder, variant, found.name)
    released = sorted((folder / "checkpoints").glob("*.pth"))  # the layout of the released repositories
    if found is None and len(released) == 1:
        return released[0]
    if found is None:
        present = sorted(file.name for file in folder.iterdir())[:8]
        raise CheckpointError(
            f"{folder} is no model folder: no weights such as {FOLDER_FILES[0].format(v='')} or "
            f"{FOLDER_FILES[1].format(v='')} are in it (it holds {', '.join(present) or 'nothing'})."
        )
    return found


def extra_file(weights: Path) -> Path:
    """Where our exports keep what diffusers has no place for, beside the given diffusers weights."""
    variant = hub.variant_of(weights.name)
    return weights.with_name(EXTRA_FILE.format(v=f".{variant}" if variant else ""))


def normalise_keys(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Strips wrappers (DDP, FSDP, compile) from keys and turns diffusers' keys into official ones.

    Raises:
        CheckpointError: two keys become one, or a diffusers key has no official counterpart.
    """
    plain: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = key
        for wrapper in WRAPPERS:
            name = name.removeprefix(wrapper).replace(f".{wrapper}", ".")
        if name in plain:
            raise CheckpointError(f"{source} holds the tensor {name} twice, once as {key}.")
        plain[name] = tensor
    if not is_diffusers(plain):
        return plain
    joined, strangers = from_diffusers(plain)
    if strangers:
        raise CheckpointError(f"{source} is not a Sana transformer of diffusers: {_some(strangers)} is unknown in it.")
    return joined


def read_safetensors_metadata(path: Path) -> dict[str, str]:
    """The string metadata of a .safetensors file.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def _find(folder: Path, variant: str | None) -> Path | None:
    suffix = f".{variant}" if variant else ""
    return next(
        (folder / name.format(v=suffix) for name in FOLDER_FILES if (folder / name.format(v=suffix)).is_file()), None
    )


def _read_folder(weights: Path) -> dict[str, Tensor]:
    state = read_file(weights)
    extra = extra_file(weights)
    if extra.is_file():
        state |= _read_safetensors(extra)
    return state


def _read_shards(index: Path) -> dict[str, Tensor]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of weight shards ({type(error).__name__}: {error}).") from error
    state: dict[str, Tensor] = {}
    for shard in shards:
        path = index.parent / shard
        if Path(shard).name != shard:
            raise CheckpointError(f"{index} names the shard {shard!r} outside its own folder.")
        if not path.is_file():
            raise CheckpointError(f"{index} names the shard {shard}, which is missing: fetch the whole folder again.")
        state |= read_file(path)
    missing = sorted(set(weight_map) - set(state))
    if missing:
        raise CheckpointError(f"The shards of {index} lack {_some(missing)}: fetch the whole folder again.")
    return state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def _read_pickle(path: Path, ema: bool) -> dict[str, Tensor]:
    try:
        with _numpy_allowed():
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        raise _refused(path, error) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _damaged(path, error) from error
    return _pick_state(path, content, ema)


def _numpy_allowed() -> AbstractContextManager[Any]:
    """Plain numpy arrays may stand in a training checkpoint (its random state); they carry no code."""
    from _codecs import encode

    reconstruct = np.empty(0).__reduce__()[0]
    names = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
    dtypes = [type(np.dtype(kind)) for kind in ("uint32", "int64", "float64", "uint8")]
    allowed = [(reconstruct, name) for name in names] + [np.ndarray, np.dtype, *dtypes, encode]
    return torch.serialization.safe_globals(allowed)


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _pick_state(path: Path, content: Any, ema: bool) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dict of weights.")
    wanted, other = ("state_dict_ema", "state_dict") if ema else ("state_dict", "state_dict_ema")
    if isinstance(content.get(wanted), Mapping):
        content = content[wanted]
    elif ema:
        raise CheckpointError(f"{path} holds no averaged weights (state_dict_ema); it has {_some(sorted(content))}.")
    elif isinstance(content.get(other), Mapping):
        logger.info("%s holds only %s; taking it", path, other)
        content = content[other]
    strangers = [
        str(key) for key, value in content.items() if not isinstance(value, Tensor) or not isinstance(key, str)
    ]
    if strangers or not content:
        what = f"{_some(strangers)} is no tensor" if strangers else "it is empty"
        raise CheckpointError(f"{path} holds no weights: {what} (expected state_dict, state_dict_ema or a flat dict).")
    return dict(content)


def _refused(path: Path, error: Exception) -> CheckpointError:
    imported = re.search(r"GLOBAL ([\w.]+)", str(error))
    if imported:
        return CheckpointError(
            f"{path} was refused: it asks to run {imported[1]}, and only plain tensors are read; use .safetensors."
        )
    return CheckpointError(f"{path} was refused: it was not written by torch.save, or holds more than plain tensors.")


def _damaged(path: Path, error: Exception) -> CheckpointError:
    lines = str(error).strip().splitlines()
    detail = lines[0].split(". ")[0].rstrip(".")[:120] if lines else type(error).__name__
    return CheckpointError(f"{path} is damaged or cut short ({path.stat().st_size} bytes): {detail}; fetch it again.")


def _some(names: list[str]) -> str:
    shown = ", ".join(map(str, names[:3]))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
