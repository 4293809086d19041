"""Runs the recorded cases of the autoencoder: kinds dcae, dcae_tiled, dcae_grad and vae."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import yaml
from torch import Tensor

from sana.models.autoencoder.dc_ae import DCAE, DCAEConfig
from sana.models.autoencoder.dc_ae_keys import (
    config_from_diffusers,
    from_diffusers_state_dict,
    to_diffusers_state_dict,
)
from tests.parity.common import Case

SHORTCUTS = {"averaging": True, "duplicating": True, None: False}


def config_from_dotlist(text: str) -> DCAEConfig:
    """The shape that efficientvit's `a.b=value c=[x,y]` text describes."""
    values: dict[str, Any] = {}
    for item in text.split():
        dotted, _, raw = item.partition("=")
        value = yaml.safe_load(raw)
        value = tuple(value) if isinstance(value, list) else value
        key = dotted.replace("encoder.downsample", "downsample").replace("decoder.upsample", "upsample")
        key = key.replace(".", "_")
        values[key] = SHORTCUTS[value] if key.endswith(("out_shortcut", "in_shortcut")) else value
    return DCAEConfig(**values)


def config_of(constructor: dict[str, Any]) -> DCAEConfig:
    """The shape a case names; when it names both forms they must agree."""
    configs = []
    if "efficientvit_cfg_dotlist" in constructor:
        configs.append(config_from_dotlist(constructor["efficientvit_cfg_dotlist"]))
    if "diffusers_config" in constructor:
        configs.append(config_from_diffusers(constructor["diffusers_config"]))
    first, *others = configs
    assert all(dataclasses.replace(other, scaling_factor=first.scaling_factor) == first for other in others)
    return first


def build(case: Case) -> DCAE:
    """The case's autoencoder in eval mode with its recorded weights."""
    source = case if "weights_from" not in case.constructor else case.other(case.constructor["weights_from"])
    own = {"efficientvit_cfg_dotlist", "diffusers_config"} & set(case.constructor)
    model = DCAE(config_of(case.constructor if own else source.constructor))
    model.load_state_dict(case.weights())
    return model.eval()


@torch.no_grad()
def run_dcae(case: Case) -> None:
    model = build(case)
    inputs, outputs = case.tensors("in."), case.tensors("out.")
    results: dict[str, Tensor] = {}
    for name, value in inputs.items():
        kind, _, size = name.partition(".")
        if kind == "x":
            results[f"z.{size}"] = model.encoder(value)
            results[f"recon.{size}"] = model.decoder(results[f"z.{size}"])
        else:
            results[f"dec.{size}"] = model.decoder(value)
    for name, expected in outputs.items():
        case.assert_close(results[name.replace("diffusers_", "")], expected, name)
    check_keymap(case, model)


def check_keymap(case: Case, model: DCAE) -> None:
    """Every recorded diffusers key comes from the recorded original tensor, and the way back is exact."""
    state = model.state_dict()
    converted = to_diffusers_state_dict(state)
    for key, entry in case.raw.get("keymap_to_diffusers", {}).items():
        source = state[entry["from"]]
        what = entry["slice"] or ""
        if what.startswith("chunk"):
            part, parts = int(what.split()[1]), int(what.split()[3])
            source = source.chunk(parts)[part]
        if "squeeze" in what:
            source = source[:, :, 0, 0]
        assert torch.equal(converted.pop(key), source), key
    assert not converted or "keymap_to_diffusers" not in case.raw, f"extra diffusers keys: {sorted(converted)}"
    back = from_diffusers_state_dict(to_diffusers_state_dict(state), model.config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


@torch.no_grad()
def run_dcae_tiled(case: Case) -> None:
    """Asserts the untiled tensors; the others are another program's blended tiles."""
    model = build(case)
    inputs, outputs = case.tensors("in."), case.tensors("out.")
    case.assert_close(model.encoder(inputs["x"]), outputs["z_full"], "z_full")
    case.assert_close(model.decoder(inputs["z"]), outputs["dec_full"], "dec_full")


def run_dcae_grad(case: Case) -> None:
    model = build(case)
    images = case.tensors("in.")["x"].requires_grad_()
    output = model.decoder(model.encoder(images))
    case.assert_close(output, case.tensor("out"), "out")
    (output * case.tensor("grad_out")).sum().backward()
    case.assert_close(images.grad, case.tensor("grad.x"), "grad.x")
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    magnitudes = case.tensors("gradw_abs.")
    for name, expected in magnitudes.items():
        case.assert_close(gradients[name].double().abs().sum(), expected, f"gradw_abs.{name}")
    for name, expected in case.tensors("gradw_sum.").items():
        # a sum of cancelling terms is only as exact as the terms: judge it by their magnitude
        error = float((gradients[name].double().sum() - expected).abs())
        limit = case.tolerance["atol"] + case.tolerance["rtol"] * float(magnitudes.get(name, expected).abs())
        assert error <= limit, f"{case.name} gradw_sum.{name}: error {error:.3e} exceeds {limit:.3e}"


@torch.no_grad()
def run_vae(case: Case) -> None:
    config = config_from_diffusers(case.load(case.constructor["config_file"])["vae_config"])
    stored = case.load(case.raw["weights_file"])
    state = {name.removeprefix("vae."): tensor for name, tensor in stored.items() if name.startswith("vae.")}
    model = DCAE(config)
    model.load_state_dict(from_diffusers_state_dict(state, config))
    model.eval()
    assert model.scaling_factor == case.call.get("scaling_factor", model.scaling_factor)
    outputs = case.tensors("out.")
    latents = model.encode(case.tensors("in.")["x"])
    case.assert_close(latents, outputs["z_scaled"], "z_scaled")
    case.assert_close(model.decode(latents), outputs["recon"], "recon")


RUNNERS: dict[str, Callable[[Case], None]] = {
    "dcae": run_dcae,
    "dcae_tiled": run_dcae_tiled,
    "dcae_grad": run_dcae_grad,
    "vae": run_vae,
}
