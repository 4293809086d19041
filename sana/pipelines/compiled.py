"""What `SanaPipeline.compile` does: which parts run as CUDA graphs or compiled code. Capturing itself is `graphs.py`.

The whole denoising loop becomes one graph: text keys and values, every step's transformer call with all branches of
guidance as one batch, and the solver between them, whose numbers come from times on the host. Not captured are loops in
which the host acts between steps: a callback, or a sampler that draws noise (`sa-solver`, `scm`).
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn

from sana.diffusion import SAMPLERS
from sana.diffusion.guidance import Guidance
from sana.diffusion.step_cache import plan_steps
from sana.models.autoencoder.base import Autoencoder
from sana.models.text_encoder.base import PromptEmbeds
from sana.models.transformer.attention import set_backend
from sana.pipelines.approximations import time_features
from sana.pipelines.compile_cache import CompileCache
from sana.pipelines.compiled_parts import DenoisingLoop, compile_blocks, fast_decoder, weights_version
from sana.pipelines.denoise import NonFiniteError
from sana.pipelines.graphs import CudaRecorder, GraphCache, Recorder
from sana.pipelines.request import Request
from sana.utils.logging import get_logger

if TYPE_CHECKING:
    from sana.pipelines.sana_pipeline import SanaPipeline

logger = get_logger(__name__)

MODES = ("off", "regional", "graph", "max")
CAPTURED_SAMPLERS = ("flow_dpm-solver", "flow_euler", "dpm-solver")  # as the pipeline calls them: no adaptive steps
SPRINT = "the Sprint transformer"
_OWN_GRAPHS = ("reduce-overhead", "max-autotune")  # modes of torch.compile that capture graphs themselves
_RECOMPILE_LIMIT = 64  # of one block: sizes, batch sizes, text lengths; torch's 8 would run the ninth uncompiled


@dataclass(frozen=True)
class CompileSettings:
    """What to compile, and how.

    Attributes:
        mode: "graph" captures the denoising loop; "regional" compiles the transformer's repeated block; "max" does
            both, uses the Triton kernels, and decodes with a compiled bf16 channels-last copy of the autoencoder.
        cache_dir: keeps compiled code there beside torch's own cache in the temporary folder; see `CompileCache`.
        max_graphs: greatest number of captured loops.
        max_graph_bytes: memory they may hold; None for a quarter of the device's.
        backend: of torch.compile, for the blocks.
        dynamic: of torch.compile. None compiles the first size exactly, a second one once more for any size, and
            nothing for further sizes; False compiles each exactly, True the first for any size.
        torch_options: further keyword arguments of torch.compile for the blocks, for example
            {"mode": "max-autotune-no-cudagraphs"}, which tries out GEMM kernels for minutes.

    Raises:
        ValueError: an option is unknown or out of range.
    """

    mode: str = "max"
    cache_dir: str | Path | None = None
    max_graphs: int = 8
    max_graph_bytes: int | None = None
    backend: str = "inductor"
    dynamic: bool | None = None
    torch_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"Unknown mode of compile {self.mode!r}; known modes: {', '.join(MODES)}.")
        if self.max_graphs < 1 or (self.max_graph_bytes is not None and self.max_graph_bytes < 1):
            raise ValueError(
                f"max_graphs and max_graph_bytes must be at least 1, not {self.max_graphs} and {self.max_graph_bytes}."
            )
        if self.torch_options.get("mode") in _OWN_GRAPHS:
            raise ValueError(
                f"torch_options mode {self.torch_options['mode']!r} captures graphs of its own; use "
                "'max-autotune-no-cudagraphs' and let mode 'graph' or 'max' capture."
            )

    @property
    def graphs(self) -> bool:
        """Whether loops are captured."""
        return self.mode in ("graph", "max")

    @property
    def regional(self) -> bool:
        """Whether the repeated block is compiled."""
        return self.mode in ("regional", "max")


class CompiledPipeline:
    """The compiled parts of one pipeline. They follow it: other weights, dtypes or devices are noticed when next used.

    Args:
        pipeline: what was asked to compile.
        settings: how.
        recorder: what captures loops; None for CUDA graphs on the pipeline's device.

    Raises:
        ValueError: the mode needs a CUDA device, and the pipeline is on another.
    """

    def __init__(self, pipeline: "SanaPipeline", settings: CompileSettings, recorder: Recorder | None = None) -> None:
        if settings.graphs and recorder is None and pipeline.device.type != "cuda":
            raise ValueError(
                f"compile({settings.mode!r}) captures CUDA graphs, and this pipeline is on the device "
                f"{str(pipeline.device)!r}; use compile('regional'), or move it with to('cuda')."
            )
        self.settings = settings
        self._pipeline = pipeline
        self._recorder = recorder
        self._graphs: GraphCache | None = None
        self._transformer: nn.Module | None = None
        self._version = 0
        self._blocks: list[nn.Module] = []
        self._backends: list[tuple[nn.Module, str]] = []
        self._decoder: Autoencoder | None = None
        self._decoder_version = 0
        self._told: set[str] = set()
        self._cache = CompileCache(settings.cache_dir)
        self._cache.load()

    def denoise(
        self,
        request: Request,
        times: Tensor,
        guidance: Guidance,
        noise: Tensor,
        prompt: PromptEmbeds,
        null: PromptEmbeds | None,
    ) -> Tensor | None:
        """Samples by a captured loop.

        Returns:
            Latents; None where the loop cannot be captured and the caller has to run it step by step.

        Raises:
            CaptureError: the capture failed.
            NonFiniteError: the transformer produced infinity or NaN.
        """
        if not self.settings.graphs:
            return None
        name = request.sampler or self._pipeline.config.scheduler.vis_sampler
        reason = self._why_not_captured(name, request)
        if reason is not None:
            self.tell(f"The denoising loop runs step by step, not as a graph: {reason}.")
            return None
        inputs = {"noise": noise, "prompt_embeds": prompt.embeds, "prompt_mask": prompt.mask}
        if null is not None:
            inputs["null_embeds"] = null.embeds[:, : prompt.embeds.shape[1]]
        size = " x ".join(str(length) for length in noise.shape)
        with self.watch("the transformer"):
            transformer = self._pipeline._require_transformer()
            loop = self._loop(name, request, times, guidance, transformer)
            label = f"{len(times) - 1} steps of {name} on latents {size}"
            latents = self._graph_cache().call(loop, partial(loop.run, transformer), inputs, label=label)
        if not bool(torch.isfinite(latents).all()):
            with torch.compiler.set_stance("force_eager"):  # only then every layer can be watched
                loop.run(transformer, **inputs, checked=True)
            raise NonFiniteError(
                "The captured denoising loop gave values that are not finite, and step by step it does not; "
                "no image was made. Try compile('regional') or compile('off')."
            )
        return latents

    def autoencoder(self) -> Autoencoder:
        """Returns the autoencoder to decode with: in mode "max" a fast copy; the pipeline's own is unchanged."""
        original = self._pipeline.autoencoder
        if self.settings.mode != "max":
            return original
        version = weights_version(original)
        if self._decoder is None or version != self._decoder_version:
            self._decoder, self._decoder_version = fast_decoder(original), version
        return self._decoder.tile_like(original)

    @contextmanager
    def watch(self, what: str) -> Iterator[None]:
        """Says what was compiled inside, and keeps it in `cache_dir`.

        Args:
            what: is being run, for the log.
        """
        if self._pipeline.transformer is not None:
            self._prepare(self._pipeline.transformer)
        if what == SPRINT and self.settings.graphs:
            self.tell("A Sprint model runs step by step, not as a graph: noise is drawn on the host between its steps.")
        if self.settings.mode == "graph":
            yield
            return
        import torch._dynamo  # a second of imports, which only compiling needs

        counters = torch._dynamo.utils.counters["stats"]
        before, start = counters["unique_graphs"], time.perf_counter()
        with torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT):
            yield
        compiled = counters["unique_graphs"] - before
        if compiled > 0:
            seconds = time.perf_counter() - start
            logger.info("Compiled %d part(s) of %s; this first call took %.1f s.", compiled, what, seconds)
            self._cache.store()

    def tell(self, line: str) -> None:
        """Logs a line the first time it comes up."""
        if line not in self._told:
            self._told.add(line)
            logger.info(line)

    def drop_graphs(self) -> None:
        """Gives captured loops and their memory back; the next call captures anew."""
        if self._graphs is not None:
            self._graphs.clear()
            self._graphs = None

    def close(self) -> None:
        """Makes the pipeline run as it did before."""
        self.drop_graphs()
        for block in self._blocks:
            block._compiled_call_impl = None
        for module, backend in self._backends:
            module.backend = backend  # type: ignore[assignment]
        self._blocks, self._backends, self._transformer, self._decoder = [], [], None, None

    def _why_not_captured(self, sampler: str, request: Request) -> str | None:
        if sampler not in CAPTURED_SAMPLERS:
            return f"the sampler {sampler!r} draws noise on the host between the steps"
        if request.step_cache and SAMPLERS[sampler].prediction != "velocity":
            return "step_cache does not fit this sampler"  # as the caller will say
        if request.callback_on_step_end is not None:
            return "callback_on_step_end runs on the host between the steps"
        if self._recorder is None and self._pipeline.device.type != "cuda":
            return f"the pipeline was moved to the device {str(self._pipeline.device)!r}"
        return None

    def _loop(
        self, name: str, request: Request, times: Tensor, guidance: Guidance, transformer: nn.Module
    ) -> DenoisingLoop:
        evaluate = None
        if request.step_cache:
            branches = [guidance.branches(float(one)) for one in times[:-1]]
            evaluate = plan_steps(time_features(transformer, times), request.step_cache, groups=branches)
        layers = tuple(self._pipeline.config.model.pag_applied_layers)
        return DenoisingLoop(name, tuple(times.tolist()), guidance, layers, self._pipeline.dtype, evaluate)

    def _prepare(self, transformer: nn.Module) -> None:
        """Compiles the blocks of a transformer that is new, and drops graphs that read weights which have moved."""
        if transformer is not self._transformer:
            self.close()
            self._transformer = transformer
            if self.settings.mode == "max":
                modules = [module for module in transformer.modules() if hasattr(module, "backend")]
                self._backends = [(module, str(module.backend)) for module in modules]
                set_backend(transformer, "triton")
            if self.settings.regional:
                options = {"backend": self.settings.backend, "dynamic": self.settings.dynamic}
                self._blocks = compile_blocks(transformer, **options, **self.settings.torch_options)
        version = weights_version(transformer)
        if version != self._version:
            self.drop_graphs()
            self._version = version

    def _graph_cache(self) -> GraphCache:
        if self._graphs is None:
            recorder, limit = self._recorder, self.settings.max_graph_bytes
            if recorder is None:
                device = self._pipeline.device
                recorder = CudaRecorder(device)
                limit = limit or torch.cuda.get_device_properties(device).total_memory // 4
            self._graphs = GraphCache(self.settings.max_graphs, recorder, max_bytes=limit)
        return self._graphs


