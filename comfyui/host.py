"""What ComfyUI gives a node: folders of models, devices, progress, the stop button. Its modules are imported here only.

Without ComfyUI around them the nodes still run: no folders, PyTorch's own choice of a device, no progress.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def module(name: str) -> Any:
    """Returns one of ComfyUI's modules; None where ComfyUI, or a version that has it, is not running."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # it is there, and lacks a package of its own
        return None


def file_names(kind: str) -> list[str]:
    """Returns the files of one of ComfyUI's folders of models ("checkpoints", "vae"), as its lists show them."""
    paths = module("folder_paths")
    return list(paths.get_filename_list(kind)) if paths is not None and kind in paths.folder_names_and_paths else []


def folders(kind: str) -> list[Path]:
    """Returns where ComfyUI looks for models of a kind."""
    paths = module("folder_paths")
    if paths is None or kind not in paths.folder_names_and_paths:
        return []
    return [Path(folder) for folder in paths.get_folder_paths(kind)]


def folder_names(kind: str, markers: Sequence[str]) -> list[str]:
    """Returns the models of a kind that are folders, by name and a slash: those that hold one of the `markers`."""
    return sorted({f"{path.name}/" for path in _subfolders(kind) if any((path / one).is_file() for one in markers)})


def find(kinds: Sequence[str], name: str) -> Path:
    """Returns the path of a file (or, with a slash at its end, a folder) that one of ComfyUI's lists showed.

    Raises:
        ValueError: it is not there any more.
    """
    paths = module("folder_paths")
    for kind in kinds:
        if name.endswith("/"):
            found = next((str(path) for path in _subfolders(kind) if path.name == name[:-1]), None)
        else:
            found = paths.get_full_path(kind, name) if paths is not None else None
        if found is not None and Path(found).exists():
            return Path(found)
    raise ValueError(
        f"{name!r} is not in ComfyUI's models/{kinds[0]}; put it there, refresh the lists (R), or choose another."
    )


def downloaded(place: str, pattern: str) -> Path | None:
    """Returns what an earlier node pack fetched below ComfyUI's models folder, if it is there.

    Args:
        place: folder in the models folder, for example "sana"; its case does not matter.
        pattern: glob below it.
    """
    models = getattr(module("folder_paths"), "models_dir", None)
    if models is None or not Path(models).is_dir():
        return None
    roots = [path for path in sorted(Path(models).iterdir()) if path.name.lower() == place and path.is_dir()]
    return next((path for root in roots for path in sorted(root.glob(pattern))), None)


def device(part: str = "model") -> torch.device:
    """Returns the device that a part computes on: "model", "text" or "vae"."""
    management = module("comfy.model_management")
    if management is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = {"model": "get_torch_device", "text": "text_encoder_device", "vae": "vae_device"}
    return torch.device(getattr(management, names[part])())


def resting_device(part: str = "model") -> torch.device:
    """Returns where the weights of a part wait between runs: "model" or "vae"."""
    management = module("comfy.model_management")
    if management is None:
        return device(part)
    return torch.device({"model": management.unet_offload_device, "vae": management.vae_offload_device}[part]())


def latent_device() -> torch.device:
    """Returns where tensors that travel between nodes live."""
    management = module("comfy.model_management")
    return torch.device("cpu") if management is None else torch.device(management.intermediate_device())


def free_all() -> None:
    """Makes ComfyUI take every model off the device."""
    management = module("comfy.model_management")
    if management is not None:
        management.unload_all_models()


def stop_if_asked() -> None:
    """Raises ComfyUI's own exception when the stop button was pressed."""
    management = module("comfy.model_management")
    if management is not None:
        management.throw_exception_if_processing_interrupted()


class Progress:
    """The bar on the node that runs.

    Args:
        total: number of steps.
    """

    def __init__(self, total: int) -> None:
        utils = module("comfy.utils")
        self.total = total
        self._bar = None if utils is None else utils.ProgressBar(total)

    def show(self, done: int) -> None:
        """Moves the bar to `done` of the steps."""
        if self._bar is not None:
            self._bar.update_absolute(done, self.total)


def _subfolders(kind: str) -> list[Path]:
    return [path for root in folders(kind) if root.is_dir() for path in sorted(root.iterdir()) if path.is_dir()]
