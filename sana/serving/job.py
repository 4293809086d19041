"""One picture that somebody waits for: what it is, what it costs, what is told while it is made. See `engine.py`."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from sana.diffusion import SAMPLERS
from sana.models.transformer.sana_cm import SanaMSCM
from sana.ops.backend import plain_kind
from sana.pipelines import inputs
from sana.pipelines.request import Request
from sana.pipelines.sana_pipeline import DEFAULT_STEPS, SanaPipeline

DECODING = 2  # what text encoding and decoding count, in evaluations of a row


class CancelledError(RuntimeError):
    """The picture was given up before it was finished."""


class HandedBackError(RuntimeError):
    """The engine stops and did not make the picture: ask another one, or later."""


@dataclass(frozen=True)
class Step:
    """What is told after a step.

    Attributes:
        done, total: numbers of steps.
        preview: what the picture would be now, an image (1, 3, H, W) in about [-1, 1]; None at most steps.
    """

    done: int
    total: int
    preview: Tensor | None = None


@dataclass(frozen=True)
class JobOptions:
    """How a picture is followed; changes no picture.

    Attributes:
        on_step: called after every step, in a thread of the engine, which waits: it must be quick.
        previews: how many pictures of the way are decoded for `on_step`; only of models that predict a velocity.
    """

    on_step: Callable[[Step], None] | None = None
    previews: int = 0


class Job:
    """A request of one picture in the engine's hands.

    Args:
        pipeline: that will make it.
        request: of one picture.
        options: how it is followed.

    Attributes:
        request: with sampler and number of steps filled in.
        size: of the picture.
        cost: pixels times evaluated rows, for estimates of time.
        future: what the pipeline returns, an error of the pipeline, CancelledError or HandedBackError.
        cancelled: set to give it up; the engine looks between steps.

    Raises:
        ValueError: the request is for several pictures, or cannot be made by this model.
    """

    def __init__(self, pipeline: SanaPipeline, request: Request, options: JobOptions | None = None) -> None:
        if request.prompt_count * request.num_images_per_prompt != 1:
            raise ValueError("A job is one picture; submit one request for each.")
        if request.callback_on_step_end is not None:
            raise ValueError("callback_on_step_end cannot take effect here; use on_step.")
        if request.upscale_from is not None:
            raise ValueError("upscale_from cannot take effect here: a picture in two parts cannot be stepped.")
        self.options = options or JobOptions()
        self.request = complete(pipeline, request)
        self.size = check(pipeline, self.request)
        steps = self.request.num_inference_steps or 1
        rows = 1 + (self.request.guidance_scale != 1.0) + (self.request.pag > 1.0)
        self.cost = float(self.size.model_height * self.size.model_width * (steps * rows + DECODING))
        self.cancelled = False
        self.future: Future[Any] = Future()
        self.future.set_running_or_notify_cancel()  # so that nobody who waits for it can cancel it by accident
        self._previews = _preview_steps(steps, self.options.previews)
        self._sampler = SAMPLERS[self.request.sampler or ""]
        self._flow_shift = _first(self.request.flow_shift, pipeline.config.scheduler.flow_shift)

    def run(self, pipeline: SanaPipeline) -> Any:
        """Makes the picture, telling its steps; `pipeline` computes as the engine wants it."""
        if self.options.on_step is None:
            return pipeline.generate(self.request)
        tell, total = self.options.on_step, self.request.num_inference_steps or 1
        before: list[Tensor] = []

        def after_step(_: Any, index: int, timestep: float, state: dict[str, Any]) -> None:
            preview = None
            if before and index + 1 in self._previews:
                preview = pipeline.decode(self._extrapolated(before[0], state["latents"], index), self.size)
            before[:] = [state["latents"]]
            tell(Step(index + 1, total, preview))

        return pipeline.generate(replace(self.request, callback_on_step_end=after_step))

    def _extrapolated(self, before: Tensor, latents: Tensor, index: int) -> Tensor:
        """Returns the latents at which the straight line of the last step would end; `latents` if it has no line."""
        if self._sampler.prediction != "velocity":
            return latents
        times = self._sampler.times(self.request.num_inference_steps, flow_shift=self._flow_shift)
        start, now = float(times[index]), float(times[index + 1])
        return latents + now / (start - now) * (latents - before)


def complete(pipeline: SanaPipeline, request: Request) -> Request:
    """Returns the request with the sampler and number of steps that the pipeline would choose, and no progress bar."""
    name = request.sampler or pipeline.config.scheduler.vis_sampler
    if name not in SAMPLERS:
        raise ValueError(f"Unknown sampler {name!r}; known: {', '.join(SAMPLERS)}.")
    sprint = isinstance(pipeline.transformer, SanaMSCM)
    if request.sampler is None and sprint and SAMPLERS[name].prediction != "trigflow":
        name = "scm"  # as SanaSprintPipeline does
    steps = request.num_inference_steps or DEFAULT_STEPS[name]
    return replace(request, sampler=name, num_inference_steps=steps, progress_bar=False)


def check(pipeline: SanaPipeline, request: Request) -> inputs.ImageSize:
    """Returns the sizes of a request's picture, before anything is computed.

    Raises:
        ValueError: the model cannot make it.
    """
    if SAMPLERS[request.sampler or ""].prediction == "trigflow":
        request.check_for_sprint()
    else:
        request.check_for_flow()
    attention = pipeline.config.model.attn_type
    if request.pag > 1.0 and plain_kind(attention)[0] != "linear":
        raise ValueError(f"pag needs linear attention, and this model has {attention!r}.")
    return inputs.plan_size(
        request.height,
        request.width,
        factor=pipeline.autoencoder.downsample_factor,
        image_size=pipeline.config.model.image_size,
        binning=request.binning,
    )


def _first(given: Any, default: Any) -> Any:
    return default if given is None else given


def _preview_steps(steps: int, previews: int) -> frozenset[int]:
    """Returns after which steps, counted from 1, a preview is shown: evenly, neither at the first nor at the last."""
    wanted = {round((index + 1) * steps / (previews + 1)) for index in range(previews)}
    return frozenset(one for one in wanted if 1 < one < steps)
