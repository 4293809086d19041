"""What diffusers' JSON files say, in official words: constructor arguments and configs both ways. Dicts only, no files.

diffusers' transformer knows one shape of Sana (linear attention, `glumbconv`, normed captions); whatever it cannot
express is an error here rather than a folder that computes something else.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sana.models.checkpoint import CheckpointError
from sana.models.diffusers_names import MODEL_TYPES, SCHEDULERS

DIFFUSERS_VERSION = "0.33.0"  # the release whose layout is written; later ones read it
# What diffusers' network always does: official argument, value.
FIXED = (
    ("attn_type", "linear"),
    ("ffn_type", "glumbconv"),
    ("y_norm", True),
    ("mlp_acts", ["silu", "silu", None]),
)
SIGMA_DATA = 0.5  # standard deviation of a Sprint model's data, as released
_SPRINT_FACTOR = 1000.0  # timestep_norm_scale_factor of a Sprint model, whose network sees times in [0, 1]
_SAMPLE_SIZE_PIXELS = 32  # image pixels for one latent pixel; official models all have it

# Official sizes: (depth, hidden_size, num_heads)
_SIZES = {
    "600M_P1_D28": (28, 1152, 16),
    "1600M_P1_D20": (20, 2240, 20),
    "3200M_P1_D40": (40, 2240, 20),
    "4800M_P1_D60": (60, 2240, 20),
}
# image_size -> (use_pe, pe_interpolation) of the official configs
_POSITIONS = {512: (False, 1.0), 1024: (False, 1.0), 2048: (True, 1.0), 4096: (True, 2.0)}


def model_type_arch(model_type: str, image_size: int) -> dict[str, Any]:
    """The architecture that the official converter means by a model type and an image size.

    Args:
        model_type: one of `MODEL_TYPES`.
        image_size: 512, 1024, 2048 or 4096 pixels.

    Returns:
        {"class": ..., "kwargs": official constructor arguments, "preset": name in the registry}.

    Raises:
        ValueError: unknown model type or image size.
    """
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model_type {model_type!r} is unknown; allowed are {', '.join(MODEL_TYPES)}.")
    if image_size not in _POSITIONS:
        raise ValueError(f"image_size {image_size} is unknown; allowed are {', '.join(map(str, _POSITIONS))}.")
    family, _, size = model_type.partition("_")
    depth, hidden_size, num_heads = _SIZES[size]
    normed, sprint = family != "SanaMS", family == "SanaSprint"
    use_pe, pe_interpolation = _POSITIONS[image_size]
    kwargs = _base_kwargs() | {
        "input_size": image_size // _SAMPLE_SIZE_PIXELS,
        "patch_size": 1,
        "in_channels": 32,
        "hidden_size": hidden_size,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_ratio": 2.5,
        "caption_channels": 2304,
        "qk_norm": normed,
        "cross_norm": normed,
        "use_pe": use_pe,
        "pe_interpolation": pe_interpolation,
    }
    if sprint:
        kwargs |= _sprint_kwargs(0.1)
    name = "SanaMSCM" if sprint else "SanaMS"
    return {"class": name, "kwargs": kwargs, "preset": f"{name}_{size}"}


def transformer_config(kwargs: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The `config.json` of `SanaTransformer2DModel` for a model.

    Args:
        kwargs: official constructor arguments.
        state: official state dict; the shapes are checked against the arguments.

    Raises:
        CheckpointError: diffusers cannot express the model, or the weights are of another one.
    """
    for name, value in FIXED:
        given = kwargs.get(name)
        given = list(given) if isinstance(given, tuple) else given
        if given != value:
            raise CheckpointError(f"diffusers has no Sana transformer with {name}={given!r}; it always has {value!r}.")
    if bool(kwargs.get("qk_norm")) != bool(kwargs.get("cross_norm")):
        raise CheckpointError("diffusers has one switch for model.qk_norm and model.cross_norm: both on or both off.")
    if kwargs.get("use_pe") and kwargs.get("pos_embed_type", "sincos") != "sincos":
        raise CheckpointError(
            f"diffusers has no position embedding {kwargs['pos_embed_type']!r} for Sana, only sincos."
        )
    hidden, heads, head_dim = kwargs["hidden_size"], kwargs["num_heads"], kwargs["linear_head_dim"]
    channels = kwargs["in_channels"]
    guidance = bool(kwargs.get("cfg_embed"))
    factor = kwargs.get("timestep_norm_scale_factor", 1.0)
    if guidance and factor != _SPRINT_FACTOR:
        raise CheckpointError(
            "diffusers' Sprint pipeline gives times in [0, 1], which needs scheduler.timestep_norm_scale_factor "
            f"{_SPRINT_FACTOR:g}; this model has {factor:g}."
        )
    config = {
        "_class_name": "SanaTransformer2DModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "in_channels": channels,
        "out_channels": 2 * channels if kwargs.get("pred_sigma") else channels,
        "num_attention_heads": hidden // head_dim,
        "attention_head_dim": head_dim,
        "num_layers": kwargs["depth"],
        "num_cross_attention_heads": heads,
        "cross_attention_head_dim": hidden // heads,
        "cross_attention_dim": hidden,
        "caption_channels": kwargs["caption_channels"],
        "mlp_ratio": kwargs["mlp_ratio"],
        "dropout": 0.0,
        "attention_bias": False,
        "sample_size": kwargs["input_size"],
        "patch_size": kwargs["patch_size"],
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "interpolation_scale": kwargs.get("pe_interpolation", 1.0) if kwargs.get("use_pe") else None,
        "guidance_embeds": guidance,
        "guidance_embeds_scale": kwargs.get("cfg_embed_scale", 0.1) if guidance else 0.1,
        "qk_norm": "rms_norm_across_heads" if kwargs.get("qk_norm") else None,
        "timestep_scale": 1.0 if guidance else 1.0 / factor,  # Sprint's pipeline gives t in [0, 1] itself
    }
    _check_shapes(kwargs, state)
    return config


