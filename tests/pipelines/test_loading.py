"""What loading takes: weights of a file are mapped, not copied, and cast tensor by tensor; trained ones are copied."""

import os
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sana.config import SanaConfig, load_config
from sana.models import build_transformer
from sana.models.autoencoder.dc_ae import DCAE, DCAEConfig
from sana.models.autoencoder.loading import load_autoencoder, save_autoencoder
from sana.models.text_encoder.tiny import create_text_encoder
from sana.models.weights import CheckpointError, load_weights
from sana.pipelines import loading
from sana.pipelines.memory.tracker import MemoryTracker

CPU = torch.device("cpu")
CONFIG = "configs/sana_config/1024ms/Sana_600M_img1024.yaml"
FORMATS = ("model.safetensors", "model.pth")


class Allocations(MemoryTracker):
    """`MemoryTracker` of memory alone: what is mapped from a file in a folder does not count."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def _see(self, tensor: Tensor) -> None:
        known = tensor.untyped_storage()._cdata in self._sizes
        if known or not (tensor.is_meta or is_mapped(tensor, self.folder)):
            super()._see(tensor)


def is_mapped(tensor: Tensor, folder: Path) -> bool:
    """Whether the kernel says that a tensor's first byte lies in a mapped file of a folder."""
    address = tensor.untyped_storage().data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(folder) not in line:
            continue
        span = line.partition(" ")[0]
        start, stop = (int(end, 16) for end in span.split("-"))
        if start <= address < stop:
            return True
    return False


def anonymous() -> int:
    """Bytes of the process's own memory; pages of files are not among them."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


def write(path: Path, dtype: torch.dtype, **shape: int) -> SanaConfig:
    """Writes a transformer of random weights in pieces of a few megabytes; returns its config."""
    config = load_config(CONFIG)
    config.model.model, config.model.extra = "SanaMS_Tiny_P1", shape
    with torch.device("meta"):
        model = build_transformer(config)
    state = {key: torch.randn(tensor.shape).to(dtype) for key, tensor in model.state_dict().items()}
    if path.suffix == ".pth":
        torch.save({"state_dict": state}, path)
    else:
        save_file(state, path)
    return config


def size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every network is loaded as a large one is."""
    monkeypatch.setattr(loading, "LARGE", 0)


