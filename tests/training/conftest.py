"""A tiny autoencoder, text encoder and configuration that a trainer can run in seconds."""

import pytest
import torch
from PIL import Image

from sana.config import load_config
from sana.models.autoencoder.dc_ae import DCAE, DCAEConfig
from sana.models.autoencoder.loading import save_autoencoder
from sana.models.text_encoder.tiny import create_text_encoder

TINY_YAML = "configs/sana_config/tiny/Sana_tiny_img256.yaml"
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


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    save_autoencoder(DCAE(DCAEConfig(**SHAPE)), folder)
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Ten captioned pictures of one colour each with a darker square."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(10):
        picture = Image.new("RGB", (70, 64), (25 * number, 255 - 20 * number, 60))
        picture.paste((10, 10, 5 * number), (8, 8, 8 + 4 * number, 40))
        picture.save(folder / f"picture_{number}.png")
        (folder / f"picture_{number}.txt").write_text(f"a red cat number {number}")
    return folder


@pytest.fixture
def tiny_options(tmp_path, text_folder, vae_folder):
    """Overrides of the bundled model's configuration that make a run take a fraction of a second."""
    return [
        f"--work_dir={tmp_path / 'run'}", f"--vae.vae_pretrained={vae_folder}", "--vae.vae_latent_dim=4",
        f"--text_encoder.text_encoder_name={text_folder}", "--text_encoder.caption_channels=16",
        "--model.extra={depth: 1, hidden_size: 32, num_heads: 2}", "--train.train_batch_size=4",
        "--train.log_interval=1", "--model.mixed_precision=fp32", "--train.extra.max_steps=4",
        "--train.extra.pool_size=8", "--train.extra.refresh=2", "--train.lr_schedule_args={num_warmup_steps: 0}",
    ]  # fmt: skip


@pytest.fixture
def image_options(tiny_options, image_folder):
    """The same with a folder of pictures, a frozen text encoder and two micro-batches a step."""
    return [
        *tiny_options, "--data.type=SanaImgDataset", f"--data.data_dir=[{image_folder}]", "--model.image_size=64",
        "--train.extra.train_text_encoder=false", "--train.extra.null_caption_probability=0",
        "--model.class_dropout_prob=0.3", "--train.gradient_accumulation_steps=2", "--train.save_model_steps=2",
    ]  # fmt: skip


@pytest.fixture
def tiny_config(tiny_options):
    return load_config(TINY_YAML, tiny_options)


@pytest.fixture
def image_config(image_options):
    return load_config(TINY_YAML, image_options)
