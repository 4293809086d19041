"""The DC-AE: presets against recorded manifests, small networks against diffusers' `AutoencoderDC`."""

import dataclasses
import json

import pytest
import torch

from sana.models.autoencoder.dc_ae import DCAE, DCAE_PRESETS, DCAEConfig
from sana.models.autoencoder.dc_ae_keys import config_to_diffusers, to_diffusers_state_dict
from tests.parity.common import DEFAULT_FOLDER
from tests.tolerance import assert_rms_close

RES, VIT, VIT5 = "ResBlock", "EViT_GLU", "EViTS5_GLU"
SMALL = {
    "residual only": DCAEConfig(
        latent_channels=4, encoder_width_list=(8, 16), decoder_width_list=(8, 16), encoder_depth_list=(1, 1),
        decoder_depth_list=(1, 2),
    ),
    "sana": DCAEConfig(
        latent_channels=4, encoder_width_list=(8, 8, 32), encoder_depth_list=(1, 2, 1), head_dim=16,
        encoder_block_type=(RES, RES, VIT5), downsample_block_type="Conv", decoder_width_list=(8, 8, 32),
        decoder_depth_list=(2, 1, 1), decoder_block_type=(RES, RES, VIT5), upsample_block_type="InterpolateConv",
    ),
    "imagenet": DCAEConfig(
        latent_channels=8, encoder_width_list=(8, 16, 32), encoder_depth_list=(0, 1, 2), head_dim=16,
        encoder_block_type=(RES, RES, VIT), decoder_width_list=(8, 16, 32), decoder_depth_list=(0, 2, 1),
        decoder_block_type=(RES, RES, VIT), decoder_norm=("bn2d", "bn2d", "trms2d"),
        decoder_act=("relu", "relu", "silu"),
    ),
    "convolutions around an empty first stage": DCAEConfig(
        latent_channels=4, encoder_width_list=(8, 8, 16), encoder_depth_list=(0, 1, 1), downsample_block_type="Conv",
        decoder_width_list=(8, 8, 16), decoder_depth_list=(0, 1, 1), upsample_block_type="InterpolateConv",
    ),
    "no shortcuts at the ends": DCAEConfig(
        latent_channels=3, encoder_width_list=(8, 16), encoder_depth_list=(1, 1), encoder_out_shortcut=False,
        decoder_width_list=(8, 16), decoder_depth_list=(1, 1), decoder_in_shortcut=False,
    ),
    "sides of different width": DCAEConfig(
        latent_channels=4, encoder_width_list=(4, 8, 16), encoder_depth_list=(1, 1, 1),
        decoder_width_list=(8, 16, 64), decoder_depth_list=(1, 1, 1), decoder_block_type=(RES, RES, VIT),
        head_dim=16, decoder_out_act="silu",
    ),
}  # fmt: skip


def load_json(name: str) -> dict:
    return json.loads((DEFAULT_FOLDER / "manifests" / name).read_text(encoding="utf-8"))


def randomise(model: torch.nn.Module) -> None:
    """Random values everywhere, positive running variances included."""
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point():
            tensor.normal_(0, 1 if tensor.ndim < 2 else tensor[0].numel() ** -0.5)


def build_pair(config: DCAEConfig) -> tuple[DCAE, torch.nn.Module]:
    """Our network and diffusers' with the same random weights, in eval mode."""
    from diffusers import AutoencoderDC

    ours = DCAE(config).eval()
    randomise(ours)
    arguments = config_to_diffusers(config)
    arguments["scaling_factor"] = ours.scaling_factor
    theirs = AutoencoderDC.from_config(arguments).eval()
    theirs.load_state_dict(to_diffusers_state_dict(ours.state_dict()))
    return ours, theirs


@pytest.mark.parametrize("name", DCAE_PRESETS)
def test_presets_match_the_manifests(name: str) -> None:
    recorded = name.replace("mix", "in").replace("sana-1.1", "sana-1.0")
    manifest = load_json("dcae_efficientvit_manifests.json")[recorded]
    summary = load_json("dcae_summary.json")["summary"][recorded]
    with torch.device("meta"):
        model = DCAE(DCAE_PRESETS[name])
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == manifest["keys"]
    assert sorted(key for key, _ in model.named_buffers()) == sorted(manifest["buffers"])
    assert sum(parameter.numel() for parameter in model.parameters()) == summary["efficientvit_params"]
    assert model.downsample_factor == summary["spatial_compression"]


def test_presets_have_the_released_scaling_factors() -> None:
    recorded = load_json("dcae_summary.json")["scaling_factors"]
    assert {name: DCAE_PRESETS[name].scaling_factor for name in recorded} == recorded
    assert DCAE_PRESETS["dc-ae-f32c32-sana-1.1"] == DCAE_PRESETS["dc-ae-f32c32-sana-1.0"]


@pytest.mark.parametrize(("given", "used"), [(None, 0.41407), (0.0, 0.41407), (0.3189, 0.3189)])
def test_an_absent_scaling_factor_is_the_official_one(given: float | None, used: float) -> None:
    config = dataclasses.replace(SMALL["residual only"], scaling_factor=given)
    assert DCAE(config).scaling_factor == used


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 24), (32, 8)])
@torch.no_grad()
def test_outputs_equal_diffusers(name: str, height: int, width: int) -> None:
    ours, theirs = build_pair(SMALL[name])
    images = torch.randn(2, 3, height, width)
    latents = theirs.encode(images).latent
    assert_rms_close(ours.encoder(images), latents, what="latents")
    assert_rms_close(ours.decoder(latents), theirs.decode(latents).sample, what="images")
    assert_rms_close(ours.encode(images), latents * ours.scaling_factor, what="scaled latents")


