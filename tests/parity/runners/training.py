"""Runs the recorded cases of training: losses, a whole step, densities of timesteps, the shift formula."""

import re

import torch

from sana.diffusion.flow import add_noise, flow_training_loss, shift_sigma, training_sigmas, training_timesteps
from sana.diffusion.timestep_sampling import sample_density, sample_timesteps
from sana.diffusion.vp_loss import VPProcess
from sana.models.transformer.sana import SanaMS
from tests.parity.common import Case
from tests.parity.runners.diffusion_models import setting

DENSITY_OPTIONS = ("logit_mean", "logit_std", "mode_scale", "sigma_data")


def run_training_loss(case: Case) -> None:
    if "flow_shift" in case.constructor:
        run_flow_loss(case)
    else:
        run_vp_loss(case)


def run_flow_loss(case: Case) -> None:
    shift, recorded = case.constructor["flow_shift"], case.tensors("in.")
    index, latents, noise = recorded["t_index"], recorded["x0"], recorded["noise"]
    sigmas = training_sigmas(shift)
    case.assert_close(sigmas, case.tensor("out.sigmas_table"), "sigmas")
    case.assert_close(sigmas * 1000, case.tensor("out.timestep_map"), "timesteps before truncation")
    assert torch.equal(training_timesteps(sigmas[index]), case.tensor("out.model_timestep"))
    prediction, seen = recorded["model_out"].clone().requires_grad_(), []

    def model(noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        seen.extend([noisy, timestep])
        return prediction

    loss = flow_training_loss(model, latents, noise, index, shift)
    case.assert_close(seen[0], case.tensor("out.x_t"), "noisy latents")
    case.assert_close(add_noise(latents, noise, sigmas[index]), seen[0], "noisy latents again")
    assert torch.equal(seen[1], case.tensor("out.model_timestep"))
    case.assert_close(loss, case.tensor("out.loss_per_sample"), "loss")
    case.assert_close(loss.mean(), case.tensor("out.loss_mean"), "mean loss")
    loss.mean().backward()
    case.assert_close(prediction.grad, case.tensor("grad.model_out"), "gradient")


def run_vp_loss(case: Case) -> None:
    recorded, process = case.tensors("in."), VPProcess()
    prediction = recorded["model_out"].clone().requires_grad_()
    snr_loss = bool(case.constructor.get("snr", case.call.get("snr", False)))
    result = process.loss(prediction, recorded["x0"], recorded["noise"], recorded["t_index"], snr_loss=snr_loss)
    case.assert_close(result.mse, case.tensor("out.mse"), "mse")
    case.assert_close(result.bound, case.tensor("out.vb"), "bound")
    case.assert_close(result.loss, case.tensor("out.loss"), "loss")
    result.loss.mean().backward()
    case.assert_close(prediction.grad, case.tensor("grad.model_out"), "gradient")


def run_training_step(case: Case) -> None:
    arguments = {key: value for key, value in case.constructor.items() if key != "class"}
    network = SanaMS(**arguments).train()
    network.load_state_dict(case.weights(), strict=True)
    recorded, call = case.tensors("in."), case.call
    loss = flow_training_loss(
        network, recorded["x0"], recorded["noise"], recorded["t_index"], call["flow_shift"],
        y=recorded["y"], mask=recorded["mask"][:, None, None],
    )  # fmt: skip
    case.assert_close(loss, case.tensor("out.loss_per_sample"), "loss")
    loss.mean().backward()
    parameters = dict(network.named_parameters())
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), call["gradient_clip"])
    case.assert_close(norm, case.tensor("out.grad_norm_before_clip"), "gradient norm")
    gradients = case.tensors("gradw_clipped.")
    assert gradients.keys() == {name for name, parameter in parameters.items() if parameter.grad is not None}
    for name, expected in gradients.items():
        case.assert_close(parameters[name].grad, expected, f"gradient of {name}")


def run_timestep_sampling(case: Case) -> None:
    """Draws of single densities, or the order of draws of the training loop."""
    recorded = case.tensors("out.")
    if not case.call.get("runs"):
        seed = int(setting(case, "seed", r"manual_seed\((\d+)\)", 0))
        mean = float(setting(case, "logit_mean", r"mean (-?\d+(?:\.\d+)?)", 0.0))
        std = float(setting(case, "logit_std", r"std (\d+(?:\.\d+)?)", 1.0))
        for name, expected in recorded.items():
            generator = torch.Generator().manual_seed(seed)
            scheme = "uniform" if name == "randint" else name
            drawn = sample_timesteps(scheme, len(expected), generator=generator, logit_mean=mean, logit_std=std)
            assert torch.equal(drawn, expected), f"{case.name} {name}"
        return
    for run in case.call["runs"]:
        key, options = run["key"], {name: run[name] for name in DENSITY_OPTIONS if name in run}
        expected = recorded[f"u64.{key}"]
        torch.manual_seed(run["seed_u64"])
        drawn = sample_density(run["scheme"], len(expected), **options)
        case.assert_close(drawn, expected, key)
        assert torch.equal((drawn * 1000).long(), recorded[f"t_index.{key}"]), f"{case.name} {key}: index"
        torch.manual_seed(run["seed_1e6"])
        many = sample_density(run["scheme"], 1_000_000, **options).double()
        case.assert_close(many.mean(), run["mean"], f"{key} mean")
        case.assert_close(many.std(), run["std"], f"{key} standard deviation")
        case.assert_close(torch.quantile(many, case.tensor("q")), recorded[f"quantiles.{key}"], f"{key} quantiles")


def run_shift_formula(case: Case) -> None:
    stride = int(case.call.get("stride", 1))
    for name, expected in case.tensors("out.").items():
        shift = float(re.fullmatch(r"shift(\d+(?:\.\d+)?)", name)[1])
        case.assert_close(training_sigmas(shift)[::stride], expected, name)
        unshifted = torch.arange(1000, dtype=torch.float64)[::stride] * 0.999 / 999
        case.assert_close(shift_sigma(unshifted, shift), expected, f"{name} by the formula")


RUNNERS = {
    "training_loss": run_training_loss,
    "training_step": run_training_step,
    "timestep_sampling": run_timestep_sampling,
}
FUNCTIONS = {"train/shift_formula": run_shift_formula}
