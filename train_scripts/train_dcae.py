"""Trains the small DC-AE of the bundled model on drawn scenes and writes it as a model folder's `vae/`.

    torchrun --nproc_per_node 2 train_scripts/train_dcae.py --work_dir output/dcae --minutes 34
    python train_scripts/train_dcae.py --work_dir output/dcae_sharp --init output/dcae/vae --decoder_only

A run that was stopped goes on from its work_dir.
"""

import argparse
from pathlib import Path

import torch

from sana.models.autoencoder.loading import save_autoencoder
from sana.training.dcae_trainer import DCAETraining, latent_deviation, psnr, train_dcae
from sana.utils.distributed import is_main_process
from sana.utils.logging import setup_logging

STAGES = ("ResBlock",) * 4 + ("EViTS5_GLU",) * 2
TINY_DCAE = {
    "encoder_width_list": (16, 32, 64, 128, 128, 256), "encoder_depth_list": (0, 1, 1, 1, 1, 1),
    "decoder_width_list": (16, 32, 64, 128, 128, 256), "decoder_depth_list": (0, 1, 2, 2, 2, 1),
    "encoder_block_type": STAGES, "decoder_block_type": STAGES,
    "downsample_block_type": "Conv", "upsample_block_type": "InterpolateConv",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("output/dcae"))
    parser.add_argument("--steps", type=int, default=6000, help="optimiser steps at most")
    parser.add_argument("--minutes", type=float, help="wall-clock time at most; the schedule ends with it")
    parser.add_argument("--batch_size", type=int, default=16, help="crops of 128 pixels per process")
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", type=Path, help="autoencoder folder to start from")
    parser.add_argument("--decoder_only", action="store_true", help="freeze the encoder and sharpen the decoder")
    options = parser.parse_args()
    setup_logging()
    values = vars(options)
    if options.decoder_only:  # no noise on the latents, whole scenes only
        values |= {"latent_noise": 0.05, "whole_scene_from": 0.0}
    autoencoder = train_dcae(DCAETraining(model=TINY_DCAE, **values))
    if is_main_process():
        autoencoder.scaling_factor = 1 / latent_deviation(autoencoder)
        save_autoencoder(autoencoder, options.work_dir / "vae", dtype=torch.bfloat16)
        print(f"PSNR {psnr(autoencoder):.2f} dB over 64 fresh scenes; written to {options.work_dir / 'vae'}")


if __name__ == "__main__":
    main()
