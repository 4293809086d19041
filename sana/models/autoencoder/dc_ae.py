"""Deep-compression autoencoder (DC-AE, Chen et al. 2024; Sana paper section 2.1): config, encoder, decoder, presets.

Layers are in `dc_ae_blocks.py`; diffusers' key names in `dc_ae_keys.py`; files in `loading.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sana.models.autoencoder.base import Autoencoder
from sana.models.autoencoder.dc_ae_blocks import build_block
from sana.models.autoencoder.dc_ae_layers import (
    ConvLayer,
    OpSequential,
    ResidualBlock,
    build_act,
    build_norm,
)
from sana.models.autoencoder.dc_ae_resample import (
    ChannelAverage,
    ChannelDuplicate,
    build_downsample,
    build_upsample,
)
from sana.models.autoencoder.streaming import stream
from sana.models.autoencoder.tiling import Tiling
from sana.ops.backend import choose

DEFAULT_SCALING_FACTOR = 0.41407  # what the official code takes when a config names none


@dataclass(frozen=True)
class DCAEConfig:
    """Shape of a DC-AE, in efficientvit's words; stage 0 has the highest resolution.

    A per-stage field may be given as one value for all stages. Depth 0 in the first stage means that the image is
    downsampled before any block (the width of stage 0 is then unused).
    """

    latent_channels: int = 32
    encoder_width_list: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_depth_list: tuple[int, ...] = (2, 2, 2, 2, 2, 2)
    encoder_block_type: tuple[str, ...] | str = "ResBlock"
    encoder_norm: tuple[str, ...] | str = "trms2d"
    encoder_act: tuple[str, ...] | str = "silu"
    downsample_block_type: str = "ConvPixelUnshuffle"
    encoder_out_shortcut: bool = True
    decoder_width_list: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    decoder_depth_list: tuple[int, ...] = (2, 2, 2, 2, 2, 2)
    decoder_block_type: tuple[str, ...] | str = "ResBlock"
    decoder_norm: tuple[str, ...] | str = "trms2d"
    decoder_act: tuple[str, ...] | str = "silu"
    upsample_block_type: str = "ConvPixelShuffle"
    decoder_in_shortcut: bool = True
    decoder_out_norm: str = "trms2d"
    decoder_out_act: str = "relu"
    in_channels: int = 3
    head_dim: int = 32
    scaling_factor: float | None = None

    def __post_init__(self) -> None:
        for side in ("encoder", "decoder"):
            stages = len(getattr(self, f"{side}_width_list"))
            for name in ("width_list", "depth_list", "block_type", "norm", "act"):
                value = getattr(self, f"{side}_{name}")
                value = (value,) * stages if isinstance(value, str) else tuple(value)
                if len(value) != stages:
                    raise ValueError(f"{side}_{name} has {len(value)} entries for {stages} stages: {value}")
                object.__setattr__(self, f"{side}_{name}", value)
            depths = getattr(self, f"{side}_depth_list")
            if stages < 2 or 0 in depths[1:] or min(depths) < 0:
                raise ValueError(
                    f"{side}_depth_list {depths}: needs two stages or more, and only the first may have depth 0"
                )
        if len(self.encoder_width_list) != len(self.decoder_width_list):
            raise ValueError(
                f"the encoder has {len(self.encoder_width_list)} stages, the decoder {len(self.decoder_width_list)}"
            )

    @property
    def downsample_factor(self) -> int:
        """Image pixels per latent pixel along one side."""
        return 2 ** (len(self.encoder_width_list) - 1)


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> raw latents (B, C, H / f, W / f)."""

    def __init__(self, config: DCAEConfig) -> None:
        super().__init__()
        widths, depths = config.encoder_width_list, config.encoder_depth_list
        last = len(widths) - 1
        if depths[0] > 0:
            self.project_in = ConvLayer(config.in_channels, widths[0])
        else:
            self.project_in = build_downsample(
                config.downsample_block_type, config.in_channels, widths[1], shortcut=False
            )
        self.stages = nn.ModuleList()
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            ops = [
                build_block(
                    config.encoder_block_type[i],
                    width,
                    head_dim=config.head_dim,
                    norm=config.encoder_norm[i],
                    act=config.encoder_act[i],
                )
                for _ in range(depth)
            ]
            if i < last and depth > 0:
                ops.append(build_downsample(config.downsample_block_type, width, widths[i + 1], shortcut=True))
            self.stages.append(OpSequential(ops))
        head = OpSequential([ConvLayer(widths[-1], config.latent_channels)])
        if config.encoder_out_shortcut:
            head = ResidualBlock(head, ChannelAverage(widths[-1], config.latent_channels, 1))
        self.project_out = head

    def units(self) -> list[nn.Module]:
        """What `forward` runs, in order: convolutions, changes of resolution, blocks."""
        return [self.project_in, *(unit for stage in self.stages for unit in stage.op_list), self.project_out]

    def forward(self, images: Tensor) -> Tensor:
        x = self.project_in(like_weights(self, images))
        for stage in self.stages:
            x = stage(x)
        x = self.project_out(x)
        return x if torch.is_grad_enabled() else x.contiguous()


