"""Runs the recorded cases of the Linear DiT: whole networks, their modules, PAG, and the comparison with diffusers."""

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sana.models.transformer.attention import set_fp32_attention
from sana.models.transformer.controlnet import SanaMSControlNet
from sana.models.transformer.sana import Sana, SanaMS
from sana.models.transformer.sana_cm import SanaMSCM
from tests.parity.common import Case
from tests.parity.runners.dit_diffusers import run_diffusers_crosscheck
from tests.parity.runners.dit_modules import (
    run_module,
    run_pag_processor,
    run_sincos,
    run_timestep_frequencies,
)

NETWORKS = {"Sana": Sana, "SanaMS": SanaMS, "SanaMSCM": SanaMSCM, "SanaMSControlNet": SanaMSControlNet}
SEED_IN_TEXT = re.compile(r"manual_seed\((\d+)\)")  # how a case names the seed of its caption dropout


def load_network(case: Case, constructor: dict, **changes) -> Sana:
    """Returns the network of a case with its recorded weights, in float32."""
    arguments = {**constructor, **changes}
    model = NETWORKS[arguments.pop("class", "SanaMS")](**arguments)
    model.load_state_dict(case.weights(), strict=True)
    return model


def prepare(case: Case, model: Sana) -> None:
    """Applies the call's switches to a network."""
    call = case.call
    model.train(not call.get("eval", True))
    set_fp32_attention(model, bool(call.get("fp32_attention")))
    model.gradient_checkpointing = bool(call.get("grad_checkpoint"))
    if model.training:
        torch.manual_seed(int(SEED_IN_TEXT.search(case.raw["made_by"]).group(1)))


def forward_arguments(case: Case) -> dict:
    """Returns the recorded inputs as arguments of the network's forward."""
    inputs = case.tensors("in.")
    arguments = {name: inputs[name] for name in ("x", "timestep", "y")}
    if "mask" in inputs and case.call.get("mask") != "none":
        mask = inputs["mask"]
        arguments["mask"] = mask[:, None, None] if case.call.get("mask") == "[B,1,1,L]" else mask
    info = {name: inputs[name] for name in ("cfg_scale", "control_signal") if name in inputs}
    if info:
        arguments["data_info"] = info
    if case.call.get("return_logvar"):
        arguments["return_logvar"] = True
    return arguments


def check_output(case: Case, out: Tensor | tuple[Tensor, Tensor], expected: Tensor, what: str) -> None:
    if isinstance(out, tuple):
        out, logvar = out
        case.assert_close(logvar, case.tensor("out.logvar"), f"{what} logvar")
    case.assert_close(out, expected, what)


def run_dit_forward(case: Case, **changes) -> None:
    model = load_network(case, case.constructor, **changes)
    prepare(case, model)
    arguments = forward_arguments(case)
    recorded = record_outputs(model, [name for name in case.tensors("mid.") if name != "pos_embed_ms"])
    with torch.no_grad():
        check_output(case, model(**arguments, batch_invariant=False), case.tensor("out"), "whole batch")
        check_modules(case, model, recorded, arguments)
        if not model.training:
            check_output(case, model(**arguments, batch_invariant=True), case.tensor("out"), "row by row")


def record_outputs(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Returns a dict that the next forward fills with the named modules' first outputs."""
    recorded: dict[str, Tensor] = {}

    def record(name: str, output: Tensor) -> None:
        recorded.setdefault(name, output)

    for name in names:
        model.get_submodule(name).register_forward_hook(lambda _, inputs, output, name=name: record(name, output))
    return recorded


def check_modules(case: Case, model: Sana, recorded: dict[str, Tensor], arguments: dict) -> None:
    """Compares intermediate outputs. Text tokens that no row reads are not computed, so they are left out."""
    for name, expected in case.tensors("mid.").items():
        if name == "pos_embed_ms":
            case.assert_close(model.position_embedding(model._grid(arguments["x"])), expected, name)
            continue
        if name in ("y_embedder", "attention_y_norm") and "mask" in arguments:
            expected = expected[:, :, arguments["mask"].flatten(1).bool().any(dim=0)]
        case.assert_close(recorded[name], expected, name)


def run_dit_forward_grad(case: Case) -> None:
    training = not case.call.get("eval", True)
    for checkpointing in (False, True):
        model = load_network(case, case.constructor)
        prepare(case, model)
        model.gradient_checkpointing |= checkpointing
        options = {"batch_invariant": not training and not checkpointing}
        arguments = forward_arguments(case)
        leaves = {}
        for name in case.tensors("grad."):
            holder = arguments if name in arguments else arguments["data_info"]
            leaves[name] = holder[name] = holder[name].clone().requires_grad_()
        out = model(**arguments, **options)
        check_output(case, out, case.tensor("out"), str(options))
        out = out[0] if isinstance(out, tuple) else out
        (out * case.tensor("grad_out")).sum().backward()
        for name, expected in case.tensors("grad.").items():
            case.assert_close(leaves[name].grad, expected, f"gradient of {name}, {options}")
        parameters = dict(model.named_parameters())
        for name, expected in case.tensors("gradw.").items():
            case.assert_close(parameters[name].grad, expected, f"gradient of {name}, {options}")


def run_dit_forward_nov24(case: Case) -> None:
    run_dit_forward(case, truncate_timestep=False)


RUNNERS: dict[str, Callable[[Case], None]] = {
    "dit_forward": run_dit_forward,
    "dit_forward_grad": run_dit_forward_grad,
    "dit_forward_nov24": run_dit_forward_nov24,
    "module": run_module,
    "pag_processor": run_pag_processor,
    "diffusers_crosscheck": run_diffusers_crosscheck,
}
FUNCTIONS: dict[str, Callable[[Case], None]] = {
    "modules/timestep_embedding_freq": run_timestep_frequencies,
    "modules/sincos_pe": run_sincos,
}
