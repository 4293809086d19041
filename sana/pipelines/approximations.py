"""The opt-in approximations of a request: a step cache and fewer text tokens. Each is off by default.

Guidance in an interval is `sana.diffusion.guidance`, fp8 weights are `sana.models.quantization.fp8`. What each costs in
quality is measured in `asset/docs/approximations.md`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from sana.diffusion.guidance import Guidance, VelocityFn
from sana.diffusion.sampler import Sampler
from sana.diffusion.step_cache import StepCache, plan_steps
from sana.models.text_encoder.base import PromptEmbeds
from sana.pipelines import inputs
from sana.pipelines.denoise import TIMESTEPS

MAX_THRESHOLD = 100.0


def check_approximations(step_cache: float, max_text_tokens: int | None) -> None:
    """Checks the two options of a `Request`.

    Raises:
        ValueError: one is out of range.
    """
    inputs.check_number("step_cache", step_cache, 0.0, MAX_THRESHOLD)
    if max_text_tokens is not None:
        inputs.check_count("max_text_tokens", max_text_tokens, 1_000_000)


def first_tokens(prompt: PromptEmbeds, limit: int | None) -> PromptEmbeds:
    """Keeps the first `limit` readable tokens of each prompt, and no column after the last of them.

    Readable tokens are those with a mask of 1, in the order in which the transformer gets them: the begin token, the
    last tokens of the instruction that precedes the prompt (none without an instruction), then the prompt itself. What
    is dropped is the end of a long prompt. A prompt of at most `limit` tokens stays as it is. The null caption or the
    negative prompt is read under the prompt's mask, so it loses the same positions.

    Args:
        prompt: embeddings (B, L, C) and mask (B, L).
        limit: None keeps everything.
    """
    if limit is None:
        return prompt
    readable = prompt.mask != 0
    kept = readable & (readable.cumsum(dim=1) <= limit)
    columns = kept.any(dim=0).nonzero()
    if not len(columns):  # no prompt has a readable token; the transformer then reads all of them
        return prompt
    length = int(columns[-1]) + 1
    return PromptEmbeds(prompt.embeds[:, :length], (prompt.mask * kept)[:, :length])


def time_features(transformer: nn.Module, times: Tensor) -> Tensor:
    """Returns the transformer's embedding of the times that a sampler asks for: (N, D) on its device.

    Args:
        transformer: `SanaMS` or a class of its kind.
        times: (N + 1,) noise levels; the last is never asked for.
    """
    device = next(transformer.parameters()).device
    embed_time = transformer.embed_time
    assert callable(embed_time)
    with torch.no_grad():
        return embed_time(times[:-1].to(device=device, dtype=torch.float32) * TIMESTEPS)


def plan_evaluations(
    threshold: float, *, transformer: nn.Module, sampler: Sampler, times: Tensor, guidance: Guidance
) -> tuple[bool, ...]:
    """Decides which steps of a run evaluate the transformer; nothing but the times and the weights matters.

    Args:
        threshold: see `plan_steps`.
        transformer: embeds the times.
        sampler: must ask for velocities at its times.
        times: (N + 1,) of the sampler.
        guidance: a prediction is not reused where other branches begin.

    Returns:
        N booleans, True for a step that evaluates it.

    Raises:
        ValueError: the sampler asks for noise, at times of its own.
    """
    if threshold == 0:
        return (True,) * (len(times) - 1)
    if sampler.prediction != "velocity":
        raise ValueError("step_cache works with samplers that ask for velocities (flow_dpm-solver, flow_euler) only.")
    branches = [guidance.branches(float(time)) for time in times[:-1]]
    return plan_steps(time_features(transformer, times), threshold, groups=branches)


def cache_steps(velocity: VelocityFn, threshold: float, *, times: Tensor, **options: Any) -> VelocityFn:
    """Returns `velocity` itself where every step is evaluated, and else a `StepCache` for one run of a sampler.

    Args:
        velocity: the guided velocity.
        threshold: see `plan_steps`.
        times: (N + 1,) of the sampler.
        **options: `transformer`, `sampler` and `guidance` of `plan_evaluations`.
    """
    evaluate = plan_evaluations(threshold, times=times, **options)
    return velocity if all(evaluate) else StepCache(velocity, times, evaluate)
