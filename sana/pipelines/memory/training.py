"""`TrainingMemory`: what a training step holds on one process: states by formula, activations by running our code.

The formulas of optimisers are in `optimizers.py`; shards (`train.use_fsdp`) and Triton kernels are not predicted.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sana.config import ConfigError, SanaConfig
from sana.config_extra import train_extra
from sana.diffusion.flow import add_noise, flow_loss, training_timesteps
from sana.models.transformer.mix_ffn import MixFFN
from sana.pipelines.memory import networks, optimizers
from sana.pipelines.memory.kernels import cpu_kernels
from sana.pipelines.memory.stages import DEVICES
from sana.pipelines.memory.texts import Lengths, TextRun
from sana.pipelines.memory.tracker import CUDA_BLOCK, MemoryTracker
from sana.utils.dtype import parse_dtype

CHECKPOINTING = ("none", "ffn", "blocks")


@dataclass(frozen=True)
class TrainingStates:
    """Bytes that a run holds from step to step.

    Attributes:
        weights: what is trained, in float32.
        optimizer: its state.
        ema: the average of the parameters.
        autoencoder: frozen; 0 with cached latents.
        text_encoder: frozen; 0 with cached features, or where it is trained.
    """

    weights: int
    optimizer: int
    ema: int
    autoencoder: int
    text_encoder: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.optimizer + self.ema + self.autoencoder + self.text_encoder


class TrainingMemory:
    """Predicts the memory of a training run of one process, with the image size of `model.image_size`.

    A backward pass on CUDA cannot be followed without a GPU, so the networks are followed on the CPU, which in training
    computes with the same operators, fused attention among them; blocks are those of the CUDA allocator.

    Args:
        config: of the run.
        device: "cpu" or "cuda".

    Raises:
        ConfigError: the run is sharded, or its optimiser is not known.
    """

    def __init__(self, config: SanaConfig, *, device: str) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode  # a second to import

        if device not in DEVICES:
            raise ValueError(f"Memory is predicted for {' or '.join(DEVICES)}, not {device!r}.")
        if config.train.use_fsdp:
            raise ConfigError("The memory of shards (train.use_fsdp) is not predicted; set it to false.")
        self.config, self.extra, self.device = config, train_extra(config.train.extra), device
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._block = CUDA_BLOCK if device == "cuda" else 1
        self._parameters = [(name, tuple(one.shape)) for name, one in self._trained().named_parameters()]

    def states(self) -> TrainingStates:
        """Returns what is held from step to step, from the end of the first one on."""
        options, trained = self.config.train.optimizer, self._trained()
        average = sum(self._rounded(one.numel() * 4) for one in trained.parameters())
        return TrainingStates(
            weights=sum(self._rounded(one.numel() * 4) for _, one in networks.named_weights(trained)),
            optimizer=optimizers.state_bytes(options, self._parameters),
            ema=average if self.config.train.ema_update else 0,
            autoencoder=self._held("autoencoder") if self._encodes_images() else 0,
            text_encoder=self._held("text_encoder") if self._encodes_texts() else 0,
        )

    def gradients(self) -> int:
        """Returns the bytes of the gradients of all parameters."""
        return sum(self._rounded(one.numel() * 4) for one in self._trained().parameters())

    def encode_images(self, batch: int) -> int:
        """Returns the peak of encoding a micro-batch of images, above the states; 0 with cached latents."""
        if self.config.data.load_vae_feat:
            return 0
        side = self.config.model.image_size
        with self._tracked("autoencoder") as (tracker, autoencoder), torch.no_grad(), self._autocast():
            autoencoder.disable_tiling()
            images = torch.empty(batch, 3, side, side, dtype=torch.uint8).float() / 127.5 - 1
            autoencoder.encode(images).float()
        return tracker.peak

    def encode_texts(self, batch: int) -> int:
        """Returns the peak of encoding a micro-batch of captions, above the states; 0 with cached features."""
        if self.config.data.load_text_feat or self.extra.train_text_encoder:
            return 0
        from sana.models.text_encoder.architectures import encoder_class, instruction_tokens

        text = self.config.text_encoder
        name, limit = text.text_encoder_name, text.model_max_length
        lengths = Lengths(instruction_tokens(name, text.chi_prompt), limit, limit)
        with self._tracked("text_encoder") as (tracker, network), torch.no_grad(), self._autocast():
            TextRun(network, encoder_class(name), lengths, "cpu", together=True).encode(batch)
        return tracker.peak

    def forward_backward(self, batch: int, checkpointing: str = "none") -> int:
        """Returns the peak of the gradients of a micro-batch, above the states; the gradients themselves included.

        Args:
            batch: images.
            checkpointing: what is computed again instead of kept: "none", "ffn" (`train.extra.checkpoint_ffn`) or
                "blocks" (`train.grad_checkpointing`).
        """
        if checkpointing not in CHECKPOINTING:
            raise ValueError(f"checkpointing must be one of {', '.join(CHECKPOINTING)}, not {checkpointing!r}.")
        with self._tracked("transformer", trained=True) as (tracker, network):
            transformer = network["transformer"]
            transformer.gradient_checkpointing = checkpointing == "blocks"
            for module in transformer.modules():
                if isinstance(module, MixFFN):
                    module.recompute_expansion = checkpointing == "ffn"
            for _ in range(min(2, self.config.train.gradient_accumulation_steps)):
                self._losses(network, batch).sum().backward()
        return tracker.peak

    def optimizer_step(self) -> int:
        """Returns the peak of an optimiser's step, above the states; gradients included."""
        return self.gradients() + optimizers.step_bytes(self.config.train.optimizer, self._parameters)

    def _losses(self, network: Any, batch: int) -> Tensor:
        """`Trainer.losses` after the encoders."""
        config, transformer = self.config, network["transformer"]
        side = config.model.image_size // config.vae.vae_downsample_rate
        latents = torch.empty(batch, config.vae.vae_latent_dim, side, side)
        embeds, mask = self._features(batch)
        with self._autocast():
            noise, sigma = torch.empty_like(latents), torch.empty(batch, dtype=torch.float64)
            if "text_encoder" in network:
                embeds = self._trained_features(network["text_encoder"], mask)
            null = transformer.y_embedder.y_embedding.to(embeds)[: embeds.shape[1]]
            embeds = torch.where(torch.zeros(batch, 1, 1, dtype=torch.bool), null, embeds)
            noisy = add_noise(latents, noise, sigma)
            found = transformer(noisy, training_timesteps(sigma), y=embeds[:, None], mask=mask)
            return flow_loss(found, latents, noise)

    def _features(self, batch: int) -> tuple[Tensor, Tensor]:
        text = self.config.text_encoder
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        embeds = torch.empty(batch, text.model_max_length, text.caption_channels, dtype=dtype)
        return embeds, torch.ones(batch, text.model_max_length, dtype=torch.int64)

    def _trained_features(self, model: Any, mask: Tensor) -> Tensor:
        """`sana.training.captions.CaptionEncoder` with captions of full length, one of them dropped."""
        from sana.models.text_encoder.architectures import instruction_tokens

        text = self.config.text_encoder
        start = max(1, instruction_tokens(text.text_encoder_name, text.chi_prompt) - 1)
        batch, length = mask.shape
        ids = torch.ones(batch, start + length - 1, dtype=torch.int64)
        hidden = model(input_ids=ids, attention_mask=ids, use_cache=False)[0]
        embeds = torch.cat([hidden[:, :1], hidden[:, start:]], dim=1)
        del hidden
        empty = torch.ones(1, length, dtype=torch.int64)
        null = model(input_ids=empty, attention_mask=empty, use_cache=False)[0]
        return torch.where(torch.zeros(batch, 1, 1, dtype=torch.bool), null.to(embeds.dtype), embeds)

    def _trained(self) -> nn.ModuleDict:
        """What learns, on the meta device."""
        parts = {"transformer": networks.build_empty("transformer", self.config)}
        if self.extra.train_text_encoder:
            parts["text_encoder"] = networks.build_empty("text_encoder", self.config)
        return nn.ModuleDict(parts)

    def _encodes_images(self) -> bool:
        return not self.config.data.load_vae_feat or self.config.train.visualize

    def _encodes_texts(self) -> bool:
        if self.extra.train_text_encoder:
            return False
        return not self.config.data.load_text_feat or self.config.train.visualize

    def _held(self, network: str) -> int:
        size = self._frozen_dtype(network).itemsize
        module = networks.build_empty(network, self.config)
        return sum(self._rounded(one.numel() * size) for _, one in networks.named_weights(module))

    def _frozen_dtype(self, network: str) -> torch.dtype:
        """As `sana.training.build.build_networks` has it."""
        on_gpu = torch.bfloat16 if self.device == "cuda" else torch.float32
        return networks.network_dtype(network, self.config, on_gpu)

    def _rounded(self, size: int) -> int:
        return -(-size // self._block) * self._block

    def _autocast(self) -> torch.autocast:
        dtype = parse_dtype(self.config.model.mixed_precision)
        mixed = dtype != torch.float32
        return torch.autocast("cpu", dtype=dtype if mixed else torch.bfloat16, enabled=mixed)

    @contextmanager
    def _tracked(self, name: str, *, trained: bool = False) -> Iterator[tuple[MemoryTracker, Any]]:
        """Gives a tracker, already on, and a network whose weights it does not count."""
        network: Any = self._trained() if trained else networks.build_empty(name, self.config)
        tracker = MemoryTracker(block=self._block, extra=cpu_kernels if self.device == "cpu" else None)
        with ExitStack() as stack:
            stack.enter_context(self._mode)
            networks.give_storage(network, torch.float32 if trained else self._frozen_dtype(name), "cpu")
            if trained:
                network.train().requires_grad_(True)
                networks.use_empty_tables(network["transformer"])
                network["transformer"].y_embedder.dropout = 0.0
            tracker.ignore(tensor for _, tensor in networks.named_weights(network))
            stack.enter_context(tracker)
            yield tracker, network
