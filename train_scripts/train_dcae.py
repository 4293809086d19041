"""Trains an autoencoder, or fine-tunes its decoder, and writes it as `work_dir/vae`; asset/docs/autoencoder_training.md
tells more.

    torchrun --nproc_per_node 2 train_scripts/train_dcae.py --work_dir output/dcae --minutes 34
    python train_scripts/train_dcae.py --work_dir output/sharp --vae_pretrained asset/models/sana_tiny \\
        --freeze_encoder --data_dir my_photographs --gan 0.5 --steps 2000

Without arguments: the small DC-AE of the bundled model, on drawn scenes. A run that was stopped goes on from its
work_dir. Exit codes: 0 done, 1 failure (weights, images, disk, divergence), 2 wrong usage, 143 and 130 after SIGTERM
and SIGINT, when a checkpoint is written.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

from sana.models.autoencoder.dc_ae import DCAE_PRESETS
from sana.pipelines.command import FAILURE, run_command
from sana.training.dcae_losses import LOSSES, LossWeights
from sana.training.dcae_model import latent_deviation_of, rounds_exactly, storage_dtype, write_autoencoder
from sana.training.dcae_options import OPTIMIZERS, DCAETraining
from sana.training.dcae_trainer import DCAETrainer, psnr
from sana.training.nonfinite import TrainingDivergedError
from sana.training.signals import StoppedBySignal
from sana.utils.distributed import barrier, is_main_process
from sana.utils.dtype import parse_dtype
from sana.utils.logging import setup_logging

BUNDLED = Path(__file__).resolve().parent.parent / "asset/models/sana_tiny/vae"
STAGES = ("ResBlock",) * 4 + ("EViTS5_GLU",) * 2
TINY_DCAE = {
    "encoder_width_list": (16, 32, 64, 128, 128, 256), "encoder_depth_list": (0, 1, 1, 1, 1, 1),
    "decoder_width_list": (16, 32, 64, 128, 128, 256), "decoder_depth_list": (0, 1, 2, 2, 2, 1),
    "encoder_block_type": STAGES, "decoder_block_type": STAGES,
    "downsample_block_type": "Conv", "upsample_block_type": "InterpolateConv",
}  # fmt: skip
NO_OPTION = ("preset", "loss", "save_dtype", *(field.name for field in dataclasses.fields(LossWeights)))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--work_dir", type=Path, default=Path("output/dcae"))
    add("--vae_pretrained", "--init", help="autoencoder to start from: folder, hub id or hf://owner/repo/folder")
    add("--preset", default="tiny", help=f"shape of a fresh autoencoder: tiny, {', '.join(DCAE_PRESETS)}")
    add(
        "--freeze_encoder",
        "--decoder_only",
        action="store_true",
        help="fine-tune the decoder; latents stay as they are",
    )
    add("--data_dir", nargs="+", default=(), help="folders of images (captions are not needed); else drawn scenes")
    add("--image_size", type=int, default=256, help="of folder images, pixels (default: 256)")
    add("--workers", type=int, default=0, help="processes that read images ahead (default: 0)")
    add("--steps", type=int, default=6000, help="optimiser steps (default: 6000)")
    add("--minutes", type=float, help="wall-clock time at most; the schedule ends with it")
    add("--batch_size", type=int, default=16, help="images per process (default: 16)")
    add("--lr", type=float, help="peak (default: 6e-4 for a fresh model, 1e-4 else)")
    add("--optimizer", choices=OPTIMIZERS, default="muon", help="muon: Muon for matrices, AdamW for the rest (default)")
    add("--mixed_precision", choices=("bf16", "fp32"), default="bf16")
    add("--loss", choices=tuple(LOSSES), help="weights of the terms (default: scenes without --data_dir, else lpips)")
    for field in dataclasses.fields(LossWeights):
        add(f"--{field.name}", type=float, metavar="WEIGHT", help=f"weight of {field.name}, instead of --loss's")
    add("--lpips_weights", type=Path, help="VGG16 of torchvision (a file) or an autoencoder (a folder) as backbone; "
        "default: the encoder training starts from, of a fresh model the bundled one")  # fmt: skip
    add("--lpips_linear", type=Path, help="channel weights that LPIPS learned for VGG16; then use --lpips 1")
    add("--gan_start", type=int, default=0, help="step at which the discriminator begins (default: 0)")
    add("--gan_lr", type=float, default=2e-4, help="of the discriminator (default: 2e-4)")
    add("--ema_decay", type=float, default=0.998)
    add("--seed", type=int, default=0)
    add("--save_every", type=int, default=200, help="steps between checkpoints (default: 200)")
    add("--log_every", type=int, default=50, help="steps between lines of train_log.jsonl (default: 50)")
    add("--save_dtype", help="fp32, bf16 or fp16 of work_dir/vae (default: bf16 where it loses nothing or the model is "
        "fresh, else fp32)")  # fmt: skip
    return parser


def read_options(given: dict) -> DCAETraining:
    """Raises ValueError: the options do not fit together."""
    if given["preset"] != "tiny" and given["preset"] not in DCAE_PRESETS:
        raise ValueError(f"--preset {given['preset']!r} is not known; choose tiny, {', '.join(DCAE_PRESETS)}")
    if given["vae_pretrained"] and given["preset"] != "tiny":
        raise ValueError("--preset is the shape of a fresh autoencoder; leave it out beside --vae_pretrained")
    chosen = {name: value for name in vars(LOSSES["lpips"]) if (value := given[name]) is not None}
    loss = given["loss"] or ("lpips" if given["data_dir"] else "scenes")
    values = {name: value for name, value in given.items() if name not in NO_OPTION}
    values |= {"weights": dataclasses.replace(LOSSES[loss], **chosen), "data_dir": tuple(given["data_dir"])}
    fresh = not given["vae_pretrained"]
    values["lr"] = given["lr"] or (6e-4 if fresh else 1e-4)
    if fresh:
        preset = DCAE_PRESETS.get(given["preset"])
        values["model"] = dataclasses.asdict(preset) | {"scaling_factor": None} if preset else TINY_DCAE
        if values["weights"].lpips and not given["lpips_weights"]:
            values["lpips_weights"] = BUNDLED
    if given["freeze_encoder"]:  # little noise on the latents, and whole scenes only
        values |= {"latent_noise": 0.05, "whole_scene_from": 0.0}
    return DCAETraining(**values)


def main(arguments: list[str] | None = None) -> int:
    given = vars(build_parser().parse_args(arguments))

    def work() -> int | None:
        setup_logging()
        options = read_options(given)
        wanted = parse_dtype(given["save_dtype"]) if given["save_dtype"] else None
        trainer = DCAETrainer(options)
        pretrained, frozen = options.vae_pretrained is not None, options.freeze_encoder
        if wanted and frozen and not rounds_exactly(trainer.autoencoder, wanted):
            raise ValueError(f"--save_dtype {given['save_dtype']} would change the frozen encoder; leave it out")
        dtype = wanted or storage_dtype(trainer.autoencoder, pretrained=pretrained, frozen=frozen)
        try:
            autoencoder = trainer.train()
        except (StoppedBySignal, TrainingDivergedError) as error:
            sys.stderr.write(f"{error}\n")
            return getattr(error, "exit_code", FAILURE)
        if is_main_process():
            images = trainer.sample_images()
            if not frozen:
                autoencoder.scaling_factor = 1 / latent_deviation_of(autoencoder, images)
            write_autoencoder(autoencoder, options.work_dir / "vae", dtype)
            images = images if options.data_dir else None
            where = f"{len(images)} training images" if images is not None else "64 fresh scenes"
            print(f"PSNR {psnr(autoencoder, images=images):.2f} dB over {where}; written to {options.work_dir / 'vae'}")
        barrier()
        trainer.lock.release()
        return None

    return run_command(work)


if __name__ == "__main__":
    torch.backends.cudnn.benchmark = True
    raise SystemExit(main())
