"""The node that samples: `SanaPipeline` behind a node, so that a seed gives its picture. No sampler is here."""

from typing import Any

from torch import Tensor

from sana.diffusion import SAMPLERS
from sana.pipelines.inputs import MAX_STEPS
from sana.pipelines.request import MAX_SCALE
from sana.utils.logging import get_logger
from sana.utils.seed import MAX_SEED

from . import host
from .patcher import ready_model
from .values import PADDING, Conditioning, Latent, SanaModel, read_conditioning, read_empty_latent

logger = get_logger(__name__)

SAMPLER_NAMES = ("flow_dpm-solver", "flow_euler")  # those of a flow; the others' models are not among the official ones
MODELS_OWN = -1.0


class SanaSampler:
    """Noise to latents, as `SanaPipeline` makes them: on a CPU in FP32, bit for bit."""

    TITLE = "Sana Sampler"
    CATEGORY = "ExtraModels/Sana"
    DESCRIPTION = "Samples as SanaPipeline does: picture i of a batch has the seed's noise of seed + i on every device."
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "sample"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  ComfyUI's name
        """Returns the inputs, in the order of their widgets."""
        seed = {"default": 0, "min": 0, "max": MAX_SEED, "control_after_generate": True}
        scale = {"default": 4.5, "min": 0.0, "max": MAX_SCALE, "step": 0.1, "round": 0.01}
        pag = {**scale, "default": 1.0, "tooltip": "Perturbed-attention guidance; 1 is off. Released examples use 2."}
        shift = {"default": MODELS_OWN, "min": -1.0, "max": 100.0, "step": 0.1, "tooltip": "-1: the model's own."}
        return {
            "required": {
                "model": ("MODEL",),
                "positive": ("CONDITIONING",),
                "negative": ("CONDITIONING", {"tooltip": "From Gemma Text Encode."}),
                "latent_image": ("LATENT", {"tooltip": "Empty: its size and number count."}),
                "seed": ("INT", seed),
                "steps": ("INT", {"default": 20, "min": 1, "max": MAX_STEPS}),
                "cfg": ("FLOAT", {**scale, "tooltip": "Guidance; 1 is off."}),
                "pag": ("FLOAT", pag),
                "sampler_name": (list(SAMPLER_NAMES),),
                "flow_shift": ("FLOAT", shift),
            }
        }

    def sample(
        self,
        model: Any,
        positive: Conditioning,
        negative: Conditioning,
        latent_image: Latent,
        **options: Any,
    ) -> tuple[Latent]:
        """Returns the LATENT, unscaled as every LATENT is.

        Args:
            model: of `SanaCheckpointLoader`.
            positive: of `SanaTextEncode`.
            negative: of `GemmaTextEncode`.
            latent_image: of `EmptySanaLatentImage`.
            **options: the widgets.

        Raises:
            ValueError: an input is of another kind, or an option cannot take effect.
        """
        sana = ready_model(model)
        samples = read_empty_latent(latent_image, sana)
        embeds, mask, _ = read_conditioning(positive, "positive", sana.caption_channels)
        null_embeds, null_mask, extra = read_conditioning(negative, "negative", sana.caption_channels)
        if extra.get(PADDING) != "encoded":
            logger.warning(
                "the negative text was encoded with the instruction; for SanaPipeline's picture use GemmaTextEncode"
            )
        latents = self._run(
            sana,
            samples,
            seeds=[options["seed"] + int(index) for index in latent_image.get("batch_index", range(len(samples)))],
            prompt_embeds=embeds,
            prompt_attention_mask=mask,
            negative_prompt_embeds=null_embeds,
            negative_prompt_attention_mask=null_mask,
            num_inference_steps=options["steps"],
            guidance_scale=options["cfg"],
            pag_guidance_scale=options["pag"],
            sampler=options["sampler_name"],
            flow_shift=None if options["flow_shift"] == MODELS_OWN else options["flow_shift"],
        )
        return ({**latent_image, "samples": latents},)

    def _run(self, sana: SanaModel, samples: Tensor, *, seeds: list[int], **wishes: Any) -> Tensor:
        factor = sana.pipeline.autoencoder.downsample_factor
        progress = host.Progress(wishes["num_inference_steps"])

        def after_step(_: object, step: int, *__: object) -> None:
            progress.show(step + 1)
            host.stop_if_asked()

        host.stop_if_asked()
        latents = sana.pipeline(
            height=samples.shape[2] * factor,
            width=samples.shape[3] * factor,
            num_images_per_prompt=len(samples),
            seed=seeds,
            use_resolution_binning=False,
            output_type="latent",
            callback_on_step_end=after_step,
            progress_bar=False,
            **wishes,
        )
        return sana.unscaled(latents).to(host.latent_device())


assert set(SAMPLER_NAMES) <= set(SAMPLERS)
