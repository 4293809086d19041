"""Runs the recorded cases of the samplers and of guidance. The analytic models are in diffusion_models.py."""

import re
from typing import Any

import torch
from torch import Tensor

from sana.diffusion import SAMPLERS
from sana.diffusion.guidance import Guidance, guide, noise_branches, select_guidance_kind
from sana.diffusion.noise_schedule import VPSchedule, time_grid
from tests.parity.common import Case
from tests.parity.runners.diffusion_models import (
    GaussianMixture,
    TinyNoiseModel,
    setting,
    settings,
    trigflow_model,
    with_captions,
)
from tests.parity.runners.diffusion_sana import run_guidance, run_solver_sana, run_solver_scm_sana
from tests.tolerance import assert_all_close

FLOAT32_STEP = 2.0**-23
FLOW_DPM_OPTIONS = ("order", "method", "solver_type", "lower_order_final", "denoise_to_zero")
# The recorded VP runs leave the first step, at time 1 (timestep 999), unguided: the interval's end was exclusive there.
VP_INTERVAL = (0.0, 0.999)


def run_timestep_grid(case: Case) -> None:
    for key, expected in case.tensors("out.").items():
        match = re.fullmatch(r"(\w+)\.n(\d+)(?:\.shift([\d.]+))?", key)
        assert match, f"{case.name}: cannot read the grid's name {key!r}"
        skip_type, steps, shift = match.groups()
        ends = {"first": case.call.get("t_T", 1.0), "last": case.call.get("t_0", 0.001)}
        grid = time_grid(skip_type, int(steps), VPSchedule(), flow_shift=float(shift or 1), **ends)
        case.assert_close(grid, expected, key)
        if skip_type == "time_uniform_flow" and ends == {"first": 1.0, "last": 0.001}:
            times = SAMPLERS["flow_dpm-solver"].times(int(steps), flow_shift=float(shift or 1))
            assert torch.equal(times, grid), key


def sample_mixture(case: Case, options: dict[str, Any], prediction: str, callback: Any = None) -> tuple[Tensor, Tensor]:
    """Samples the case's mixture by Flow-DPM-Solver. Returns latents and the times."""
    denoiser = with_captions(GaussianMixture(case), case)
    denoiser = noise_branches(denoiser) if prediction == "noise" else denoiser
    model = guide(denoiser, Guidance(guidance_scale=options["cfg_scale"]))
    sampler = SAMPLERS["flow_dpm-solver"]
    times = sampler.times(
        options["steps"], flow_shift=options["flow_shift"], skip_type=options.get("skip_type", "time_uniform_flow")
    )
    arguments = {name: options[name] for name in FLOW_DPM_OPTIONS if name in options}
    noise = case.tensor("in.z")
    return sampler.sample(model, noise, times, prediction=prediction, callback=callback, **arguments), times


def rounding_near_noise(times: Tensor, cfg_scale: float) -> float:
    """Returns how far the recorded float32 numbers are off because noise was guided and divided by alpha near 0."""
    alpha = 1 - times.double()
    return float(4 * FLOAT32_STEP * 3 * (2 * abs(cfg_scale) + 1) * alpha[1] / alpha[0].clamp_min(1e-6))


def exact_flow(case: Case, options: dict[str, Any]) -> Tensor:
    """Returns the solution of 200 steps on the official grid."""
    common = {name: options[name] for name in ("cfg_scale", "flow_shift")}
    return sample_mixture(case, {**common, "steps": 200, "order": 2}, "velocity")[0]


def assert_lower_order(case: Case, options: dict[str, Any]) -> None:
    """Asserts that fewer steps than the order give what the greatest possible order gives."""
    lower, _ = sample_mixture(case, {**options, "order": options["steps"]}, "velocity")
    result, _ = sample_mixture(case, options, "velocity")
    assert torch.isfinite(result).all(), f"{case.name} {options['key']}: values that are not finite"
    case.assert_close(result, lower, options["key"])


def assert_right_where_official_is_not_finite(case: Case, options: dict[str, Any]) -> None:
    """Asserts a finite result, and that the same options reach the exact flow when the steps are many."""
    result, _ = sample_mixture(case, options, "velocity")
    assert torch.isfinite(result).all(), f"{case.name} {options['key']}: values that are not finite"
    fine, _ = sample_mixture(case, {**options, "steps": 200}, "velocity")
    exact = exact_flow(case, options)
    error = float((fine - exact).abs().mean() / exact.abs().mean())
    assert error <= 0.05, f"{case.name} {options['key']}: 200 steps are {error:.3f} from the exact flow"


