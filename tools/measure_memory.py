"""Predicted against measured memory of every stage: the networks of a model with empty weights, run for real.

    python tools/measure_memory.py --model asset/models/sana_tiny --height 256 --width 256

On a CPU every allocation that PyTorch's allocator makes while a stage runs is added up (those inside oneDNN too); on a
GPU `torch.cuda.max_memory_allocated` is read. Nothing is fetched: weights are zeros, and the tokenizer is a stand-in.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sana.config import SanaConfig, load_config
from sana.models.autoencoder.tiling import make_tiling
from sana.models.text_encoder.architectures import LETTERS_A_TOKEN
from sana.models.text_encoder.base import TextEncoder
from sana.models.text_encoder.load import _load_tokenizer, _split_folder
from sana.pipelines.loading import find_model, source_config
from sana.pipelines.memory import networks
from sana.pipelines.memory.stages import MemoryModel
from sana.pipelines.sana_pipeline import SanaPipeline
from sana.utils.dtype import parse_dtype

STAGES = {"text": "text_encoder", "denoise": "transformer", "decode": "autoencoder", "encode": "autoencoder"}
WHOLE = "picture"  # all stages of one call, all networks in memory
PARTS = {"text": "text_encoder", "denoise": "transformer", "decode": "decoder", "encode": "encoder"}
STEPS = 2  # of sampling: the second holds what every later one holds


@dataclass(frozen=True)
class Row:
    """Bytes of one stage: the network's weights, and what is held above them."""

    model: str
    stage: str
    network: str
    height: int
    width: int
    batch: int
    dtype: str
    device: str
    predicted_weights: int
    predicted_stage: int
    measured_weights: int
    measured_stage: int

    @property
    def ratio(self) -> float:
        """Predicted total over the measured one."""
        return (self.predicted_weights + self.predicted_stage) / (self.measured_weights + self.measured_stage)


