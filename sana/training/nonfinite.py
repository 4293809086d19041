"""What happens when a loss or a gradient is not finite: skip the step, count, stop with a bundle of evidence.

Finding the layer at fault is in `sana.models.layers.finite`; what a skipped step means is the trainer's business.
"""

import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sana.training.train_log import plain
from sana.utils import distributed
from sana.utils.logging import get_logger

logger = get_logger(__name__)

MAX_BYTES = 256 * 2**20  # of the tensors of one bundle
MAX_ROWS = 1024  # keys and captions of one bundle
MAX_LETTERS = 4096  # of one caption
FIRST_BUNDLES = 2  # the first bad steps tell most; the one that stops the run is kept as well


class TrainingDivergedError(RuntimeError):
    """More steps were not finite than the budget allows."""


@dataclass(frozen=True)
class Evidence:
    """What a bundle is made of. Nothing is read before a bundle is written.

    Attributes:
        keys, captions: of the batch of this process.
        tensors: of the batch of this process, the most telling first: latents, sigma, noise, prompt embeddings.
        find_layer: runs the model again and names the first layer that is not finite, for example
            `lambda: first_nonfinite_layer(model, latents, timestep, embeds, mask=mask)`. It is called on every process.
        parameters: names and parameters whose gradients are searched, where `gradient_norms` is empty.
        gradient_norms: of every gradient before clipping, by name, in the order of the parameters.
        local_loss: the loss of this process alone; None where it is not known.
    """

    keys: Sequence[str] = ()
    captions: Sequence[str] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    find_layer: Callable[[], str | None] | None = None
    parameters: Iterable[tuple[str, nn.Parameter]] = ()
    gradient_norms: Mapping[str, float] = field(default_factory=dict)
    local_loss: float | None = None


