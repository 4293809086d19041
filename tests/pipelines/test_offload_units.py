"""Cuts of networks: every tensor in one unit or in the rest, units in the order in which a forward runs them."""

import pytest
import torch
from torch import nn

from sana.config import load_config
from sana.models import build_transformer
from sana.models.autoencoder.dc_ae import DCAE, DCAE_PRESETS
from sana.models.layers.residency import forget, manage
from sana.models.text_encoder.gemma import Gemma2TextEncoder
from sana.models.text_encoder.qwen import Qwen2TextEncoder
from sana.models.text_encoder.t5 import T5TextEncoder
from sana.models.transformer.controlnet import SanaMSControlNet
from sana.pipelines.offload_units import CAST_KEPT, is_castable, units_of
from tests.models.transformer.networks import inputs, small

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}


def share_of_units(name: str, network: nn.Module) -> float:
    """The share of a network's bytes that lies in units; fails where a tensor lies in two."""
    units = units_of(name, network).order
    tensors = [id(one) for unit in units for one in (*unit.parameters(), *unit.buffers())]
    assert len(tensors) == len(set(tensors))
    inside = sum(one.nbytes for unit in units for one in (*unit.parameters(), *unit.buffers()))
    return inside / sum(one.nbytes for one in (*network.parameters(), *network.buffers()))


def order_of_run(units: tuple[nn.Module, ...], run) -> list[int]:
    seen: list[int] = []
    handles = [unit.register_forward_pre_hook(lambda *_, i=i: seen.append(i)) for i, unit in enumerate(units)]
    run()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", ["Sana_600M_img1024", "Sana_1600M_img1024"])
def test_most_of_a_preset_lies_in_its_blocks(name):
    with torch.device("meta"):
        network = build_transformer(load_config(f"configs/sana_config/1024ms/{name}.yaml"))
    assert len(units_of("transformer", network).order) == network.architecture.depth
    assert share_of_units("transformer", network) > 0.94


def test_blocks_of_a_control_network_are_in_the_order_of_its_forward():
    network = small(SanaMSControlNet, depth=4, copy_blocks_num=2)
    given = inputs(1)
    control = {"control_signal": torch.randn_like(given["x"])}
    with torch.no_grad():
        run = order_of_run(units_of("transformer", network).order, lambda: network(**given, data_info=control))
    assert run == list(range(6))


def make_text_encoder(kind: str) -> nn.Module:
    import transformers

    if kind == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4, "vocab_size": 50}
        return T5TextEncoder(transformers.T5EncoderModel(transformers.T5Config(**sizes)), None)
    if kind == "qwen2":
        model = transformers.Qwen2Model(transformers.Qwen2Config(**SMALL, vocab_size=50, intermediate_size=64))
        return Qwen2TextEncoder(model, None)
    options = {**SMALL, "vocab_size": 50, "intermediate_size": 64, "head_dim": 8, "pad_token_id": 0}
    return Gemma2TextEncoder(transformers.Gemma2Model(transformers.Gemma2Config(**options)), None)


@pytest.mark.parametrize("kind", ["t5", "qwen2", "gemma2"])
def test_layers_of_text_encoders(kind):
    encoder = make_text_encoder(kind).eval()
    cut = units_of("text_encoder", encoder)
    assert share_of_units("text_encoder", encoder) > 0.97 and cut.lazy
    with torch.no_grad():
        run = order_of_run(cut.order, lambda: encoder.model(input_ids=torch.ones(1, 4, dtype=torch.long)))
    assert run == [0, 1, 2, 3]  # the table of tokens and three layers


@pytest.mark.parametrize("name", ["dc-ae-f32c32-sana-1.0", "dc-ae-f64c128-in-1.0"])
def test_stages_of_an_autoencoder(name):
    with torch.device("meta"):
        network = DCAE(DCAE_PRESETS[name])
    cut = units_of("autoencoder", network)
    assert share_of_units("autoencoder", network) == 1.0 and cut.deep
    half = len(cut.order) // 2
    assert cut.order[0] is network.encoder.project_in and cut.order[half] is network.decoder.project_in
    assert cut.order[half + 1] is network.decoder.stages[-1] and cut.order[-1] is network.decoder.project_out


def test_blocks_of_a_kl_autoencoder():
    diffusers = pytest.importorskip("diffusers")
    from sana.models.autoencoder.kl import KLAutoencoder

    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    model = diffusers.AutoencoderKL(block_out_channels=(32, 64), norm_num_groups=8, **kinds)
    network = KLAutoencoder(model).eval()
    cut = units_of("autoencoder", network)
    assert share_of_units("autoencoder", network) > 0.9
    with torch.no_grad():
        run = order_of_run(cut.order, lambda: network.decode(network.encode(torch.zeros(1, 3, 16, 16))))
    assert run == list(range(6))


def test_what_casting_keeps():
    network = small()
    wanted = {slot.name for slot in manage(network) if is_castable(slot, CAST_KEPT)}
    forget(network)
    assert not any(part in name for name in wanted for part in ("norm", "bias", "table", "embed", "depth_conv"))
    assert {"blocks.0.attn.qkv.weight", "blocks.0.mlp.point_conv.conv.weight"} <= wanted
