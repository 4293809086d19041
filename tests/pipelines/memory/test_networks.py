"""Bytes of weights against counts of numbers, and of packed copies against the copies that a run makes."""

import pytest
import torch

from sana.config import ConfigError, load_config
from sana.models.quantization.layers import is_quantized
from sana.models.quantization.schemes import quantized_bytes
from sana.ops import packing
from sana.pipelines.loading import find_model, source_config
from sana.pipelines.memory import networks
from sana.pipelines.memory.stages import MemoryModel

TINY = "asset/models/sana_tiny"
SMALL = "configs/sana_config/512ms/Sana_600M_img512.yaml"
# Numbers in the released networks: their model cards; the transformer's is that of its parameters and tables.
GEMMA_2_2B = 2_614_341_888


@pytest.fixture(scope="module")
def tiny():
    return source_config(find_model(TINY))


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_the_text_encoder_of_a_yaml_has_its_published_size(dtype, size) -> None:
    weights = MemoryModel(load_config(SMALL), device="cpu", dtype=dtype).weights("text_encoder")
    assert 0 <= weights.total - GEMMA_2_2B * size < 10_000  # tables of angles, a number of normalisation
    assert weights.units == 1 + 26
    assert weights.unit == pytest.approx(256_000 * 2304 * size)  # the embedding
    layer = weights.pair - weights.unit
    assert weights.unit + 26 * layer + weights.rest == weights.total
    assert weights.packed == 0


def test_a_table_that_two_modules_share_counts_once() -> None:
    config = load_config(SMALL, ["--text_encoder.text_encoder_name=T5-small"])
    weights = MemoryModel(config, device="cpu", dtype=torch.float32).weights("text_encoder")
    encoder = 76_961_152 - 32_128 * 512  # the whole network without its head ...
    decoder = 8 * (2 * 4 * 512 * 384 + 3 * 512 * 1024 + 3 * 512) + 32 * 6 + 512  # ... and without its decoder
    assert weights.total == 4 * (encoder - decoder)


@pytest.mark.parametrize("network", networks.NETWORKS)
def test_weights_of_the_bundled_model_are_those_of_its_files(tiny, network) -> None:
    from safetensors import safe_open

    folder = {"text_encoder": "text_encoder/", "transformer": "", "autoencoder": "vae/"}[network]
    with safe_open(f"{TINY}/{folder}model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    total = MemoryModel(tiny, device="cpu", dtype=torch.float32).weights(network).total
    extra = {"transformer": 0.03}.get(network, 0.001)  # tables that only training reads are not in the file
    assert stored * 4 <= total <= stored * 4 * (1 + extra)


def test_blocks_on_cuda_are_whole(tiny) -> None:
    cpu, cuda = (
        MemoryModel(tiny, device=device, dtype=torch.float32).weights("transformer") for device in ("cpu", "cuda")
    )
    assert cuda.total % 512 == 0
    assert 0 < cuda.total - cpu.total < 512 * 300
    assert cuda.packed == 0


def test_units_and_the_rest_are_the_whole(tiny) -> None:
    for network in networks.NETWORKS:
        weights = MemoryModel(tiny, device="cpu", dtype=torch.bfloat16).weights(network)
        assert 0 < weights.unit < weights.pair <= 2 * weights.unit
        assert weights.pair + weights.rest <= weights.total


@pytest.mark.parametrize("network", networks.NETWORKS)
def test_units_are_those_that_offload_moves(tiny, network) -> None:
    from types import SimpleNamespace

    from sana.models.layers.schedule import Residency
    from sana.pipelines.offload_units import units_of

    module = networks.build_empty(network, tiny)
    networks.give_storage(module, torch.float32, "cpu")
    module.requires_grad_(False)
    owner = torch.nn.ModuleDict({"model": module}) if network == "text_encoder" else module
    real = Residency(owner, units_of(network, SimpleNamespace(model=module) if owner is not module else module))
    sizes = [sum(slot.home.nbytes for slot in unit) for unit in real.members]
    weights = MemoryModel(tiny, device="cpu", dtype=torch.float32).weights(network)
    real_dtype = networks.network_dtype(network, tiny, torch.float32)
    assert real_dtype == torch.float32
    assert (weights.unit, weights.units) == (max(sizes), len(sizes))
    assert weights.rest == sum(slot.home.nbytes for slot in real.rest)


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4", "fp8"])
def test_a_quantised_transformer_takes_what_its_scheme_says(scheme) -> None:
    config = load_config(SMALL)
    exact = networks.build_empty("transformer", config)
    expected = 0
    for name, tensor in networks.named_weights(exact):
        chosen = name.endswith("weight") and is_quantized("transformer", name)
        expected += quantized_bytes(tensor.shape, scheme if chosen else None, torch.bfloat16)
    model = MemoryModel(config, device="cuda", dtype=torch.bfloat16, quantization=scheme)
    assert model.weights("transformer").total == pytest.approx(expected, rel=1e-3)


def test_packed_copies_are_those_that_a_run_makes(tiny) -> None:
    packing.set_pack_budget(None)
    network = networks.build_empty("transformer", tiny)
    networks.give_storage(network, torch.float32, "cpu")
    for _, tensor in networks.named_weights(network):
        tensor.zero_()
    with torch.no_grad():
        text = network.cache_text(torch.zeros(1, 8, tiny.text_encoder.caption_channels))
        network(torch.zeros(1, 32, 8, 8), network.cache_time(torch.zeros(1))[0], text)
    copies = (packing._packed.get(weight, {}) for weight in networks.packable_weights(network))
    made = sum(copy.nbytes for parts in copies for *_, copy in parts.values())
    assert MemoryModel(tiny, device="cpu", dtype=torch.float32).packed("transformer") == made


def test_copies_end_with_their_budget(tiny) -> None:
    budget = 5_000_000
    packing.set_pack_budget(budget)
    try:
        model = MemoryModel(tiny, device="cpu", dtype=torch.float32)
        assert budget - 1_300_000 < model.packed("transformer") <= budget  # the next weight found no room
        assert model.packed("transformer") + model.packed("decoder") <= budget
    finally:
        packing.set_pack_budget(None)


def test_an_unknown_autoencoder_is_refused_with_what_to_do(tiny) -> None:
    config = load_config(SMALL, ["--vae.vae_pretrained=someone/strange-ae"])
    with pytest.raises(ConfigError, match="give a local folder, or one of dc-ae-f32c32-sana-1.0"):
        networks.empty_autoencoder(config)


def test_a_diffusers_kl_is_refused(tmp_path, tiny) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    config = load_config(SMALL, [f"--vae.vae_pretrained={tmp_path}"])
    with pytest.raises(ConfigError, match="is not predicted: it is an AutoencoderKL"):
        networks.empty_autoencoder(config)
