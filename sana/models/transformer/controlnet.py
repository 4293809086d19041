"""`SanaMSControlNet`: SanaMS with a copied branch that reads a control signal. Its training is not here."""

from copy import deepcopy
from functools import partial
from typing import Any

from torch import Tensor, nn

from sana.models.transformer.sana import BlockRunner, SanaMS


class ControlBlock(nn.Module):
    """A copy of a block whose output is added to the main branch through a projection that starts at zero (ControlNet).

    Args:
        block: the block to copy.
        dim: width D of the tokens.
        first: whether this is the first one, which mixes the control signal into the main branch's tokens.
    """

    def __init__(self, block: nn.Module, dim: int, first: bool) -> None:
        super().__init__()
        self.copied_block = deepcopy(block)
        if first:
            self.before_proj = _zero_linear(dim)
        self.after_proj = _zero_linear(dim)

    def forward(self, x: Tensor, control: Tensor, **shared: Any) -> tuple[Tensor, Tensor]:
        """Tokens and control tokens (B, N, D) -> the next control tokens and what to add to the main branch."""
        if hasattr(self, "before_proj"):
            control = x + self.before_proj(control)
        control = self.copied_block(control, **shared)
        return control, self.after_proj(control)


class SanaMSControlNet(SanaMS):
    """SanaMS with a control branch; `data_info["control_signal"]` holds the encoded control image (B, C, H, W).

    The control signal passes the same patch embedding but gets no position embedding: released weights were trained so.

    Args:
        **kwargs: as for `SanaMS`; `copy_blocks_num` blocks, starting with the second, get a control block before them.
    """

    cacheable = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        arch = self.architecture
        if not 1 <= arch.copy_blocks_num < arch.depth:
            raise ValueError(
                f"copy_blocks_num must be from 1 to depth - 1 = {arch.depth - 1}, not {arch.copy_blocks_num}."
            )
        self.controlnet = nn.ModuleList(
            ControlBlock(self.blocks[index], arch.hidden_size, first=index == 0)
            for index in range(arch.copy_blocks_num)
        )

    def run_blocks(self, tokens: Tensor, identity_rows: list[int], run: BlockRunner, info: dict[str, Tensor]) -> Tensor:
        control = self.x_embedder(info["control_signal"].to(self.dtype))
        for index, (block, rows) in enumerate(zip(self.blocks, identity_rows, strict=True)):
            if 1 <= index <= len(self.controlnet):
                control, added = run(self.controlnet[index - 1], tokens, control)
                tokens = tokens + added
            tokens = run(block, tokens, identity_rows=rows)
        return tokens

    @property
    def _info_keys(self) -> tuple[str, ...]:
        return (*super()._info_keys, "control_signal")


def _zero_linear(dim: int) -> nn.Linear:
    layer = nn.Linear(dim, dim)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


SanaMSControlNet_600M_P1_D28 = partial(SanaMSControlNet, depth=28, hidden_size=1152, num_heads=16, patch_size=1)
SanaMSControlNet_1600M_P1_D20 = partial(SanaMSControlNet, depth=20, hidden_size=2240, num_heads=20, patch_size=1)
