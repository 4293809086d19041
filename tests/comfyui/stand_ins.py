"""Stand-ins for ComfyUI's own modules and nodes, by `contract.json`: what the pack calls, and what calls the pack."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image

CONTRACT = json.loads((Path(__file__).parent / "contract.json").read_text(encoding="utf-8"))


class InterruptProcessingException(Exception):  # noqa: N818  ComfyUI's name
    """The stop button was pressed."""


class Bars(list):
    """Every (done, total) that a progress bar showed; after `stop_after` of them the stop button is pressed."""

    stop_after: int | None = None

    def interrupted(self) -> None:
        """Raises as ComfyUI does once the button was pressed."""
        if self.stop_after is not None and len(self) >= self.stop_after:
            raise InterruptProcessingException


def modules(models: Path) -> tuple[dict[str, ModuleType], Bars]:
    """Returns ComfyUI's modules by name, around a folder of models, and what progress bars showed."""
    bars = Bars()
    cpu = torch.device("cpu")

    class ProgressBar:
        def __init__(self, total: int) -> None:
            self.total = total

        def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
            bars.append((value, total or self.total))

    def devices() -> torch.device:
        return cpu

    management = _module(
        "comfy.model_management",
        InterruptProcessingException=InterruptProcessingException,
        throw_exception_if_processing_interrupted=bars.interrupted,
        text_encoder_dtype=lambda device=None: torch.float16,
        load_models_gpu=lambda models: [model.load() for model in models],
        unload_all_models=lambda: None,
        **dict.fromkeys(
            (
                "get_torch_device",
                "text_encoder_device",
                "vae_device",
                "vae_offload_device",
                "unet_offload_device",
                "intermediate_device",
            ),
            devices,
        ),
    )
    utils = _module("comfy.utils", ProgressBar=ProgressBar)
    comfy = _module("comfy", model_management=management, utils=utils)
    found = [comfy, management, utils, _folder_paths(models)]
    return {module.__name__: module for module in found}, bars


def _folder_paths(models: Path) -> ModuleType:
    suffixes = {".safetensors", ".pth", ".ckpt", ".bin"}
    kinds = ("checkpoints", "vae", "text_encoders", "diffusers")
    places = {kind: ([str(models / kind)], suffixes) for kind in kinds}

    def get_filename_list(kind: str) -> list[str]:
        root = Path(places[kind][0][0])
        return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.suffix in suffixes)

    def get_full_path(kind: str, name: str) -> str | None:
        path = Path(places[kind][0][0]) / name
        return str(path) if path.is_file() else None

    return _module(
        "folder_paths",
        models_dir=str(models),
        folder_names_and_paths=places,
        get_folder_paths=lambda kind: places[kind][0],
        get_filename_list=get_filename_list,
        get_full_path=get_full_path,
    )


def nodes(folder: Path) -> dict[str, type]:
    """Returns ComfyUI's own nodes; pictures are written to `folder`."""

    class VAEDecode:
        def decode(self, vae: Any, samples: Mapping[str, Any]) -> tuple[Any]:
            return (vae.decode(samples["samples"]),)

    class VAEDecodeTiled:
        def decode(self, vae: Any, samples: Mapping[str, Any], tile_size: int, overlap: int, **_: int) -> tuple[Any]:
            assert vae.temporal_compression_decode() is None
            factor = vae.spacial_compression_decode()
            sides = {"tile_x": tile_size // factor, "tile_y": tile_size // factor, "overlap": overlap // factor}
            return (vae.decode_tiled(samples["samples"], **sides, tile_t=None, overlap_t=None),)

    class VAEEncode:
        def encode(self, vae: Any, pixels: Any) -> tuple[Any]:
            return ({"samples": vae.encode(pixels[:, :, :, :3])},)

    class SaveImage:
        def save_images(self, images: Any, filename_prefix: str = "ComfyUI", **hidden: Any) -> dict[str, Any]:
            assert hidden["prompt"] is not None
            return {"ui": {"images": list(_save(images, folder, filename_prefix))}}

    class PreviewImage(SaveImage):
        pass

    class KSampler:
        def sample(self, model: Any, latent_image: Mapping[str, Any], **options: Any) -> tuple[Any]:
            from tests.comfyui.comfy_sampling import sample

            return ({**latent_image, "samples": sample(model, latent_image["samples"], **options)},)

    own = (VAEDecode, VAEDecodeTiled, VAEEncode, SaveImage, PreviewImage, KSampler)
    for cls in own:
        _declare(cls, CONTRACT["nodes"][cls.__name__])
    return {cls.__name__: cls for cls in own}


def _declare(cls: Any, said: Mapping[str, Any]) -> None:
    """Gives a class what the contract says of it."""
    types = {part: dict(said[part]) for part in ("required", "hidden") if part in said}
    cls.INPUT_TYPES = classmethod(lambda cls: types)
    cls.RETURN_TYPES = tuple(said["returns"])
    cls.FUNCTION, cls.CATEGORY, cls.OUTPUT_NODE = said["function"], said["category"], said["output_node"]


def _save(images: torch.Tensor, folder: Path, prefix: str) -> Iterator[dict[str, str]]:
    assert images.ndim == 4 and images.shape[3] == 3 and images.dtype == torch.float32
    assert float(images.min()) >= 0 and float(images.max()) <= 1
    for index, image in enumerate(images):
        name = f"{prefix}_{index:05}_.png"
        Image.fromarray((255 * image.cpu().numpy()).clip(0, 255).astype("uint8")).save(folder / name)
        yield {"filename": name, "subfolder": "", "type": "output"}


def _module(name: str, **attributes: Any) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(attributes)
    return module
