"""Scaling, size checks and independence of the batch, for any autoencoder."""

import copy

import pytest
import torch
from torch import Tensor, nn

from sana.models.autoencoder.base import Autoencoder
from sana.models.autoencoder.dc_ae import DCAE, DCAEConfig
from sana.models.autoencoder.tiling import AUTO_TILE_PIXELS, Tiling


class Halving(Autoencoder):
    """Raw latents are every second pixel; remembers the batch sizes it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.scaling_factor, self.shift_factor = 4.0, 0.25
        self.latent_channels, self.downsample_factor = 3, 2
        self.batches: list[int] = []

    def raw_encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        self.batches.append(len(images))
        return images[..., ::2, ::2]

    def raw_decode(self, latents: Tensor) -> Tensor:
        self.batches.append(len(latents))
        return latents.repeat_interleave(2, -1).repeat_interleave(2, -2)


def test_latents_are_shifted_then_scaled_and_back() -> None:
    model, images = Halving(), torch.rand(3, 3, 4, 6)
    latents = model.encode(images)
    torch.testing.assert_close(latents, (images[..., ::2, ::2] - 0.25) * 4)
    torch.testing.assert_close(model.decode(latents)[..., ::2, ::2], images[..., ::2, ::2])


@pytest.mark.parametrize(("training", "batches"), [(False, [1, 1, 1]), (True, [3])])
def test_images_run_one_by_one_on_a_cpu_unless_training(training: bool, batches: list[int]) -> None:
    model = Halving().train(training)
    model.encode(torch.rand(3, 3, 4, 4))
    assert model.batches == batches


def test_an_empty_batch_passes() -> None:
    assert Halving().eval().encode(torch.empty(0, 3, 4, 4)).shape == (0, 3, 2, 2)


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(batch: int) -> None:
    model = DCAE(
        DCAEConfig(
            latent_channels=8, encoder_width_list=(8, 16, 32), encoder_depth_list=(0, 1, 1), head_dim=16,
            encoder_block_type=("ResBlock", "ResBlock", "EViTS5_GLU"), decoder_width_list=(8, 16, 32),
            decoder_depth_list=(0, 1, 1), decoder_block_type=("ResBlock", "ResBlock", "EViTS5_GLU"),
        )
    ).eval()  # fmt: skip
    latents, images = torch.randn(batch, 8, 6, 4), torch.randn(batch, 3, 24, 16)
    decoded, encoded = model.decode(latents), model.encode(images)
    for i in range(batch):
        assert torch.equal(decoded[i : i + 1], model.decode(latents[i : i + 1].clone()))
        assert torch.equal(encoded[i : i + 1], model.encode(images[i : i + 1].clone()))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 4, 5), "image size 4x5 .* not divisible by 2"),
        ((1, 3, 3, 4), "image size 3x4 .* not divisible by 2"),
        ((1, 3, 0, 4), "image size 0x4"),
        ((1, 1, 4, 4), r"images must be \(B, 3, H, W\), got \(1, 1, 4, 4\)"),
        ((3, 4, 4), r"images must be \(B, 3, H, W\), got \(3, 4, 4\)"),
    ],
)
def test_images_that_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Halving().encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 4, 2, 2), (3, 2, 2)])
def test_latents_that_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"latents must be \(B, 3, h, w\)"):
        Halving().decode(torch.zeros(shape))


class Scaling(Halving):
    """Decodes through a convolution, so that there is a layout to choose."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def raw_decode(self, latents: Tensor) -> Tensor:
        return self.conv(super().raw_decode(latents))


def test_preparing_freezes_casts_and_lays_out_and_takes_back_what_it_can() -> None:
    model = Scaling().train()
    expected = model.state_dict()["conv.weight"].bfloat16()
    assert model.prepare_for_decoding(torch.bfloat16) is model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(model.conv.weight, expected)
    model.prepare_for_decoding()
    assert model.dtype == torch.bfloat16, "None keeps the dtype"
    model.prepare_for_decoding(torch.float32, channels_last=False)
    assert model.conv.weight.is_contiguous()
    assert torch.equal(model.conv.weight, expected.float())


def test_compiled_code_is_made_once_at_the_first_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def stand_in(function):
        compiled.append(function)
        return lambda latents: function(latents) + 1

    monkeypatch.setattr(torch, "compile", stand_in)
    model, latents = Scaling(), torch.randn(1, 3, 2, 2)
    plain = model.eval().decode(latents)
    model.prepare_for_decoding(compile=True)
    assert not compiled
    for _ in range(2):
        torch.testing.assert_close(model.decode(latents), plain + 1)
    assert len(compiled) == 1
    assert torch.equal(model.encode(torch.ones(1, 3, 2, 2)), torch.full((1, 3, 1, 1), 3.0)), "encoding is as it was"
    model.prepare_for_decoding(compile=False)
    torch.testing.assert_close(model.decode(latents), plain)


def test_a_copy_of_a_compiled_autoencoder_decodes_with_its_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)
    model, latents = Scaling().prepare_for_decoding(compile=True), torch.randn(1, 3, 2, 2)
    model.decode(latents)
    twin = copy.deepcopy(model)
    twin.conv.weight.zero_()
    twin.conv.bias.fill_(7)
    assert torch.equal(twin.decode(latents), torch.full((1, 3, 4, 4), 7.0))
    assert not torch.equal(model.decode(latents), twin.decode(latents))


def tiles_of_two() -> DCAE:
    return DCAE(
        DCAEConfig(
            latent_channels=4, encoder_width_list=(8, 16), encoder_depth_list=(1, 1), decoder_width_list=(8, 16),
            decoder_depth_list=(1, 1), head_dim=8, encoder_block_type=("ResBlock", "EViT_GLU"),
            decoder_block_type=("ResBlock", "EViT_GLU"),
        )
    ).eval()  # fmt: skip


