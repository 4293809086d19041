"""What of a run is saved, how it is taken up again, and the weights that are exported. Files are in checkpoints.py."""

import copy
import functools
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sana.config import ConfigError, config_to_dict
from sana.models.metadata import CheckpointMetadata, save_checkpoint
from sana.models.weights import CheckpointError, load_weights
from sana.training import rng_state
from sana.training.checkpoints import LoadedCheckpoint
from sana.training.official_pth import (
    load_official_optimizer,
    load_official_training_state,
    official_name,
    save_official_pth,
)
from sana.training.parallel import own_class
from sana.utils.dtype import parse_dtype
from sana.utils.logging import get_logger
from sana.utils.seed import seed_everything

if TYPE_CHECKING:
    from sana.training.trainer import Trainer

logger = get_logger(__name__)


def save(trainer: "Trainer") -> None:
    """Writes a checkpoint of everything that decides what comes next. Every process must call it."""
    trainer.settle()
    parallel = trainer.parallel
    weights = {
        "module": parallel.module_state(),
        "optimizer": parallel.optimizer_state(trainer.optimizer),
        **({"ema": trainer.ema.average} if trainer.ema else {}),
    }
    shared = {
        "step": trainer.step, "samples": trainer.samples, "scheduler": trainer.scheduler.state_dict(),
        "guard": trainer.guard.state_dict(), "report": trainer.report.state_dict(), "arch": _arch(trainer),
        "optimizer_type": trainer.config.train.optimizer["type"],
        "ema_updates": trainer.ema.updates if trainer.ema else 0,
        "scaler": parallel.accelerator.scaler.state_dict() if parallel.accelerator.scaler else {},
        **({} if parallel.sharded else weights),
    }  # fmt: skip
    per_rank = {"rng": rng_state.capture(), "data": trainer.data.state_dict()}
    full = _full_weights(trainer)  # every process takes part; only the main one writes
    if trainer.extra.save_pth and parallel.is_main:
        _write_official(trainer, per_rank["rng"])
    trainer.checkpoints.save(
        trainer.step, shared=shared, per_rank=per_rank, sharded=weights if parallel.sharded else None,
        export=lambda folder: functools.partial(_write_export, trainer, folder, full),
    )  # fmt: skip


def resume(trainer: "Trainer") -> None:
    """Goes on from `--resume_from` or from the newest checkpoint of the work_dir; seeds a new run otherwise.

    Raises:
        ConfigError: `resume_from` names nothing that is there.
        CheckpointError: the checkpoint is of another model or optimiser.
    """
    parallel = trainer.parallel
    path = _find(trainer)
    if path is None:
        seed_everything(trainer.config.train.seed + parallel.rank)
        return
    if path.suffix == ".pth":
        _resume_official(trainer, path)
        return
    loaded = trainer.checkpoints.load(path)
    shared = loaded.shared
    _check_fits(trainer, shared, path)
    if parallel.sharded != ("module" not in shared):
        raise CheckpointError(f"{path} was saved {'without' if parallel.sharded else 'with'} train.use_fsdp; keep it.")
    weights, averaged = shared, bool(trainer.ema and shared["ema_updates"])
    if parallel.sharded:
        weights = {
            "module": parallel.module_state(),
            "optimizer": parallel.optimizer_state(trainer.optimizer),
            **({"ema": trainer.ema.average} if averaged else {}),
        }
        trainer.checkpoints.load_sharded(path, weights)
    parallel.load_module_state(weights["module"])
    parallel.load_optimizer_state(trainer.optimizer, weights["optimizer"])
    if trainer.ema is not None:  # averaging that was off so far starts from the weights as they are
        average = weights["ema"] if averaged else {name: p.detach() for name, p in trainer.objective.named_parameters()}
        trainer.ema.load_state_dict({"average": average, "updates": shared["ema_updates"]})
    if parallel.accelerator.scaler:
        parallel.accelerator.scaler.load_state_dict(shared["scaler"])
    trainer.scheduler.load_state_dict(shared["scheduler"])
    trainer.guard.load_state_dict(shared["guard"])
    trainer.report.load_state_dict(shared["report"])
    trainer.step, trainer.samples = shared["step"], shared["samples"]
    _restore_rank(trainer, loaded)
    logger.info("resumed %s at step %d", path, trainer.step)


