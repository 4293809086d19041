"""TensorBoard and Weights & Biases behind one small object. The run's own record is in `train_log.py`.

Both are optional extras, imported here only and when asked for. Only the main process tracks.
"""

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from sana.config import ConfigError
from sana.registry import suggest
from sana.utils.distributed import is_main_process
from sana.utils.logging import get_logger

logger = get_logger(__name__)

STATE_NAME = "tracker.json"
MODES = (None, "online", "offline", "disabled")


class TrackerError(RuntimeError):
    """A tracker that was asked for cannot be had; one sentence that says what to do."""


class Backend(Protocol):
    """One tracker. `errors` are what its calls may raise when the network or the disk fails."""

    errors: tuple[type[Exception], ...]

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def image(self, name: str, path: Path, step: int) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """Gives what it is told to every tracker. One that fails in the middle of a run is dropped, and the run goes on.

    Args:
        backends: by name; none for a tracker that does nothing.
    """

    def __init__(self, backends: Mapping[str, Backend] | None = None) -> None:
        self._backends = dict(backends or {})

    @property
    def names(self) -> tuple[str, ...]:
        """The trackers at work."""
        return tuple(self._backends)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Sends numbers of a step; steps must not fall."""
        self._tell("log", {key: float(value) for key, value in values.items()}, step)

    def image(self, name: str, path: str | Path | None, step: int) -> None:
        """Sends a picture file; None (no picture was written) does nothing."""
        if path is not None:
            self._tell("image", name, Path(path), step)

    def close(self) -> None:
        """Finishes what is to be written; closing again does nothing."""
        self._tell("close")
        self._backends.clear()

    def _tell(self, method: str, *arguments: Any) -> None:
        for name, backend in list(self._backends.items()):
            try:
                getattr(backend, method)(*arguments)
            except backend.errors as error:
                logger.error("%s failed (%s); the run goes on without it", name, error)
                del self._backends[name]


def parse_report_to(report_to: str | None) -> tuple[str, ...]:
    """Returns the names of the trackers in `report_to`.

    Args:
        report_to: "tensorboard", "wandb", both with a comma between, "all", or "none" or nothing.

    Raises:
        ConfigError: an unknown name, or "none" beside another one.
    """
    names = [name.strip().lower() for name in (report_to or "none").split(",") if name.strip()]
    for name in names:
        if name not in (*BACKENDS, "all", "none"):
            known = [*BACKENDS, "all", "none"]
            raise ConfigError(f"report_to: unknown tracker {name!r}.{suggest(name, known)} Known: {', '.join(known)}.")
    if "none" in names and len(set(names)) > 1:
        raise ConfigError(f"report_to is {report_to!r}: none cannot stand beside another tracker.")
    return tuple(name for name in BACKENDS if name in names or "all" in names)


def build_tracker(
    report_to: str | None,
    work_dir: str | Path,
    *,
    name: str,
    project: str,
    config: Mapping[str, Any],
    resume: bool,
    step: int = 0,
    explicit: bool = True,
    mode: str | None = None,
) -> Tracker:
    """Starts the trackers of a run.

    A tracker that cannot be had (not installed; wandb without a login, unless it is offline) is an error when it was
    asked for by name. As a mere default, or one of "all", it costs one log line: training must not stop for it.

    Args:
        report_to: see `parse_report_to`.
        work_dir: `tensorboard/`, `wandb/` and `tracker.json` (which run to go on with) are made in it.
        name: of the run.
        project: of wandb.
        config: the whole configuration as plain values.
        resume: go on with the run that `work_dir` holds. What it was told after `step` is hidden (TensorBoard) or kept
            as it was (wandb, which takes no step twice).
        step: optimiser steps done.
        explicit: whether somebody chose `report_to`; False for the value that nobody set.
        mode: of wandb: "online", "offline" or "disabled"; None leaves it to wandb's own settings (WANDB_MODE).

    Raises:
        ConfigError: an unknown tracker or mode.
        TrackerError: an explicit tracker cannot be had.
    """
    names = parse_report_to(report_to)
    if mode not in MODES:
        raise ConfigError(f"The mode of wandb is {mode!r}; allowed is {', '.join(str(one) for one in MODES)}.")
    if not is_main_process():
        return Tracker()
    required = explicit and "all" not in (report_to or "").lower()
    work_dir = Path(work_dir)
    backends: dict[str, Backend] = {}
    for one in names:
        try:
            work_dir.mkdir(parents=True, exist_ok=True)
            backends[one] = BACKENDS[one](
                work_dir, name=name, project=project, config=config, resume=resume, step=step, mode=mode
            )
        except (TrackerError, OSError) as error:
            if required:
                Tracker(backends).close()
                raise TrackerError(str(error)) from error
            logger.warning("%s The run goes on with train_log.jsonl alone.", error)
    return Tracker(backends)


class TensorBoard:
    """Event files in `work_dir/tensorboard`."""

    errors = (OSError, RuntimeError, ValueError)

    def __init__(
        self, work_dir: Path, *, name: str, config: Mapping[str, Any], resume: bool, step: int, **_: Any
    ) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise TrackerError(_not_installed("tensorboard")) from error
        # Events of an earlier process at purge_step and later are hidden: those this process will write again.
        self._writer = SummaryWriter(str(work_dir / "tensorboard"), purge_step=step + 1 if resume else 0)
        if not resume:
            text = json.dumps(config, indent=1, default=str)
            self._writer.add_text("config", f"{name}\n\n" + "\n".join(f"    {line}" for line in text.splitlines()), 0)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def image(self, name: str, path: Path, step: int) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as picture:
            self._writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of wandb; its id is kept in `work_dir/tracker.json`, so that a resumed run goes on with it."""

    def __init__(
        self,
        work_dir: Path,
        *,
        name: str,
        project: str,
        config: Mapping[str, Any],
        resume: bool,
        mode: Any,
        **_: Any,
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise TrackerError(_not_installed("wandb")) from error
        self.errors: tuple[type[Exception], ...] = (wandb.Error, OSError, ValueError)
        self._wandb = wandb
        try:
            if (mode or wandb.setup().settings.mode) == "online" and not _has_login(wandb):
                raise TrackerError(
                    "report_to names wandb, and there is no login: run `wandb login` or set WANDB_API_KEY, or "
                    "WANDB_MODE=offline, or choose --report_to=tensorboard."
                )
            self._run = wandb.init(
                project=project,
                name=name,
                id=_run_id(work_dir, resume),
                resume="allow" if resume else None,
                config=dict(config),
                dir=str(work_dir),
                mode=mode,
                settings=wandb.Settings(console="off"),  # the progress bar is not for its log
            )
        except wandb.Error as error:
            raise TrackerError(f"report_to names wandb, and it could not be started: {error}.") from error

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def image(self, name: str, path: Path, step: int) -> None:
        self._run.log({name: self._wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()


BACKENDS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def _not_installed(name: str) -> str:
    return (
        f"report_to names {name}, which is not installed: pip install {name}, or choose another tracker or "
        "--report_to=none."
    )


def _has_login(wandb: Any) -> bool:
    """Whether wandb will find a key without asking: environment and settings files, or the netrc file."""
    from requests.utils import get_netrc_auth

    settings = wandb.setup().settings
    return bool(settings.api_key or settings.identity_token_file or get_netrc_auth(settings.base_url))


def _run_id(work_dir: Path, resume: bool) -> str:
    """Returns the id of the wandb run of a work_dir: the kept one when resuming, else a new one, which is kept."""
    path = work_dir / STATE_NAME
    if resume and path.is_file():
        try:
            return str(json.loads(path.read_text(encoding="utf-8"))["wandb"])
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s is not readable (%s): wandb begins a new run", path, error)
    run_id = secrets.token_hex(4)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps({"wandb": run_id}) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return run_id
