"""`MemoryModel`: the peak of every stage of a picture, found by running our own code on tensors without storage."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sana.config import ConfigError, SanaConfig
from sana.diffusion import SAMPLERS
from sana.diffusion.guidance import Guidance, guide
from sana.models.text_encoder.base import PromptEmbeds
from sana.ops.chunks import few
from sana.ops.packing import pack_budget
from sana.pipelines.denoise import SprintDenoiser, TransformerDenoiser
from sana.pipelines.memory import networks
from sana.pipelines.memory.kernels import FusedAttention, cpu_kernels
from sana.pipelines.memory.networks import NetworkWeights
from sana.pipelines.memory.repeats import Repeats
from sana.pipelines.memory.texts import Lengths, TextRun
from sana.pipelines.memory.tiles import set_tiling
from sana.pipelines.memory.tracker import CUDA_BLOCK, MemoryTracker

if TYPE_CHECKING:
    from sana.models.autoencoder.tiling import Tiling

DEVICES = ("cpu", "cuda")
HALVES = ("encoder", "decoder")  # of the autoencoder
STEPS_RUN = 3  # from the third step on, every step holds what the one before held


class MemoryModel:
    """Predicts the memory of a configuration's networks and stages.

    Args:
        config: names the networks.
        device: "cpu" or "cuda"; no such device need be here.
        dtype: of the transformer and the text encoder.
        quantization: scheme of the transformer, or None.
        text_quantization: scheme of the text encoder, or None.

    Attributes:
        thorough: whether blocks and chunks that are alike are all run: the same numbers, later.
    """

    thorough = False

    def __init__(
        self,
        config: SanaConfig,
        *,
        device: str,
        dtype: torch.dtype,
        quantization: str | None = None,
        text_quantization: str | None = None,
    ) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode  # a second to import

        if device not in DEVICES:
            raise ValueError(f"Memory is predicted for {' or '.join(DEVICES)}, not {device!r}.")
        self.config = config
        self.device = device
        self.dtype = dtype
        self.schemes = {"transformer": quantization, "text_encoder": text_quantization}
        self._block = CUDA_BLOCK if device == "cuda" else 1
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._weights: dict[str, NetworkWeights] = {}
        self._packed: dict[str, int] = {}

    def weights(self, network: str) -> NetworkWeights:
        """Returns what a network's weights take.

        Args:
            network: "text_encoder", "transformer" or "autoencoder".

        Raises:
            ConfigError: its shape is not known without its files.
        """
        if network not in networks.NETWORKS:
            raise ValueError(f"Unknown network {network!r}; known: {', '.join(networks.NETWORKS)}.")
        if network not in self._weights:
            module = self._build(network)
            part = "decoder" if network == "autoencoder" else network
            counted = networks.weights_of(network, module, block=self._block, packed=self.packed(part))
            self._weights[network] = counted
        return self._weights[network]

    def packed(self, part: str) -> int:
        """Returns the bytes of the copies that a CPU keeps of the weights of a network, or of half the autoencoder.

        Args:
            part: "text_encoder" (none are kept), "transformer", "encoder" or "decoder".
        """
        if self.device != "cpu" or part == "text_encoder":
            return 0
        if part not in self._packed:
            before = self.packed("transformer") if part in HALVES else 0
            network = self._build("autoencoder" if part in HALVES else part)
            module = getattr(network, part) if part in HALVES else network
            self._packed[part] = networks.packed_bytes(module, pack_budget() - before)
        return self._packed[part]

    def encode_text(self, prompts: int, *, null: bool = True, tokens: int | None = None) -> int:
        """Returns the peak of encoding texts, above the text encoder's weights.

        Args:
            prompts: number of prompts.
            null: whether the null caption is encoded too.
            tokens: of every prompt, the instruction not counted; None: `model_max_length`.
        """
        return self._encode_text(prompts, null, tokens)[0]

    def denoise(
        self,
        height: int,
        width: int,
        batch: int,
        *,
        guidance: bool = True,
        pag: bool = False,
        tokens: int | None = None,
        steps: int | None = None,
    ) -> int:
        """Returns the peak of sampling, above the transformer's weights.

        Args:
            height: of the picture in pixels, a multiple of the autoencoder's factor.
            width: as `height`.
            batch: number of pictures.
            guidance: whether the null caption is evaluated too.
            pag: whether a perturbed branch is evaluated too.
            tokens: of every prompt; None: `model_max_length`.
            steps: whose modulation is prepared; None: the sampler's default number.

        Raises:
            ConfigError: the network is a ControlNet.
            ValueError: a size or a number is out of range.
        """
        name = self.config.scheduler.vis_sampler
        sampler, length = SAMPLERS[name], self._tokens(tokens)
        shape = (batch, self.config.vae.vae_latent_dim, *self._latent_size(height, width))
        with self._tracked("transformer") as (tracker, network):
            if "control_signal" in network._info_keys:
                raise ConfigError(
                    f"Pictures of the ControlNet model.model {self.config.model.model!r} are not predicted."
                )
            with self._mode, tracker:
                noise = torch.empty(shape, device=self.device)
                prompt = self._embeds(batch, length)
                null = self._embeds(batch, self._tokens(None)) if guidance else None
            if sampler.prediction == "trigflow":
                self._sprint(tracker, network, prompt, noise)
            else:
                self._flow(tracker, network, name, noise, prompt, null, pag=pag, steps=steps)
        return tracker.peak

    def decode(self, height: int, width: int, batch: int, *, tiling: "Tiling | None" = None) -> int:
        """Returns the peak of decoding latents to pictures, above the autoencoder's weights.

        Args:
            height: of the picture in pixels.
            width: as `height`.
            batch: number of pictures.
            tiling: None: every picture is decoded whole.
        """
        with self._tracked("autoencoder") as (tracker, autoencoder), self._mode, tracker:
            set_tiling(autoencoder, tiling)
            latents = torch.empty(
                batch, autoencoder.latent_channels, *self._latent_size(height, width), device=self.device
            )
            images = autoencoder.decode(latents).float()
            torch.isfinite(images).all()
            (images / 2 + 0.5).clamp(0, 1)
        return tracker.peak

    def encode(self, height: int, width: int, batch: int, *, tiling: "Tiling | None" = None) -> int:
        """Returns the peak of encoding pictures to latents, above the autoencoder's weights; see `decode`."""
        with self._tracked("autoencoder") as (tracker, autoencoder), self._mode, tracker:
            set_tiling(autoencoder, tiling)
            images = torch.empty(batch, 3, height, width, device=self.device)
            autoencoder.encode(images)
        return tracker.peak

    def picture(
        self,
        height: int,
        width: int,
        batch: int,
        *,
        guidance: bool = True,
        pag: bool = False,
        tiling: "Tiling | None" = None,
        tokens: int | None = None,
        steps: int | None = None,
    ) -> int:
        """Returns the peak of a call for as many prompts as pictures, all networks in memory, their weights included.

        Args:
            height, width, batch, tiling: see `decode`.
            guidance, pag, tokens, steps: see `denoise`.
        """
        text, kept = self._encode_text(batch, guidance, tokens)
        held = sum(self.weights(network).total for network in networks.NETWORKS)
        found = [held + text]
        held += kept + self.weights("transformer").packed
        options: Any = {"guidance": guidance, "pag": pag, "tokens": tokens, "steps": steps}
        found.append(held + self.denoise(height, width, batch, **options))
        held += self.weights("autoencoder").packed
        found.append(held + self.decode(height, width, batch, tiling=tiling))
        return max(found)

    def _encode_text(self, prompts: int, null: bool, tokens: int | None) -> tuple[int, int]:
        """The peak of encoding texts, and what the pipeline remembers of them."""
        from sana.models.text_encoder.architectures import encoder_class, instruction_tokens

        text = self.config.text_encoder
        name, limit = text.text_encoder_name, text.model_max_length
        lengths = Lengths(instruction_tokens(name, text.chi_prompt), self._tokens(tokens), limit)
        with self._tracked("text_encoder") as (tracker, network), self._mode, tracker:
            run = TextRun(network, encoder_class(name), lengths, self.device)
            features = run.encode(prompts)
            embeds = run.stack(features, prompts)
            if null:
                features += run.encode_null()
                run.stack(features[-1:], prompts)
            del embeds
            return tracker.peak, tracker.live

    def _latent_size(self, height: int, width: int) -> tuple[int, int]:
        factor = self.config.vae.vae_downsample_rate
        if height % factor or width % factor or min(height, width) < factor:
            raise ValueError(f"Height and width must be multiples of {factor} pixels, not {height} and {width}.")
        return height // factor, width // factor

    def _tokens(self, tokens: int | None) -> int:
        longest = self.config.text_encoder.model_max_length
        if tokens is not None and not 1 <= tokens <= longest:
            raise ValueError(f"tokens must be between 1 and model_max_length {longest}, not {tokens}.")
        return longest if tokens is None else tokens

    def _embeds(self, rows: int, length: int) -> PromptEmbeds:
        channels = self.config.text_encoder.caption_channels
        return PromptEmbeds(
            torch.empty(rows, length, channels, dtype=self.dtype, device=self.device),
            torch.ones(rows, length, dtype=torch.int64, device=self.device),
        )

    def _build(self, network: str) -> Any:
        """A network with fake storage; a fresh one for every question, since some keep what they made."""
        module = networks.build_empty(network, self.config, self.schemes.get(network))
        with self._mode:
            networks.give_storage(module, networks.network_dtype(network, self.config, self.dtype), self.device)
        if network == "transformer":
            networks.use_empty_tables(module)
        if not self.thorough:
            for blocks in networks.repeated(network, module):
                Repeats(blocks)
        if network == "autoencoder":
            networks.keep_folded(module)
        return module

    @contextmanager
    def _tracked(self, name: str) -> Iterator[tuple[MemoryTracker, Any]]:
        """Gives a tracker and a network whose weights it does not count."""
        network = self._build(name)
        tracker = MemoryTracker(block=self._block, extra=cpu_kernels if self.device == "cpu" else None)
        tracker.ignore(tensor for _, tensor in networks.named_weights(network))
        with ExitStack() as stack:
            if self.device == "cuda":
                stack.enter_context(FusedAttention())
            stack.enter_context(torch.no_grad())
            if not self.thorough:
                stack.enter_context(few())
            stack.enter_context(tracker)
            yield tracker, network

    def _flow(
        self,
        tracker: MemoryTracker,
        network: Any,
        name: str,
        noise: Tensor,
        prompt: PromptEmbeds,
        null: PromptEmbeds | None,
        *,
        pag: bool,
        steps: int | None,
    ) -> None:
        sampler = SAMPLERS[name]
        levels = sampler.times(steps or default_steps(name)).tolist()[:-1]
        layers = self.config.model.pag_applied_layers if pag else ()
        with self._mode, tracker:
            denoiser = TransformerDenoiser(network, prompt, null, pag_layers=layers, dtype=self.dtype)
            denoiser._cached = bool(getattr(network, "cacheable", False))  # it looks for weights with storage
            if denoiser._cached:
                denoiser._make_times(levels)
        scale = 4.5 if null is not None else 1.0
        kind = "classifier-free_PAG" if pag else "classifier-free"

        def branches(latents: Tensor, sigma: Tensor, which: tuple[str, ...]) -> dict[str, Tensor]:
            level: Any = min(levels, key=lambda known: abs(known - float(sigma)))
            with self._mode, tracker:
                return denoiser(latents, level, which)

        velocity = guide(branches, Guidance(kind, scale, 2.0))
        sampler.sample(velocity, noise, sampler.times(STEPS_RUN))

    def _sprint(self, tracker: MemoryTracker, network: Any, prompt: PromptEmbeds, noise: Tensor) -> None:
        """Two steps of a distilled model: each of fresh noise and what the one before it found."""
        angle = torch.tensor(1.0)
        with self._mode, tracker:
            denoiser = SprintDenoiser(network, prompt, guidance_scale=4.5, dtype=self.dtype)
            latents = noise
            for _ in range(2):
                latents = torch.randn_like(noise) + denoiser(latents, angle)


@cache
def default_steps(sampler: str) -> int:
    """Returns how many steps a pipeline takes with a sampler when nothing else is said."""
    from sana.pipelines.sana_pipeline import DEFAULT_STEPS

    return DEFAULT_STEPS[sampler]