class Decoder(nn.Module):
    """Raw latents (B, C, h, w) -> images (B, 3, h * f, w * f)."""

    def __init__(self, config: DCAEConfig) -> None:
        super().__init__()
        widths, depths = config.decoder_width_list, config.decoder_depth_list
        last = len(widths) - 1
        stem = ConvLayer(config.latent_channels, widths[-1])
        if config.decoder_in_shortcut:
            stem = ResidualBlock(stem, ChannelDuplicate(config.latent_channels, widths[-1], 1))
        self.project_in = stem
        self.stages = nn.ModuleList()
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            ops = []
            if i < last and depth > 0:
                ops.append(build_upsample(config.upsample_block_type, widths[i + 1], width, shortcut=True))
            ops += [
                build_block(
                    config.decoder_block_type[i],
                    width,
                    head_dim=config.head_dim,
                    norm=config.decoder_norm[i],
                    act=config.decoder_act[i],
                )
                for _ in range(depth)
            ]
            self.stages.append(OpSequential(ops))
        if depths[0] > 0:
            width, out = widths[0], ConvLayer(widths[0], config.in_channels)
        else:
            width = widths[1]
            out = build_upsample(config.upsample_block_type, width, config.in_channels, shortcut=False)
        self.project_out = OpSequential(
            [build_norm(config.decoder_out_norm, width), build_act(config.decoder_out_act), out]
        )

    def units(self) -> list[nn.Module]:
        """What `forward` runs, in order: convolutions, changes of resolution, blocks."""
        stages = reversed(self.stages)
        return [self.project_in, *(unit for stage in stages for unit in stage.op_list), self.project_out]

    def forward(self, latents: Tensor) -> Tensor:
        x = self.project_in(like_weights(self, latents))
        for stage in reversed(self.stages):
            x = stage(x)
        x = self.project_out(x)
        return x if torch.is_grad_enabled() else x.contiguous()


def layout_of(network: nn.Module, x: Tensor) -> torch.memory_format:
    """Channels last, if the network's convolutions are laid out so or run on a CPU for inference."""
    first = next(parameter for parameter in network.parameters() if parameter.ndim == 4)
    last = not first.is_contiguous() and first.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last or choose("auto", x) == "cpu" else torch.contiguous_format


def like_weights(network: nn.Module, x: Tensor) -> Tensor:
    """`x` with channels last in memory, where `layout_of` says so; else as it is."""
    if layout_of(network, x) != torch.channels_last:
        return x
    x = x.contiguous(memory_format=torch.channels_last)
    if len(x) == 1 and x.stride(0) != x.numel() and not x.requires_grad:
        # A picture read as (H, W, 3) and permuted: oneDNN takes another kernel for the odd stride of its first axis,
        # and the whole picture would be rounded otherwise than its tiles.
        x = x.as_strided(x.shape, (x.numel(), *x.stride()[1:]))
    return x


