"""A memory model with round numbers, so that plans can be checked by hand. No test is here."""

from dataclasses import dataclass, field
from typing import Any

from sana.config import SanaConfig
from sana.pipelines.memory.networks import NetworkWeights

M = 10**6
SHARE = {None: 1.0, "int8": 0.5, "nf4": 0.25}
WEIGHTS = {  # M bytes: total, packed, unit, rest, units
    "text_encoder": (5000, 0, 400, 1000, 10),
    "transformer": (3000, 1500, 100, 1000, 20),
    "autoencoder": (1000, 500, 400, 200, 2),
}


@dataclass
class StandIn:
    """Memory that is linear in everything.

    Text encoding takes 100 M a prompt, denoising 200 M a picture of 1024 x 1024 (half without guidance), decoding 3000
    M of such a picture whole and, in tiles, 200 M and 2 M a pixel of the tile's side; encoding 500 M more.

    Attributes:
        asked: what was computed, in its order.
    """

    quantization: str | None = None
    text_quantization: str | None = None
    asked: list[tuple[Any, ...]] = field(default_factory=list)

    def weights(self, network: str) -> NetworkWeights:
        self.asked.append(("weights", network))
        scheme = {"transformer": self.quantization, "text_encoder": self.text_quantization}.get(network)
        total, packed, unit, rest, units = (int(one) for one in WEIGHTS[network])
        share = SHARE[scheme]
        unit, rest = int(unit * share) * M, int(rest * share) * M
        return NetworkWeights(int(total * share) * M, packed * M, unit, rest, units, pair=2 * unit)

    def encode_text(self, prompts: int, *, null: bool = True) -> int:
        self.asked.append(("encode_text", prompts, null))
        return 100 * M * prompts

    def denoise(self, height: int, width: int, batch: int, *, guidance: bool = True, pag: bool = False) -> int:
        self.asked.append(("denoise", height, width, batch))
        return int(100 * M * batch * (1 + guidance + pag) * height * width / 1024**2)

    def decode(self, height: int, width: int, batch: int, *, tiling: Any = None) -> int:
        self.asked.append(("decode", height, width, batch, tiling))
        if tiling is None:
            return int(3000 * M * batch * height * width / 1024**2)
        return 200 * M + 2 * M * tiling.stride_height

    def encode(self, height: int, width: int, batch: int, *, tiling: Any = None) -> int:
        self.asked.append(("encode", height, width, batch, tiling))
        return 500 * M + StandIn().decode(height, width, batch, tiling=tiling)


class Maker:
    """Makes stand-ins and keeps them.

    Attributes:
        made: (quantization, text_quantization) -> stand-in.
    """

    def __init__(self) -> None:
        self.made: dict[tuple[str | None, str | None], StandIn] = {}

    def __call__(self, quantization: str | None, text_quantization: str | None) -> StandIn:
        assert (quantization, text_quantization) not in self.made, "a model is made once"
        return self.made.setdefault((quantization, text_quantization), StandIn(quantization, text_quantization))

    @property
    def asked(self) -> list[tuple[Any, ...]]:
        """What all of them computed."""
        return [one for model in self.made.values() for one in model.asked]


def large_config() -> SanaConfig:
    """A config of 1024 px, bf16 networks and a bf16 autoencoder."""
    config = SanaConfig()
    config.model.image_size = 1024
    config.model.mixed_precision = "bf16"
    config.vae.weight_dtype = "bf16"
    return config
