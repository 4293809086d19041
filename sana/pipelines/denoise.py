"""The transformer as the function a sampler calls: guidance branches stacked into one forward. No sampler is here."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sana.models.layers.finite import first_nonfinite_layer
from sana.models.text_encoder.base import PromptEmbeds
from sana.models.transformer.caches import TextCache, TimeCache

TIMESTEPS = 1000.0  # the transformer sees sigma in [0, 1] as a timestep in [0, 1000]


class NonFiniteError(RuntimeError):
    """A network produced infinity or NaN; the message names the first layer that did."""


def check_finite(output: Tensor, network: nn.Module, what: str, *args: object, **kwargs: object) -> None:
    """Raises NonFiniteError when `output` holds a value that is not finite, and searches the first layer that made one.

    Args:
        output: what the network returned.
        network: the module to search; it is run again.
        what: the network's name and the moment, for the message.
        *args, **kwargs: what the network was called with.
    """
    if torch.isfinite(output).all():
        return
    layer = first_nonfinite_layer(network, *args, **kwargs)
    where = f"first in its layer {layer!r}" if layer else "in its input or output"
    raise NonFiniteError(
        f"The {what} produced values that are not finite, {where}; no image was made. "
        "Try dtype fp32 or bf16, or check the weights."
    )


class TransformerDenoiser:
    """Velocity of every branch of guidance for a batch of latents, from one call of the transformer.

    What steps share is computed once: keys and values of the texts, and, with `times`, the modulation of every step.

    Args:
        transformer: `SanaMS` or a class of its kind.
        prompt: embeddings of the prompts, one row an image.
        null: embeddings of the null caption or the negative prompts, one row an image.
        pag_layers: the blocks that use identity self-attention for the perturbed branch.
        dtype: what the transformer computes in; latents stay float32 outside.
        times: noise levels whose modulation is computed together, in advance; others are as they come.
        checked: whether every prediction is searched for values that are not finite. On a GPU that waits for it.
    """

    def __init__(
        self,
        transformer: nn.Module,
        prompt: PromptEmbeds,
        null: PromptEmbeds | None,
        *,
        pag_layers: Sequence[int] = (),
        dtype: torch.dtype = torch.float32,
        times: Tensor | None = None,
        checked: bool = True,
    ) -> None:
        self.transformer: Any = transformer
        self.pag_layers = tuple(pag_layers)
        self.dtype = dtype
        self.checked = checked
        self._prompt = prompt
        self._null = self._cut(null, prompt.embeds.shape[1]) if null is not None else None
        self._texts: dict[tuple[str, ...], TextCache | tuple[Tensor, Tensor]] = {}
        self._times: dict[float, TimeCache] = {}
        self._cached = has_caches(transformer)
        if self._cached and times is not None:
            self._make_times(times.tolist())

    @staticmethod
    def _cut(null: PromptEmbeds, length: int) -> PromptEmbeds:
        """Cuts the null caption to the prompts' length; the prompt's mask hides the rest of it anyway.

        Raises:
            ValueError: it is shorter than the prompts.
        """
        if null.embeds.shape[1] < length:
            raise ValueError(f"The negative embeddings have {null.embeds.shape[1]} tokens and the prompts {length}.")
        return PromptEmbeds(null.embeds[:, :length], null.mask[:, :length])

    def text(self, branches: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """Returns the stacked embeddings (k*B, 1, L, C) and mask (k*B, L) of `branches`.

        The mask of the prompt serves the null branch too: the released models are sampled so.
        """
        embeds = torch.cat([self._embeds(branch) for branch in branches])
        return embeds[:, None].to(self.dtype), self._prompt.mask.repeat(len(branches), 1)

    def _embeds(self, branch: str) -> Tensor:
        if branch != "uncond":
            return self._prompt.embeds
        if self._null is None:
            raise ValueError("Guidance needs the embeddings of the null caption, and none were made.")
        return self._null.embeds

    def __call__(self, latents: Tensor, sigma: Tensor, branches: tuple[str, ...]) -> dict[str, Tensor]:
        """Evaluates the branches.

        Args:
            latents: (B, C, H, W) float32.
            sigma: 0-d, in [0, 1].
            branches: of "uncond", "cond", "perturbed" in the order of the stacked batch; "perturbed" is the last.

        Returns:
            branch -> velocity (B, C, H, W) float32.

        Raises:
            NonFiniteError: the transformer's output is not finite.
        """
        rows = latents.shape[0]
        stacked = latents.to(self.dtype).repeat(len(branches), 1, 1, 1)
        perturbed = {"pag_layers": self.pag_layers, "pag_rows": rows} if "perturbed" in branches else {}
        if branches not in self._texts:
            self._texts[branches] = self._prepare(branches)
        text = self._texts[branches]
        if isinstance(text, TextCache):
            output = self.transformer(stacked, self._time(sigma), text, **perturbed)
        else:
            output = self.transformer(stacked, self._timesteps(sigma, len(stacked)), text[0], mask=text[1], **perturbed)
        output = output[:, : latents.shape[1]].float()  # a model that also predicts a variance has more channels
        if self.checked and not torch.isfinite(output).all():
            what = f"transformer at timestep {float(sigma) * TIMESTEPS:.1f}"
            embeds, mask = self.text(branches)
            inputs = (stacked, self._timesteps(sigma, len(stacked)), embeds)
            check_finite(output, self.transformer, what, *inputs, mask=mask, **perturbed)
        return dict(zip(branches, output.chunk(len(branches)), strict=True))

    def _prepare(self, branches: tuple[str, ...]) -> TextCache | tuple[Tensor, Tensor]:
        embeds, mask = self.text(branches)
        return self.transformer.cache_text(embeds, mask, branches=len(branches)) if self._cached else (embeds, mask)

    def _timesteps(self, sigma: Tensor, rows: int) -> Tensor:
        return (self._filled(float(sigma)) * TIMESTEPS).expand(rows)

    def _time(self, sigma: Tensor) -> TimeCache:
        if float(sigma) not in self._times:
            self._make_times([float(sigma)])
        return self._times[float(sigma)]

    def _make_times(self, times: Sequence[float]) -> None:
        timesteps = torch.stack([self._filled(time) for time in times]) * TIMESTEPS
        self._times |= zip(times, self.transformer.cache_time(timesteps), strict=True)

    def _filled(self, value: float) -> Tensor:
        """A number as a 0-d float32 on the device. Filling it copies nothing there, which a CUDA graph could not."""
        return torch.full((), value, dtype=torch.float32, device=self._prompt.mask.device)


def has_caches(transformer: nn.Module) -> bool:
    """Whether texts and times can be prepared for a transformer. Not for a sharded one: only its forward gathers it."""
    if not getattr(transformer, "cacheable", False):
        return False
    return type(next(transformer.parameters())) is nn.Parameter


class SprintDenoiser:
    """TrigFlow prediction of a distilled model: the guidance scale is an input of the network, so there is one branch.

    Args:
        transformer: `SanaMSCM`.
        prompt: embeddings of the prompts, one row an image.
        guidance_scale: given to the network.
        dtype: what the transformer computes in.
    """

    def __init__(
        self, transformer: nn.Module, prompt: PromptEmbeds, *, guidance_scale: float, dtype: torch.dtype
    ) -> None:
        self.transformer = transformer
        self.dtype = dtype
        self.guidance_scale = guidance_scale
        self._embeds = prompt.embeds[:, None].to(dtype)
        self._mask = prompt.mask

    def __call__(self, latents: Tensor, angle: Tensor) -> Tensor:
        """Evaluates the network.

        Args:
            latents: (B, C, H, W) float32, divided by sigma_data.
            angle: 0-d, the TrigFlow time in [0, pi/2].

        Returns:
            (B, C, H, W) float32, in units of sigma_data.
        """
        rows = latents.shape[0]
        times = angle.to(device=latents.device, dtype=torch.float32).expand(rows)
        scale = torch.full((rows,), self.guidance_scale, device=latents.device, dtype=torch.float32)
        arguments = {"mask": self._mask, "data_info": {"cfg_scale": scale}}
        inputs = (latents.to(self.dtype), times, self._embeds)
        output = self.transformer(*inputs, **arguments).float()
        check_finite(output, self.transformer, f"transformer at time {float(angle):.4f}", *inputs, **arguments)
        return output
