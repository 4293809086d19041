"""SanaSprintPipeline: one to four steps with a distilled model. The pipeline itself is `sana_pipeline.py`."""

from collections.abc import Sequence
from typing import Any

from sana.diffusion import SAMPLERS
from sana.pipelines.sana_pipeline import SanaPipeline


class SanaSprintPipeline(SanaPipeline):
    """`SanaPipeline` with the defaults of the distilled models: SCM sampling, two steps, the second at angle 1.3.

    A `SanaPipeline` whose config says `vis_sampler: scm` samples the same way; this class insists on it.
    """

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        **options: Any,
    ) -> Any:
        """Makes pictures; see `SanaPipeline.__call__`."""
        if options.get("sampler") is None:
            configured = self.config.scheduler.vis_sampler
            options["sampler"] = configured if SAMPLERS[configured].prediction == "trigflow" else "scm"
        if options.get("num_inference_steps") in (None, 2) and options.get("timesteps") is None:
            options["num_inference_steps"] = 2
            options.setdefault("intermediate_timesteps", 1.3)
        return super().__call__(prompt, height, width, **options)
