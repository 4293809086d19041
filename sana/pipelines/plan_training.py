"""What a training run needs in memory, and the batch size and recomputation that fit. One process, no shards.

The numbers are of `sana.pipelines.memory.training`; a table of them is in `plan_report.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from sana.config import SanaConfig
from sana.config_extra import train_extra
from sana.pipelines import inputs
from sana.pipelines.plan_report import CPU_NOTE, CUDA_NOTE, Reason, Sheet
from sana.pipelines.plan_request import (
    AUTO,
    DEVICES,
    MAX_BATCH,
    check_choice,
    format_memory,
    parse_limit,
    parse_memory,
)
from sana.pipelines.plan_search import MemoryLimitError
from sana.pipelines.plan_stages import Stage

CHECKPOINTING = ("none", "ffn", "blocks")  # in the order of what they cost
KEYS = {"ffn": "train.extra.checkpoint_ffn", "blocks": "train.grad_checkpointing"}
WORDS = {"none": "nothing computed again", **KEYS}
NOTE = "one process without shards (train.use_fsdp); validation pictures, batches on their way and saving are left out."


class TrainingModel(Protocol):
    """What gives the numbers."""

    def stages(self, batch: int, checkpointing: str, accumulation: int) -> tuple[Stage, ...]:
        """Returns what every stage of a step holds.

        Args:
            batch: images of a micro-batch.
            checkpointing: one of CHECKPOINTING.
            accumulation: micro-batches of a step.
        """


@dataclass(frozen=True)
class TrainingRequest:
    """What a training run may need. All else is the config's.

    Attributes:
        batch: images of a micro-batch; "auto": the config's `train.train_batch_size`, or fewer where that does not fit.
        checkpointing: what is computed again for gradients: "none", "ffn" (`train.extra.checkpoint_ffn`), "blocks"
            (`train.grad_checkpointing`) or "auto".
        device: "cuda" or "cpu".
        max_vram: bytes, or a text such as "32GB"; None: nothing is chosen, and "auto" is what the config says.
        margin: bytes or text, kept free below `max_vram`.

    Raises:
        ValueError: a value is not allowed.
    """

    batch: int | str = AUTO
    checkpointing: str = AUTO
    device: str = "cuda"
    max_vram: int | str | None = None
    margin: int | str = 0

    def __post_init__(self) -> None:
        if self.batch != AUTO:
            inputs.check_count("batch", self.batch, MAX_BATCH)  # type: ignore[arg-type]
        check_choice("checkpointing", self.checkpointing, (AUTO, *CHECKPOINTING))
        check_choice("device", self.device, DEVICES)
        parse_limit(self.max_vram, self.margin)

    @property
    def limit(self) -> int | None:
        """Bytes that may be allocated; None where there is no bound."""
        return parse_limit(self.max_vram, self.margin)


@dataclass(frozen=True)
class TrainingPlan(Sheet):
    """What a training run needs, and the settings that it needs it with.

    Attributes:
        batch: images of a micro-batch.
        checkpointing: one of CHECKPOINTING.
        accumulation: micro-batches of one optimiser step, so that it sees at least as many images as the config says.
    """

    batch: int
    checkpointing: str
    accumulation: int

    def as_dict(self) -> dict[str, Any]:
        return super().as_dict() | {
            "batch": self.batch, "checkpointing": self.checkpointing, "gradient_accumulation_steps": self.accumulation,
        }  # fmt: skip

    @property
    def overrides(self) -> tuple[str, ...]:
        """The arguments that make `train_scripts/train.py` run so."""
        blocks, ffn = self.checkpointing == "blocks", self.checkpointing == "ffn"
        return (
            f"--train.train_batch_size={self.batch}",
            f"--train.gradient_accumulation_steps={self.accumulation}",
            f"--train.grad_checkpointing={str(blocks).lower()}",
            f"--train.extra.checkpoint_ffn={str(ffn).lower()}",
        )


def make_training_plan(
    config: SanaConfig, request: TrainingRequest, *, model: TrainingModel | None = None
) -> TrainingPlan:
    """Plans a training run. Nothing is loaded, no data is read, no device is needed.

    With a bound, the first of these that fits is taken: the whole batch without recomputing anything, with the wide
    values of the Mix-FFN computed again, with whole blocks computed again; then fewer images a micro-batch, as many as
    fit, with more micro-batches a step. What the request fixes is kept.

    Args:
        config: of the run.
        request: what is open, and how much memory there is.
        model: what gives the numbers; None: `sana.pipelines.memory`.

    Raises:
        ValueError: the request does not fit the config.
        MemoryLimitError: not even one image fits.
    """
    ways = _ways(config, request)
    model = model or PredictedRun(config, request.device)
    wanted = config.train.train_batch_size * config.train.gradient_accumulation_steps
    known: dict[tuple[int, str], tuple[Stage, ...]] = {}

    def stages(batch: int, way: str) -> tuple[Stage, ...]:
        if (batch, way) not in known:
            known[batch, way] = model.stages(batch, way, -(-wanted // batch))
        return known[batch, way]

    def need(batch: int, way: str) -> int:
        return max(stage.total for stage in stages(batch, way))

    asked = config.train.train_batch_size if request.batch == AUTO else int(request.batch)
    batch, way = _choose(request, asked, ways, need)
    return TrainingPlan(
        headline=_headline(config, request, batch),
        stages=stages(batch, way),
        limit=request.limit,
        host=0,
        reasons=_reasons(config, request, (batch, way, -(-wanted // batch)), need),
        notes=(NOTE, CUDA_NOTE if request.device == "cuda" else CPU_NOTE),
        batch=batch,
        checkpointing=way,
        accumulation=-(-wanted // batch),
    )


def _ways(config: SanaConfig, request: TrainingRequest) -> tuple[str, ...]:
    """Returns the kinds of recomputation that may be chosen."""
    extra = train_extra(config.train.extra)
    mix_ffn = config.model.ffn_type.startswith("glumbconv")
    if request.checkpointing == "ffn" and not mix_ffn:
        raise ValueError(f"checkpointing ffn needs a Mix-FFN; model.ffn_type is {config.model.ffn_type!r}.")
    if request.checkpointing != AUTO:
        return (request.checkpointing,)
    if request.limit is None:
        return ("blocks" if config.train.grad_checkpointing else "ffn" if extra.checkpoint_ffn else "none",)
    return tuple(way for way in CHECKPOINTING if mix_ffn or way != "ffn")


def _choose(
    request: TrainingRequest, asked: int, ways: tuple[str, ...], need: Callable[[int, str], int]
) -> tuple[int, str]:
    """Returns the micro-batch and the recomputation that fit.

    Raises:
        MemoryLimitError: none does.
    """
    limit = request.limit
    if limit is None:
        return asked, ways[0]
    for way in ways:
        if need(asked, way) <= limit:
            return asked, way
    if request.batch == AUTO:
        best = greatest_batch(asked, limit, lambda batch: need(batch, ways[-1]))  # the last way needs least
        if best:
            return best, next(way for way in ways if need(best, way) <= limit)
    batch = 1 if request.batch == AUTO else asked
    least = min(ways, key=lambda way: need(batch, way))
    needed = need(batch, least)
    fitting = format_memory(needed + parse_memory("margin", request.margin), up=True)
    images = f"{batch} image{'s' if batch > 1 else ''} a micro-batch"
    raise MemoryLimitError(
        f"Training does not fit into {format_memory(limit)}: {images} need {format_memory(needed, up=True)} with "
        f"{WORDS[least]}; it fits with max_vram {fitting}"
        + ("." if request.batch == AUTO else ", or perhaps with batch auto."),
        needed=needed, allowed=limit, stage="training",
    )  # fmt: skip


def greatest_batch(high: int, limit: int, need: Callable[[int], int]) -> int:
    """Returns the greatest batch below `high` that fits, 0 if none does. Asks seldom, where needs grow about linearly.

    Args:
        high: a batch that does not fit.
        limit: bytes.
        need: batch -> bytes, which grow with it.
    """
    if high <= 1 or need(1) > limit:
        return 0
    low = 1
    while high - low > 1:
        share = (limit - need(low)) / (need(high) - need(low))
        middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        low, high = (middle, high) if need(middle) <= limit else (low, middle)
    return low


def _headline(config: SanaConfig, request: TrainingRequest, batch: int) -> str:
    side, optimizer = config.data.image_size, config.train.optimizer.get("type", "AdamW")
    sources = [name for name, there in _cached(config).items() if there]
    cached = f", cached {' and '.join(sources)}" if sources else ""
    return (
        f"training of {config.model.model}: {batch} of {side} x {side} px a micro-batch, {optimizer}, "
        f"{config.model.mixed_precision} on {request.device}{cached}"
    )


def _cached(config: SanaConfig) -> Mapping[str, bool]:
    return {"latents": config.data.load_vae_feat, "text features": config.data.load_text_feat}


def _reasons(
    config: SanaConfig, request: TrainingRequest, chosen: tuple[int, str, int], need: Callable[[int, str], int]
) -> tuple[Reason, ...]:
    batch, way, accumulation = chosen
    asked = config.train.train_batch_size
    if request.batch != AUTO:
        why = "as asked for"
    elif batch == asked:
        why = "the config's"
    else:
        why = f"the greatest that fits; {asked}, the config's, need {format_memory(need(asked, way))}"
    if request.checkpointing != AUTO:
        recompute = "as asked for"
    elif request.limit is None:
        recompute = "the config's"
    elif way == CHECKPOINTING[0]:
        recompute = "nothing has to be computed again"
    else:
        recompute = f"{KEYS[way]}; without it {format_memory(need(batch, CHECKPOINTING[0]))} are needed"
    return (
        Reason("batch", str(batch), why),
        Reason("checkpointing", way, recompute),
        Reason("accumulation", str(accumulation), f"for {batch * accumulation} images a step"),
    )


class PredictedRun:
    """The numbers of `sana.pipelines.memory.training`, put together as the trainer's step runs.

    Args:
        config: of the run.
        device: "cuda" or "cpu".
    """

    def __init__(self, config: SanaConfig, device: str) -> None:
        self._config, self._device = config, device
        self._known: dict[tuple[Any, ...], Any] = {}

    def stages(self, batch: int, checkpointing: str, accumulation: int) -> tuple[Stage, ...]:
        """See `TrainingModel`."""
        several = accumulation > 1
        states, gradients = self._ask(several, "states"), self._ask(several, "gradients")
        held = {
            "weights": states.weights,
            "optimizer": states.optimizer,
            "moving average": states.ema,
            "autoencoder": states.autoencoder,
            "text encoder": states.text_encoder,
        }
        held = {name: amount for name, amount in held.items() if amount}
        late = held | {"gradients": gradients}  # encoders meet them from the second micro-batch on
        early = late if several else held
        images, texts = self._ask(several, "encode_images", batch), self._ask(several, "encode_texts", batch)
        learning = self._ask(several, "forward_backward", batch, checkpointing)
        return (
            *((Stage("encoding images", early, images),) if images else ()),
            *((Stage("encoding texts", early, texts),) if texts else ()),
            Stage("forward and backward", late, max(0, learning - gradients)),
            Stage("optimizer step", late, max(0, self._ask(several, "optimizer_step") - gradients)),
        )

    def _ask(self, several: bool, question: str, *about: Any) -> Any:
        """Asks the model of a run with one or with several micro-batches a step; of each question once."""
        key = several, question, about
        if key not in self._known:
            self._known[key] = getattr(self._model(several), question)(*about)
        return self._known[key]

    def _model(self, several: bool) -> Any:
        from sana.pipelines.memory.training import TrainingMemory

        if (several,) not in self._known:
            train = replace(self._config.train, gradient_accumulation_steps=1 + several)
            self._known[several,] = TrainingMemory(replace(self._config, train=train), device=self._device)
        return self._known[several,]
