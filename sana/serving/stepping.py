"""A pipeline that asks for everything heavy instead of computing it, so that many calls of it can be interleaved.

The arithmetic of a call stays the pipeline's own code: checks, noise, guidance, sampler, binning, resizing. Only the
networks are replaced by questions, which the engine answers.
"""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sana.models.text_encoder.base import PromptEmbeds
from sana.pipelines.inputs import ImageSize
from sana.pipelines.sana_pipeline import SanaPipeline

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
Ask = Callable[[Any], Any]


@dataclass(frozen=True)
class Do:
    """A question that is answered by calling a function."""

    function: Callable[[], Any]


@dataclass(frozen=True)
class Evaluate:
    """A question that is answered by the transformer called with these arguments, perhaps together with others'."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def latents(self) -> Tensor:
        """(B, C, H, W): the stacked branches."""
        found: Tensor = self.args[0]
        return found


class SteppedPipeline(SanaPipeline):
    """One call of a pipeline that shares everything with it, but asks where that would run a network.

    Args:
        pipeline: with weights, not compiled.
        ask: takes a `Do` or an `Evaluate` and returns the answer.
    """

    _whole: SanaPipeline
    _ask: Ask

    def __init__(self, pipeline: SanaPipeline, ask: Ask) -> None:
        assert pipeline.transformer is not None, "the engine checks that there are weights"
        transformer = stand_in(pipeline, pipeline.transformer, ask)
        # Not assigned one by one: a pipeline that offloads takes assigned networks under its management.
        self.__dict__.update(pipeline.__dict__ | {"transformer": transformer, "_whole": pipeline, "_ask": ask})

    def stage(self, network: str) -> AbstractContextManager[None]:
        """Enters nothing: whoever answers the questions enters the pipeline's own stages."""
        return nullcontext()

    def encode_prompts(self, *args: Any, **kwargs: Any) -> PromptEmbeds:
        """Asks for `SanaPipeline.encode_prompts`."""
        found: PromptEmbeds = self._ask(Do(lambda: self._whole.encode_prompts(*args, **kwargs)))
        return found

    def decode(self, latents: Tensor, size: ImageSize | None = None) -> Tensor:
        """Asks for `SanaPipeline.decode`."""
        found: Tensor = self._ask(Do(lambda: self._whole.decode(latents, size)))
        return found


def stand_in(pipeline: SanaPipeline, transformer: nn.Module, ask: Ask) -> nn.Module:
    """Returns a module of the same class, settings and weights whose forward asks.

    Hooks of the module itself are left to the true one, which runs them when it answers.
    """
    kind = type(transformer)
    other = kind.__new__(kind)
    other.__dict__.update(transformer.__dict__)

    def asked(name: str) -> Callable[..., Any]:
        def prepare(*args: Any, **kwargs: Any) -> Any:
            def inside() -> Any:
                with pipeline.stage("transformer"):
                    return getattr(transformer, name)(*args, **kwargs)

            return ask(Do(inside))

        return prepare

    other.__dict__ |= {name: OrderedDict() for name in HOOKS}
    other.__dict__ |= {"_compiled_call_impl": None, "forward": lambda *args, **kwargs: ask(Evaluate(args, kwargs))}
    other.__dict__ |= {name: asked(name) for name in ("cache_text", "cache_time") if hasattr(transformer, name)}
    return other
