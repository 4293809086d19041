"""The pieces that `compiled.py` puts together: the denoising loop as a function of tensors, compiled blocks, a fast
decoder, and a number that tells whether weights have moved. When each is used is decided there.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sana.diffusion import SAMPLERS
from sana.diffusion.guidance import Guidance, guide
from sana.diffusion.step_cache import StepCache
from sana.models.autoencoder.base import Autoencoder
from sana.models.text_encoder.base import PromptEmbeds
from sana.pipelines.denoise import TransformerDenoiser

_BAKED = ("backend", "fp32_attention")  # attributes of modules that choose kernels


@dataclass(frozen=True)
class DenoisingLoop:
    """A sampler's run as a function of tensors; its fields are what a captured graph of it bakes in.

    Attributes:
        sampler: its name, of CAPTURED_SAMPLERS.
        times: (N + 1) times of the sampler.
        guidance: how the branches combine.
        pag_layers: blocks that the perturbed branch changes.
        dtype: what the transformer computes in.
        evaluate: with a step cache, which of the N steps call the transformer.
    """

    sampler: str
    times: tuple[float, ...]
    guidance: Guidance
    pag_layers: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    evaluate: tuple[bool, ...] | None = None

    def run(
        self,
        transformer: nn.Module,
        noise: Tensor,
        prompt_embeds: Tensor,
        prompt_mask: Tensor,
        null_embeds: Tensor | None = None,
        *,
        checked: bool = False,
    ) -> Tensor:
        """Returns the latents (B, C, h, w) of noise like them.

        Args:
            transformer: `SanaMS` or a class of its kind.
            noise: (B, C, h, w) float32.
            prompt_embeds: (B, L, D).
            prompt_mask: (B, L), of the prompts and the null captions.
            null_embeds: (B, L', D); needed by guidance.
            checked: whether every step is checked for values that are not finite, for which the host waits.

        Raises:
            NonFiniteError: there is such a value, and `checked`.
        """
        null = None
        if null_embeds is not None:
            null = PromptEmbeds(null_embeds, prompt_mask[:, : null_embeds.shape[1]])
        prompt = PromptEmbeds(prompt_embeds, prompt_mask)
        times = torch.tensor(self.times, dtype=torch.float32)
        denoiser = TransformerDenoiser(
            transformer, prompt, null, pag_layers=self.pag_layers, dtype=self.dtype, times=times[:-1], checked=checked
        )
        velocity = guide(denoiser, self.guidance)
        if self.evaluate is not None:
            velocity = StepCache(velocity, times, self.evaluate)
        return SAMPLERS[self.sampler].sample(velocity, noise, times)


def compile_blocks(transformer: nn.Module, **options: Any) -> list[nn.Module]:
    """Compiles the transformer's repeated block: one compilation serves all blocks, for their weights are its inputs.

    Args:
        transformer: with its blocks in `blocks`.
        **options: of torch.compile.

    Returns:
        The modules that now run compiled.
    """
    kind = type(transformer.blocks[0])  # type: ignore[index]
    blocks = [module for module in transformer.modules() if type(module) is kind]
    for block in blocks:
        block.compile(**options)
    return blocks


@torch.inference_mode(False)  # made in the middle of a call, its tensors must stay usable outside
def fast_decoder(autoencoder: Autoencoder) -> Autoencoder:
    """Returns a copy of an autoencoder that decodes in bf16, channels-last and compiled."""
    return copy.deepcopy(autoencoder).prepare_for_decoding(torch.bfloat16, channels_last=True, compile=True)


def weights_version(model: nn.Module) -> int:
    """Returns a number that changes when weights move to other memory or a module chooses other kernels.

    A graph reads weights where they lay when it was captured; values that are changed in place it sees.
    """
    facts: list[Any] = [id(model), torch.get_float32_matmul_precision()]
    for module in model.modules():
        facts += (module.__dict__.get(name) for name in _BAKED)
        for tensors in (module._parameters, module._buffers):
            facts += ((one.data_ptr(), one.dtype) for one in tensors.values() if one is not None)
    return hash(tuple(facts))
