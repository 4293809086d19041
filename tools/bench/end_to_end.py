"""Prompt to picture, 20 steps with guidance, against diffusers' pipeline with the same weights, prompts and noise.

The bundled model on a CPU; on a GPU the official shapes with random weights. Every picture has a new prompt.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tools.bench.harness import Case, Check, Comparison, Side, Work, compare
from tools.bench.networks import DTYPES, exact_convolutions
from tools.bench.pairs import DiffusersSide, Pair, Shape, bundled_pair, prompts, random_ours, random_theirs
from tools.bench.results import OURS
from tools.bench.setting import Setting
from tools.bench.targets import COMPILED

PICTURE_TOLERANCE = 1e-3  # of float32 pictures: 20 steps with guidance enlarge rounding errors
LOOP_MOST = 0.25  # and those of 16 bits much more; another mask or schedule changes the latents by about their size
REDUCED = "reduced: 2 blocks of 0.6B, 2 layers of Gemma, bf16, 512 px, 2 steps with CFG"
BATCHES = (16, 4, 32, 8)
CHECKED = "a red cat to the left of a blue star on a white background"


def cases(setting: Setting) -> list[Case]:
    """By device; what the targets ask for comes first."""
    if setting.device == "cpu":
        return _bundled_cases(setting)
    if setting.suite == "quick":
        build = partial(gpu_comparison, REDUCED, setting.device)
        names = ("", " compiled")
        return [Case("end_to_end", f"{REDUCED}, batch 2{name}", partial(build, 2, bool(name)), 5.0) for name in names]
    found = []
    for model in ("0.6B", "1.6B"):
        name = f"{model}, bf16, 1024 px, 20 steps with CFG, batch"
        make, key = partial(gpu_comparison, model, setting.device), f"end_to_end.{model}"
        found += [
            Case("end_to_end", f"{name} 1", partial(make, 1, False), 30.0, 170.0, 10, key),
            Case("end_to_end", f"{name} 1, {COMPILED}", partial(make, 1, True), 30.0, 130.0, 10, key),
        ]
        batches = BATCHES if model == "0.6B" else ()
        found += [
            Case("end_to_end", f"{name} {batch}", partial(make, batch, False), 20.0, 60.0, 3, f"throughput.{model}")
            for batch in batches
        ]
    return found


def _bundled_cases(setting: Setting) -> list[Case]:
    whole = "end_to_end.bundled" if setting.suite != "quick" else ""
    steps = 2 if setting.suite == "quick" else 20
    builds: list[tuple[str, Callable[[Pair], Comparison], str]] = [
        (f"text, {steps} steps with CFG, decode", partial(_whole, steps=steps), whole),
        ("text encoding alone", _text_alone, ""),
        ("decoding alone", _decode_alone, ""),
    ]
    found = []
    for name, build, key in builds:
        title = f"bundled model, fp32, 256 px: {name}"
        found.append(Case("end_to_end", title, partial(_of_bundled, build, setting), 5.0, 120.0, key=key))
    return found


def _of_bundled(build: Callable[[Pair], Comparison], setting: Setting) -> Comparison:
    return build(bundled_pair(setting.folder))


def _whole(pair: Pair, steps: int) -> Comparison:
    ours, theirs = pair.ours, pair.theirs
    ours.steps = theirs.steps = steps

    def check() -> dict[str, Check]:
        return {"diffusers": compare(ours.make([CHECKED]), theirs.make([CHECKED]), tolerance=PICTURE_TOLERANCE)}

    return Comparison([Side(OURS, ours), Side("diffusers", theirs)], check, work=Work(images=1), facts={"steps": steps})


def _text_alone(pair: Pair) -> Comparison:
    """The prompt with its instruction and the null caption, as both pipelines need them for guidance."""
    unseen, also_unseen = prompts(), prompts()

    @torch.inference_mode()
    def ours(text: str | None = None) -> Tensor:
        pipeline = pair.ours.pipeline
        found = pipeline.encode_prompts([text or f"{next(unseen)} "])
        pipeline.encode_prompts([""], null=True)
        return found.embeds[found.mask.bool()]

    @torch.inference_mode()
    def theirs(text: str | None = None) -> Tensor:
        side = pair.theirs
        text = text or f"{next(also_unseen)} "
        embeds, mask, _, _ = side.pipeline.encode_prompt(text, negative_prompt="", **side.text_options)
        return embeds[mask.bool()]

    def check() -> dict[str, Check]:
        return {"diffusers": compare(ours(CHECKED), theirs(CHECKED))}

    return Comparison([Side(OURS, ours), Side("diffusers", theirs)], check, kernels=True)


def _decode_alone(pair: Pair) -> Comparison:
    latents = pair.ours.noise(1, 0)

    @torch.inference_mode()
    def ours() -> Tensor:
        return pair.ours.pipeline.decode(latents)

    def theirs() -> Tensor:
        return decode_by_diffusers(pair.theirs, latents)

    def check() -> dict[str, Check]:
        return {"diffusers": compare(ours(), theirs())}

    return Comparison([Side(OURS, ours), Side("diffusers", theirs)], check, kernels=True, work=Work(images=1))


@torch.inference_mode()
def decode_by_diffusers(side: DiffusersSide, latents: Tensor) -> Tensor:
    """Pictures of latents, not clamped."""
    vae = side.pipeline.vae
    return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]


@dataclass
class JudgedPair:
    """Random networks on a GPU, and how far 16 bits may be from one another: see `compare`.

    Attributes:
        pair: ours is compiled.
        latents, pictures: float32 results of diffusers' pipeline for `CHECKED`, and the tolerances they lead to.
    """

    pair: Pair
    latents: Tensor
    pictures: Tensor

    @torch.inference_mode()
    def check(self, theirs: DiffusersSide) -> Check:
        """Compares latents of the whole loop, and pictures decoded from one and the same latents; returns the worse."""
        ours = self.pair.ours
        loop = compare(ours.make([CHECKED], output="latent"), theirs.make([CHECKED], output="latent"), self.latents,
                       tolerance=5e-3, most=LOOP_MOST)  # fmt: skip
        pictures = ours.pipeline.decode(self.latents)
        decoded = compare(pictures, decode_by_diffusers(theirs, self.latents).float(), self.pictures, tolerance=5e-3)
        return max(loop, decoded, key=lambda check: check.rms_ratio / check.tolerance)


@functools.lru_cache(maxsize=1)
def random_pair(shape_of: Callable[[], Shape], device: str, steps: int = 20) -> JudgedPair:
    """Both pipelines in bf16, and diffusers' results in float32.

    Args:
        shape_of: makes the shape (a function, because shapes cannot be hashed).
        device: "cuda", or "cpu" in tests.
        steps: of sampling.
    """
    ours = random_ours(shape_of(), device, DTYPES["bf16"], steps)
    theirs = random_theirs(ours)
    wide = DiffusersSide(copy.copy(theirs.pipeline), ours)
    for name in ("transformer", "vae", "text_encoder"):
        setattr(wide.pipeline, name, copy.deepcopy(getattr(theirs.pipeline, name)).float())
    with exact_convolutions():
        latents = wide.make([CHECKED], output="latent")
        pictures = decode_by_diffusers(wide, latents)
    if device != "cpu":
        ours.pipeline.compile(mode="max")
    return JudgedPair(Pair(ours, theirs), latents, pictures)


@functools.cache
def _shape_of(model: str) -> Callable[[], Shape]:
    """One function a model, so that `random_pair` finds what it has built."""
    return reduced_shape if model == REDUCED else lambda: Shape(model)


def reduced_shape() -> Shape:
    """Two blocks and two layers of text encoder, for a quick look."""
    return Shape("0.6B", 512, {"depth": 2}, gemma={"num_hidden_layers": 2})


def gpu_comparison(model: str, device: str, batch: int, compiled: bool) -> Comparison:
    """Our compiled pipeline against diffusers', as it is or with its transformer compiled."""
    judged = random_pair(_shape_of(model), device, 2 if model == REDUCED else 20)
    return batch_comparison(judged, batch, compiled)


def batch_comparison(judged: JudgedPair, batch: int, compiled: bool) -> Comparison:
    """See `gpu_comparison`."""
    ours, theirs, name = judged.pair.ours, judged.pair.theirs, "diffusers"
    if compiled:
        pipeline = copy.copy(theirs.pipeline)
        pipeline.transformer = torch.compile(theirs.pipeline.transformer)
        theirs, name = DiffusersSide(pipeline, ours), COMPILED

    def check() -> dict[str, Check]:
        return {name: judged.check(theirs)}

    sides = [Side(OURS, partial(ours, batch)), Side(name, partial(theirs, batch))]
    return Comparison(sides, check, ours.pipeline.device.type, work=Work(images=batch), facts={"batch": batch})
