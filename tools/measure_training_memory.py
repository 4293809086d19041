"""Predicted against measured memory of training steps: weights, state, average and activations of one process.

    python tools/measure_training_memory.py --config configs/sana_config/tiny/Sana_tiny_img256.yaml --batch 8

Weights are zeros, pictures and captions are made up; what is counted is as in `measure_memory.py`.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sana.config import SanaConfig, load_config
from sana.config_extra import train_extra
from sana.models.text_encoder.load import _load_tokenizer, _split_folder
from sana.pipelines.memory import networks
from sana.pipelines.memory.training import CHECKPOINTING, TrainingMemory
from sana.training.build import choose_kernels
from sana.training.captions import CaptionEncoder
from sana.training.ema import ExponentialMovingAverage
from sana.training.objective import FlowObjective, NoiseOptions, draw
from sana.training.optimizer import build_optimizer
from sana.training.parallel import Parallel
from tools.measure_memory import Row, measured_peak, stored_bytes, table

STEPS = 2  # the first makes the optimiser's state


def zeros(name: str, config: SanaConfig) -> nn.Module:
    """Builds a network in float32 on the CPU whose weights are zero and learn."""
    network = networks.build_empty(name, config)
    networks.give_storage(network, torch.float32, "cpu")
    with torch.no_grad():
        for _, tensor in networks.named_weights(network):
            tensor.zero_()
    return network.train().requires_grad_(True)


def objective_of(config: SanaConfig) -> FlowObjective:
    """What is trained, as `sana.training.build` puts it together."""
    text, captions, joint = config.text_encoder, None, train_extra(config.train.extra).train_text_encoder
    if joint:
        tokenizer = _load_tokenizer(_split_folder(Path(text.text_encoder_name))[1])
        captions = CaptionEncoder(tokenizer, zeros("text_encoder", config), text.chi_prompt, text.model_max_length)
    return FlowObjective(zeros("transformer", config), flow_shift=config.scheduler.flow_shift, captions=captions)


def steps(config: SanaConfig, parallel: Parallel, module: nn.Module, batch: int) -> Callable[[], Any]:
    """Returns what takes steps as `Trainer.train_step` does, without reading images."""
    text, side = config.text_encoder, config.model.image_size // config.vae.vae_downsample_rate
    shape = (config.vae.vae_latent_dim, side, side)

    def run() -> Any:
        optimizer = build_optimizer(module.named_parameters(), config.train.optimizer)
        ema = ExponentialMovingAverage(module, config.train.ema_rate) if config.train.ema_update else None
        for _ in range(STEPS):
            for _ in range(config.train.gradient_accumulation_steps):
                with parallel.autocast():
                    latents = torch.zeros(batch, *shape, device=parallel.device)
                    embeds = torch.zeros(batch, text.model_max_length, text.caption_channels, device=parallel.device)
                    mask = torch.ones(embeds.shape[:2], dtype=torch.int64, device=parallel.device)
                    draws = draw(range(batch), shape, NoiseOptions(0, drop_probability=1.0)).to(parallel.device)
                    captions = ["a red cat " * text.model_max_length] * batch
                    losses = module(latents, draws, embeds, mask, captions)
                parallel.backward(losses.sum())
            parallel.clip_gradients(config.train.gradient_clip)
            optimizer.step()
            if ema is not None:
                ema.update(module)
            optimizer.zero_grad()
        return optimizer, ema

    return run


def row(config_file: str, overrides: Sequence[str], batch: int, checkpointing: str) -> Row:
    """Predicts and measures."""
    config = load_config(config_file, overrides)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    memory = TrainingMemory(config, device=device)
    states = memory.states()
    step = max(memory.forward_backward(batch, checkpointing), memory.optimizer_step())
    parallel = Parallel(config.model.mixed_precision)
    module = parallel.prepare(objective_of(config))
    module.transformer.gradient_checkpointing = checkpointing == "blocks"
    extra = train_extra({**(config.train.extra or {}), "checkpoint_ffn": checkpointing == "ffn"})
    choose_kernels(module.transformer, extra, parallel.device)
    held = stored_bytes(module)
    peak = measured_peak(steps(config, parallel, module, batch), device)
    name, side = f"train {checkpointing}", config.model.image_size
    shape = (side, side, batch, config.model.mixed_precision, device)
    return Row(
        config_file, name, "transformer", *shape, states.weights, states.optimizer + states.ema + step, held, peak
    )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/sana_config/tiny/Sana_tiny_img256.yaml")
    parser.add_argument("--batch", type=int, default=8, help="images of a micro-batch")
    parser.add_argument("--checkpointing", nargs="+", default=list(CHECKPOINTING), choices=CHECKPOINTING)
    parser.add_argument("--json", type=Path, help="write the rows there")
    args, overrides = parser.parse_known_args(argv)
    args.overrides = overrides
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    rows = [row(args.config, args.overrides, args.batch, one) for one in args.checkpointing]
    print(table(rows))
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(one) for one in rows], indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
