"""SanaPipeline: prompts in, pictures out. Loading is in `loading.py`, checks in `request.py`, formulas elsewhere."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sana.config import SanaConfig
from sana.data.transforms import resize_and_crop_tensor
from sana.diffusion import SAMPLERS
from sana.diffusion.guidance import Guidance, guide, select_guidance_kind
from sana.diffusion.sampler import Sampler
from sana.models.autoencoder.base import Autoencoder
from sana.models.text_encoder.base import PromptEmbeds
from sana.models.transformer.sana_cm import SanaMSCM
from sana.ops.backend import plain_kind
from sana.pipelines import inputs, loading
from sana.pipelines.approximations import cache_steps
from sana.pipelines.compiled import SPRINT, Compilable, watching
from sana.pipelines.denoise import TIMESTEPS, SprintDenoiser, TransformerDenoiser, check_finite
from sana.pipelines.graphs import to_host
from sana.pipelines.images import to_pil
from sana.pipelines.offload import Offloadable
from sana.pipelines.plan import Plannable
from sana.pipelines.quantized import Quantizable
from sana.pipelines.recipe import weights_hash
from sana.pipelines.request import Request
from sana.pipelines.text_features import TextFeatures, call_length, stack
from sana.pipelines.upscale import start_from_small
from sana.utils.allocator import keep_freed_memory
from sana.utils.dtype import parse_dtype
from sana.utils.logging import get_logger
from sana.utils.methods import OnClassOrInstance

logger = get_logger(__name__)

DEFAULT_STEPS = {"flow_dpm-solver": 20, "flow_euler": 28, "dpm-solver": 20, "sa-solver": 25, "scm": 2, "trigflow": 2}


class SanaPipeline(Compilable, Offloadable, Plannable, Quantizable):
    """Text to image with a Sana model.

    Two ways to one: `SanaPipeline(config)` and then `.from_pretrained(weights)`, or
    `SanaPipeline.from_pretrained(folder_or_id)` where the weights say themselves what they are.

    Args:
        config: a YAML file, a `SanaConfig`, or a mapping of its sections.
        device: "cuda" where there is one and nothing else is said, else "cpu". "mps" ran as a stand-in only.
        dtype: of the transformer and the text encoder: a torch dtype or a name such as "bf16". None means fp32 on a
            CPU and `model.mixed_precision` elsewhere. The autoencoder keeps `vae.weight_dtype`.

    Attributes:
        transformer: the denoiser, None before `from_pretrained`.
        autoencoder, text_encoder: loaded when first used; both may be assigned.
        text_features: what it remembers of encoded texts; `text_features.size = 0` switches that off.
    """

    def __init__(
        self,
        config: str | Path | Mapping[str, Any] | SanaConfig,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> None:
        self.config = loading.as_config(config)
        self.device = loading.as_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        default = torch.float32 if self.device.type == "cpu" else parse_dtype(self.config.model.mixed_precision)
        self.dtype = parse_dtype(dtype) if dtype is not None else default
        self.transformer: nn.Module | None = None
        self.model_path: str | None = None
        self._autoencoder: Autoencoder | None = None
        self._text_encoder: loading.AnyTextEncoder | None = None
        self.text_features = TextFeatures()
        self._weights_hash: str | None = None

    @OnClassOrInstance
    def from_pretrained(
        self_or_class: Any,  # noqa: N805  the pipeline, or its class
        model_path: str | Path,
        *,
        variant: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> "SanaPipeline":
        """Loads weights: into this pipeline, or, called on the class, into a new one made from what the weights say.

        Args:
            model_path: on an instance: any file or folder of transformer weights (`.pth`, `.safetensors`, `.bin`, a
                diffusers folder; a path, `hf://owner/repo/path`, a hub id or a URL). On the class: a model folder of
                ours, a single `.safetensors` of ours, or a folder or hub id in diffusers' layout.
            variant: of a diffusers folder's files, for example "bf16".
            device: moves the pipeline first.
            dtype: as in the constructor.

        Returns:
            The pipeline.

        Raises:
            CheckpointError: the weights are broken, are no model, or do not fit the config.
            FetchError: they could not be fetched.
        """
        source = loading.find_model(model_path, variant)
        if isinstance(self_or_class, type):
            pipeline = self_or_class(loading.source_config(source), device=device, dtype=dtype)
        else:
            pipeline = self_or_class
            pipeline.to(device, parse_dtype(dtype) if dtype is not None else None)
        pipeline.transformer = pipeline._load_transformer(source)
        pipeline.model_path = str(model_path)
        pipeline._weights_hash = None
        return pipeline

    @property
    def autoencoder(self) -> Autoencoder:
        """The autoencoder of `config.vae`."""
        if self._autoencoder is None:
            self._autoencoder = loading.load_autoencoder(self.config, self.load_device)
        return self._autoencoder

    @autoencoder.setter
    def autoencoder(self, autoencoder: Autoencoder) -> None:
        self._autoencoder = autoencoder.eval()
        self._weights_hash = None

    vae = autoencoder  # what diffusers calls it: `pipeline.vae.enable_tiling()`

    @property
    def text_encoder(self) -> loading.AnyTextEncoder:
        """The text encoder of `config.text_encoder`; never loaded when every call brings its embeddings."""
        if self._text_encoder is None:
            self._text_encoder = self._load_text_encoder()
        return self._text_encoder

    @text_encoder.setter
    def text_encoder(self, text_encoder: loading.AnyTextEncoder) -> None:
        self._text_encoder = text_encoder
        self.text_features.clear()
        self._weights_hash = None

    def to(
        self,
        *where: str | torch.device | torch.dtype | None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Moves what is loaded, and what will be. A dtype changes the transformer and the text encoder only.

        Raises:
            ValueError: there is no such device here.
        """
        for one in (*where, device, dtype):
            if isinstance(one, torch.dtype):
                self.dtype = one
            elif one is not None:
                self.device = loading.as_device(one)
        if self.transformer is not None:
            self.transformer.to(self.device, self.dtype)
        if self._text_encoder is not None:
            self._text_encoder.to(self.device, self.dtype)
        if self._autoencoder is not None:
            self._autoencoder.to(self.device)
        if self._compiled is not None:
            self._compiled.drop_graphs()
        self.text_features.clear()
        self._weights_hash = None
        return self

    def weights_hash(self) -> str:
        """Returns the hash of the three networks as they are loaded: tensors, and settings that decide a picture."""
        if self._weights_hash is None:
            transformer = self._require_transformer()
            config = self.config
            settings = {
                "class": type(transformer).__name__,
                "kwargs": getattr(transformer, "init_kwargs", {}),
                "pag_applied_layers": config.model.pag_applied_layers,
                "chi_prompt": config.text_encoder.chi_prompt,
                "model_max_length": config.text_encoder.model_max_length,
                "scaling": [self.autoencoder.scaling_factor, self.autoencoder.shift_factor],
                "sigma_data": config.scheduler.sigma_data,
            }
            self._weights_hash = weights_hash((transformer, self.autoencoder, self.text_encoder), settings)
        return self._weights_hash

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        **options: Any,
    ) -> Any:
        """Makes pictures; in several parts where a plan with a bound says so (`fit`).

        Args:
            prompt: a text or a list; every prompt's images are returned.
            height: in pixels; the model's own size when None.
            width: in pixels; the model's own size when None.
            **options: the other fields of `sana.pipelines.request.Request`, by name.

        Returns:
            By `output_type`. "pt": (B, 3, H, W) float32 in about [-1, 1], not clamped; "np": (B, H, W, 3) in [0, 1];
            "pil": a list of images; "latent": (B, C, h, w), scaled.

        Raises:
            ValueError: an argument is out of range, or cannot take effect.
            NonFiniteError: a network produced infinity or NaN.
        """
        return self.generate_as_planned(Request(prompt=prompt, height=height, width=width, **options))

    @torch.inference_mode()
    def generate(self, request: Request) -> Any:
        """Makes the pictures of a request at once; see `__call__`."""
        if self.device.type == "cpu":
            keep_freed_memory()
        transformer = self._require_transformer()
        name = request.sampler or self.config.scheduler.vis_sampler
        sampler = SAMPLERS[name]
        self._check_sampler(name, sampler)
        request = replace(request, num_inference_steps=request.num_inference_steps or DEFAULT_STEPS[name])
        size = inputs.plan_size(
            request.height,
            request.width,
            factor=self.autoencoder.downsample_factor,
            image_size=self.config.model.image_size,
            binning=request.binning,
        )
        images = request.prompt_count * request.num_images_per_prompt
        generators = inputs.as_generators(request.generator, request.seed, images)
        factor = self.autoencoder.downsample_factor
        shape = (images, self.autoencoder.latent_channels, size.model_height // factor, size.model_width // factor)
        if request.upscale_from is not None:
            sampler, noise = start_from_small(self, request, sampler, size, generators)
        else:
            rows = request.num_images_per_prompt
            noise = inputs.initial_noise(request.latents, generators, shape, images_per_prompt=rows, device=self.device)
        denoise = self._sprint if sampler.prediction == "trigflow" else self._flow
        latents = denoise(transformer, sampler, request, noise, generators)
        if request.output_type == "latent":
            return latents
        return _as_output(self.decode(latents, size), request.output_type)

    def encode_prompts(self, prompts: Sequence[str], *, null: bool = False, trim: bool = False) -> PromptEmbeds:
        """Returns the embeddings of prompts, or with `null` those of negative prompts (made without CHI).

        Args:
            prompts: P texts. What is known of them from earlier calls is not computed again.
            null: whether they are negative prompts, whose padding is read under the prompts' masks.
            trim: cut prompts to the longest of them; else L is `model_max_length`. Their padding is zero.

        Returns:
            embeds (P, L, C) and mask (P, L), new tensors.

        Raises:
            NonFiniteError: the text encoder produced infinity or NaN.
        """
        encoder = self.text_encoder
        with self.stage("text_encoder"):
            features = self.text_features.find(encoder, prompts, null=null, device=self.device)
        longest = max(len(feature.mask) for feature in features)
        length = call_length(longest, encoder.model_max_length, self.device) if trim else encoder.model_max_length
        return stack(features, length)

    @torch.no_grad()
    def decode(self, latents: Tensor, size: inputs.ImageSize | None = None) -> Tensor:
        """Returns images (B, 3, H, W) float32 of scaled latents, resized and cropped when the size was binned."""
        autoencoder = self.autoencoder if self._compiled is None else self._compiled.autoencoder()
        with self.stage("autoencoder"), watching(self._compiled, "the decoder"):
            images = autoencoder.decode(latents).float()
        if not torch.isfinite(images).all():
            raw = latents.to(autoencoder.dtype) / autoencoder.scaling_factor + autoencoder.shift_factor
            network = getattr(autoencoder, "decoder", autoencoder)
            check_finite(images, network, "autoencoder's decoder", raw)
        if size is not None and size.binned:
            images = resize_and_crop_tensor(images, size.width, size.height)
        return images

    def _flow(
        self, transformer: nn.Module, sampler: Sampler, request: Request, noise: Tensor, generators: inputs.Generators
    ) -> Tensor:
        """Samples a flow-matching (or VP) model with guidance; returns latents."""
        request.check_for_flow()
        flow_shift = request.flow_shift if request.flow_shift is not None else self.config.scheduler.flow_shift
        times = sampler.times(request.num_inference_steps, flow_shift=flow_shift)
        guidance = self._guidance(request)
        needs_null = any("uncond" in guidance.branches(float(time)) for time in times)
        with self.stage("text_encoder"):  # one for both, so that the encoder comes and goes once
            prompt = request.embeds(self.encode_prompts, self.device)
            null = request.null_embeds(self.encode_prompts, self.device) if needs_null else None
        with self.stage("transformer"):
            if self._compiled is not None:
                latents = self._compiled.denoise(request, times, guidance, noise, prompt, null)
                if latents is not None:
                    return latents
            pag_layers = self.config.model.pag_applied_layers
            options: dict[str, Any] = {"pag_layers": pag_layers, "dtype": self.dtype, "times": times[:-1]}
            denoiser = TransformerDenoiser(transformer, prompt, null, **options)
            velocity = cache_steps(
                guide(denoiser, guidance),
                request.step_cache,
                transformer=transformer,
                sampler=sampler,
                times=times,
                guidance=guidance,
            )
            with (
                watching(self._compiled, "the transformer"),
                self._steps(request, len(times) - 1, TIMESTEPS) as callback,
            ):
                return sampler.sample(velocity, noise, times, generator=generators, callback=callback)

    def _sprint(
        self, transformer: nn.Module, sampler: Sampler, request: Request, noise: Tensor, generators: inputs.Generators
    ) -> Tensor:
        """Samples a distilled model in a few steps; the guidance scale is one of its inputs. Returns latents."""
        request.check_for_sprint()
        sigma_data = self.config.scheduler.sigma_data
        times = request.angles()
        if times is None:
            times = sampler.times(request.num_inference_steps, **request.sprint_times())
        prompt = request.embeds(self.encode_prompts, self.device)
        denoiser = SprintDenoiser(transformer, prompt, guidance_scale=request.guidance_scale, dtype=self.dtype)
        if request.latents is not None:  # the released pipeline takes the caller's latents in units of the data
            noise = noise / sigma_data
        options = {"sigma_data": sigma_data, "generator": generators}
        watched = watching(self._compiled, SPRINT)
        with self.stage("transformer"), watched, self._steps(request, len(times) - 1) as callback:
            return sampler.sample(denoiser, noise, times, callback=callback, **options)

    def _check_sampler(self, name: str, sampler: Sampler) -> None:
        """Raises ValueError when the model does not predict what the sampler needs."""
        if isinstance(self.transformer, SanaMSCM):
            predicted = "trigflow"
        else:
            predicted = "velocity" if self.config.scheduler.predict_flow_v else "noise"
        if predicted != sampler.prediction:
            fitting = [one for one in SAMPLERS if SAMPLERS[one].prediction == predicted]
            raise ValueError(
                f"The sampler {name!r} needs a model that predicts {sampler.prediction}, and this one predicts "
                f"{predicted}; use {' or '.join(fitting)}."
            )

    def _guidance(self, request: Request) -> Guidance:
        """Returns the guidance of a request, as the released code chooses its kind.

        Raises:
            ValueError: PAG is asked for and the model cannot do it.
        """
        model = self.config.model
        kind = select_guidance_kind(model.guidance_type, request.pag, plain_kind(model.attn_type)[0])
        if request.pag > 1.0:
            if kind != "classifier-free_PAG":
                raise ValueError(f"pag_guidance_scale needs attn_type 'linear'; this model has {model.attn_type!r}.")
            depth = len(getattr(self.transformer, "blocks", ())) or max(model.pag_applied_layers, default=0) + 1
            if not model.pag_applied_layers or not all(0 <= layer < depth for layer in model.pag_applied_layers):
                raise ValueError(f"pag_applied_layers {model.pag_applied_layers} must name blocks 0 to {depth - 1}.")
        low, high = request.interval_guidance
        return Guidance(kind, float(request.guidance_scale), request.pag, (float(low), float(high)))

    @contextmanager
    def _steps(
        self, request: Request, total: int, unit: float = 1.0
    ) -> Iterator[Callable[[int, float, Tensor], Tensor | None]]:
        """Gives what a sampler calls after every step: the progress bar and the caller's own callback.

        Args:
            request: holds the callback.
            total: number of steps.
            unit: what a sampler's time is multiplied by for the callback.
        """
        with tqdm(total=total, desc="Sampling", disable=None if request.progress_bar else True) as bar:

            def after_step(index: int, time: float, latents: Tensor) -> Tensor | None:
                bar.update()
                if request.callback_on_step_end is None:
                    return None
                changed = request.callback_on_step_end(self, index, float(time) * unit, {"latents": latents})
                return changed.get("latents") if changed else None

            yield after_step

    def _require_transformer(self) -> nn.Module:
        if self.transformer is None:
            raise ValueError("The pipeline has no weights yet; call from_pretrained(model_path) first.")
        return self.transformer


def _as_output(images: Tensor, output_type: str) -> Any:
    """Turns images in [-1, 1] into what the caller asked for."""
    if output_type == "pt":
        return images
    if output_type == "pil":
        return to_pil(images)
    return to_host((images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1))[0].numpy()