class StandInTokenizer:
    """One token for some letters, as many as the prediction assumes."""

    def encode(self, text: str) -> list[int]:
        return [1] * (len(text) // LETTERS_A_TOKEN)

    def __call__(self, texts: Sequence[str], *, max_length: int, **_: Any) -> dict[str, torch.Tensor]:
        lengths = [min(max_length, max(1, len(self.encode(text)))) for text in texts]
        mask = torch.tensor([[1] * length + [0] * (max_length - length) for length in lengths])
        return {"input_ids": mask.clone(), "attention_mask": mask}


def measured_peak(run: Callable[[], Any], device: str) -> int:
    """Returns the highest number of bytes that were allocated at a time while `run` ran, above those before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    del kept
    return peak_of(memory_events(profiler))


def memory_events(profiler: Any) -> list[tuple[int, int]]:
    """Time and signed bytes of every allocation and release on the CPU, in order."""
    events = profiler.profiler.kineto_results.events()
    found = [(one.start_ns(), one.nbytes()) for one in events if one.name() == "[memory]"]
    return sorted(found, key=lambda event: event[0])


def peak_of(events: Sequence[tuple[int, int]]) -> int:
    """The highest running sum of allocations and releases."""
    total = peak = 0
    for _, size in events:
        total += size
        peak = max(peak, total)
    return peak


def load_settings(model: str) -> SanaConfig:
    """Returns the configuration of a YAML file or of a model folder."""
    return load_config(model) if Path(model).suffix in (".yaml", ".yml") else source_config(find_model(model))


def zeros_for(name: str, config: SanaConfig, dtype: torch.dtype, device: str, scheme: str | None = None) -> nn.Module:
    """Builds a network of a config, quantised if a scheme is given, whose weights are all zero."""
    network = networks.build_empty(name, config, scheme)
    networks.give_storage(network, networks.network_dtype(name, config, dtype), device)
    for _, tensor in networks.named_weights(network):
        tensor.zero_()
    return network


def stored_bytes(network: nn.Module) -> int:
    """Bytes of a network's weights in memory, shared ones once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor for _, tensor in networks.named_weights(network)}
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


class Measurement:
    """Runs the stages of one model at one size, for real and in the prediction."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.config = load_settings(args.model)
        self.dtype = parse_dtype(args.dtype)
        factor = self.config.vae.vae_downsample_rate
        self.tiling = None if args.tile is None else make_tiling(factor, *[args.tile] * 4)
        schemes = {"quantization": args.quantization, "text_quantization": args.text_quantization}
        self.model = MemoryModel(self.config, device=args.device, dtype=self.dtype, **schemes)

    def row(self, stage: str) -> Row:
        """Predicts and measures one stage, or a whole picture."""
        if stage == WHOLE:
            return self._whole()
        args, name = self.args, STAGES[stage]
        weights = self.model.weights(name)
        predicted = getattr(self, f"predict_{stage}")()
        network = zeros_for(name, self.config, self.dtype, args.device, self.model.schemes.get(name))
        held = stored_bytes(network)
        peak = measured_peak(getattr(self, f"run_{stage}")(network), args.device)
        size = (args.height, args.width, args.batch, args.dtype, args.device)
        return Row(
            args.model, stage, name, *size, weights.total + self.model.packed(PARTS[stage]), predicted, held, peak
        )

    def _whole(self) -> Row:
        args, weights = self.args, [self.model.weights(name) for name in networks.NETWORKS]
        held = sum(one.total for one in weights)
        predicted = self.model.picture(args.height, args.width, args.batch, tiling=self.tiling, steps=STEPS)
        parts = {
            name: zeros_for(name, self.config, self.dtype, args.device, self.model.schemes.get(name))
            for name in networks.NETWORKS
        }
        stored = sum(stored_bytes(network) for network in parts.values())
        self._tile(parts["autoencoder"])
        pipeline = self._pipeline(**parts | {"text_encoder": self._encoder(parts["text_encoder"])})
        options = {"height": args.height, "width": args.width, "num_inference_steps": STEPS, "progress_bar": False}
        peak = measured_peak(
            lambda: pipeline(self._prompts(), output_type="pt", use_resolution_binning=False, **options), args.device
        )
        size = (args.height, args.width, args.batch, args.dtype, args.device)
        return Row(args.model, WHOLE, "all", *size, held, predicted - held, stored, peak)

    def predict_text(self) -> int:
        return self.model.encode_text(self.args.batch)

    def predict_denoise(self) -> int:
        return self.model.denoise(self.args.height, self.args.width, self.args.batch, steps=STEPS)

    def predict_decode(self) -> int:
        return self.model.decode(self.args.height, self.args.width, self.args.batch, tiling=self.tiling)

    def predict_encode(self) -> int:
        return self.model.encode(self.args.height, self.args.width, self.args.batch, tiling=self.tiling)

    def run_text(self, network: Any) -> Callable[[], Any]:
        prompts, pipeline = self._prompts(), self._pipeline(text_encoder=self._encoder(network))

        def run() -> Any:
            return pipeline.encode_prompts(prompts, trim=True), pipeline.encode_prompts([""], null=True)

        return torch.inference_mode()(run)

    def run_denoise(self, network: Any) -> Callable[[], Any]:
        pipeline = self._pipeline(transformer=network)
        pipeline._autoencoder = networks.empty_autoencoder(self.config)  # asked for its sizes only
        text = self.config.text_encoder
        shape = (self.args.batch, text.model_max_length, text.caption_channels)

        def run() -> Any:
            embeds = torch.zeros(shape, dtype=self.dtype, device=self.args.device)
            return pipeline(
                prompt_embeds=embeds,
                prompt_attention_mask=torch.ones(shape[:2], device=self.args.device),
                negative_prompt_embeds=torch.zeros_like(embeds),
                height=self.args.height,
                width=self.args.width,
                num_inference_steps=STEPS,
                output_type="latent",
                use_resolution_binning=False,
                progress_bar=False,
            )

        return run

    def run_decode(self, network: Any) -> Callable[[], Any]:
        self._tile(network)
        pipeline = self._pipeline(autoencoder=network)
        factor = network.downsample_factor
        shape = (self.args.batch, network.latent_channels, self.args.height // factor, self.args.width // factor)
        return lambda: pipeline.decode(torch.zeros(shape, device=self.args.device))

    def run_encode(self, network: Any) -> Callable[[], Any]:
        self._tile(network)
        shape = (self.args.batch, 3, self.args.height, self.args.width)

        def run() -> Any:
            for _ in range(2):  # the peak is at the beginning, where the first time no packed copies are kept yet
                latents = network.encode(torch.zeros(shape, device=self.args.device))
            return latents

        return torch.no_grad()(run)

    def _tile(self, network: Any) -> None:
        network.disable_tiling()
        if self.args.tile is not None:
            network.enable_tiling(*[self.args.tile] * 4)

    def _pipeline(self, **parts: Any) -> SanaPipeline:
        pipeline = SanaPipeline(self.config, device=self.args.device, dtype=self.dtype)
        for name, part in parts.items():
            setattr(pipeline, name, part)
        return pipeline

    def _encoder(self, network: Any) -> TextEncoder:
        from sana.models.text_encoder.architectures import encoder_class

        text, name = self.config.text_encoder, Path(self.config.text_encoder.text_encoder_name)
        tokenizer = _load_tokenizer(_split_folder(name)[1]) if name.is_dir() else StandInTokenizer()
        options = {"model_max_length": text.model_max_length, "chi_prompt": text.chi_prompt}
        return encoder_class(text.text_encoder_name)(network, tokenizer, **options)

    def _prompts(self) -> list[str]:
        """Different texts, all longer than the model reads."""
        longest = self.config.text_encoder.model_max_length
        return [f"{index} " + "a red cat, " * longest for index in range(self.args.batch)]


def table(rows: Sequence[Row]) -> str:
    """The rows as text, in MiB."""
    lines = [f"{'stage':12} {'weights':>21} {'above them':>21} {'total':>21}  predicted / measured"]
    for row in rows:
        pairs = (
            (row.predicted_weights, row.measured_weights),
            (row.predicted_stage, row.measured_stage),
            (row.predicted_weights + row.predicted_stage, row.measured_weights + row.measured_stage),
        )
        cells = " ".join(f"{one / 2**20:10.1f}{two / 2**20:11.1f}" for one, two in pairs)
        lines.append(f"{row.stage:12} {cells}  {row.ratio:.3f}")
    return "\n".join(lines)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="asset/models/sana_tiny", help="a YAML file or a model folder")
    parser.add_argument("--height", type=int, default=256, help="pixels")
    parser.add_argument("--width", type=int, default=256, help="pixels")
    parser.add_argument("--batch", type=int, default=1, help="pictures at a time")
    parser.add_argument("--dtype", default="fp32", help="of the transformer and the text encoder")
    parser.add_argument("--quantization", help="scheme of the transformer")
    parser.add_argument("--text_quantization", help="scheme of the text encoder")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tile", type=int, help="side of the autoencoder's tiles in pixels; whole pictures without")
    parser.add_argument("--stages", nargs="+", default=[*STAGES, WHOLE], choices=[*STAGES, WHOLE])
    parser.add_argument("--json", type=Path, help="write the rows there")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    measurement = Measurement(args)
    rows = [measurement.row(stage) for stage in args.stages]
    print(table(rows))
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
