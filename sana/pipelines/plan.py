"""What a picture will need in memory, said before anything is loaded, and a pipeline made to fit into what is there.

The search is in `plan_search.py`, the sums in `plan_stages.py`, the table in `plan_report.py`. Training is planned in
`plan_training.py`.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from sana.config import SanaConfig
from sana.ops.packing import set_pack_budget
from sana.pipelines.calls import generate_in_calls
from sana.pipelines.plan_report import CPU_NOTE, CUDA_NOTE, Reason, Sheet
from sana.pipelines.plan_request import AUTO, NONE, Job, PlanRequest, format_memory, make_job
from sana.pipelines.plan_search import MemoryLimitError, as_options, own_tile, search
from sana.pipelines.plan_stages import Estimator, MakeModel, MemoryModel, Settings, make_tiling
from sana.utils.dtype import dtype_name
from sana.utils.logging import get_logger

if TYPE_CHECKING:
    from sana.pipelines.request import Request
    from sana.pipelines.sana_pipeline import SanaPipeline

__all__ = ["MemoryLimitError", "Plan", "PlanRequest", "Plannable", "make_plan"]

logger = get_logger(__name__)

INEXACT_NOTE = "quantised weights change the picture a little; every other setting here makes the same picture."
FREE = {
    "batch": "all in one call",
    "tiling": "whole pictures fit",
    "slicing": "a batch is decoded at once",
    "offload": "all networks fit on the device",
    "quantization": "exact weights fit",
    "text_quantization": "exact weights fit",
    "packing": "copies of weights in the CPU's layout fit",
}


@dataclass(frozen=True)
class Plan(Sheet):
    """What making pictures needs, and the settings that it needs it with.

    Attributes:
        request: what was asked for.
        settings: fixed by the caller, or chosen.
        calls: of the pipeline, each with at most `settings.batch` pictures.
    """

    request: PlanRequest
    settings: Settings
    calls: int

    @property
    def exact(self) -> bool:
        """Whether the pictures are those of a pipeline without these settings."""
        return self.settings.quantization is None and self.settings.text_quantization is None

    def as_dict(self) -> dict[str, Any]:
        return super().as_dict() | {"calls": self.calls, "batch": self.settings.batch, "exact": self.exact}

    def apply(self, pipeline: "SanaPipeline") -> None:
        """Gives a pipeline these settings; best before its networks are loaded, so that they never lie side by side.

        With a bound, calls of the pipeline with more pictures than `settings.batch` are made in several, see
        `Plannable.generate_as_planned`. A plan without packed copies switches them off for the whole process
        (`sana.ops.packing.set_pack_budget`).

        Raises:
            ValueError: the pipeline is on another kind of device or in another dtype than the plan is for.
            ImportError: a package for quantisation is missing.
        """
        self._check_fits_to(pipeline)
        chosen = self.settings
        already = quantised_already(pipeline)
        fresh = {one: getattr(chosen, field) for one, field in SCHEME_FIELDS.items() if one not in already}
        if any(fresh.values()):
            pipeline.quantize(fresh.get("transformer"), fresh.get("text_encoder"))
        OFFLOADERS[chosen.offload](pipeline)
        if self.request.device == "cpu" and not chosen.packing:
            set_pack_budget(0)
        _decode_with(pipeline, chosen, own_tile(make_job(pipeline.config, self.request)))
        pipeline._plan = self

    def _check_fits_to(self, pipeline: "SanaPipeline") -> None:
        if pipeline.device.type != self.request.device:
            raise ValueError(
                f"This plan is for device {self.request.device}, and the pipeline is on {pipeline.device}; "
                "make the plan with pipeline.plan(...)."
            )
        for network, scheme in quantised_already(pipeline).items():
            name = SCHEME_FIELDS[network]
            if getattr(self.settings, name) != scheme:
                raise ValueError(
                    f"This plan's {name} is {getattr(self.settings, name) or NONE}, and the pipeline's {network} is "
                    f"{scheme} already; make the plan with pipeline.plan(...)."
                )
        planned = make_job(pipeline.config, self.request).dtype
        if pipeline.dtype != planned:
            raise ValueError(
                f"This plan is for dtype {dtype_name(planned)}, and the pipeline's is {dtype_name(pipeline.dtype)}; "
                "make the plan with pipeline.plan(...)."
            )


SCHEME_FIELDS = {"transformer": "quantization", "text_encoder": "text_quantization"}  # network -> field of settings
OFFLOADERS: dict[str, Any] = {
    "none": lambda pipeline: pipeline.disable_offload(),
    "model": lambda pipeline: pipeline.enable_model_cpu_offload(),
    "group": lambda pipeline: pipeline.enable_group_offload(),
    "sequential": lambda pipeline: pipeline.enable_sequential_cpu_offload(),
}


def quantised_already(pipeline: "SanaPipeline") -> dict[str, str]:
    """Returns network -> scheme of those networks that are quantised, or will be when they are loaded."""
    from sana.models.quantization.apply import quantization_of

    found = {name: want.scheme for name, want in pipeline._quantization.items()}
    for name, network in (("transformer", pipeline.transformer), ("text_encoder", pipeline._text_encoder)):
        quantization = quantization_of(network) if isinstance(network, nn.Module) else None
        found |= {name: quantization.scheme} if quantization is not None else {}
    return found


def _decode_with(pipeline: "SanaPipeline", settings: Settings, own: int | None) -> None:
    """Sets how the autoencoder takes pictures apart; one that is not loaded yet is only loaded where it has to."""
    if pipeline._autoencoder is None and settings.tile == own and not settings.slicing:
        return
    autoencoder: Any = pipeline.autoencoder
    if settings.tile is None:
        autoencoder.disable_tiling()
    else:
        tiling = make_tiling(settings.tile)
        autoencoder.enable_tiling(tiling.height, tiling.width, tiling.stride_height, tiling.stride_width)
    if settings.slicing:
        autoencoder.enable_slicing()
    else:
        autoencoder.disable_slicing()


def make_plan(config: SanaConfig, request: PlanRequest, *, make_model: MakeModel | None = None) -> Plan:
    """Plans pictures. Takes seconds; nothing is loaded or fetched, no device is needed.

    Args:
        config: of the model.
        request: what is wanted, and which settings are open.
        make_model: what gives the numbers; None: `sana.pipelines.memory`.

    Returns:
        The plan; with `request.max_vram`, the least harmful one that fits (see `plan_search.search`).

    Raises:
        ValueError: the request is impossible with this model.
        ConfigError: the shape of a network is not known without its files.
        MemoryLimitError: nothing fits.
    """
    job = make_job(config, request)
    estimate = Estimator(job, make_model or partial(_memory_model, config, job))
    settings = search(estimate)
    calls = -(-request.batch // settings.batch)
    return Plan(
        headline=_headline(config, job),
        stages=estimate.all_stages(settings),
        limit=request.limit,
        host=estimate.host(settings),
        reasons=tuple(_reasons(estimate, settings, calls)),
        notes=(
            *((INEXACT_NOTE,) if settings.quantization or settings.text_quantization else ()),
            CUDA_NOTE if request.device == "cuda" else CPU_NOTE,
        ),
        request=request,
        settings=settings,
        calls=calls,
    )


def _memory_model(config: SanaConfig, job: Job, quantization: str | None, text_quantization: str | None) -> MemoryModel:
    from sana.pipelines.memory.stages import MemoryModel as Predicted

    return Predicted(
        config,
        device=job.request.device,
        dtype=job.dtype,
        quantization=quantization,
        text_quantization=text_quantization,
    )


def _headline(config: SanaConfig, job: Job) -> str:
    request, size = job.request, job.size
    count = f"{request.batch} picture{'s' if request.batch > 1 else ''}"
    inside = f" (made as {size.model_height} x {size.model_width})" if size.binned else ""
    extras = [name for name, there in (("guidance", job.guidance), ("PAG", request.pag)) if there]
    with_extras = f", {' and '.join(extras)}" if extras else ", no guidance"
    with_extras += f", from {job.small[0]} x {job.small[1]} px" if job.small else ""
    return (
        f"{config.model.model}: {count} of {size.height} x {size.width} px{inside}, {dtype_name(job.dtype)} on "
        f"{request.device}{with_extras}"
    )


def _reasons(estimate: Estimator, settings: Settings, calls: int) -> list[Reason]:
    """Returns every setting with its value and why it has it."""
    request, limited = estimate.job.request, estimate.job.request.limit is not None
    plain = Settings(batch=request.batch, packing=estimate.job.packing)
    names = {"tile": "tiling"}
    shown = ["batch", "tile", "slicing", "offload", "quantization"]
    shown += ["text_quantization"] if estimate.job.text_encoder else []
    shown = [one for one in shown if request.device != "cpu" or one not in ("slicing", "offload")]
    shown += ["packing"] if request.device == "cpu" else []
    reasons = []
    for attribute in shown:
        name, value = names.get(attribute, attribute), getattr(settings, attribute)
        asked = attribute not in ("batch", "slicing") and getattr(request, name) != AUTO
        if asked:
            why = "as asked for"
        elif value == getattr(plain, attribute):
            why = FREE[name] if limited else "the pipeline's own way"
            why = "tiles take the pictures one by one" if name == "slicing" and settings.tile else why
        else:
            without = estimate.worst(replace(settings, **{attribute: getattr(plain, attribute)}))
            why = f"otherwise {without.name} needs {format_memory(without.total)}"
        text = as_options(settings).get(name, value)
        if attribute == "batch":
            text = f"{value}, {calls} calls" if calls > 1 else value
        reasons.append(Reason(name, _word(text), why))
    return reasons


def _word(value: object) -> str:
    return {True: "yes", False: "no", None: NONE}[value] if value is None or isinstance(value, bool) else str(value)


class Plannable:
    """The part of `SanaPipeline` that plans its memory."""

    _plan: Plan | None = None  # that was applied last

    def plan(self, height: int | None = None, width: int | None = None, batch: int = 1, **options: Any) -> Plan:
        """Says what pictures will need, without loading anything.

        Args:
            height: of a picture in pixels; None for the model's own size.
            width: as `height`.
            batch: pictures that are wanted.
            **options: the other fields of `PlanRequest`, such as `max_vram="8GB"`. Device and dtype are the pipeline's,
                as are schemes by which its networks are quantised already.

        Returns:
            `print(plan)` shows its table; `plan.apply(pipeline)` does what it says.

        Raises:
            ValueError, ConfigError: see `make_plan`.
            MemoryLimitError: nothing fits into `max_vram`.
        """
        pipeline = cast("SanaPipeline", self)
        own: dict[str, Any] = {"device": pipeline.device.type, "dtype": pipeline.dtype}
        own |= {SCHEME_FIELDS[network]: scheme for network, scheme in quantised_already(pipeline).items()}
        for name, value in own.items():
            if options.get(name, value) not in (value, AUTO):
                raise ValueError(
                    f"{name} is {options[name]!r}, and this pipeline's is {value!r} already; leave it out."
                )
        return make_plan(pipeline.config, PlanRequest(height=height, width=width, batch=batch, **(options | own)))

    def generate_as_planned(self, request: "Request") -> Any:
        """Makes the pictures of a request in as many calls as the plan that was applied allows; else in one.

        Raises:
            ValueError: see `sana.pipelines.calls.generate_in_calls`, and `Request`.
        """
        pipeline, plan = cast("SanaPipeline", self), self._plan
        if plan is None or plan.limit is None or not plan.request.split:
            return pipeline.generate(request)
        return generate_in_calls(pipeline, request, plan.settings.batch)

    def fit(
        self,
        max_vram: int | str,
        height: int | None = None,
        width: int | None = None,
        batch: int = 1,
        **options: Any,
    ) -> Plan:
        """Makes the pipeline fit into an amount of memory: plans and applies the plan. Call it before any picture.

        Args:
            max_vram: bytes or a text such as "8GB".
            height: of a picture in pixels; None for the model's own size.
            width: as `height`.
            batch: pictures that are wanted in a call; the plan says in how many parts they are made.
            **options: the other fields of `PlanRequest`; what is given there is not changed.

        Returns:
            The plan that was applied.

        Raises:
            ValueError, ConfigError, MemoryLimitError: as `plan`; the pipeline is unchanged then.
        """
        plan = self.plan(height, width, batch, max_vram=max_vram, **options)
        plan.apply(cast("SanaPipeline", self))
        if not plan.exact:
            logger.warning("To fit into %s, weights were quantised: pictures change a little.", max_vram)
        return plan
