"""A device that this machine lacks: its tensors say that they are there, and the CPU computes with them.

It stands in for what accelerators have in common, and is as strict as each of them: tensors of two devices never meet,
and, as on "mps", there is no float64. PyTorch knows one such device a process, for good, so this is a program:
`python -m tests.pipelines.stand_in_device` makes pictures on it and prints what it saw as JSON.
"""

import json
import sys
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from sana.pipelines import loading
from sana.pipelines.sana_pipeline import SanaPipeline
from sana.pipelines.sprint import SanaSprintPipeline
from tests.parity.runners.pipeline import build_pipeline
from tests.tiny_model import recorded_case

NAME = "elsewhere"
DEVICE = f"{NAME}:0"
ATEN = torch.ops.aten
TRANSFERS = (ATEN._to_copy.default, ATEN.copy_.default)
MATH = 0  # the attention that is made of other operations
SIZE = {"height": 64, "width": 96, "num_inference_steps": 3, "progress_bar": False, "use_resolution_binning": False}
PROMPTS = ["a red circle", "two blue squares on a green background"]
CASES: dict[str, dict[str, Any]] = {
    "guidance": {},
    "pag": {"pag_scale": 2.0},
    "no guidance": {"guidance_scale": 1.0},
    "negative": {"negative_prompt": ["a star", ""]},
    "euler": {"sampler": "flow_euler"},
    "small": {"upscale_from": 32},
    "step cache": {"step_cache": 0.1, "num_inference_steps": 6},
    "pil": {"output_type": "pil"},
}


class Backend(_DummyBackendModule):
    """What PyTorch asks about the device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class Elsewhere(Tensor):
    """A tensor of the device; `here` is what it holds, on the CPU."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> Self:
        result = Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype, device=NAME
        )
        result.here = here
        return result

    def __init__(self, here: Tensor) -> None:
        """`__new__` made it."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class OnDevice(TorchDispatchMode):
    """Takes what is made on the device, or moved there, to `Elsewhere`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # a device runs its parts
                return func.decompose(*args, **(kwargs or {}))
        return compute(func, args, kwargs or {})


def compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs an operation with what its tensors hold, and puts the results where the device would have them."""
    given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    there = [one for one in given if isinstance(one, Elsewhere)]
    if func is torch.ops.prim.device.default:
        return torch.device(NAME, 0) if there else torch.device("cpu")
    if there and func is ATEN._fused_sdp_choice.default:
        return MATH
    if there and func not in TRANSFERS and any(one.dim() and not isinstance(one, Elsewhere) for one in given):
        raise AssertionError(f"{func} got tensors of the CPU beside tensors of the device")
    target, lands = kwargs.get("device"), bool(there)
    if target is not None:
        lands, kwargs = torch.device(target).type == NAME, kwargs | {"device": torch.device("cpu")}
    args_here, kwargs_here = tree_map_only(Elsewhere, lambda one: one.here, (args, kwargs))
    results = func(*args_here, **kwargs_here)
    if func is ATEN.copy_.default:
        return args[0]
    if not lands:
        return results
    known = {id(one.here): one for one in there}  # what is changed in place stays the same tensor
    return tree_map_only(Tensor, lambda one: known[id(one)] if id(one) in known else landed(func, one), results)


def landed(func: Any, tensor: Tensor) -> Elsewhere:
    """Returns a result as a tensor of the device."""
    if tensor.dtype == torch.float64:
        raise TypeError(f"{func} makes float64, which the device does not have")
    with torch.inference_mode(False):  # else a view could not share the version of what it is a view of
        return Elsewhere(tensor)


def main() -> None:
    """Makes every case's pictures on the CPU and on the device."""
    _setup_privateuseone_for_python_backend(NAME, Backend())
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) is a transfer as well
    loading.as_device = torch.device  # type: ignore[assignment]  # it knows real ones only
    seen = {
        "pictures": {case: compare(bundled, on_device, options) for case, options in CASES.items()},
        "ways": {way: compare(bundled, prepare, {}) for way, prepare in WAYS.items()},
        "sprint": compare(sprint, on_device, {"num_inference_steps": 2, "height": 64, "width": 64}),
    }
    sys.stdout.write(json.dumps(seen) + "\n")


def bundled() -> SanaPipeline:
    """Returns the bundled model on the CPU."""
    return SanaPipeline.from_pretrained("asset/models/sana_tiny", device="cpu")


def sprint() -> SanaPipeline:
    """Returns a distilled model on the CPU."""
    return build_pipeline(recorded_case("e2e/sprint_2"), SanaSprintPipeline)


def on_device(pipeline: SanaPipeline) -> None:
    """Moves all that is loaded, and will be."""
    pipeline.to(DEVICE)


def tiled(pipeline: SanaPipeline) -> None:
    """Decodes in six tiles."""
    pipeline.to(DEVICE)
    pipeline.vae.enable_tiling(32, 32, 32, 32)


WAYS: dict[str, Callable[[SanaPipeline], Any]] = {
    "tiles": tiled,
    "model offload": lambda pipeline: pipeline.enable_model_cpu_offload(DEVICE),
    "sequential offload": lambda pipeline: pipeline.enable_sequential_cpu_offload(DEVICE),
    "group offload": lambda pipeline: pipeline.enable_group_offload(2, use_stream=False, device=DEVICE),
}


def compare(
    load: Callable[[], SanaPipeline], prepare: Callable[[SanaPipeline], Any], options: dict[str, Any]
) -> dict[str, Any]:
    """Returns the RMS between the pictures of both, where the device's are, and how much of its networks lies there."""
    options = SIZE | options
    expected = as_tensor(load()(PROMPTS, seed=3, **options))
    with OnDevice():
        pipeline = load()
        prepare(pipeline)
        made = as_tensor(pipeline(PROMPTS, seed=3, **options))
        there = isinstance(made, Elsewhere)
        error = ((made.here if there else made) - expected).square().mean().sqrt()
        networks = (pipeline.transformer, pipeline.autoencoder)
        weights = [isinstance(one, Elsewhere) for network in networks for one in network.state_dict().values()]
    return {"error": float(error), "there": there, "weights": sum(weights) / len(weights)}


def as_tensor(made: Any) -> Tensor:
    """Returns pictures of any kind in [-1, 1]."""
    if not isinstance(made, list):
        return made
    return torch.stack([torch.from_numpy(np.array(one)) for one in made]) / 127.5 - 1


if __name__ == "__main__":
    main()
