"""The judge of drawn scenes: finds objects by pixels, names shapes by geometry and emoji by a small classifier.

It sees a picture and nothing else. How prompts are scored is in `score_scenes.py`; `python -m tools.scene_judge`
trains the classifier anew (about a minute on two CPU cores) and writes it to `asset/models/scene_judge`.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import ndimage
from torch import Tensor, nn
from tqdm import tqdm

from sana.data.sprites import BACKGROUNDS, COLOURS, EMOJI_BY_NOUN, SHAPES, sprite

WEIGHTS = Path(__file__).resolve().parent.parent / "asset/models/scene_judge/model.safetensors"
EMOJI_NOUNS = tuple(EMOJI_BY_NOUN)
OTHER = len(EMOJI_NOUNS)  # the class of everything that is no known emoji
SIDE = 40  # pixels of a crop for the classifier
DIFFERENCE = 26  # of 255: a pixel this far from the background belongs to an object
MIN_AREA = 150  # pixels; smaller specks are compression noise
MIN_PROBABILITY = 0.5
MIN_SHAPE_IOU = 0.84
SEED = 0


@dataclass(frozen=True)
class Detection:
    """One object: noun (None when it is nothing known), colour (shapes only) and centre (row, column) in pixels."""

    noun: str | None
    colour: str | None
    centre: tuple[float, float]
    area: int


class EmojiClassifier(nn.Module):
    """(B, 4, 40, 40) crops, RGB in [0, 1] and mask, -> (B, emoji + 1) logits."""

    def __init__(self) -> None:
        super().__init__()
        widths = (4, 24, 48, 96)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(4, after), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1] * (SIDE // 8) ** 2, OTHER + 1)

    def forward(self, crops: Tensor) -> Tensor:
        return self.head(self.features(crops).flatten(1))


class SceneJudge:
    """Finds and names the objects of a picture.

    Args:
        weights: classifier as safetensors.
    """

    def __init__(self, weights: Path = WEIGHTS) -> None:
        self.classifier = EmojiClassifier()
        self.classifier.load_state_dict(load_file(weights))
        self.classifier.eval()

    def detect(self, image: np.ndarray) -> list[Detection]:
        """Objects of an (H, W, 3) uint8 picture on a plain background."""
        background = border_colour(image)
        found = []
        for mask in components(foreground(image, background)):
            rows, columns = np.nonzero(mask)
            centre = ((rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2)
            noun, colour = name_shape(image, mask)
            if noun is None:
                noun = self._name_emoji(image, mask, background)
            found.append(Detection(noun, colour, centre, int(mask.sum())))
        return found

    def _name_emoji(self, image: np.ndarray, mask: np.ndarray, background: np.ndarray) -> str | None:
        with torch.no_grad():
            probabilities = self.classifier(crop(image, mask, background)[None]).softmax(-1)[0]
        best = int(probabilities.argmax())
        return None if best == OTHER or probabilities[best] < MIN_PROBABILITY else EMOJI_NOUNS[best]


def border_colour(image: np.ndarray) -> np.ndarray:
    """Median RGB of the outermost pixels, (3,) float."""
    border = np.concatenate([image[:2].reshape(-1, 3), image[-2:].reshape(-1, 3), image[:, :2].reshape(-1, 3)])
    return np.median(border.astype(np.float32), axis=0)


def background_name(image: np.ndarray) -> str:
    """The nearest named background."""
    colour = border_colour(image)
    return min(BACKGROUNDS, key=lambda name: float(np.abs(colour - BACKGROUNDS[name]).sum()))


def foreground(image: np.ndarray, background: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels that differ from the background."""
    return np.abs(image.astype(np.float32) - background).max(-1) > DIFFERENCE


def components(mask: np.ndarray) -> list[np.ndarray]:
    """Connected parts of a mask of at least `MIN_AREA` pixels; parts up to 4 pixels apart count as one."""
    joined, count = ndimage.label(ndimage.binary_dilation(mask, np.ones((5, 5))))
    parts = [(joined == number) & mask for number in range(1, count + 1)]
    return [part for part in parts if part.sum() >= MIN_AREA]


def name_shape(image: np.ndarray, mask: np.ndarray) -> tuple[str | None, str | None]:
    """(shape, colour) of a part of one flat colour whose outline fits a shape, else (None, None)."""
    pixels = image[mask].astype(np.float32)
    median = np.median(pixels, axis=0)
    colour = min(COLOURS, key=lambda name: float(np.abs(median - COLOURS[name]).sum()))
    flat = (np.abs(pixels - median).max(-1) < 60).mean()
    if flat < 0.72 or np.abs(median - COLOURS[colour]).max() > 55:
        return None, None
    outline = _fit(mask)
    overlaps = {shape: _iou(outline, _template(shape)) for shape in SHAPES}
    best = max(overlaps, key=overlaps.__getitem__)
    return (best, colour) if overlaps[best] >= MIN_SHAPE_IOU else (None, None)


def _template(shape: str) -> np.ndarray:
    return _fit(sprite(shape, "red", 128)[..., 3] > 0.5)


