"""The documented import path of the pipelines. The work lives in `sana.pipelines`; nothing is defined here."""

from sana.pipelines.sana_pipeline import SanaPipeline
from sana.pipelines.sprint import SanaSprintPipeline

__all__ = ["SanaPipeline", "SanaSprintPipeline"]
