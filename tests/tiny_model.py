"""A model folder of ours, some hundred kilobytes large, made of the recorded tiny networks. No test is here."""

import shutil
from pathlib import Path
from typing import Any

from sana.config import config_to_dict
from sana.models.autoencoder.loading import save_autoencoder
from sana.models.weights import CheckpointMetadata, save_checkpoint
from tests.parity.common import DEFAULT_FOLDER, Case, load_cases
from tests.parity.runners.pipeline import build_pipeline

CHI_PROMPT = ["Draw what the user asks for.", "User Prompt: "]
IMAGE_SIZE = 64


def recorded_case(name: str) -> Case:
    """Returns a case of the repository's own reference numbers."""
    return next(case for case in load_cases(DEFAULT_FOLDER) if case.name == name)


def make_model_folder(folder: Path, **model_options: Any) -> Path:
    """Writes `model.safetensors`, `vae/` and `text_encoder/`, as `asset/models/sana_tiny` is made.

    Args:
        folder: where to.
        **model_options: changed entries of the config's section model.
    """
    pipeline = build_pipeline(recorded_case("e2e/cfg_8"))
    config = pipeline.config
    config.model.image_size = config.data.image_size = IMAGE_SIZE
    config.model.extra = {"depth": 2, "hidden_size": 32, "num_heads": 4}
    config.vae.vae_pretrained, config.text_encoder.text_encoder_name = "vae", "text_encoder"
    config.text_encoder.chi_prompt = CHI_PROMPT
    for name, value in model_options.items():
        setattr(config.model, name, value)
    save_autoencoder(pipeline.autoencoder, folder / "vae")
    for source in ("tiny_gemma2", "tiny_tokenizer"):
        shutil.copytree(DEFAULT_FOLDER / "text" / source, folder / "text_encoder", dirs_exist_ok=True)
    metadata = CheckpointMetadata(
        arch={"class": type(pipeline.transformer).__name__, "kwargs": pipeline.transformer.init_kwargs},
        flow_shift=config.scheduler.flow_shift,
        chi_prompt=CHI_PROMPT,
        license="Apache-2.0",
        config=config_to_dict(config),
    )
    save_checkpoint(folder / "model.safetensors", pipeline.transformer, metadata)
    return folder
