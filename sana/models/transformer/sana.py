"""The Linear DiT `Sana` and its multi-scale form `SanaMS`, with their presets. Config and weights are not read here."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sana.models.layers.linear import Linear
from sana.models.layers.norms import RMSNorm
from sana.models.transformer.architecture import SanaArchitecture
from sana.models.transformer.attention import readable_tokens
from sana.models.transformer.block import SanaBlock
from sana.models.transformer.caches import CachedSampling, TextCache, TimeCache
from sana.models.transformer.embedding import (
    CaptionEmbedder,
    FinalLayer,
    PatchEmbed,
    TimestepEmbedder,
    unpatchify,
)
from sana.models.transformer.position import Rotary, rotary_axes, rotary_table, sincos_table
from sana.models.transformer.rows import call_by_row, repeat_rows

Grid = tuple[int, int]
Output = Tensor | tuple[Tensor, Tensor]
BlockRunner = Callable[..., Any]


class Sana(CachedSampling, nn.Module):
    """Linear diffusion transformer for latents of one fixed square size (as released in November 2024).

    Args:
        **kwargs: the official constructor arguments; see `SanaArchitecture` for each.
    """

    pos_embed: Tensor
    fixed_size = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.architecture = arch = SanaArchitecture.from_kwargs(kwargs)
        self.gradient_checkpointing = False
        self._tables: dict[tuple[Any, ...], Tensor | None] = {}
        dim = arch.hidden_size
        self.x_embedder = PatchEmbed(arch.patch_size, arch.in_channels, dim, arch.patch_embed_kernel)
        self.t_embedder = TimestepEmbedder(dim)
        self.t_block = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        self.y_embedder = CaptionEmbedder(
            arch.caption_channels, dim, arch.class_dropout_prob, num_tokens=arch.model_max_length
        )
        if arch.cfg_embed:
            self.cfg_embedder = TimestepEmbedder(dim)
        if arch.logvar:
            self.logvar_linear = nn.Linear(dim, 1)
        if arch.y_norm:
            self.attention_y_norm = RMSNorm(dim, arch.y_norm_scale_factor, arch.norm_eps)
        # Part of every official checkpoint. The forward makes its table from height and width and does not read this.
        self.register_buffer("pos_embed", torch.zeros(1, self._base_size**2, dim))
        rates = [arch.drop_path * index / max(arch.depth - 1, 1) for index in range(arch.depth)]
        self.blocks = nn.ModuleList(SanaBlock(arch, rate) for rate in rates)
        self.final_layer = FinalLayer(dim, arch.patch_size, arch.out_channels)
        self.initialize_weights()

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """All constructor arguments, in a form that JSON can hold."""
        return self.architecture.to_kwargs()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.x_embedder.proj.weight.dtype

    def forward(
        self,
        x: Tensor,
        timestep: Tensor | TimeCache,
        y: Tensor | TextCache,
        mask: Tensor | None = None,
        data_info: dict[str, Any] | None = None,
        *,
        return_logvar: bool = False,
        jvp: bool = False,
        pag_layers: tuple[int, ...] = (),
        pag_rows: int = 0,
        batch_invariant: bool | None = None,
    ) -> Output:
        """Predicts the velocity (with `pred_sigma`, followed by the variance channels).

        Args:
            x: (B, C, H, W) latents.
            timestep: (B,) in [0, 1000]. `SanaMSCM`: TrigFlow angles in [0, pi / 2]. Or one of `cache_time`'s entries.
            y: (B, L, C_text) or (B, 1, L, C_text) text embeddings, or what `cache_text` made of them; then `timestep`
                is prepared too, and only the arguments of `denoise` count.
            mask: (b, L) or (b, 1, 1, L), non-zero for readable text tokens; B must be a multiple of b, whose rows are
                then repeated in order. None: all tokens are read.
            data_info: `cfg_scale` (B,) for `cfg_embed`; `control_signal` (B, C, H, W) for the ControlNet.
            return_logvar: whether to return also the log-variance (B, 1).
            jvp: whether the call is differentiated forward; gradient checkpointing is then off.
            pag_layers: indices of blocks whose self-attention is perturbed for the last `pag_rows` rows.
            pag_rows: number of rows at the END of the batch that are the perturbed branch of PAG.
            batch_invariant: whether a row's result must not depend, to the last bit, on the other rows of the batch.
                Rows are then computed one by one. None: on the CPU in evaluation mode.

        Returns:
            (B, C', H, W); with `return_logvar`, a pair with the log-variance.

        Raises:
            ValueError: the arguments do not fit the model or one another.
        """
        if isinstance(y, TextCache):
            assert isinstance(timestep, TimeCache), "prepared texts go with a prepared time"
            return self.denoise(x, timestep, y, pag_layers=pag_layers, pag_rows=pag_rows)
        assert isinstance(timestep, Tensor), "a prepared time goes with prepared texts"
        rows = x.shape[0]
        data_info = data_info or {}
        self._check_inputs(x, data_info, return_logvar, bool(batch_invariant))
        self._check_perturbation(x, tuple(pag_layers), pag_rows)
        inputs: dict[str, Tensor] = {"x": x, "timestep": timestep, "y": y if y.dim() == 4 else y.unsqueeze(1)}
        if mask is not None:
            inputs["mask"] = readable_tokens(mask.flatten(1))
        inputs |= {name: torch.as_tensor(data_info[name], device=x.device) for name in self._info_keys}
        options = {"return_logvar": return_logvar, "jvp": jvp, "pag_layers": frozenset(pag_layers)}
        inputs = {name: repeat_rows(value, rows) for name, value in inputs.items()}
        if self._by_row(x) if batch_invariant is None else batch_invariant:
            return call_by_row(self._predict, inputs, rows, pag_rows, options)
        return self._predict(**inputs, **options, pag_rows=pag_rows)

    def forward_with_dpmsolver(self, x: Tensor, timestep: Tensor, y: Tensor, **kwargs: Any) -> Tensor:
        """`forward` without the variance channels."""
        out = self(x, timestep, y, **kwargs)
        return out.chunk(2, dim=1)[0] if self.architecture.pred_sigma else out

    def _by_row(self, x: Tensor) -> bool:
        return x.device.type == "cpu" and not self.training

    def _predict(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor,
        mask: Tensor | None = None,
        *,
        return_logvar: bool = False,
        jvp: bool = False,
        pag_layers: frozenset[int] = frozenset(),
        pag_rows: int = 0,
        **info: Tensor,
    ) -> Output:
        grid = self._grid(x)
        time = self.embed_time(timestep, info.get("cfg_scale"))  # (B, D)
        text, mask = self.embed_text(y, mask)  # (B, L, D), (B, L)
        shared = {"y": text, "t": self.t_block(time), "mask": mask, "HW": grid, "rotary": self.rotary(grid, x.device)}
        identity_rows = [pag_rows if index in pag_layers else 0 for index in range(len(self.blocks))]
        run = self._block_runner(shared, checkpointing=not jvp)
        tokens = self.run_blocks(self.embed_latents(x, grid), identity_rows, run, info)  # (B, N, D)
        out = unpatchify(self.final_layer(tokens, time), grid, self.architecture.patch_size)
        if return_logvar:
            return out, self.logvar_linear(time) * self.architecture.logvar_scale_factor
        return out

    def run_blocks(self, tokens: Tensor, identity_rows: list[int], run: BlockRunner, info: dict[str, Tensor]) -> Tensor:
        """Runs all blocks on tokens (B, N, D); `run(block, tokens, identity_rows=...)` supplies what they share."""
        for block, rows in zip(self.blocks, identity_rows, strict=True):
            tokens = run(block, tokens, identity_rows=rows)
        return tokens

    def embed_latents(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, C, H, W) -> (B, N, D), with the added position embedding if the model has one."""
        tokens = self.x_embedder(x.to(self.dtype))
        position = self._kept("position", grid, tokens, lambda: self.position_embedding(grid))
        return tokens if position is None else tokens + position

    def embed_time(self, timestep: Tensor, cfg_scale: Tensor | None = None) -> Tensor:
        """(B,) -> (B, D)."""
        arch = self.architecture
        if arch.timestep_norm_scale_factor != 1.0:
            timestep = timestep.float() / arch.timestep_norm_scale_factor
        elif arch.truncate_timestep:
            timestep = timestep.long()  # trained in: the shifted timestep is cut, never rounded
        time = self.t_embedder(timestep.float())
        if cfg_scale is not None:
            time = time + self.cfg_embedder(cfg_scale * arch.cfg_embed_scale)
        return time

    def embed_text(self, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Projects captions (B, 1, L, C). On a CPU, tokens that no row of the batch reads are left out.

        Returns:
            (B, L', D), and the mask (B, L') or None where every token is read.
        """
        y = y.to(self.dtype)
        if self.training and self.y_embedder.dropout > 0:
            y = self.y_embedder.drop(y)
        if y.device.type == "cpu":  # elsewhere counting would wait for the device; cut captions before
            y, mask = self._trim(y, mask)
        return self._project_text(y), mask

    @staticmethod
    def _trim(y: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Leaves out tokens (B, 1, L, C) that no row reads, and the mask (B, L) if all rows read all that is left."""
        if mask is None:
            return y, None
        kept = mask.any(dim=0)
        if not bool(kept.all()):
            y, mask = y[:, :, kept], mask[:, kept]
        return y, None if bool(mask.all()) else mask

    def _project_text(self, y: Tensor) -> Tensor:
        """Captions (B, 1, L, C) -> (B, L, D)."""
        text = self.y_embedder(y.to(self.dtype))
        if self.architecture.y_norm:
            text = self.attention_y_norm(text)
        return text.squeeze(1)

    def position_embedding(self, grid: Grid) -> Tensor | None:
        """Returns the added embedding (1, N, D) of a grid of tokens on the CPU, or None if the model adds none."""
        arch = self.architecture
        if not arch.use_pe or arch.use_rope:
            return None
        return sincos_table(arch.hidden_size, grid, arch.pe_interpolation, self._base_size)

    def rotary(self, grid: Grid, device: torch.device) -> Rotary | None:
        """Returns the rotary angles (N, d) of a grid of tokens, or None if the model rotates nothing."""
        arch = self.architecture
        if not arch.use_rope:
            return None
        angles = rotary_table(rotary_axes(arch.head_dim), grid, arch.pe_interpolation)
        like = torch.empty(0, device=device)
        cosines, sines = (self._kept(f"rotary {i}", grid, like, lambda i=i: angles[i]) for i in (0, 1))
        return cosines, sines

    def _kept(self, name: str, grid: Grid, like: Tensor, table: Callable[[], Tensor | None]) -> Any:
        """Returns a table with the dtype and device of a tensor. Copies on other devices are kept for good: a captured
        CUDA graph goes on reading them."""
        if like.device.type == "cpu" or torch.compiler.is_compiling():
            made = table()
            return None if made is None else made.to(like)
        key = (name, grid, like.dtype, like.device)
        if key not in self._tables:
            made = table()
            self._tables[key] = None if made is None else made.to(like)
        return self._tables[key]

    def initialize_weights(self) -> None:
        """Xavier for linear layers and the patch convolution, small normal for the conditioning and the output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.architecture.hidden_size, -1))
        caption = self.y_embedder.y_proj
        conditioning = [self.t_embedder.mlp[0], self.t_embedder.mlp[2], self.t_block[1], caption.fc1, caption.fc2]
        for layer in [*conditioning, self.final_layer.linear]:
            nn.init.normal_(layer.weight, std=0.02)
        if self.architecture.cfg_embed:  # a fresh guidance embedding changes nothing
            nn.init.zeros_(self.cfg_embedder.mlp[2].weight)
        if not self.pos_embed.is_meta:
            position = self.position_embedding((self._base_size, self._base_size))
            if position is not None:
                self.pos_embed.copy_(position)

    @property
    def _base_size(self) -> int:
        return self.architecture.input_size // self.architecture.patch_size

    @property
    def _info_keys(self) -> tuple[str, ...]:
        return ("cfg_scale",) if self.architecture.cfg_embed else ()

    def _grid(self, x: Tensor) -> Grid:
        patch = self.architecture.patch_size
        return x.shape[-2] // patch, x.shape[-1] // patch

    def _block_runner(self, shared: dict[str, Any], checkpointing: bool) -> BlockRunner:
        def run(block: nn.Module, *inputs: Any, identity_rows: int = 0) -> Any:
            if checkpointing and self.gradient_checkpointing and torch.is_grad_enabled():
                return checkpoint(block, *inputs, identity_rows=identity_rows, use_reentrant=False, **shared)
            return block(*inputs, identity_rows=identity_rows, **shared)

        return run

    def _check_inputs(self, x: Tensor, data_info: dict[str, Any], return_logvar: bool, batch_invariant: bool) -> None:
        self._check_shape(x)
        for name in self._info_keys:
            if name not in data_info:
                raise ValueError(f"this {type(self).__name__} needs data_info[{name!r}].")
        if return_logvar and not self.architecture.logvar:
            raise ValueError("return_logvar=True needs a model built with logvar=True.")
        if batch_invariant and self.training:
            raise ValueError(
                "batch_invariant=True has no meaning in training mode, where captions are dropped at random."
            )

    def _check_shape(self, x: Tensor) -> None:
        arch = self.architecture
        if x.dim() != 4 or x.shape[1] != arch.in_channels:
            raise ValueError(f"latents must have shape (B, {arch.in_channels}, H, W), not {tuple(x.shape)}.")
        if x.shape[-2] % arch.patch_size or x.shape[-1] % arch.patch_size:
            raise ValueError(
                f"latents of {x.shape[-2]} x {x.shape[-1]} do not divide into patches of {arch.patch_size}."
            )
        if self.fixed_size and x.shape[-2:] != (arch.input_size, arch.input_size):
            raise ValueError(
                f"Sana takes latents of {arch.input_size} x {arch.input_size} only, not {x.shape[-2]} x {x.shape[-1]}; "
                "SanaMS takes any size."
            )

    def _check_perturbation(self, x: Tensor, pag_layers: tuple[int, ...], pag_rows: int) -> None:
        depth = self.architecture.depth
        if not 0 <= pag_rows <= x.shape[0]:
            raise ValueError(f"pag_rows must be between 0 and the batch size {x.shape[0]}, not {pag_rows}.")
        if any(not 0 <= index < depth for index in pag_layers):
            raise ValueError(f"pag_layers must be block indices from 0 to {depth - 1}, not {list(pag_layers)}.")


class SanaMS(Sana):
    """`Sana` for latents of any height and width."""

    fixed_size = False


# Presets: depth, width and heads of the released networks; every other argument is passed on.
_600M = {"depth": 28, "hidden_size": 1152, "num_heads": 16}
_1600M = {"depth": 20, "hidden_size": 2240, "num_heads": 20}

# The November 2024 release embeds fractional timesteps as they are.
Sana_600M_P1_D28 = partial(Sana, **_600M, patch_size=1, truncate_timestep=False)
Sana_1600M_P1_D20 = partial(Sana, **_1600M, patch_size=1, truncate_timestep=False)

SanaMS_600M_P1_D28 = partial(SanaMS, **_600M, patch_size=1)
SanaMS_600M_P2_D28 = partial(SanaMS, **_600M, patch_size=2)
SanaMS_600M_P4_D28 = partial(SanaMS, **_600M, patch_size=4)
SanaMS_1600M_P1_D20 = partial(SanaMS, **_1600M, patch_size=1)
SanaMS_1600M_P2_D20 = partial(SanaMS, **_1600M, patch_size=2)
SanaMS_2400M_P1_D30 = partial(SanaMS, **{**_1600M, "depth": 30}, patch_size=1)
SanaMS_3200M_P1_D40 = partial(SanaMS, **{**_1600M, "depth": 40}, patch_size=1)
SanaMS_4800M_P1_D60 = partial(SanaMS, **{**_1600M, "depth": 60}, patch_size=1)
# A small network for tests and for the bundled model; depth, hidden_size and num_heads may be given too.
SanaMS_Tiny_P1 = partial(SanaMS, depth=6, hidden_size=224, num_heads=7, patch_size=1)
