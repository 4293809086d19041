"""The noise process, guidance and the samplers: all know a callable and a list of times, never a model class."""

from sana.registry import Registry

SAMPLERS = Registry(
    "sampler",
    {
        "flow_dpm-solver": "sana.diffusion.flow_dpm_solver:SAMPLER",
        "flow_euler": "sana.diffusion.flow_euler:SAMPLER",
        "dpm-solver": "sana.diffusion.dpm_solver:SAMPLER",
        "sa-solver": "sana.diffusion.sa_solver:SAMPLER",
        "scm": "sana.diffusion.scm:SAMPLER",
        "trigflow": "sana.diffusion.scm:TRIGFLOW_SAMPLER",
    },
)

__all__ = ["SAMPLERS"]