def run_flow_dpm(case: Case) -> None:
    recorded = case.tensors("out.")
    for options in settings(case, cfg_scale=1.0, flow_shift=3.0, order=2):
        key = options.get("key", "")
        if "error" in options:
            assert_lower_order(case, options)
            continue
        if not options.get("finite", True):
            assert_right_where_official_is_not_finite(case, options)
            continue
        states: list[Tensor] = [case.tensor("in.z")]
        seen: list[float] = []

        def record(index: int, time: float, latents: Tensor, states=states, seen=seen) -> None:
            states.append(latents)
            seen.append(time)

        expected = recorded[key] if key else case.tensor("out")
        result, times = sample_mixture(case, options, "noise", record)
        case.assert_close(result, expected, key)
        ours, _ = sample_mixture(case, options, "velocity")
        slack = rounding_near_noise(times, options["cfg_scale"])
        rtol, atol = float(case.tolerance["rtol"]), float(case.tolerance["atol"]) + slack
        assert_all_close(ours, expected, rtol, atol, f"{case.name} {key} guided by velocity")
        if "intermediates" in recorded:
            case.assert_close(torch.stack(states), recorded["intermediates"], "intermediates")
        if "model_t" in recorded:
            timesteps = torch.tensor(seen, dtype=torch.float32) * 1000
            case.assert_close(timesteps[:, None].expand_as(recorded["model_t"]), recorded["model_t"], "model_t")


def run_flow_other(case: Case) -> None:
    """Each method either names its trouble in a ValueError or gives a right answer."""
    for options in settings(case, cfg_scale=1.0, flow_shift=3.0, steps=6):
        match = re.fullmatch(r"(\w+?)_o(\d)(?:_(\w+))?", options["key"])
        assert match, options["key"]
        method, order, skip_type = match.groups()
        options |= {"method": method, "order": int(order), "skip_type": skip_type or "time_uniform_flow"}
        try:
            if method == "adaptive":
                assert_adaptive_is_right(case, options)
            else:
                assert_right_where_official_is_not_finite(case, options)
        except ValueError as error:
            assert len(str(error)) > 20, f"{case.name} {options['key']}: unclear message {error}"


def assert_adaptive_is_right(case: Case, options: dict[str, Any]) -> None:
    """Runs the adaptive solver between noise levels 0.999 and 0.001, where the log-SNR is finite."""
    denoiser = with_captions(GaussianMixture(case), case)
    model = guide(denoiser, Guidance(guidance_scale=options["cfg_scale"]))
    result = SAMPLERS["flow_dpm-solver"].sample(
        model, case.tensor("in.z"), torch.tensor([0.999, 0.001]), method="adaptive", order=options["order"]
    )
    exact = exact_flow(case, options)
    error = float((result - exact).abs().mean() / exact.abs().mean())
    assert error <= 0.2, f"{case.name} {options['key']}: {error:.3f} from the exact flow"


def run_flow_euler(case: Case) -> None:
    sampler = SAMPLERS["flow_euler"]
    model = guide(with_captions(GaussianMixture(case), case), Guidance(guidance_scale=case.call.get("cfg_scale", 4.5)))
    for key, expected in case.tensors("out.").items():
        if not (match := re.fullmatch(r"n(\d+)", key)):
            continue
        seen: list[float] = []
        times = sampler.times(int(match[1]), flow_shift=float(case.call.get("shift", 3.0)))
        result = sampler.sample(
            model, case.tensor("in.z"), times, callback=lambda index, time, latents, seen=seen: seen.append(time)
        )
        case.assert_close(result, expected, key)
        case.assert_close(times, case.tensor(f"out.sigmas.{key}"), f"sigmas {key}")
        for name in ("timesteps", "model_t"):
            case.assert_close(torch.tensor(seen) * 1000, case.tensor(f"out.{name}.{key}"), f"{name} {key}")


def run_diffusers_crosscheck(case: Case) -> None:
    """The default grid gives the official numbers; diffusers' own sigmas and timesteps give diffusers' numbers."""
    recorded, noise, mixture = case.tensors("out."), case.tensor("in.z"), GaussianMixture(case)
    sampler, cond = SAMPLERS["flow_dpm-solver"], case.tensor("in.cond")
    shift = float(setting(case, "flow_shift", r"flow_shift=(\d+(?:\.\d+)?)", 3.0))
    for key in [key for key in recorded if key.startswith("official.n")]:
        steps = int(key.removeprefix("official.n"))
        options = {"steps": steps, "order": 2, "cfg_scale": 1.0, "flow_shift": shift}
        case.assert_close(sample_mixture(case, options, "noise")[0], recorded[key], key)
        sigmas, timesteps = recorded[f"diffusers_sigmas.n{steps}"], recorded[f"diffusers_timesteps.n{steps}"]
        seen = dict(zip(sigmas.tolist(), timesteps.tolist()))

        def velocity(latents: Tensor, sigma: Tensor, seen=seen) -> Tensor:
            return mixture(latents, torch.tensor(float(seen[float(sigma)])), cond)

        case.assert_close(
            sampler.sample(velocity, noise, sigmas), recorded[f"diffusers.n{steps}"], f"diffusers {steps}"
        )