def _fit(mask: np.ndarray) -> np.ndarray:
    """A mask cut to its bounding box and centred in a square of 64 pixels."""
    rows, columns = np.nonzero(mask)
    part = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    side = max(part.shape)
    square = np.zeros((side, side), np.uint8)
    top, left = (side - part.shape[0]) // 2, (side - part.shape[1]) // 2
    square[top : top + part.shape[0], left : left + part.shape[1]] = part * 255
    return np.asarray(Image.fromarray(square).resize((64, 64), Image.BILINEAR)) > 127


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max(1, (a | b).sum()))


def crop(image: np.ndarray, mask: np.ndarray, background: np.ndarray) -> Tensor:
    """The part under `mask`, everything else white, squared and resized: (4, 40, 40) in [0, 1]."""
    rows, columns = np.nonzero(mask)
    box = slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)
    part, alpha = image[box].astype(np.float32), mask[box]
    part = np.where(alpha[..., None], part, 255.0)
    side = max(part.shape[:2]) + 4
    square = np.full((side, side, 4), 255.0, np.float32)
    square[..., 3] = 0
    top, left = (side - part.shape[0]) // 2, (side - part.shape[1]) // 2
    square[top : top + part.shape[0], left : left + part.shape[1], :3] = part
    square[top : top + part.shape[0], left : left + part.shape[1], 3] = alpha * 255.0
    tensor = torch.from_numpy(square).permute(2, 0, 1)[None] / 255
    return F.interpolate(tensor, (SIDE, SIDE), mode="bilinear", antialias=True)[0]


def training_example(rng: np.random.Generator) -> tuple[Tensor, int] | None:
    """One augmented crop and its class; about a fifth are no emoji: shapes, torn, mixed or scrambled emoji."""
    size = int(rng.choice((64, 96, 96, 128, 192)))
    label = int(rng.integers(OTHER))
    background = np.array(BACKGROUNDS[str(rng.choice(list(BACKGROUNDS)))], np.float32)
    rgba = sprite(EMOJI_NOUNS[label], None, size)
    if rng.random() < 0.22:
        label, rgba = OTHER, _spoil(rng, rgba, size)
    canvas = np.empty((size + 16, size + 16, 3), np.float32)
    canvas[:] = background
    top, left = rng.integers(0, 17, 2)
    window = canvas[top : top + size, left : left + size]
    window += rgba[..., 3:] * (rgba[..., :3] - window)
    tensor = torch.from_numpy(canvas).permute(2, 0, 1)[None]
    blur = float(rng.uniform(0.35, 1.0))
    tensor = F.interpolate(tensor, scale_factor=blur, mode="bilinear", antialias=True)
    tensor = F.interpolate(tensor, (size + 16, size + 16), mode="bilinear")[0].permute(1, 2, 0).numpy()
    tensor = tensor * rng.uniform(0.92, 1.08, 3) + rng.normal(0, rng.uniform(0, 9), tensor.shape)
    image = np.clip(tensor, 0, 255).astype(np.uint8)
    background = border_colour(image)
    parts = components(foreground(image, background))
    if not parts:
        return None
    return crop(image, max(parts, key=np.sum), background), label


def _spoil(rng: np.random.Generator, rgba: np.ndarray, size: int) -> np.ndarray:
    """Something that must not pass for an emoji."""
    how = int(rng.integers(4))
    other = sprite(str(rng.choice(EMOJI_NOUNS)), None, size)
    if how == 0:
        return sprite(str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS))), size)
    if how == 1:  # upper half of one, lower half of another
        return np.concatenate([rgba[: size // 2], other[size // 2 :]])
    if how == 2:  # scrambled quarters
        half = size // 2
        quarters = [rgba[:half, :half], rgba[:half, half:], rgba[half:, :half], rgba[half:, half:]]
        a, b, c, d = (quarters[i] for i in rng.permutation(4)) if rng.random() < 0.5 else quarters[::-1]
        return np.concatenate([np.concatenate([a, b], 1), np.concatenate([c, d], 1)])
    mixed = rgba.copy()  # two drawn over each other
    mixed[..., :3] = (rgba[..., :3] + other[..., :3]) / 2
    mixed[..., 3] = np.maximum(rgba[..., 3], other[..., 3])
    return mixed


def train_classifier(
    *, examples: int = 9000, epochs: int = 14, batch_size: int = 128, seed: int = SEED
) -> EmojiClassifier:
    """Trains the classifier on drawn emoji."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    drawn = [training_example(rng) for _ in tqdm(range(examples), desc="drawing", mininterval=5)]
    kept = [pair for pair in drawn if pair is not None]
    crops, labels = torch.stack([pair[0] for pair in kept]), torch.tensor([pair[1] for pair in kept])
    model = EmojiClassifier()
    steps = epochs * (len(crops) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in tqdm(range(steps), desc="training", mininterval=5):
        index = torch.randint(len(crops), (batch_size,))
        loss = F.cross_entropy(model(crops[index]), labels[index], label_smoothing=0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


if __name__ == "__main__":
    WEIGHTS.parent.mkdir(parents=True, exist_ok=True)
    save_file(train_classifier().state_dict(), WEIGHTS)
