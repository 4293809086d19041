"""Runs the recorded cases of optimisers, their parameter groups and learning-rate schedules."""

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from sana.models.transformer.sana import SanaMS
from sana.training.lr_scheduler import build_lr_scheduler
from sana.training.optimizer import OPTIMIZERS, auto_scale_lr, build_optimizer, parameter_groups
from tests.parity.common import Case, load_cases

BY_DESCRIPTION = {  # how `made_by` names an optimiser
    "CAME8BitWrapper": "CAME8BitWrapper",
    "CAMEWrapper": "CAMEWrapper",
    "came-pytorch": "CAME",
    "Lion": "Lion",
    "AdamW": "AdamW",
}
STATE_NAMES = {"RMS"}  # recorded for the log only; no optimiser reads it


def optimizer_type(case: Case) -> str:
    """The configured name of a case's optimiser: given, or the first that its description names."""
    given = case.constructor.get("type") or case.constructor.get("class")
    if given:
        return given
    text = case.raw["made_by"]
    places = {text.find(word): name for word, name in BY_DESCRIPTION.items() if word in text}
    return places[min(places)]


def optimizer_options(case: Case) -> dict[str, Any]:
    """`train.optimizer` of a case; options that only the description states are read from there."""
    options = {key: value for key, value in case.constructor.items() if key != "class"}
    options["type"] = optimizer_type(case)
    if options["type"] == "CAME8BitWrapper":
        for key, value in re.findall(r"(block_size|min_8bit_size)=(\d+)", case.raw["made_by"]):
            options.setdefault(key, int(value))
    return options


def generated(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor], torch.Generator]:
    """Start values, targets and the generator of the noise, where a case gives seeds and shapes in place of tensors."""
    text = case.raw["made_by"]
    shapes = {
        name: tuple(int(size) for size in sizes.split(","))
        for name, sizes in re.findall(r"(\w+)\((\d+(?:,\d+)*)\)", text.split("shapes", 1)[1])
        if name in case.call["state_keys"]
    }
    patterns = (r"manual_seed\((\d+)\)", r"targets seed (\d+)", r"noise seed (\d+)")
    start, target, noise = (torch.Generator().manual_seed(int(re.search(pattern, text)[1])) for pattern in patterns)
    # before its own start values such a case drew those of the cases that hold whole tensors
    siblings = (other for other in load_cases(case.folder) if other.kind == case.kind)
    for shape in next((small_shapes(other) for other in siblings if other.tensors("in.noise.")), []):
        torch.randn(shape, generator=start)
    values, targets = (
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for generator in (start, target)
    )
    return values, targets, noise


def small_shapes(case: Case) -> list[torch.Size]:
    """The shapes of a case's parameters in the order in which they were drawn."""
    stored = case.tensors("in.p.")
    return [stored[name].shape for name in case.call["state_keys"]]


def run_optimizer(case: Case) -> None:
    values, targets = case.tensors("in.p."), case.tensors("in.target.")
    recorded_noise, noise_generator = case.tensors("in.noise."), None
    if not recorded_noise:
        values, targets, noise_generator = generated(case)
        check_summaries(case, "in.p", values)
        check_summaries(case, "in.target", targets)
    parameters = {name: nn.Parameter(value.clone()) for name, value in values.items()}
    optimizer = build_optimizer(parameters.items(), optimizer_options(case))
    trajectory = case.tensors("traj.")
    for step in range(case.call["steps"]):
        for name, parameter in parameters.items():
            if noise_generator is None:
                noise = recorded_noise[name][step]
            else:
                noise = torch.randn(parameter.shape, generator=noise_generator)
            parameter.grad = 2 * (parameter.detach() - targets[name]) + 0.5 * noise
        optimizer.step()
        for name, parameter in parameters.items():
            if name in trajectory:
                case.assert_close(parameter.detach(), trajectory[name][step], f"{name} after step {step}")
        check_summaries(case, "traj", {f"{name}.{step}": parameter.detach() for name, parameter in parameters.items()})
    check_state(case, optimizer, parameters)


