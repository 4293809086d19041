"""What is minimised: random draws of every sample and the flow-matching loss. No optimiser and no parallelism here."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sana.diffusion.flow import flow_training_loss
from sana.diffusion.timestep_sampling import sample_timesteps
from sana.models.transformer.sana import Sana
from sana.training.captions import CaptionEncoder
from sana.utils.transfer import to_device


@dataclass(frozen=True)
class Draws:
    """Everything random about a batch: noise (B, C, h, w), timestep index (B,) int64, dropped captions (B,) bool."""

    noise: Tensor
    index: Tensor
    dropped: Tensor

    def to(self, device: torch.device) -> "Draws":
        """On a device, without waiting for it."""
        return Draws(*(to_device(tensor, device) for tensor in (self.noise, self.index, self.dropped)))


@dataclass(frozen=True)
class NoiseOptions:
    """How noise levels and dropped captions are drawn (`scheduler.*`, `model.class_dropout_prob`)."""

    seed: int
    scheme: str = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    drop_probability: float = 0.0


def draw(positions: Sequence[int], shape: Sequence[int], options: NoiseOptions) -> Draws:
    """Draws for the samples at `positions` of a run, each from a generator of its own.

    What a sample gets depends on the seed and on its place in the run only: not on the number of processes, the size
    of micro-batches or the device. That is what makes two processes equal one, and a resumed run equal an unbroken one.

    Args:
        positions: how many samples the whole run has seen before each of these.
        shape: (C, h, w) of a latent.
        options: distributions and seed.

    Returns:
        Draws on the CPU.
    """
    noise, index, dropped = [], [], []
    for position in positions:
        digest = hashlib.blake2b(f"{options.seed}:{position}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        drawn = sample_timesteps(
            options.scheme, 1, generator=generator, logit_mean=options.logit_mean, logit_std=options.logit_std
        )
        index.append(drawn)
        dropped.append(torch.rand(1, generator=generator) < options.drop_probability)
        noise.append(torch.randn(*shape, generator=generator))
    return Draws(torch.stack(noise), torch.cat(index), torch.cat(dropped))


class FlowObjective(nn.Module):
    """Loss of every image of a batch (Sana section 2.3; Esser et al. 2024, equations 12 to 14). Holds what is trained.

    Args:
        transformer: predicts the velocity; its own caption dropout is switched off, `Draws.dropped` decides.
        flow_shift: shifts the noise levels.
        captions: a text encoder that is trained too; None: embeddings are given.
        compile: the transformer runs through torch.compile.
    """

    def __init__(
        self,
        transformer: Sana,
        *,
        flow_shift: float,
        captions: CaptionEncoder | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.transformer, self.captions = transformer, captions
        transformer.y_embedder.dropout = 0.0
        self.flow_shift = flow_shift
        self._predict = [torch.compile(transformer) if compile else transformer]  # a list: no second sub-module

    def forward(
        self,
        latents: Tensor,
        draws: Draws,
        prompt_embeds: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        captions: Sequence[str] = (),
    ) -> Tensor:
        """Returns the mean squared error of the velocity, one value an image.

        Args:
            latents: (B, C, h, w), scaled.
            draws: for these samples.
            prompt_embeds: (B, L, C_text), where no text encoder is trained.
            prompt_mask: (B, L).
            captions: B texts for the text encoder that is trained.
        """
        if self.captions is not None:
            prompt_embeds, prompt_mask = self.captions(list(captions), draws.dropped)
        else:
            assert prompt_embeds is not None and prompt_mask is not None
            prompt_embeds = self._drop(prompt_embeds, draws.dropped)
        return flow_training_loss(
            self._predict[0], latents, draws.noise, draws.index, self.flow_shift,
            y=prompt_embeds[:, None], mask=prompt_mask,
        )  # fmt: skip

    def parts(self) -> list[nn.Module]:
        """Sub-modules that hold all parameters and can each be called alone, inner ones first: the units of FSDP."""
        own = [] if self.captions is None else [self.captions.model]
        return [*self.transformer.blocks, self.transformer, *own]

    def _drop(self, prompt_embeds: Tensor, dropped: Tensor) -> Tensor:
        """Replaces dropped captions by the learned null caption; the prompt's mask stays.

        Cached features end with the batch's longest prompt: what the null caption has beyond that is masked anyway.
        """
        null = self.transformer.y_embedder.y_embedding.to(prompt_embeds)[: prompt_embeds.shape[1]]  # (L, C_text)
        return torch.where(dropped[:, None, None], null, prompt_embeds)
