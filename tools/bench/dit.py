"""One forward of the whole transformer, 0.6B and 1.6B, 512 to 4096 px, against diffusers' with the same weights."""

from functools import partial

import torch
from torch import Tensor

from tools.bench.harness import Case, Check, Comparison, Side, Work, compare
from tools.bench.networks import (
    DTYPES,
    STEPS,
    CachedDenoiser,
    diffusers_step,
    diffusers_transformer,
    exact_step,
    fastest,
    forward_flops,
    random_inputs,
    random_transformer,
    transformer_arguments,
)
from tools.bench.results import OURS
from tools.bench.setting import Setting

GRAPH = "ours, captured graph"
REDUCED = {"hidden_size": 128, "num_heads": 4, "caption_channels": 64}
# suite -> model, pixels, dtype, batch, blocks (None: all), rounds
SIZES: dict[str, list[tuple[str, int, str, int, int | None, int]]] = {
    "quick": [("0.6B", 512, "fp32", 1, 2, 3)],
    "cpu": [
        ("0.6B", 512, "fp32", 1, None, 3),
        ("1.6B", 512, "fp32", 1, 4, 3),
        ("0.6B", 1024, "fp32", 1, None, 2),
        ("1.6B", 1024, "bf16", 1, 4, 2),
        ("0.6B", 2048, "fp32", 1, 2, 2),
        ("0.6B", 4096, "fp32", 1, 1, 2),
    ],
    "gpu": [
        ("0.6B", 1024, "bf16", 2, None, 10),
        ("1.6B", 1024, "bf16", 2, None, 10),
        ("0.6B", 512, "bf16", 2, None, 10),
        ("1.6B", 512, "bf16", 2, None, 10),
        ("1.6B", 2048, "bf16", 2, None, 5),
        ("1.6B", 4096, "bf16", 2, None, 3),
        ("0.6B", 2048, "bf16", 2, None, 5),
        ("0.6B", 4096, "bf16", 2, None, 3),
    ],
}


def cases(setting: Setting) -> list[Case]:
    """By suite, see `SIZES`."""
    found = []
    for model, pixels, dtype, batch, blocks, rounds in SIZES[setting.suite]:
        full = transformer_arguments(model, pixels)["depth"]
        depth = f", {blocks} of {full} blocks" if blocks else ""
        width = ", reduced width" if setting.suite == "quick" else ""
        name = f"DiT forward {model}, {dtype}, {pixels} px, batch {batch}{depth}{width}"
        build = partial(build_comparison, model, pixels, dtype, batch, blocks, setting)
        found.append(Case("dit", name, build, 8.0, 90.0, rounds))
    return found


def build_comparison(
    model: str, pixels: int, dtype: str, batch: int, blocks: int | None, setting: Setting
) -> Comparison:
    """Our forward as the sampler calls it, and on a GPU in a captured graph, against diffusers'."""
    reduced = REDUCED if setting.suite == "quick" else {}
    arguments = transformer_arguments(model, pixels, blocks) | reduced
    network = random_transformer(arguments, setting.device, DTYPES[dtype])
    theirs = diffusers_transformer(network)
    inputs = random_inputs(arguments, batch, pixels, setting.device, DTYPES[dtype])
    their_step = diffusers_step(theirs, inputs)
    exact = None if dtype == "fp32" else exact_step(network, inputs)
    step = CachedDenoiser(fastest(network), inputs)
    sides = [Side(OURS, step, step.prepare, STEPS), Side("diffusers", their_step)]
    if setting.device != "cpu":
        sides.insert(1, Side(GRAPH, CapturedStep(CachedDenoiser(step.model, inputs)), step.prepare, STEPS))

    def check() -> dict[str, Check]:
        ours = step().clone()
        return {side.name: compare(ours, side.run(), exact) for side in sides[1:]}

    flops = 0.0 if reduced else batch * forward_flops(model, pixels, blocks)
    return Comparison(sides, check, setting.device, work=Work(flops=flops), facts={"dtype": dtype, "batch": batch})


class CapturedStep:
    """A step of our network as one CUDA graph.

    Args:
        step: waits for no device, and is not prepared again: the graph reads its tensors where they are.
    """

    def __init__(self, step: CachedDenoiser) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # compiles kernels before the capture
        self._step = step
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._out = step()

    def __call__(self) -> Tensor:
        """Replays the graph; the result is overwritten by the next call."""
        self._graph.replay()
        return self._out
