"""The tables name every large layer of every network that we build, each once."""

import pytest
import torch
from torch import nn

from sana.models.quantization.layers import LAYERS, is_quantized, matches, plain_name, table_of
from tests.models.transformer.networks import KINDS, small

ENCODERS = ("gemma-2b", "gemma-2-2b-it", "Qwen2-0.5B-Instruct", "T5-small")


def large_layers(network: nn.Module) -> list[str]:
    return [plain_name(name) for name, one in network.named_modules() if isinstance(one, nn.Linear | nn.Conv2d)]


def in_tables(kind: str, name: str) -> tuple[bool, bool]:
    return matches(name, LAYERS[kind].quantized), matches(name, LAYERS[kind].exact)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("ffn_type", ["glumbconv", "glumbconv_dilate", "mlp", "dwmlp"])
def test_every_layer_of_a_transformer_is_decided_on_once(kind, ffn_type):
    options = {"cfg_embed": True, "logvar": True} if kind == "SanaMSCM" else {}
    for name in large_layers(small(KINDS[kind], ffn_type=ffn_type, **options)):
        assert sum(in_tables("transformer", name)) == 1, name


@pytest.mark.parametrize("name", ENCODERS)
def test_every_layer_of_a_text_encoder_is_decided_on_once(name):
    from sana.models.text_encoder.architectures import empty_text_encoder

    layers = large_layers(empty_text_encoder(name))
    assert layers
    for layer in layers:
        assert sum(in_tables("text_encoder", layer)) == 1, layer


def test_the_share_of_the_released_model_that_is_quantised():
    from sana.models.transformer.sana import SanaMS_600M_P1_D28

    with torch.device("meta"):
        model = SanaMS_600M_P1_D28(ffn_type="glumbconv", attn_type="linear", mlp_ratio=2.5, linear_head_dim=32)
    quantised = sum(one.numel() for name, one in model.named_parameters() if is_quantized("transformer", name))
    block = 1152 * 1152 * (3 + 1 + 1 + 2 + 1) + 1152 * 5760 + 2880 * 1152  # products of a block, by hand
    biases = 28 * (1152 * 4 + 2304 + 5760)  # of these layers, which keep their dtype
    weights = sum(
        one.numel() for name, one in model.named_parameters()
        if name.endswith("weight") and is_quantized("transformer", name)
    )  # fmt: skip
    assert weights == 28 * block
    assert quantised - weights in (0, biases)
    assert weights / sum(one.numel() for one in model.parameters()) > 0.97


def test_names_as_modules_and_parameters_spell_them():
    for name in (
        "blocks.0.mlp.inverted_conv", "blocks.0.mlp.inverted_conv.conv", "blocks.3.mlp.point_conv.conv.weight",
        "controlnet.0.copied_block.attn.proj", "blocks.1.cross_attn.kv_linear.weight",
    ):  # fmt: skip
        assert is_quantized("transformer", name), name
    for name in ("blocks.0.mlp.depth_conv.conv", "y_embedder.y_proj.fc1", "t_block.1", "final_layer.linear.weight"):
        assert not is_quantized("transformer", name), name
    for name in ("model.layers.3.self_attn.q_proj.weight", "layers.0.mlp.up_proj"):
        assert is_quantized("text_encoder", name), name
    assert not is_quantized("text_encoder", "embed_tokens.weight")


def test_other_networks_have_no_table():
    with pytest.raises(ValueError, match="autoencoder.*known: transformer, text_encoder"):
        table_of("autoencoder")