class DCAE(Autoencoder):
    """The autoencoder of Sana. `encode`/`decode` scale (see `Autoencoder`); `encoder`/`decoder` do not.

    Tiling is exact, so images of more than `AUTO_TILE_PIXELS` are tiled without being asked for.

    Args:
        config: the shape; its `scaling_factor` of None means the official default 0.41407.
    """

    tiles_exactly = True

    def __init__(self, config: DCAEConfig) -> None:
        super().__init__()
        self.config = config
        self.scaling_factor = config.scaling_factor or DEFAULT_SCALING_FACTOR
        self.latent_channels = config.latent_channels
        self.downsample_factor = config.downsample_factor
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def raw_encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.encoder(images)

    def raw_decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents)

    def raw_encode_tiled(self, images: Tensor, tiling: Tiling) -> Tensor:
        """`raw_encode` in tiles; without gradients."""
        return stream(
            self.encoder.units(), images, tiling, factor=1, layout=layout_of(self.encoder, images),
            progress=self.progress, title="Encoding",
        )  # fmt: skip

    def raw_decode_tiled(self, latents: Tensor, tiling: Tiling) -> Tensor:
        """`raw_decode` in tiles; without gradients. What runs in tiles of the image is compiled if that was asked."""
        return stream(
            self.decoder.units(), latents, tiling, factor=self.downsample_factor,
            layout=layout_of(self.decoder, latents), compiler=self._compile_piece if self._compile else None,
            progress=self.progress, title="Decoding",
        )  # fmt: skip


def _sana_f32() -> DCAEConfig:
    blocks = ("ResBlock",) * 3 + ("EViTS5_GLU",) * 3
    return DCAEConfig(
        encoder_depth_list=(2, 2, 2, 3, 3, 3),
        encoder_block_type=blocks,
        downsample_block_type="Conv",
        decoder_depth_list=(3, 3, 3, 3, 3, 3),
        decoder_block_type=blocks,
        upsample_block_type="InterpolateConv",
        scaling_factor=0.41407,
    )


def _imagenet(latent_channels: int, deep_widths: tuple[int, ...], scaling_factor: float) -> DCAEConfig:
    widths = (128, 256, 512, 512, 1024, 1024, *deep_widths)
    attention = len(widths) - 3
    blocks = ("ResBlock",) * 3 + ("EViT_GLU",) * attention
    return DCAEConfig(
        latent_channels=latent_channels,
        encoder_width_list=widths,
        encoder_depth_list=(0, 4, 8) + (2,) * attention,
        encoder_block_type=blocks,
        decoder_width_list=widths,
        decoder_depth_list=(0, 5, 10) + (2,) * attention,
        decoder_block_type=blocks,
        decoder_norm=("bn2d",) * 3 + ("trms2d",) * attention,
        decoder_act=("relu",) * 3 + ("silu",) * attention,
        scaling_factor=scaling_factor,
    )


# The released autoencoders by name. In the original format only the name is stored, so the scaling factors stand here.
DCAE_PRESETS = {
    "dc-ae-f32c32-sana-1.0": _sana_f32(),
    "dc-ae-f32c32-sana-1.1": _sana_f32(),
    "dc-ae-f32c32-in-1.0": _imagenet(32, (), 0.3189),
    "dc-ae-f32c32-mix-1.0": _imagenet(32, (), 0.4552),
    "dc-ae-f64c128-in-1.0": _imagenet(128, (2048,), 0.2889),
    "dc-ae-f64c128-mix-1.0": _imagenet(128, (2048,), 0.4538),
    "dc-ae-f128c512-in-1.0": _imagenet(512, (2048, 2048), 0.4883),
    "dc-ae-f128c512-mix-1.0": _imagenet(512, (2048, 2048), 0.362),
}
