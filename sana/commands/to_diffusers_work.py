"""What `sana convert to-diffusers` does: which checkpoint, what it is, and which parts belong to it.

Writing the layout of diffusers is in `sana/models/pipeline_folder.py`.
"""

import argparse
from pathlib import Path

import torch

from sana.config import SanaConfig, config_to_dict, load_config
from sana.models import build_transformer
from sana.models.diffusers_config import model_type_arch, official_config, pipeline_class
from sana.models.metadata import official_precision
from sana.models.pipeline_folder import ExportOptions, export_pipeline
from sana.models.text_encoder.chi import CHI_PROMPT
from sana.models.weights import CheckpointError, CheckpointMetadata, load_state_dict, read_metadata
from sana.utils import hub

_OWNER = "hf://Efficient-Large-Model"
# What --model_type and --image_size mean when no checkpoint is named.
RELEASED = {
    ("SanaMS_600M_P1_D28", 512): "Sana_600M_512px",
    ("SanaMS_600M_P1_D28", 1024): "Sana_600M_1024px",
    ("SanaMS_1600M_P1_D20", 512): "Sana_1600M_512px",
    ("SanaMS_1600M_P1_D20", 1024): "Sana_1600M_1024px_BF16",
    ("SanaMS_1600M_P1_D20", 2048): "Sana_1600M_2Kpx_BF16",
    ("SanaMS_1600M_P1_D20", 4096): "Sana_1600M_4Kpx_BF16",
    ("SanaMS1.5_1600M_P1_D20", 1024): "SANA1.5_1.6B_1024px",
    ("SanaMS1.5_4800M_P1_D60", 1024): "SANA1.5_4.8B_1024px",
    ("SanaSprint_600M_P1_D28", 1024): "Sana_Sprint_0.6B_1024px",
    ("SanaSprint_1600M_P1_D20", 1024): "Sana_Sprint_1.6B_1024px",
}


def convert(args: argparse.Namespace) -> str:
    """Reads the checkpoint and writes the folder.

    Returns:
        The name of diffusers' pipeline for the model.

    Raises:
        CheckpointError, FetchError, ConfigError: see the message.
    """
    reference = args.orig_ckpt_path or released(args)
    source = hub.resolve(reference, kind="any")
    metadata = describe(args, reference, read_metadata(source))
    if args.flow_shift is not None:
        metadata.flow_shift = args.flow_shift
    sprint = metadata.arch["class"] == "SanaMSCM"
    scheduler_type = args.scheduler_type or ("scm" if sprint else "flow-dpm_solver")
    if sprint != (scheduler_type == "scm"):
        raise CheckpointError(f"--scheduler_type {scheduler_type} does not fit {metadata.arch['class']}.")
    defaults = ExportOptions()
    options = ExportOptions(
        scheduler_type=scheduler_type,
        dtype=args.dtype,
        variant=args.variant,
        full=args.save_full_pipeline,
        vae=args.vae or part(source, metadata, "vae", "vae_pretrained") or defaults.vae,
        text_encoder=args.text_encoder
        or part(source, metadata, "text_encoder", "text_encoder_name")
        or defaults.text_encoder,
    )
    export_pipeline(args.dump_path, load_state_dict(source, ema=args.ema), metadata, options)
    return pipeline_class(metadata.arch)


def released(args: argparse.Namespace) -> str:
    """The released checkpoint of a model type and size.

    Raises:
        CheckpointError: there is none.
    """
    key = (args.model_type or "SanaMS_1600M_P1_D20", args.image_size or 1024)
    if key not in RELEASED:
        raise CheckpointError(f"No released checkpoint is known for {key[0]} at {key[1]} px: give --orig_ckpt_path.")
    name = RELEASED[key]
    return f"{_OWNER}/{name}/checkpoints/{name}.pth"


def describe(args: argparse.Namespace, reference: str, own: CheckpointMetadata | None) -> CheckpointMetadata:
    """What the model is: by --config, by --model_type, by the checkpoint itself, or by the official default."""
    if args.config:
        return describe_config(load_config(args.config))
    if own is not None and not args.model_type:
        return own
    arch = model_type_arch(args.model_type or "SanaMS_1600M_P1_D20", args.image_size or 1024)
    official = official_precision(reference)
    sampler = "scm" if arch["class"] == "SanaMSCM" else "flow_dpm-solver"
    config = official_config(arch, sampler, 3.0)
    config["text_encoder"]["chi_prompt"] = list(CHI_PROMPT)
    return CheckpointMetadata(
        arch=arch,
        precision=official[0] if official else "",
        flow_shift=3.0,
        chi_prompt=list(CHI_PROMPT),
        license=f"that of {reference}",
        config=config,
    )


def describe_config(config: SanaConfig) -> CheckpointMetadata:
    """The metadata that a config implies; the network is built without storage to learn its arguments."""
    with torch.device("meta"):
        model = build_transformer(config)
    return CheckpointMetadata(
        arch={"class": type(model).__name__, "kwargs": model.init_kwargs},
        precision=config.model.mixed_precision,
        flow_shift=config.scheduler.flow_shift,
        chi_prompt=list(config.text_encoder.chi_prompt or []),
        config=config_to_dict(config),
    )


def part(source: Path, metadata: CheckpointMetadata, section: str, key: str) -> str | None:
    """A part that the metadata names; a path is relative to the folder of the checkpoint."""
    name = metadata.config.get(section, {}).get(key)
    folder = source if source.is_dir() else source.parent
    return str(folder / name) if name and (folder / name).exists() else name