def remember_tiles(model: DCAE, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, Tiling]]:
    """Kind of call, images in it, and the tiles, of every run in tiles from now on."""
    calls: list[tuple[str, int, Tiling]] = []
    for name in ("raw_encode_tiled", "raw_decode_tiled"):
        run = getattr(model, name)
        monkeypatch.setattr(
            model,
            name,
            lambda batch, tiling, name=name, run=run: (calls.append((name, len(batch), tiling)), run(batch, tiling))[1],
            raising=False,
        )
    return calls


@torch.no_grad()
def test_tiling_is_used_above_its_size_until_it_is_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = tiles_of_two(), torch.randn(2, 3, 16, 24)
    calls, latents = remember_tiles(model, monkeypatch), model.encode(images)
    whole = model.decode(latents)
    model.enable_tiling(24, 24, 8, 4)
    assert (model.tiling, model.tiling_for(16, 24), calls) == (Tiling(24, 24, 8, 4), None, [])
    model.encode(images)
    assert calls == [], "an image no larger than the size is done whole"
    model.enable_tiling(16, 16, 8, 4)
    tiling = Tiling(16, 16, 8, 4)
    assert model.tiling_for(16, 24) == tiling
    torch.testing.assert_close(model.encode(images), latents)
    torch.testing.assert_close(model.decode(latents), whole)
    assert calls == [("raw_encode_tiled", 1, tiling)] * 2 + [("raw_decode_tiled", 1, tiling)] * 2
    model.disable_tiling()
    model.decode(latents)
    assert (model.tiling, len(calls)) == (None, 4)
    model.enable_tiling()
    assert model.tiling == Tiling(512, 512, 448, 448), "a call starts from the defaults"


def test_large_images_are_tiled_unasked_where_that_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    assert AUTO_TILE_PIXELS == 2048 * 2048
    model = tiles_of_two()
    assert model.tiling_for(2048, 2048) is None
    assert model.tiling_for(2048, 2050) == model.tiling_for(8192, 514) == Tiling()
    monkeypatch.setattr("sana.models.autoencoder.base.AUTO_TILE_PIXELS", 100)
    calls, latents = remember_tiles(model, monkeypatch), torch.randn(1, 4, 6, 10)
    decoded = model.decode(latents)
    assert decoded.requires_grad and not calls, "gradients are wanted, and nobody asked for tiles"
    with torch.no_grad():
        torch.testing.assert_close(model.decode(latents), decoded)
        assert len(calls) == 1
        model.train().decode(latents)
        assert len(calls) == 1
    model.eval().requires_grad_(False).decode(latents)
    assert len(calls) == 2, "frozen weights want no gradient"
    model.disable_tiling()
    model.decode(latents)
    assert (len(calls), model.tiling_for(8192, 8192)) == (2, None)
    assert Halving().tiling_for(8192, 8192) is None


@pytest.mark.parametrize("training", [False, True])
def test_tiles_that_were_asked_for_serve_no_training(training: bool) -> None:
    model = tiles_of_two().train(training)
    model.enable_tiling(16, 16, 8, 8)
    with torch.set_grad_enabled(not training):
        for run, batch in ((model.encode, torch.randn(1, 3, 16, 24)), (model.decode, torch.randn(1, 4, 8, 12))):
            with pytest.raises(ValueError, match=r"an image of 16x24 .* use torch.no_grad\(\), or call disable_tiling"):
                run(batch)
    model.encode(torch.randn(1, 3, 16, 16))


def test_a_copy_tiles_like_the_original_when_told() -> None:
    model = tiles_of_two()
    twin = copy.deepcopy(model)
    model.disable_tiling()
    model.enable_slicing()
    model.progress = False
    assert twin.tile_like(model) is twin
    assert (twin.tiling, twin.progress, twin.tiling_for(8192, 8192)) == (None, False, None)
    model.enable_tiling(64, 64)
    assert twin.tile_like(model).tiling_for(128, 128) == model.tiling
    twin.train().requires_grad_(False)
    batches: list[int] = []
    twin.decoder.register_forward_hook(lambda _, inputs, out: batches.append(len(out)))
    twin.decode(torch.randn(2, 4, 4, 4))
    assert batches == [1, 1], "slices came along"


def test_sizes_of_tiles_are_multiples_of_the_factor() -> None:
    with pytest.raises(ValueError, match="tile_sample_min_width must be a positive multiple of 2,"):
        tiles_of_two().enable_tiling(8, 7)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_slicing_runs_images_one_by_one(device: str) -> None:
    model = Halving().to(device).train()
    model.enable_slicing()
    assert model.encode(torch.rand(3, 3, 4, 4, device=device)).shape == (3, 3, 2, 2)
    model.disable_slicing()
    model.decode(torch.rand(2, 3, 2, 2, device=device))
    assert model.batches == [1, 1, 1, 2]


def test_compiled_pieces_of_tiles_are_made_once_and_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def stand_in(function, dynamic):
        compiled.append(function)
        assert dynamic
        return lambda x: function(x) + 1

    monkeypatch.setattr(torch, "compile", stand_in)
    model, latents = tiles_of_two(), torch.randn(1, 4, 8, 12)
    model.enable_tiling(16, 16, 8, 8)
    model.prepare_for_decoding()
    plain = model.decode(latents)
    assert not compiled
    model.prepare_for_decoding(compile=True)
    for _ in range(2):
        torch.testing.assert_close(model.decode(latents), plain + 1)
    assert len(compiled) == 1
    twin = copy.deepcopy(model)
    twin.decode(latents)
    assert len(compiled) == 2
    model.encode(torch.randn(1, 3, 16, 24))
    assert len(compiled) == 2, "encoding is as it was"
