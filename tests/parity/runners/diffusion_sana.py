"""Runs the recorded cases that sample or guide a small Sana network."""

import re
from typing import Any

import torch
from torch import Tensor, nn

from sana.diffusion import SAMPLERS
from sana.diffusion.guidance import Guidance, guide, noise_branches
from sana.models.transformer.sana import SanaMS
from sana.models.transformer.sana_cm import SanaMSCM
from tests.parity.common import Case
from tests.parity.runners.diffusion_models import setting
from tests.tolerance import assert_all_close

NETWORKS = {"SanaMS": SanaMS, "SanaMSCM": SanaMSCM}


def load_network(case: Case) -> nn.Module:
    """Returns the case's network with its recorded weights, in evaluation mode."""
    arguments = dict(case.constructor)
    network = NETWORKS[arguments.pop("class")](**arguments).eval()
    network.load_state_dict(case.weights(), strict=True)
    return network


class BatchedDenoiser:
    """All branches in one call of the network, and the timesteps that reached its embedding."""

    def __init__(self, network: nn.Module, case: Case, pag_layers: list[int]) -> None:
        self.network, self.pag_layers = network, tuple(pag_layers)
        self.captions = {branch: case.tensor("in.cond") for branch in ("cond", "perturbed")}
        self.captions["uncond"] = case.tensor("in.uncond")
        self.mask = case.tensor("in.mask")
        self.embedded: list[float] = []
        network.t_embedder.register_forward_pre_hook(self._watch)
        self._seen: list[Tensor] = []

    def _watch(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self._seen.append(arguments[0].detach().flatten().float())

    @torch.no_grad()
    def __call__(self, latents: Tensor, sigma: Tensor, branches: tuple[str, ...]) -> dict[str, Tensor]:
        count, rows = len(branches), latents.shape[0]
        self._seen.clear()
        output = self.network(
            latents.repeat(count, 1, 1, 1),
            (sigma * 1000).expand(count * rows),
            torch.cat([self.captions[branch] for branch in branches]),
            mask=self.mask.repeat(count, 1),
            pag_layers=self.pag_layers,
            pag_rows=rows if "perturbed" in branches else 0,
        )
        values = torch.cat(self._seen).unique()
        assert len(values) == 1, f"one step embedded the timesteps {values.tolist()}"
        self.embedded.append(float(values))
        return dict(zip(branches, output.chunk(count)))


def pag_layers_of(case: Case, run: dict[str, Any]) -> list[int]:
    if "pag_applied_layers" in run:
        return run["pag_applied_layers"]
    stated = setting(case, "pag_applied_layers", r"pag_applied_layers=\[([\d, ]*)\]", "1")
    return stated if isinstance(stated, list) else [int(layer) for layer in stated.split(",")]


def guidance_of(run: dict[str, Any]) -> Guidance:
    scale = run["guidance_scale"] if "guidance_scale" in run else run["cfg_scale"]
    interval = tuple(float(end) for end in run.get("interval_guidance", (0, 1)))
    return Guidance(run["guidance_type"], float(scale), float(run.get("pag_scale", 1.0)), interval)


def run_guidance(case: Case) -> None:
    network, latents = load_network(case), case.tensor("in.z")
    for run in case.call["runs"]:
        guidance, time = guidance_of(run), torch.tensor(float(run["t"]))
        denoiser = noise_branches(BatchedDenoiser(network, case, pag_layers_of(case, run)))
        result, expected = guide(denoiser, guidance)(latents, time), case.tensor(f"out.{run['key']}")
        if guidance.kind == "classifier-free_PAG_seq" and guidance.branches(time) == ("cond", "perturbed"):
            # Without CFG the official call takes the batch's second half for the perturbed branch and returns it as
            # the result. We guide every row; so there the record is compared with that branch.
            half = (latents.shape[0] + 1) // 2
            result = torch.cat([result[:half], denoiser(latents, time, ("cond", "perturbed"))["perturbed"][half:]])
        case.assert_close(result, expected, run["key"])


def run_solver_sana(case: Case) -> None:
    network = load_network(case)
    for run in case.call["runs"]:
        check_flow_dpm(case, network, run)
    for key in case.tensors("out."):
        if match := re.fullmatch(r"flow_euler_n(\d+)", key):
            check_flow_euler(case, network, key, int(match[1]))


def check_flow_dpm(case: Case, network: nn.Module, run: dict[str, Any]) -> None:
    """Guided on noise as recorded, then on velocity as the pipeline does, with room for the rounding of the former."""
    key, noise, sampler = run["key"], case.tensor("in.z"), SAMPLERS["flow_dpm-solver"]
    order = int(run.get("order") or setting(case, "order", r"order=(\d)", 2))
    times = sampler.times(run["steps"], flow_shift=run["flow_shift"])
    for prediction in ("noise", "velocity"):
        denoiser = BatchedDenoiser(network, case, pag_layers_of(case, run))
        model = guide(noise_branches(denoiser) if prediction == "noise" else denoiser, guidance_of(run))
        states = [noise]
        result = sampler.sample(
            model,
            noise,
            times,
            order=order,
            prediction=prediction,
            callback=lambda index, time, latents, states=states: states.append(latents),
        )
        slack = 0.0 if prediction == "noise" else 1e-5 * float((1 - times[1]) / (1 - times[0]).clamp_min(1e-6))
        rtol, atol = float(case.tolerance["rtol"]), float(case.tolerance["atol"]) + slack
        assert_all_close(result, case.tensor(f"out.{key}"), rtol, atol, f"{case.name} {key} guided on {prediction}")
        case.assert_close(
            torch.tensor(denoiser.embedded), case.tensor(f"out.t_embedder_input.{key}"), f"timesteps {key}"
        )
        if prediction == "noise" and f"inter.{key}" in case.tensors("out."):
            case.assert_close(torch.stack(states), case.tensor(f"out.inter.{key}"), f"intermediates {key}")


def check_flow_euler(case: Case, network: nn.Module, key: str, steps: int) -> None:
    scale = float(setting(case, "flow_euler_cfg_scale", r"FlowEuler\([^)]*cfg (\d+(?:\.\d+)?)\)", 4.5))
    denoiser, sampler = BatchedDenoiser(network, case, []), SAMPLERS["flow_euler"]
    times = sampler.times(steps, flow_shift=float(case.call.get("flow_euler_shift", 3.0)))
    result = sampler.sample(guide(denoiser, Guidance(guidance_scale=scale)), case.tensor("in.z"), times)
    case.assert_close(result, case.tensor(f"out.{key}"), key)
    case.assert_close(torch.tensor(denoiser.embedded), case.tensor(f"out.t_embedder_input.{key}"), f"timesteps {key}")


def run_solver_scm_sana(case: Case) -> None:
    network, noise, sampler = load_network(case), case.tensor("in.z"), SAMPLERS["scm"]
    scale = torch.full((noise.shape[0],), float(setting(case, "cfg_scale", r"cfg_scale (\d+(?:\.\d+)?)", 4.5)))
    sigma_data = float(setting(case, "sigma_data", r"sigma_data (\d+(?:\.\d+)?)", 0.5))
    second = float(setting(case, "intermediate_timesteps", r"intermediate_timesteps (\d+(?:\.\d+)?)", 1.3))
    seed = int(setting(case, "seed", r"seed (\d+)", 3031))
    caption, mask = case.tensor("in.cond"), case.tensor("in.mask")

    @torch.no_grad()
    def trigflow(latents: Tensor, angle: Tensor) -> Tensor:
        return network(latents, angle.expand(len(latents)), caption, mask=mask, data_info={"cfg_scale": scale})

    for key, expected in case.tensors("out.").items():
        times = sampler.times(int(key.removeprefix("n")), intermediate_timesteps=second)
        generator = torch.Generator().manual_seed(seed)
        result = sampler.sample(trigflow, noise, times, sigma_data=sigma_data, generator=generator)
        case.assert_close(result, expected, key)
