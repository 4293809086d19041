"""SanaSprintPipeline: one to four steps with a distilled model. The pipeline itself is `sana_pipeline.py`."""

from collections.abc import Sequence
from typing import Any

from sana.diffusion import SAMPLERS
from sana.pipelines.sana_pipeline import SanaPipeline


class SanaSprintPipeline(SanaPipeline):
    """`SanaPipeline` that samples with SCM whatever the config's `vis_sampler` says.

    A `SanaPipeline` whose config says `vis_sampler: scm` does the same.
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
        return super().__call__(prompt, height, width, **options)