def export(trainer: "Trainer", folder: Path) -> None:
    """Writes the weights as a model folder that `SanaPipeline.from_pretrained` reads. Every process must call it."""
    trainer.settle()
    full = _full_weights(trainer)
    if trainer.parallel.is_main:
        _write_export(trainer, folder, full)
    trainer.parallel.barrier()


def _resume_official(trainer: "Trainer", path: Path) -> None:
    """Goes on from a checkpoint of the official trainer, which knows no data position: its epoch starts anew.

    `model.resume_from` may be a mapping with `resume_optimizer` and `resume_lr_scheduler`, as official.
    """
    if trainer.parallel.sharded:
        raise ConfigError(f"{path} is an official .pth; start from it without train.use_fsdp, or by model.load_from.")
    choice = trainer.config.model.resume_from
    choice = choice if isinstance(choice, dict) else {}
    state = load_official_training_state(path)
    load_weights(trainer.networks.transformer, state.state_dict)
    if trainer.ema is not None:
        for name, value in (state.ema or state.state_dict).items():
            if (average := trainer.ema.average.get(f"transformer.{name}")) is not None:
                average.copy_(value)
    if state.optimizer and choice.get("resume_optimizer", True):
        load_official_optimizer(trainer.optimizer, state.optimizer)
    if state.scheduler and choice.get("resume_lr_scheduler", True):
        trainer.scheduler.load_state_dict(state.scheduler)
    trainer.step = state.step or 0
    effective = trainer.config.train.train_batch_size * trainer.config.train.gradient_accumulation_steps
    trainer.samples = trainer.step * effective * trainer.parallel.world_size
    seed_everything(trainer.config.train.seed + trainer.parallel.rank + trainer.step)
    logger.info("resumed the official %s at step %d; its data start at the beginning of an epoch", path, trainer.step)


def _find(trainer: "Trainer") -> Path | None:
    """Which checkpoint to go on from: the main process looks, all get its answer or its error."""
    config = trainer.config
    inner = config.model.resume_from
    asked = config.resume_from or (inner.get("checkpoint") if isinstance(inner, dict) else inner)
    found: Path | CheckpointError | None = None
    if trainer.parallel.is_main:
        try:
            named = asked and asked != "latest"
            found = Path(str(asked)) if named else trainer.checkpoints.latest(thorough=True)
        except CheckpointError as error:  # raised below, on every process
            found = error
    found = trainer.parallel.gather(found)[0]
    if isinstance(found, CheckpointError):
        raise found
    if found is not None and not found.exists():
        raise ConfigError(f"resume_from is {str(found)!r}, which does not exist; give a folder checkpoints/step_...")
    return found


def _restore_rank(trainer: "Trainer", loaded: LoadedCheckpoint) -> None:
    if loaded.per_rank is not None:
        rng_state.restore(loaded.per_rank["rng"])
        trainer.data.load_state_dict(loaded.per_rank["data"])
        return
    logger.warning(
        "the checkpoint has %d processes and this run %d: the data go on where they were, random numbers start anew",
        loaded.world_size, trainer.parallel.world_size,
    )  # fmt: skip
    seed_everything(trainer.config.train.seed + trainer.parallel.rank + trainer.step)
    trainer.data.load_state_dict(loaded.all_ranks[trainer.parallel.rank % loaded.world_size]["data"])


def _check_fits(trainer: "Trainer", shared: dict[str, Any], path: Path) -> None:
    if shared["arch"] != _arch(trainer):
        was, now = shared["arch"]["kwargs"], _arch(trainer)["kwargs"]
        key = next((key for key in now if was.get(key) != now[key]), "class")
        raise CheckpointError(
            f"{path} holds a model with {key}={was.get(key, shared['arch']['class'])}, and the configuration asks for "
            f"{now.get(key, _arch(trainer)['class'])}: use another work_dir, or start from its weights by "
            "model.load_from."
        )
    kind = trainer.config.train.optimizer["type"]
    if shared["optimizer_type"] != kind:
        raise CheckpointError(
            f"{path} holds the state of {shared['optimizer_type']}, and train.optimizer.type is {kind}: use another "
            "work_dir, or start from its weights by model.load_from."
        )