@pytest.mark.parametrize("name", FORMATS)
def test_weights_of_the_wanted_dtype_are_the_file(large, tmp_path, name):
    config = write(tmp_path / name, torch.float32, depth=2, hidden_size=128, num_heads=4)
    with Allocations(tmp_path) as allocated:
        model = loading.load_transformer(loading.find_model(tmp_path / name), config, torch.float32, CPU)
    assert all(is_mapped(parameter, tmp_path) for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert allocated.peak == 0
    assert model(torch.randn(1, 32, 4, 4), torch.ones(1), torch.randn(1, 3, 2304)).shape == (1, 32, 4, 4)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("stored", "wanted"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_other_dtypes_are_cast_tensor_by_tensor(large, tmp_path, name, stored, wanted):
    config = write(tmp_path / name, stored, depth=2, hidden_size=128, num_heads=4)
    with Allocations(tmp_path) as allocated:
        model = loading.load_transformer(loading.find_model(tmp_path / name), config, wanted, CPU)
    tensors = model.state_dict()
    largest = max(tensor.nbytes for tensor in tensors.values())
    assert size(tensors.values()) <= allocated.peak <= size(tensors.values()) + largest
    exact = loading.load_state_dict(tmp_path / name)
    assert all(torch.equal(tensors[key], exact[key].to(wanted)) for key in exact)


def test_what_is_trained_has_memory_of_its_own(tmp_path):
    config = write(tmp_path / FORMATS[0], torch.float32, depth=2, hidden_size=128, num_heads=4)
    with torch.device("meta"):
        model = build_transformer(config)
    load_weights(model, tmp_path / FORMATS[0])
    assert not any(is_mapped(tensor, tmp_path) for tensor in model.state_dict().values())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", FORMATS)
def test_a_truncated_file_is_refused(large, tmp_path, name):
    config = write(tmp_path / name, torch.float32, depth=1, hidden_size=64, num_heads=4)
    os.truncate(tmp_path / name, (tmp_path / name).stat().st_size - 1000)
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        loading.load_transformer(loading.find_model(tmp_path / name), config, torch.float32, CPU)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_is_replaced_or_removed_meanwhile_does_not_hurt(large, tmp_path, name):
    config = write(tmp_path / name, torch.float32, depth=1, hidden_size=64, num_heads=4)
    model = loading.load_transformer(loading.find_model(tmp_path / name), config, torch.float32, CPU)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    write(tmp_path / f"new_{name}", torch.float32, depth=1, hidden_size=64, num_heads=4)
    os.replace(tmp_path / f"new_{name}", tmp_path / name)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    (tmp_path / name).unlink()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_writing_to_mapped_weights_does_not_write_to_the_file(large, tmp_path):
    config = write(tmp_path / FORMATS[0], torch.float32, depth=1, hidden_size=64, num_heads=4)
    content = (tmp_path / FORMATS[0]).read_bytes()
    model = loading.load_transformer(loading.find_model(tmp_path / FORMATS[0]), config, torch.float32, CPU)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert (tmp_path / FORMATS[0]).read_bytes() == content


def test_an_autoencoder_is_mapped_for_inference_only(tmp_path):
    config = DCAEConfig(
        latent_channels=4, encoder_width_list=(16, 32), encoder_depth_list=(1, 1), decoder_width_list=(16, 32),
        decoder_depth_list=(1, 1), scaling_factor=0.5,
    )  # fmt: skip
    save_autoencoder(DCAE(config), tmp_path)
    with Allocations(tmp_path) as allocated:
        mapped = load_autoencoder(tmp_path, mapped=True)
    assert all(is_mapped(tensor, tmp_path) for tensor in mapped.state_dict().values()) and allocated.peak == 0
    own = load_autoencoder(tmp_path)
    assert not any(is_mapped(tensor, tmp_path) for tensor in own.state_dict().values())
    half = load_autoencoder(tmp_path, dtype=torch.bfloat16, mapped=True)
    assert not any(is_mapped(tensor, tmp_path) for tensor in half.state_dict().values())


def test_a_text_encoder_is_mapped(tmp_path):
    create_text_encoder(tmp_path / "text", ["a cat", "two dogs"], vocab_size=300)
    config = load_config(CONFIG)
    config.text_encoder.text_encoder_name = str(tmp_path / "text")
    encoder = loading.load_text_encoder(config, torch.float32, CPU)
    assert all(is_mapped(tensor, tmp_path) for tensor in encoder.parameters())
    half = loading.load_text_encoder(config, torch.bfloat16, CPU)
    exact = dict(encoder.model.named_parameters())
    for name, tensor in half.model.named_parameters():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, exact[name].bfloat16())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stored", "wanted", "bound"),
    [
        (torch.float32, torch.float32, 0.02),
        (torch.bfloat16, torch.float32, 1.1),
        (torch.bfloat16, torch.bfloat16, 0.02),
    ],
)
def test_a_file_of_600_megabytes(tmp_path, stored, wanted, bound):
    """Blocks of the 600M preset. Allocations of tensors, and what the kernel counts as the process's own memory."""
    path = tmp_path / FORMATS[0]
    depth = 7 if stored == torch.float32 else 14
    config = write(path, stored, depth=depth, hidden_size=1152, num_heads=16)
    assert 550e6 < path.stat().st_size < 700e6
    before = anonymous()
    with Allocations(tmp_path) as allocated:
        model = loading.load_transformer(loading.find_model(path), config, wanted, CPU)
    own = anonymous() - before
    total = size(model.state_dict().values())
    sum(float(parameter.sum()) for parameter in model.parameters())  # the whole file is read
    assert allocated.peak <= bound * total
    assert own <= (bound + 0.02) * total and anonymous() - before <= (bound + 0.02) * total
