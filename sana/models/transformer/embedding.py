"""Embeddings of patches, times and captions, and the output layer. Position embeddings are in `position.py`."""

import math

import torch
from torch import Tensor, nn

from sana.models.layers.linear import Linear
from sana.models.transformer.mix_ffn import Grid, Mlp
from sana.ops import modulated_layer_norm
from sana.ops.backend import choose
from sana.ops.linear.cpu import linear_cpu


class PatchEmbed(nn.Module):
    """Turns squares of latent pixels into tokens.

    Args:
        patch_size: side of a square; the stride of the convolution.
        in_channels: latent channels.
        dim: width D of the tokens.
        kernel_size: of the convolution, default `patch_size`; odd kernels are padded to keep the grid.
    """

    def __init__(self, patch_size: int, in_channels: int, dim: int, kernel_size: int | None = None) -> None:
        super().__init__()
        kernel_size = kernel_size or patch_size
        padding = kernel_size // 2 if kernel_size % 2 else 0
        self.proj = nn.Conv2d(in_channels, dim, kernel_size, stride=patch_size, padding=padding)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D)."""
        if self.proj.kernel_size == self.proj.stride == (1, 1) and choose("auto", latents) == "cpu":
            return linear_cpu(latents.flatten(2).transpose(1, 2), self.proj.weight, self.proj.bias)
        return self.proj(latents.contiguous(memory_format=torch.channels_last)).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of a number, then two linear layers (DiT).

    Args:
        dim: width D of the output.
        frequency_embedding_size: number of sinusoidal features.
    """

    def __init__(self, dim: int, frequency_embedding_size: int = 256) -> None:
        super().__init__()
        self.frequency_embedding_size = frequency_embedding_size
        self.mlp = nn.Sequential(Linear(frequency_embedding_size, dim), nn.SiLU(), Linear(dim, dim))

    def forward(self, timestep: Tensor) -> Tensor:
        """(B,) -> (B, D), in the dtype of the weights."""
        return self.mlp(timestep_embedding(timestep, self.frequency_embedding_size).to(self.mlp[0].weight.dtype))


def timestep_embedding(timestep: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Cosines, then sines, of a number at geometrically spaced frequencies; an odd width ends with a zero.

    Args:
        timestep: (B,), may be fractional.
        dim: number of features.
        max_period: period of the slowest frequency over 2 pi.

    Returns:
        (B, dim) float32.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angles = timestep.float()[:, None] * torch.exp(-math.log(max_period) * exponent)  # (B, half)
    features = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return nn.functional.pad(features, (0, 1)) if dim % 2 else features


class CaptionEmbedder(nn.Module):
    """Projects text embeddings to the tokens' width and, in training, replaces some captions by a learned null caption.

    Args:
        caption_channels: width C of the text embeddings.
        dim: width D of the output.
        dropout: probability of replacing a caption.
        num_tokens: number L of tokens of the null caption.
    """

    y_embedding: Tensor

    def __init__(self, caption_channels: int, dim: int, dropout: float, num_tokens: int = 300) -> None:
        super().__init__()
        self.dropout = dropout
        self.y_proj = Mlp(caption_channels, dim, dim)
        # A buffer, not a parameter: it is random, never trained, and part of every official checkpoint.
        self.register_buffer("y_embedding", torch.randn(num_tokens, caption_channels) / caption_channels**0.5)

    def forward(self, caption: Tensor, train: bool = False, force_drop_ids: Tensor | None = None) -> Tensor:
        """Projects captions.

        Args:
            caption: (B, 1, L, C).
            train: whether to drop captions at random. The random numbers come from PyTorch's CPU generator.
            force_drop_ids: (B,), 1 where the caption is to be replaced; overrides the random choice.

        Returns:
            (B, 1, L, D).
        """
        if (train and self.dropout > 0) or force_drop_ids is not None:
            caption = self.drop(caption, force_drop_ids)
        return self.y_proj(caption)

    def drop(self, caption: Tensor, force_drop_ids: Tensor | None = None) -> Tensor:
        """Returns the captions with some rows replaced by the null caption."""
        if caption.shape[2:] != self.y_embedding.shape:
            raise ValueError(
                f"captions of shape {tuple(caption.shape[2:])} cannot be replaced by the null caption of shape "
                f"{tuple(self.y_embedding.shape)}: pad captions to model_max_length, or set class_dropout_prob to 0."
            )
        if force_drop_ids is None:
            dropped = torch.rand(caption.shape[0]) < self.dropout
        else:
            dropped = force_drop_ids == 1
        return torch.where(dropped.to(caption.device)[:, None, None, None], self.y_embedding.to(caption.dtype), caption)


class FinalLayer(nn.Module):
    """Modulated LayerNorm and a linear layer from tokens to the values of their patches (official `T2IFinalLayer`).

    Args:
        dim: width D of the tokens.
        patch_size: side p of a patch.
        out_channels: channels C' of the network's output.
    """

    backend = "auto"

    def __init__(self, dim: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = Linear(dim, patch_size * patch_size * out_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Tokens (B, N, D) and time embedding (B, D) -> (B, N, p * p * C')."""
        shift, scale = (self.scale_shift_table[None] + time[:, None]).chunk(2, dim=1)  # (B, 1, D)
        return self.linear(modulated_layer_norm(x, shift, scale, self.norm_final.eps, backend=self.backend))


def unpatchify(x: Tensor, grid: Grid, patch_size: int) -> Tensor:
    """Tokens (B, N, p * p * C) on an (H, W) grid -> image (B, C, H * p, W * p)."""
    return nn.functional.pixel_shuffle(
        x.unflatten(1, grid).unflatten(-1, (patch_size**2, -1)).permute(0, 4, 3, 1, 2).flatten(1, 2), patch_size
    )
