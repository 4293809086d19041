"""What the web app may be told at its start, checked. Nothing is read, loaded or shown here."""

from dataclasses import dataclass

from sana.pipelines import inputs
from sana.pipelines.options import check_choice
from sana.utils.seed import MAX_SEED

SAFETY = ("shield", "basic", "off")
SHIELD_MODEL = "google/shieldgemma-2b"


@dataclass(frozen=True)
class DemoOptions:
    """What the page starts with, and its limits.

    Attributes:
        image_size: side of the pictures that the page starts with, in pixels; None for the model's own.
        cfg_scale, pag_scale: guidance that the page starts with; the released app's values.
        step: sampling steps that the page starts with; -1 for the sampler's default.
        seed: that the page starts with.
        bs: pictures in one call of the transformer; more wait for their turn. Changes no picture on a CPU.
        max_queue: wishes that may wait; one more is told to come again later.
        max_images: pictures of one wish.
        output: folder in which every picture is kept with its recipe; None keeps none.
        safety: "shield" (ShieldGemma checks prompts where it is available), "basic" (a list of words) or "off".
        shield_model_path: folder, hub id or hf:// reference of ShieldGemma.
        safety_required: an unavailable ShieldGemma is an error, because it was asked for by name.
        device: of ShieldGemma; None for cuda where there is one, else the CPU.
    """

    image_size: int | None = None
    cfg_scale: float = 5.0
    pag_scale: float = 2.0
    step: int = -1
    seed: int = 0
    bs: int = 1
    max_queue: int = 16
    max_images: int = 8
    output: str | None = None
    safety: str = "shield"
    shield_model_path: str = SHIELD_MODEL
    safety_required: bool = False
    device: str | None = None

    def __post_init__(self) -> None:
        if self.image_size is not None:
            inputs.check_count("image_size", self.image_size, inputs.MAX_SIDE)
        inputs.check_number("cfg_scale", self.cfg_scale, 1, 100)
        inputs.check_number("pag_scale", self.pag_scale, 1, 100)
        if self.step != -1:
            inputs.check_count("step", self.step, inputs.MAX_STEPS)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed must be a whole number in [0, 2**63), not {self.seed!r}.")
        inputs.check_count("bs", self.bs, 10_000)
        inputs.check_count("max_queue", self.max_queue, 100_000)
        inputs.check_count("max_images", self.max_images, 1000)
        check_choice("safety", self.safety, SAFETY)
        if self.safety_required and self.safety != "shield":
            raise ValueError(f"safety={self.safety} uses no model: leave out shield_model_path, or give safety=shield.")
