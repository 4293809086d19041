"""The constructor arguments of every Sana transformer, with the official names. No layer is built here."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from sana.ops.backend import plain_kind
from sana.registry import suggest

ATTENTION_TYPES = ("linear", "flash", "vanilla", "triton_linear")
CROSS_ATTENTION_TYPES = ("flash", "vanilla")
FFN_TYPES = ("glumbconv", "glumbconv_dilate", "mlp", "dwmlp", "mbconvpreglu", "triton_mbconvpreglu")
POSITION_TYPES = ("sincos", "3d_rope", "flux_rope")
# Official arguments that never reach a layer of these networks: accepted when they ask for nothing.
NO_EFFECT = {"config", "micro_condition", "lr_scale", "null_embed_path", "autocast_linear_attn"}


@dataclass(frozen=True)
class SanaArchitecture:
    """Shape and options of a Sana transformer. Field names and defaults are the official constructor's.

    Attributes:
        input_size: latent height and width that `pos_embed` is made for, in latent pixels.
        patch_size: side of the square of latent pixels that becomes one token.
        in_channels: latent channels.
        hidden_size: width D of the tokens.
        depth: number of blocks.
        num_heads: heads of the cross-attention and of softmax self-attention.
        mlp_ratio: width of the feed-forward network (of one half, for gated ones) over `hidden_size`.
        class_dropout_prob: probability, in training, of replacing a caption by the learned null caption.
        learn_sigma: kept for the official YAMLs; the number of outputs follows `pred_sigma` alone.
        pred_sigma: whether the network gives twice `in_channels` channels (prediction and variance).
        drop_path: largest stochastic-depth probability; it grows linearly from 0 over the blocks.
        caption_channels: width of the text embeddings.
        pe_interpolation: divisor of the positions in the position embedding.
        model_max_length: number L of text tokens of the learned null caption.
        qk_norm: whether self-attention normalises queries and keys (ignored by `attn_type="vanilla"`).
        y_norm: whether projected captions pass an RMSNorm.
        norm_eps: eps of that norm.
        attn_type: "linear", "flash" or "vanilla" self-attention; "triton_linear" is linear by Triton kernels.
        ffn_type: "glumbconv", "glumbconv_dilate", "mlp", "dwmlp" or "mbconvpreglu"; "triton_mbconvpreglu" is the last
            by Triton kernels.
        use_pe: whether a position embedding is used at all.
        y_norm_scale_factor: initial weight of the caption norm.
        patch_embed_kernel: kernel of the patch convolution; None means `patch_size`.
        mlp_acts: activations of the gated feed-forward networks (expansion, gate, output).
        linear_head_dim: width d of a head of linear attention.
        cross_norm: whether cross-attention normalises queries and keys.
        cross_attn_type: "flash" (fused) or "vanilla" (plain products, which forward-mode differentiation accepts).
        cfg_embed: whether the guidance scale is embedded and added to the time embedding.
        cfg_embed_scale: factor of the guidance scale before it is embedded.
        logvar: whether a log-variance head reads the time embedding.
        logvar_scale_factor: factor of that head's output.
        pos_embed_type: "sincos" (added to the tokens) or "3d_rope" / "flux_rope" (rotates queries and keys).
        timestep_norm_scale_factor: divisor of the timestep before it is embedded.
        truncate_timestep: whether fractional timesteps are cut to integers when that divisor is 1. The May-2025 release
            does so; the Nov-2024 release does not.
        clip_fp16: whether self-attention outputs are clipped to +-65504, for checkpoints trained in float16.
        copy_blocks_num: number of copied blocks of the ControlNet branch; no other network uses it.
    """

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1
    learn_sigma: bool = True
    pred_sigma: bool = True
    drop_path: float = 0.0
    caption_channels: int = 2304
    pe_interpolation: float = 1.0
    model_max_length: int = 300
    qk_norm: bool = False
    y_norm: bool = False
    norm_eps: float = 1e-5
    attn_type: str = "flash"
    ffn_type: str = "mlp"
    use_pe: bool = True
    y_norm_scale_factor: float = 1.0
    patch_embed_kernel: int | None = None
    mlp_acts: tuple[str | None, ...] = ("silu", "silu", None)
    linear_head_dim: int = 32
    cross_norm: bool = False
    cross_attn_type: str = "flash"
    cfg_embed: bool = False
    cfg_embed_scale: float = 1.0
    logvar: bool = False
    logvar_scale_factor: float = 1.0
    pos_embed_type: str = "sincos"
    timestep_norm_scale_factor: float = 1.0
    truncate_timestep: bool = True
    clip_fp16: bool = False
    copy_blocks_num: int = 7

    @classmethod
    def from_kwargs(cls, kwargs: dict[str, Any]) -> "SanaArchitecture":
        """Returns the checked architecture of official constructor arguments.

        Raises:
            TypeError: an argument is unknown.
            ValueError: a value is impossible.
        """
        known = [field.name for field in fields(cls)]
        values = dict(kwargs)
        for name in sorted(set(values) - set(known)):
            if name not in NO_EFFECT:
                raise TypeError(f"Sana got an unknown argument {name!r}.{suggest(name, known)}")
            if values.pop(name) and name == "micro_condition":
                raise ValueError("micro_condition=True has no effect in any Sana network; leave it False.")
        if "mlp_acts" in values:
            values["mlp_acts"] = tuple(values["mlp_acts"])
        architecture = cls(**values)
        architecture._check()
        return architecture

    def to_kwargs(self) -> dict[str, Any]:
        """Returns the arguments as a dict that JSON can hold and `from_kwargs` accepts."""
        return {**asdict(self), "mlp_acts": list(self.mlp_acts)}

    def _check(self) -> None:
        for key, allowed in (
            ("attn_type", ATTENTION_TYPES),
            ("cross_attn_type", CROSS_ATTENTION_TYPES),
            ("ffn_type", FFN_TYPES),
            ("pos_embed_type", POSITION_TYPES),
        ):
            value = getattr(self, key)
            if value not in allowed:
                raise ValueError(
                    f"{key}={value!r} is not known.{suggest(str(value), list(allowed))} Allowed: {allowed}."
                )
        for key in ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "linear_head_dim"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, not {getattr(self, key)}.")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}.")
        if plain_kind(self.attn_type)[0] == "linear" and self.hidden_size % self.linear_head_dim:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of linear_head_dim {self.linear_head_dim}."
            )
        if self.use_pe and self.pos_embed_type == "sincos" and self.hidden_size % 4:
            raise ValueError(f"the sincos position embedding needs hidden_size % 4 == 0, not {self.hidden_size}.")
        if self.use_rope and self.head_dim % 4:
            raise ValueError(
                f"{self.pos_embed_type} needs a head dimension that is a multiple of 4, not {self.head_dim}."
            )
        if len(self.mlp_acts) != 3:
            raise ValueError(f"mlp_acts must hold three names, not {list(self.mlp_acts)}.")

    @property
    def use_rope(self) -> bool:
        """Whether queries and keys are rotated."""
        return self.use_pe and self.pos_embed_type != "sincos"

    @property
    def head_dim(self) -> int:
        """Width of a self-attention head."""
        linear = plain_kind(self.attn_type)[0] == "linear"
        return self.linear_head_dim if linear else self.hidden_size // self.num_heads

    @property
    def out_channels(self) -> int:
        """Channels of the network's output."""
        return self.in_channels * 2 if self.pred_sigma else self.in_channels