@pytest.mark.parametrize("name", SMALL)
def test_gradients_equal_diffusers(name: str) -> None:
    ours, theirs = build_pair(SMALL[name])
    ours.double()
    theirs.double()
    images = torch.randn(2, 3, 8, 16, dtype=torch.float64)
    cotangent = torch.randn(2, 3, 8, 16, dtype=torch.float64)
    given, expected = (images.clone().requires_grad_() for _ in range(2))
    (ours.decoder(ours.encoder(given)) * cotangent).sum().backward()
    (theirs.decode(theirs.encode(expected).latent).sample * cotangent).sum().backward()
    gradients = to_diffusers_state_dict({key: parameter.grad for key, parameter in ours.named_parameters()})
    assert gradients.keys() == {key for key, _ in theirs.named_parameters()}
    assert_rms_close(given.grad, expected.grad, torch.float32, backward=True, what="images")
    for key, parameter in theirs.named_parameters():
        assert_rms_close(gradients[key], parameter.grad, torch.float32, backward=True, what=key)


def test_it_learns_in_both_memory_layouts() -> None:
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    losses = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = DCAE(SMALL["imagenet"]).train().to(memory_format=layout)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        losses[layout] = []
        for _ in range(20):
            loss = (model.decoder(model.encoder(images.to(memory_format=layout))) - images).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[layout].append(loss.item())
    first, second = losses.values()
    assert first[-1] < 0.5 * first[0]
    assert first[0] == pytest.approx(second[0], rel=1e-4)
    assert first[3] == pytest.approx(second[3], rel=1e-2)


def test_shapes_without_storage() -> None:
    with torch.device("meta"):
        model = DCAE(DCAE_PRESETS["dc-ae-f64c128-in-1.0"]).eval()
        latents = model.encode(torch.empty(2, 3, 128, 192))
    assert latents.shape == (2, 128, 2, 3)
    assert model.decode(latents).shape == (2, 3, 128, 192)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_16_bit_weights_stay_close(dtype: torch.dtype) -> None:
    model = DCAE(SMALL["sana"]).eval()
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    expected = model.decode(model.encode(images))
    model.to(dtype)
    actual = model.decode(model.encode(images))
    assert actual.dtype == dtype
    error = (actual.float() - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()
    assert error < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_depth_list": (1, 1, 1)}, "encoder_depth_list has 3 entries for 2 stages"),
        ({"decoder_depth_list": (1, 0)}, r"decoder_depth_list \(1, 0\).*only the first may have depth 0"),
        ({"decoder_norm": ("bn2d",)}, "decoder_norm has 1 entries for 2 stages"),
        (
            {"encoder_width_list": (8, 8, 8), "encoder_depth_list": (1, 1, 1)},
            "the encoder has 3 stages, the decoder 2",
        ),
    ],
)
def test_impossible_shapes_are_refused(change: dict, message: str) -> None:
    shape = {
        "encoder_width_list": (8, 16),
        "encoder_depth_list": (1, 1),
        "decoder_width_list": (8, 16),
        "decoder_depth_list": (1, 1),
    }
    with pytest.raises(ValueError, match=message):
        DCAEConfig(**(shape | change))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", SMALL)
def test_inference_equals_training(name: str, layout: torch.memory_format) -> None:
    """Without gradients a CPU computes in another layout and order, and the images come out contiguous."""
    model = DCAE(SMALL[name]).eval()
    randomise(model)
    images = torch.randn(1, 3, 24, 16)
    latents = model.encoder(images).detach()
    expected = model.decoder(latents).detach()
    model.to(memory_format=layout).requires_grad_(False)
    for _ in range(2):
        with torch.no_grad():
            assert_rms_close(model.encoder(images), latents, what="latents")
            decoded = model.decoder(latents)
        assert_rms_close(decoded, expected, what="images")
        assert decoded.is_contiguous()


@pytest.mark.parametrize("name", ["sana", "imagenet"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_compiler_takes_the_decoder_as_one_graph(name: str, layout: torch.memory_format) -> None:
    model = DCAE(SMALL[name]).eval()
    randomise(model)
    latents = torch.randn(2, model.latent_channels, 4, 6)
    with torch.no_grad():
        expected = model.raw_decode(latents)
    model.to(memory_format=layout)
    torch.compiler.reset()
    compiled = torch.compile(model.raw_decode, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_rms_close(compiled(latents), expected)
    assert_rms_close(compiled(latents), expected, what="with gradients")


def test_prepared_for_decoding_in_bf16() -> None:
    model = DCAE(SMALL["sana"]).eval()
    randomise(model)
    latents = torch.randn(2, model.latent_channels, 4, 4)
    with torch.no_grad():
        expected = model.decode(latents)
    assert model.prepare_for_decoding(torch.bfloat16) is model
    actual = model.decode(latents)
    assert actual.dtype == torch.bfloat16
    assert not actual.requires_grad
    error = (actual.float() - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()
    assert error < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_prepared_for_decoding_on_a_gpu(compile: bool) -> None:
    model = DCAE(SMALL["sana"]).eval()
    randomise(model)
    latents = torch.randn(2, model.latent_channels, 8, 8)
    with torch.no_grad():
        expected = model.decode(latents)
    model.cuda().prepare_for_decoding(torch.bfloat16, compile=compile)
    with torch.inference_mode():
        actual = model.decode(latents.cuda()).float().cpu()
    assert (actual - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt() < 0.05