def _arch(trainer: "Trainer") -> dict[str, Any]:
    transformer = trainer.networks.transformer
    return {"class": own_class(transformer).__name__, "kwargs": transformer.init_kwargs}


def _full_weights(trainer: "Trainer") -> dict[str, torch.Tensor]:
    """Unsharded weights of the objective, the averaged ones where there are any; on the CPU of the main process."""
    parallel = trainer.parallel
    with trainer.ema.applied(trainer.objective) if trainer.ema else nullcontext(), torch.no_grad():
        full = {}
        for name, tensor in trainer.objective.state_dict().items():
            whole = parallel.full(tensor)
            if parallel.is_main:
                full[name] = whole.detach().cpu().clone()
    return full


def _write_official(trainer: "Trainer", rng: dict[str, Any]) -> None:
    """Writes `epoch_E_step_S.pth` as the official trainer does, and prunes like the checkpoints."""
    folder, own = trainer.work_dir / "checkpoints", trainer.networks.transformer.state_dict()
    ema = None
    if trainer.ema is not None:
        ema = own | {
            k.removeprefix("transformer."): v for k, v in trainer.ema.average.items() if k.startswith("transformer.")
        }
    save_official_pth(
        folder / official_name(trainer.epochs, trainer.step), state_dict=own, ema_state_dict=ema,
        optimizer=trainer.optimizer.state_dict(), scheduler=trainer.scheduler.state_dict(), epoch=trainer.epochs,
        rng_state=rng,
    )  # fmt: skip
    written = sorted(folder.glob("epoch_*_step_*.pth"), key=lambda path: int(path.stem.rpartition("_")[2]))
    for old in written[: -trainer.extra.keep_last]:
        step = int(old.stem.rpartition("_")[2])
        if not trainer.extra.keep_every or step % trainer.extra.keep_every:
            old.unlink(missing_ok=True)


def _write_export(trainer: "Trainer", folder: Path, full: dict[str, torch.Tensor]) -> None:
    """Writes `model.safetensors` with metadata, and `text_encoder/` where it was trained, in the training precision."""
    folder.mkdir(parents=True, exist_ok=True)
    config, text = config_to_dict(trainer.config), trainer.objective.captions
    for section, key in (("vae", "vae_pretrained"), ("text_encoder", "text_encoder_name")):
        if (local := Path(config[section][key])).exists():  # the folder may be read from anywhere
            config[section][key] = str(local.resolve())
    if text is not None:
        config["text_encoder"]["text_encoder_name"] = "text_encoder"  # beside the file
    config["model"]["load_from"] = config["load_from"] = None
    dtype = parse_dtype(trainer.config.model.mixed_precision)
    metadata = CheckpointMetadata(
        arch=_arch(trainer),
        precision=trainer.config.model.mixed_precision,
        flow_shift=trainer.config.scheduler.flow_shift,
        chi_prompt=[line or "" for line in trainer.config.text_encoder.chi_prompt],
        license="Apache-2.0",
        config=config,
    )
    own = {key.removeprefix("transformer."): value for key, value in full.items() if key.startswith("transformer.")}
    save_checkpoint(folder / "model.safetensors", own, metadata, dtype=dtype)
    if text is not None:
        with torch.device("meta"):  # the live model trains on, maybe in shards; no random number is drawn
            stored = own_class(text.model)(copy.deepcopy(text.model.config))
        prefix = "captions.model."
        weights = {k.removeprefix(prefix): v.to(dtype) for k, v in full.items() if k.startswith(prefix)}
        stored.load_state_dict(weights, assign=True)
        stored.save_pretrained(folder / "text_encoder")
        text.tokenizer.save_pretrained(folder / "text_encoder")
