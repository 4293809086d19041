"""Solvers of diffusers on lists of times that a test gives; on their own grids they would not step where ours do."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers")


class GivenTimes(diffusers.DPMSolverMultistepScheduler):
    """diffusers' solver on a given list of sigmas, with the timesteps that our model sees for them."""

    given: torch.Tensor

    def set_timesteps(self, num_inference_steps: int | None = None, device: object = None, **_: object) -> None:
        super().set_timesteps(len(self.given) - 1)
        self.sigmas = self.given
        self.timesteps = (self.given[:-1] * 1000).long()


class GivenAngles(diffusers.SCMScheduler):
    """diffusers' solver of Sprint models on a given list of angles, 0 at its end."""

    given: tuple[float, ...]

    def set_timesteps(self, num_inference_steps: int, *_: object, **__: object) -> None:
        super().set_timesteps(
            len(self.given) - 1, timesteps=list(self.given), max_timesteps=None, intermediate_timesteps=None
        )
