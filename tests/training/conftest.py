"""A tiny autoencoder, text encoder and configuration that a trainer can run in seconds."""

import pytest
import torch

from sana.config import load_config
from sana.models.autoencoder.dc_ae import DCAE, DCAEConfig
from sana.models.autoencoder.loading import save_autoencoder
from sana.models.text_encoder.tiny import create_text_encoder

STAGES = ("ResBlock",) * 4 + ("EViTS5_GLU",) * 2
SHAPE = {
    "latent_channels": 4,
    "encoder_width_list": (4, 4, 8, 8, 16, 16), "encoder_depth_list": (0, 1, 1, 1, 1, 1),
    "decoder_width_list": (4, 4, 8, 8, 16, 16), "decoder_depth_list": (0, 1, 1, 1, 1, 1),
    "encoder_block_type": STAGES, "decoder_block_type": STAGES, "head_dim": 8,
    "downsample_block_type": "Conv", "upsample_block_type": "InterpolateConv",
}  # fmt: skip


@pytest.fixture
def dcae_shape():
    return dict(SHAPE)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    torch.manual_seed(0)
    captions = ["a red cat", "two owls on a blue background", "Draw this picture."] * 20
    create_text_encoder(folder, captions, vocab_size=420, hidden_size=16, intermediate_size=32, num_hidden_layers=2)
    return folder


@pytest.fixture
def tiny_config(tmp_path, text_folder):
    torch.manual_seed(0)
    save_autoencoder(DCAE(DCAEConfig(**SHAPE)), tmp_path / "vae")
    return load_config(
        "configs/sana_config/tiny/Sana_tiny_img256.yaml",
        [
            f"--work_dir={tmp_path / 'run'}", f"--vae.vae_pretrained={tmp_path / 'vae'}", "--vae.vae_latent_dim=4",
            f"--text_encoder.text_encoder_name={text_folder}", "--text_encoder.caption_channels=16",
            "--model.extra={depth: 1, hidden_size: 32, num_heads: 2}", "--train.train_batch_size=4",
            "--train.extra={steps: 4, pool_size: 8, refresh: 2}", "--train.log_interval=1",
        ],
    )  # fmt: skip