def arch_of_transformer(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Official class and constructor arguments of a diffusers `transformer/config.json`.

    Raises:
        CheckpointError: it is not the config of a Sana transformer.
    """
    if config.get("_class_name") not in ("SanaTransformer2DModel", None):
        raise CheckpointError(f"{source} is the config of {config['_class_name']}, not of SanaTransformer2DModel.")
    try:
        hidden = config["num_attention_heads"] * config["attention_head_dim"]
        guidance = bool(config.get("guidance_embeds", False))
        normed = config.get("qk_norm") is not None
        scale = config.get("interpolation_scale")
        kwargs = _base_kwargs() | {
            "input_size": config["sample_size"],
            "patch_size": config.get("patch_size", 1),
            "in_channels": config["in_channels"],
            "hidden_size": hidden,
            "depth": config["num_layers"],
            "num_heads": config["num_cross_attention_heads"],
            "mlp_ratio": config["mlp_ratio"],
            "caption_channels": config["caption_channels"],
            "qk_norm": normed,
            "cross_norm": normed,
            "linear_head_dim": config["attention_head_dim"],
            "use_pe": scale is not None,
            "pe_interpolation": 1.0 if scale is None else float(scale),
            "pred_sigma": config.get("out_channels") == 2 * config["in_channels"],
            "timestep_norm_scale_factor": float(round(1.0 / config.get("timestep_scale", 1.0), 6)),
        }
        if guidance:
            kwargs |= _sprint_kwargs(float(config.get("guidance_embeds_scale", 0.1)))
    except (KeyError, TypeError, ZeroDivisionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{source} is no config of a Sana transformer ({reason}).") from error
    return {"class": "SanaMSCM" if guidance else "SanaMS", "kwargs": kwargs}


def pipeline_class(arch: Mapping[str, Any]) -> str:
    """The name of diffusers' pipeline for an architecture."""
    return "SanaSprintPipeline" if arch["kwargs"].get("cfg_embed") else "SanaPipeline"


def scheduler_config(scheduler_type: str, flow_shift: float, sigma_data: float = SIGMA_DATA) -> dict[str, Any]:
    """The `scheduler/scheduler_config.json` for one of the official converter's scheduler types.

    Args:
        scheduler_type: "flow-dpm_solver", "flow-euler" or "scm".
        flow_shift: shift of the schedule; "scm" has none.
        sigma_data: standard deviation of the data; only "scm" has it.

    Raises:
        ValueError: unknown scheduler type.
    """
    if scheduler_type == "flow-dpm_solver":
        own = {
            "_class_name": "DPMSolverMultistepScheduler",
            "flow_shift": flow_shift,
            "use_flow_sigmas": True,
            "prediction_type": "flow_prediction",
            "algorithm_type": "dpmsolver++",
            "solver_order": 2,
            "solver_type": "midpoint",
            "lower_order_final": True,
            "final_sigmas_type": "zero",
        }
    elif scheduler_type == "flow-euler":
        own = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": flow_shift}
    elif scheduler_type == "scm":
        own = {"_class_name": "SCMScheduler", "prediction_type": "trigflow", "sigma_data": sigma_data}
    else:
        raise ValueError(f"scheduler_type {scheduler_type!r} is unknown; allowed are {', '.join(SCHEDULERS)}.")
    return {"_diffusers_version": DIFFUSERS_VERSION, "num_train_timesteps": 1000} | own


def sampler_of_scheduler(config: Mapping[str, Any]) -> tuple[str, float]:
    """Our sampler's name and flow_shift for a diffusers scheduler config.

    Raises:
        CheckpointError: Sana has no such sampler.
    """
    samplers = {
        "DPMSolverMultistepScheduler": ("flow_dpm-solver", "flow_shift"),
        "FlowMatchEulerDiscreteScheduler": ("flow_euler", "shift"),
        "SCMScheduler": ("scm", ""),
    }
    name = config.get("_class_name", "DPMSolverMultistepScheduler")
    if name not in samplers:
        raise CheckpointError(f"The scheduler {name} has no counterpart here; known are {', '.join(samplers)}.")
    sampler, key = samplers[name]
    return sampler, float(config.get(key, 1.0))


def official_config(
    arch: Mapping[str, Any], sampler: str, flow_shift: float, downsample_factor: int = 32
) -> dict[str, dict[str, Any]]:
    """The sections of a `SanaConfig` that an architecture decides; other keys keep their defaults.

    Args:
        arch: {"class", "kwargs"}.
        sampler: official sampler name.
        flow_shift: shift of the schedule.
        downsample_factor: image pixels for one latent pixel along a side.
    """
    kwargs = arch["kwargs"]
    image_size = kwargs["input_size"] * downsample_factor
    ratio = image_size if image_size in _POSITIONS else 1024
    shared = ("mlp_ratio", "qk_norm", "cross_norm", "attn_type", "ffn_type", "use_pe", "pe_interpolation")
    others = ("linear_head_dim", "cross_attn_type", "cfg_embed", "cfg_embed_scale", "logvar", "pos_embed_type")
    return {
        "data": {"image_size": image_size},
        "model": {
            "model": preset_name(arch) or _nearest_preset(arch),
            "image_size": image_size,
            "aspect_ratio_type": f"ASPECT_RATIO_{ratio}",
            "mlp_acts": list(kwargs["mlp_acts"]),
            "class_dropout_prob": kwargs.get("class_dropout_prob", 0.1),
            "pag_applied_layers": [min(8, kwargs["depth"] // 2)],
            # a size of its own is told to the preset
            "extra": None if preset_name(arch) else {key: kwargs[key] for key in ("depth", "hidden_size", "num_heads")},
            **{key: kwargs[key] for key in (*shared, *others) if key in kwargs},
        },
        "vae": {"vae_latent_dim": kwargs["in_channels"], "vae_downsample_rate": downsample_factor},
        "text_encoder": {
            "caption_channels": kwargs["caption_channels"],
            "y_norm": kwargs["y_norm"],
            "y_norm_scale_factor": kwargs["y_norm_scale_factor"],
            "model_max_length": kwargs["model_max_length"],
        },
        "scheduler": {
            "vis_sampler": sampler,
            "flow_shift": flow_shift,
            "pred_sigma": kwargs["pred_sigma"],
            "learn_sigma": kwargs["learn_sigma"],
            "timestep_norm_scale_factor": kwargs["timestep_norm_scale_factor"],
        },
    }


def preset_name(arch: Mapping[str, Any]) -> str | None:
    """The registry's name of an architecture's size; None when it is no official size."""
    kwargs = arch["kwargs"]
    shape = (kwargs["depth"], kwargs["hidden_size"], kwargs["num_heads"])
    size = next((name for name, known in _SIZES.items() if known == shape and kwargs["patch_size"] == 1), None)
    return f"{arch['class']}_{size}" if size else None


def _nearest_preset(arch: Mapping[str, Any]) -> str:
    """A preset of the same class and patch size; of patches of 1, the one that `model.extra` resizes."""
    patch = arch["kwargs"]["patch_size"]
    return f"{arch['class']}_Tiny_P1" if patch == 1 else f"{arch['class']}_600M_P{patch}_D28"


def _base_kwargs() -> dict[str, Any]:
    return {
        "class_dropout_prob": 0.1,
        "learn_sigma": False,
        "pred_sigma": False,
        "model_max_length": 300,
        "y_norm": True,
        "y_norm_scale_factor": 0.01,
        "attn_type": "linear",
        "cross_attn_type": "flash",
        "ffn_type": "glumbconv",
        "mlp_acts": ["silu", "silu", None],
        "linear_head_dim": 32,
        "pos_embed_type": "sincos",
        "timestep_norm_scale_factor": 1.0,
    }


def _sprint_kwargs(cfg_embed_scale: float) -> dict[str, Any]:
    return {
        "cfg_embed": True,
        "cfg_embed_scale": cfg_embed_scale,
        "logvar": True,
        "class_dropout_prob": 0.0,
        "cross_attn_type": "vanilla",
        "timestep_norm_scale_factor": _SPRINT_FACTOR,
    }


def _check_shapes(kwargs: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """The few shapes that decide the architecture, so that a wrong --model_type is named before anything is written."""
    hidden, patch, channels = kwargs["hidden_size"], kwargs["patch_size"], kwargs["in_channels"]
    depth = 1 + max((int(key.split(".")[1]) for key in state if key.startswith("blocks.")), default=-1)
    expected = {
        "x_embedder.proj.weight": ((hidden, channels, patch, patch), "hidden_size, in_channels and patch_size"),
        "y_embedder.y_proj.fc1.weight": ((hidden, kwargs["caption_channels"]), "hidden_size and caption_channels"),
        "blocks.0.mlp.point_conv.conv.weight": ((hidden, int(hidden * kwargs["mlp_ratio"]), 1, 1), "mlp_ratio"),
    }
    for key, (shape, fields) in expected.items():
        if key not in state:
            raise CheckpointError(f"The weights have no {key}: they are no Sana transformer that diffusers can hold.")
        if tuple(state[key].shape) != shape:
            raise CheckpointError(
                f"The weights are of another model: {key} is {tuple(state[key].shape)} in the file and {shape} by "
                f"{fields}; check the model type or config."
            )
    if depth != kwargs["depth"]:
        raise CheckpointError(f"The weights have {depth} blocks, and the model type or config says {kwargs['depth']}.")
    for key, name in (
        ("blocks.0.attn.q_norm.weight", "qk_norm"),
        ("blocks.0.cross_attn.q_norm.weight", "cross_norm"),
        ("cfg_embedder.mlp.0.weight", "cfg_embed"),
    ):
        if (key in state) != bool(kwargs.get(name)):
            verb = "have" if key in state else "lack"
            raise CheckpointError(f"The weights {verb} {key}, and {name} is {bool(kwargs.get(name))} by the config.")