def watching(compiled: CompiledPipeline | None, what: str) -> AbstractContextManager[None]:
    """Returns `compiled.watch(what)`; of a pipeline that is not compiled, a context that does nothing."""
    return nullcontext() if compiled is None else compiled.watch(what)


class Compilable:
    """The part of `SanaPipeline` that can be compiled."""

    _compiled: CompiledPipeline | None = None

    def compile(
        self, mode: str = "max", *, cache_dir: str | Path | None = None, max_graphs: int = 8, **options: Any
    ) -> Self:
        """Makes later calls faster; the same pictures within rounding (bf16 for the decoder, in mode "max").

        The first call with a new size, batch size, text length, number of steps or guidance pays for it: "graph" runs
        the loop twice and captures it; "regional" and "max" compile one block, which takes a minute or less once and
        again for the second size, and is kept on disk. Later calls launch one graph instead of tens of thousands of
        kernels. What the first call took is logged.

        A graph holds the memory that its loop needs, shared with the other graphs. Loops with `callback_on_step_end`
        and samplers that draw noise between steps are not captured and run step by step. Weights that move (`to`,
        `from_pretrained`) are noticed; graphs are captured again. While a loop is a graph, no progress bar is shown.

        Args:
            mode: "graph", "regional", "max" (both, with the Triton kernels and a compiled bf16 decoder beside the
                pipeline's own) or "off", which undoes it. Only "regional" and "off" work without a CUDA GPU.
            cache_dir: folder that keeps compiled code, for machines whose temporary folder does not last.
            max_graphs: greatest number of captured loops; the least recently used is dropped.
            **options: the other fields of `sana.pipelines.compiled.CompileSettings`, by name.

        Returns:
            The pipeline.

        Raises:
            ValueError: an option is unknown or out of range, or the mode needs a CUDA device.
        """
        settings = CompileSettings(mode, cache_dir, max_graphs, **options)
        compiled = None if mode == "off" else CompiledPipeline(cast("SanaPipeline", self), settings)
        if self._compiled is not None:
            self._compiled.close()
        self._compiled = compiled
        return self