class NonFiniteGuard:
    """Decides whether a step is skipped, and stops a run that skips too many.

    All processes must give the same numbers (a loss and a gradient norm reduced over them): then all decide the same.

    Args:
        budget: this many steps of the whole run are skipped; the next one stops it.
        folder: of the bundles, usually `work_dir/nonfinite`.

    Attributes:
        count: steps of the run that were not finite so far.
        bundles: names of the bundles' folders of this process.
    """

    def __init__(self, budget: int, folder: str | Path) -> None:
        if budget < 0:
            raise ValueError(f"The budget of steps that are not finite must not be negative, and is {budget}.")
        self.budget, self.folder = budget, Path(folder)
        self.count = 0
        self.bundles: list[str] = []

    def check(self, step: int, loss: float, grad_norm: float, evidence: Callable[[], Evidence] | None = None) -> bool:
        """Looks at one step after its backward pass, before its optimiser step or after the device has left that out.

        Args:
            step: the number of the step.
            loss: summed or averaged over all processes.
            grad_norm: of the whole gradient, before clipping.
            evidence: called, on every process, when a bundle is written: for the first two bad steps and the last.

        Returns:
            True when the step must be skipped: no optimiser step, no average, gradients cleared.

        Raises:
            TrainingDivergedError: the budget is used up.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return False
        self.count += 1
        over = self.count > self.budget
        what = f"loss {loss:g}, gradient norm {grad_norm:g}"
        bundle = None
        if evidence is not None and (over or self.count <= FIRST_BUNDLES):
            bundle = write_bundle(self.folder, step, loss, grad_norm, evidence(), skipped=self.count)
            self.bundles += [bundle.name] if bundle is not None else []
        if over:
            where = f"; {bundle} holds the batch and the first bad layer" if bundle is not None else ""
            raise TrainingDivergedError(
                f"Training diverged: step {step} is not finite ({what}), and {self.budget} such steps were skipped, as "
                f"many as train.extra.nonfinite_budget allows{where}."
            )
        logger.warning("step %d is not finite (%s): skipped, %d of %d", step, what, self.count, self.budget)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps."""
        return {"count": self.count, "bundles": list(self.bundles)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.count, self.bundles = int(state["count"]), [str(name) for name in state["bundles"]]


def write_bundle(
    folder: Path,
    step: int,
    loss: float,
    grad_norm: float,
    evidence: Evidence,
    *,
    skipped: int = 1,
    max_bytes: int = MAX_BYTES,
) -> Path | None:
    """Saves `step_00000400/` (`step_00000400_rank3/` among several processes) with `report.json`, `batch.safetensors`.

    The folder appears whole or not at all; one of that name is replaced. Of several processes the main one writes, and
    those whose own loss or batch is not finite. All search, since sharded models only run on all together.

    Args:
        folder: of the bundles; made when missing.
        step: the number of the step.
        loss: of the step.
        grad_norm: of the step.
        evidence: of this process.
        skipped: steps that were not finite so far.
        max_bytes: tensors beyond this sum are left out, and named in the report.

    Returns:
        The folder; None when this process writes none, or could not (which is logged).
    """
    report: dict[str, Any] = {
        "step": step,
        "loss": str(loss),  # JSON has no NaN
        "grad_norm": str(grad_norm),
        "skipped": skipped,
        "rank": distributed.rank(),
        "world_size": distributed.world_size(),
        "local_loss": None if evidence.local_loss is None else str(evidence.local_loss),
        "first_bad_layer": _search(evidence.find_layer),
        "first_bad_gradient": _search(lambda: _first_bad_gradient(evidence)),
        "keys": [str(key) for key in evidence.keys[:MAX_ROWS]],
        "captions": [str(caption)[:MAX_LETTERS] for caption in evidence.captions[:MAX_ROWS]],
        "tensors": {name: _describe(tensor) for name, tensor in evidence.tensors.items()},
    }
    suspect = evidence.local_loss is not None and not math.isfinite(evidence.local_loss)
    suspect = suspect or any(one["nonfinite"] for one in report["tensors"].values())
    if not (distributed.is_main_process() or suspect):
        return None
    kept, left_out = _within(evidence.tensors, max_bytes)
    report["left_out"] = left_out
    several = f"_rank{report['rank']}" if report["world_size"] > 1 else ""
    path = folder / f"step_{step:08d}{several}"
    try:
        _write_folder(path, report, kept)
    except OSError as error:
        logger.error("the bundle %s could not be written: %s", path, error)
        return None
    logger.warning("wrote %s (first bad layer: %s)", path, report["first_bad_layer"])
    return path


def first_nonfinite_gradient(parameters: Iterable[tuple[str, nn.Parameter]]) -> str | None:
    """Returns the name of the first parameter whose gradient holds NaN or infinity, None where all are finite.

    Of a sharded gradient this process's part is searched.
    """
    for name, parameter in parameters:
        grad = parameter.grad
        if grad is not None and not bool(torch.isfinite(getattr(grad, "to_local", lambda grad=grad: grad)()).all()):
            return name
    return None


def _first_bad_gradient(evidence: Evidence) -> str | None:
    if evidence.gradient_norms:
        return next((name for name, norm in evidence.gradient_norms.items() if not math.isfinite(norm)), None)
    return first_nonfinite_gradient(evidence.parameters)


def _search(find: Callable[[], str | None] | None) -> str | None:
    """Runs a search whose own failure (no memory left, for example) must not hide that training diverged."""
    if find is None:
        return None
    try:
        return find()
    except (RuntimeError, ValueError, TypeError) as error:
        return f"the search failed: {error}"


def _describe(tensor: Tensor) -> dict[str, Any]:
    values = tensor.detach()
    good = values[torch.isfinite(values)].double() if values.is_floating_point() else values.double()
    bounds = {"min": plain(good.min()), "max": plain(good.max()), "mean": plain(good.mean())} if good.numel() else {}
    kind = str(values.dtype).removeprefix("torch.")
    return {"shape": list(values.shape), "dtype": kind, "nonfinite": values.numel() - good.numel(), **bounds}


def _within(tensors: Mapping[str, Tensor], max_bytes: int) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the tensors, in their order, that fit together into so many bytes, and the names of the others."""
    kept: dict[str, Tensor] = {}
    left_out = []
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if size > max_bytes:
            left_out.append(name)
            continue
        max_bytes -= size
        kept[name] = tensor.detach().cpu().contiguous().clone()  # a clone: the format refuses shared memory
    return kept, left_out


def _write_folder(path: Path, report: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        temporary.mkdir()
        if tensors:
            save_file(dict(tensors), temporary / "batch.safetensors")
        text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
        (temporary / "report.json").write_bytes(text.encode("utf-8", "replace"))
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
