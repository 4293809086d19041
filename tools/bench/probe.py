"""One picture by the bundled model in a process of its own: `memory.py` starts it to see time and memory from nothing.

python -m tools.bench.probe ours FOLDER    # or diffusers. FOLDER/settings.json says what to make; FOLDER/ours.pt gets
                                           # the picture, and the greatest resident memory goes to stdout as JSON
Each side imports only what it needs itself.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.bench.clocks import peak_bytes


def main(arguments: list[str]) -> int:
    """Makes the picture and says what it took."""
    side, folder = arguments[0], Path(arguments[1])
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    noise = torch.randn(settings["noise_shape"], generator=torch.Generator().manual_seed(0))
    picture = (our_picture if side == "ours" else diffusers_picture)(settings, noise)
    torch.save(picture, folder / f"{side}.pt")
    print(json.dumps({"peak_bytes": peak_bytes("cpu")}))
    return 0


def our_picture(settings: dict[str, Any], noise: Tensor) -> Tensor:
    """By our pipeline, in [0, 1]."""
    from sana.pipelines.sana_pipeline import SanaPipeline

    pipeline = SanaPipeline.from_pretrained(settings["ours"], device="cpu", dtype="fp32")
    picture = pipeline(
        prompt=settings["prompt"], height=settings["pixels"], width=settings["pixels"], latents=noise,
        num_inference_steps=settings["steps"], guidance_scale=settings["guidance"], use_resolution_binning=False,
        progress_bar=False,
    )  # fmt: skip
    return (picture / 2 + 0.5).clamp(0, 1)


@torch.inference_mode()
def diffusers_picture(settings: dict[str, Any], noise: Tensor) -> Tensor:
    """By diffusers' pipeline from its exported folder, in [0, 1]."""
    import diffusers

    pipeline = diffusers.SanaPipeline.from_pretrained(settings["diffusers"], torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    embeds, mask, null, _ = pipeline.encode_prompt(
        settings["prompt"], negative_prompt="", complex_human_instruction=settings["chi_prompt"] or None,
        max_sequence_length=settings["max_length"],
    )  # fmt: skip
    return pipeline(
        negative_prompt=None, prompt_embeds=embeds, prompt_attention_mask=mask, negative_prompt_embeds=null,
        negative_prompt_attention_mask=mask, height=settings["pixels"], width=settings["pixels"], latents=noise,
        num_inference_steps=settings["steps"], guidance_scale=settings["guidance"], use_resolution_binning=False,
        output_type="pt",
    ).images  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