def check_summaries(case: Case, prefix: str, values: dict[str, Tensor]) -> None:
    """Compares tensors with what was recorded of them: whole, the first 64 values, or sums in float64."""
    recorded = case.tensors(f"{prefix}.")
    for name, value in values.items():
        if name in recorded:
            case.assert_close(value, recorded[name], f"{prefix}.{name}")
        if f"{name}.head64" in recorded:
            case.assert_close(value.flatten()[:64], recorded[f"{name}.head64"], f"{prefix}.{name}")
            total = value.double().abs().sum()
            case.assert_close(total, recorded[f"{name}.abs_sum"], f"{prefix}.{name}.abs_sum")
            # the terms of the plain sum cancel: it is as exact as their magnitude
            error = float((value.double().sum() - recorded[f"{name}.sum"]).abs())
            limit = case.tolerance["atol"] * value.numel() + case.tolerance["rtol"] * float(total)
            assert error <= limit, f"{case.name} {prefix}.{name}.sum is {error:.2e} off"


def check_state(case: Case, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> None:
    """Compares the recorded tensors of the state, and asks for every recorded entry except the log's."""
    recorded = case.tensors("state.")
    for name, keys in case.call.get("state_keys", {}).items():
        state = optimizer.state[parameters[name]]
        missing = set(keys) - STATE_NAMES - set(state)
        assert not missing, f"{case.name} {name}: the state has no {missing}"
        for key in keys:
            expected = recorded.get(f"{name}.{key}")
            if expected is not None and state[key].dtype != torch.uint8:
                case.assert_close(state[key], expected, f"state of {name}.{key}")


def network_of(case: Case) -> SanaMS:
    """The network of a case: given, or the one whose parts the recorded names show."""
    if case.constructor:
        return SanaMS(**{key: value for key, value in case.constructor.items() if key != "class"})
    names = case.call["group_order"]
    return SanaMS(
        input_size=8, patch_size=1, in_channels=4, hidden_size=32, num_heads=4, caption_channels=24,
        model_max_length=10, attn_type="linear", ffn_type="glumbconv", linear_head_dim=8,
        depth=len({match[1] for name in names if (match := re.match(r"blocks\.(\d+)\.", name))}),
        y_norm="attention_y_norm.weight" in names, qk_norm="blocks.0.attn.q_norm.weight" in names,
        cross_norm="blocks.0.cross_attn.q_norm.weight" in names,
    )  # fmt: skip


def run_optimizer_groups(case: Case) -> None:
    for run in case.call["auto_scale_lr"]:
        ratio, options = auto_scale_lr(run["effective_bs"], {"lr": run["lr_in"]}, run["rule"], run["base_batch_size"])
        assert math.isclose(ratio, run["ratio"], rel_tol=1e-15), f"{run}: ratio {ratio}"
        assert math.isclose(options["lr"], run["lr_out"], rel_tol=1e-15), f"{run}: lr {options['lr']}"
    ((lr, decay),) = case.call["param_groups_distinct"]
    network = network_of(case)
    groups = parameter_groups(network.named_parameters(), lr, decay)
    assert [name for group in groups for name, _ in group["params"]] == case.call["group_order"]
    assert len(groups) == case.call["n_groups"]
    assert {(group["lr"], group["weight_decay"]) for group in groups} == {(lr, decay)}
    optimizer = build_optimizer(network.named_parameters(), {"type": "AdamW", "lr": lr, "weight_decay": decay})
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert all(ours is theirs for ours, theirs in zip(order, network.parameters(), strict=True))
    assert {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {(lr, decay)}


def run_lr_schedule(case: Case) -> None:
    for run in case.call["runs"]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=run["base_lr"])
        scheduler = build_lr_scheduler(
            optimizer,
            run["lr_schedule"],
            run["lr_schedule_args"],
            total_steps=run["num_epochs"] * run["dataloader_len"],
            lr_scale_ratio=run["lr_scale_ratio"],
        )
        used = []
        for _ in run["lr_at_step"]:
            used.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        case.assert_close(used, run["lr_at_step"], run["lr_schedule"])


assert set(BY_DESCRIPTION.values()) <= set(OPTIMIZERS)
RUNNERS = {
    "optimizer": run_optimizer,
    "optimizer_groups": run_optimizer_groups,
    "lr_schedule": run_lr_schedule,
}
FUNCTIONS = {}