def run_vp(case: Case) -> None:
    recorded, noise, sampler = case.tensors("out."), case.tensor("in.z"), SAMPLERS["dpm-solver"]
    schedule, denoiser = VPSchedule(), with_captions(TinyNoiseModel(), case)
    if "ns.t" in recorded:
        times = recorded["ns.t"]
        case.assert_close(schedule.alpha(times), recorded["ns.alpha"], "alpha")
        case.assert_close(schedule.log_snr(times), recorded["ns.lambda"], "lambda")
        case.assert_close(schedule.inverse_log_snr(recorded["ns.lambda"]), recorded["ns.inv"], "inverse of lambda")
    cfg_scale = float(case.call.get("cfg_scale", 4.5))
    for key in [key for key in recorded if key.startswith("vp.")]:
        method, order = re.fullmatch(r"vp\.(\w+)\.order(\d)", key).groups()
        options: dict[str, Any] = {"order": int(order), "method": method}
        scale, skip_type, steps = cfg_scale, "time_uniform", 1
        if method == "adaptive":
            scale = float(setting(case, "adaptive_cfg_scale", r"adaptive[^;]*cfg (\d+(?:\.\d+)?)", 1.0))
        elif method == "singlestep":
            steps = int(setting(case, "singlestep_steps", r"singlestep uses steps=(\d+)", 10))
            skip_type = setting(case, "singlestep_skip_type", r"singlestep uses[^;]*skip_type='(\w+)'", "logSNR")
        else:
            steps, options["method"] = int(method.removeprefix("n")), "multistep"
        model = guide(denoiser, Guidance(guidance_scale=scale, interval=VP_INTERVAL))
        times = sampler.times(steps, skip_type=skip_type, method=options["method"], order=options["order"])
        case.assert_close(sampler.sample(model, noise, times, **options), recorded[key], key)


def run_sa(case: Case) -> None:
    sampler = SAMPLERS["sa-solver"]
    scale = float(setting(case, "cfg_scale", r"cfg (\d+(?:\.\d+)?)", 4.5))
    steps = int(setting(case, "steps", r"S=(\d+)", 25))
    seed = int(setting(case, "seed", r"manual_seed\((\d+)\)", 3005))
    model = guide(with_captions(TinyNoiseModel(), case), Guidance(guidance_scale=scale))
    for key, expected in case.tensors("out.").items():
        generator = torch.Generator().manual_seed(seed)
        eta = float(key.removeprefix("eta"))
        times = sampler.times(steps)
        result = sampler.sample(model, case.tensor("in.z"), times, eta=eta, generator=generator)
        case.assert_close(result, expected, key)


def run_scm(case: Case) -> None:
    seed = int(setting(case, "seed", r"manual_seed\((\d+)\)", 3009))
    sigma_data = float(setting(case, "sigma_data", r"lat=z\*(\d+(?:\.\d+)?)", 0.5))
    recorded = case.tensors("out.")
    for key, expected in recorded.items():
        match = re.fullmatch(r"(scm|trigflow)\.(\w+)\.n(\d+)", key)
        if not match:
            continue
        name, variant, steps = match.groups()
        times = SAMPLERS[name].times(int(steps), **case.call["variants"][variant])
        prefix = "timesteps" if name == "scm" else "trigflow_timesteps"
        case.assert_close(times, recorded[f"{prefix}.{variant}.n{steps}"], f"times of {key}")
        generator = torch.Generator().manual_seed(seed)
        result = SAMPLERS[name].sample(
            trigflow_model, case.tensor("in.z"), times, sigma_data=sigma_data, generator=generator
        )
        case.assert_close(result, expected, key)


def run_guidance_type_select(case: Case) -> None:
    for run in case.call["runs"]:
        chosen = select_guidance_kind(run["default"], run["pag_scale"], run["attn_type"])
        assert chosen == run["result"], f"{run}: {chosen}"


RUNNERS = {
    "timestep_grid": run_timestep_grid,
    "solver_flow_dpm": run_flow_dpm,
    "solver_flow_other": run_flow_other,
    "solver_flow_euler": run_flow_euler,
    "solver_diffusers_crosscheck": run_diffusers_crosscheck,
    "solver_vp": run_vp,
    "solver_sa": run_sa,
    "solver_scm": run_scm,
    "guidance": run_guidance,
    "solver_sana": run_solver_sana,
    "solver_scm_sana": run_solver_scm_sana,
}
FUNCTIONS = {"data/guidance_type_select": run_guidance_type_select}
