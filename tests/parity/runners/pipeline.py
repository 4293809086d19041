"""Runs the recorded pictures: kinds e2e (prompt to picture with guidance) and e2e_sprint (distilled models)."""

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sana.config import config_from_dict
from sana.models import transformer_arguments
from sana.models.autoencoder.dc_ae import DCAE
from sana.models.autoencoder.dc_ae_keys import config_from_diffusers, from_diffusers_state_dict
from sana.models.text_encoder import load_text_encoder
from sana.models.transformer.sana import SanaMS
from sana.models.transformer.sana_cm import SanaMSCM
from sana.pipelines.sana_pipeline import SanaPipeline
from sana.pipelines.sprint import SanaSprintPipeline
from tests.parity.common import DEFAULT_FOLDER, Case

PIPELINE_ARGUMENTS = (
    "prompt",
    "negative_prompt",
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "pag_guidance_scale",
    "num_images_per_prompt",
    "use_resolution_binning",
)
SPRINT_TIMES = ("max_timesteps", "intermediate_timesteps", "timesteps")


def load_part(case: Case, prefix: str, file: str | None = None) -> dict[str, Tensor]:
    """The tensors of one network in the case's weight file (or another), named without their prefix."""
    stored = case.load(file or case.raw["weights_file"])
    return {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}


def build_pipeline(case: Case, pipeline_class: type[SanaPipeline] = SanaPipeline) -> SanaPipeline:
    """The case's pipeline: transformer, autoencoder and text encoder with the recorded weights."""
    recorded = case.load(case.constructor["config_file"])
    config = config_from_dict(recorded["official_yaml_as_json"])
    if "pag_applied_layers" in case.constructor:
        config.model.pag_applied_layers = list(case.constructor["pag_applied_layers"])
    pipeline = pipeline_class(config, device="cpu", dtype="fp32")

    transformer_class = SanaMSCM if config.model.model.startswith("SanaMSCM") else SanaMS
    weights = load_part(case, "dit.")
    logvar = "logvar_linear.weight" in weights  # the recorded pipeline left the head out, whatever its config says
    arguments = {**transformer_arguments(config), "logvar": logvar, **recorded["sana_ms"]}
    transformer = transformer_class(**arguments)
    transformer.load_state_dict(weights)
    pipeline.transformer = transformer.eval().requires_grad_(False)

    shape = config_from_diffusers(recorded["vae_config"])
    autoencoder = DCAE(shape)
    elsewhere = recorded.get("vae_weights", "").split()[:1]  # "e2e/weights (vae.* keys)"
    vae_weights = load_part(case, "vae.", f"{elsewhere[0]}.safetensors" if elsewhere else None)
    autoencoder.load_state_dict(from_diffusers_state_dict(vae_weights, shape))
    pipeline.autoencoder = autoencoder.requires_grad_(False)

    text = case.path("text") if case.path("text/tiny_gemma2").is_dir() else DEFAULT_FOLDER / "text"
    pipeline.text_encoder = load_text_encoder(
        text / "tiny_gemma2",
        tokenizer_path=text / "tiny_tokenizer",
        dtype=torch.float32,
        model_max_length=config.text_encoder.model_max_length,
        chi_prompt=config.text_encoder.chi_prompt,
    )
    return pipeline


def watch_times(pipeline: SanaPipeline) -> list[float]:
    """Returns a list that fills with what the time embedder sees: all times at once where they are prepared, else one
    entry a call of the transformer."""
    seen: list[float | None] = []

    def before_call(module: Any, args: tuple[Any, ...]) -> None:
        if isinstance(args[1], Tensor):
            seen.append(None)

    def before_embedder(module: Any, args: tuple[Tensor, ...]) -> None:
        if seen and seen[-1] is None:
            seen[-1] = float(args[0].flatten()[0])
        else:
            seen.extend(args[0].tolist())

    assert pipeline.transformer is not None
    pipeline.transformer.register_forward_pre_hook(before_call)
    pipeline.transformer.t_embedder.register_forward_pre_hook(before_embedder)
    return seen  # type: ignore[return-value]


def run_pipeline(case: Case, pipeline: SanaPipeline, arguments: dict[str, Any]) -> None:
    """Makes latents and picture, and compares whatever the case recorded."""
    expected = case.tensors("out.")
    times = watch_times(pipeline)
    arguments = {"latents": case.tensors("in.")["latents"], "progress_bar": False, **arguments}
    latents = pipeline(**arguments, output_type="latent")
    case.assert_close(latents, expected["latent"], "latent")
    if "t_embedder_input" in expected:
        case.assert_close(torch.tensor(times), expected["t_embedder_input"], "timesteps")
    if "image_full_avgpool16" in expected:
        full = pipeline.decode(latents)
        case.assert_close(F.avg_pool2d(full, 16), expected["image_full_avgpool16"], "whole picture, reduced 16 times")
    if pipeline_draws_noise(pipeline):
        arguments["generator"] = recorded_generator(case)
    case.assert_close(pipeline(**arguments), expected["image"], "image")


def pipeline_draws_noise(pipeline: SanaPipeline) -> bool:
    return isinstance(pipeline, SanaSprintPipeline)


def recorded_generator(case: Case) -> torch.Generator:
    """The generator that the case's `made_by` names; steps of Sprint draw noise from it."""
    seed = re.search(r"manual_seed\((\d+)\)", case.raw["made_by"])
    assert seed is not None, f"{case.name}: made_by names no seed"
    return torch.Generator().manual_seed(int(seed[1]))


def run_e2e(case: Case) -> None:
    pipeline = build_pipeline(case)
    sampler = re.search(r"vis_sampler\s*=\s*'([^']+)'", case.raw["made_by"])  # only named there
    arguments = {name: case.call[name] for name in PIPELINE_ARGUMENTS if name in case.call}
    if "binned_hw" in case.call:
        factor = pipeline.autoencoder.downsample_factor
        assert [side * factor for side in case.tensors("out.")["latent"].shape[-2:]] == case.call["binned_hw"]
    run_pipeline(case, pipeline, {**arguments, "sampler": sampler[1] if sampler else None})


def run_e2e_sprint(case: Case) -> None:
    pipeline = build_pipeline(case, SanaSprintPipeline)
    arguments = {name: case.call[name] for name in PIPELINE_ARGUMENTS if name in case.call}
    arguments.setdefault("use_resolution_binning", False)
    times = {name: case.constructor[name] for name in SPRINT_TIMES if name in case.constructor}
    run_pipeline(case, pipeline, {**arguments, **times, "generator": recorded_generator(case)})


RUNNERS = {"e2e": run_e2e, "e2e_sprint": run_e2e_sprint}
FUNCTIONS: dict = {}
