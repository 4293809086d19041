"""The pictures of the page: a bounded temporary folder of PNG files that hold their recipes. Nothing is drawn here."""

import os
import re
import secrets
import shutil
import tempfile
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sana.pipelines.images import save_png
from sana.pipelines.prompts import safe_name
from sana.pipelines.recipe import Recipe

KEPT = 256  # pictures in the temporary folder
NAME = 48  # characters of a picture's name that say its prompt


@dataclass(frozen=True)
class Picture:
    """A finished picture.

    Attributes:
        path: of its PNG, which holds the recipe.
        recipe: how it was made.
    """

    path: Path
    recipe: Recipe


class PictureFolder:
    """Keeps the last pictures in a temporary folder, which goes with this object or with the process.

    Each picture lies in a folder whose name nobody can guess, since whoever knows it can fetch the picture.

    Args:
        kept: pictures; of more, the oldest are removed.
        output: folder in which every picture is kept for good as well; None for none.

    Raises:
        OSError: `output` cannot be made.
    """

    def __init__(self, kept: int = KEPT, output: str | None = None) -> None:
        self.output = None if output is None else Path(output).expanduser()
        if self.output is not None:
            self.output.mkdir(parents=True, exist_ok=True)
        self._kept = kept
        self._temporary = tempfile.TemporaryDirectory(prefix="sana-app-", ignore_cleanup_errors=True)
        self._folders: deque[Path] = deque()
        self._lock = threading.Lock()

    @property
    def path(self) -> Path:
        """The temporary folder."""
        return Path(self._temporary.name)

    def keep(self, image: Image.Image, recipe: Recipe) -> Picture:
        """Stores a picture with its recipe.

        Raises:
            OSError: the disk is full, or the folder is gone.
        """
        name = picture_name(recipe)
        folder = self.path / secrets.token_urlsafe(24)
        folder.mkdir()
        save_png(image, folder / name, recipe.as_dict())
        if self.output is not None:
            partial = self.output / f".{secrets.token_hex(6)}.part"
            try:
                shutil.copyfile(folder / name, partial)
                os.replace(partial, self.output / name)
            finally:
                partial.unlink(missing_ok=True)
        with self._lock:
            self._folders.append(folder)
            while len(self._folders) > self._kept:
                shutil.rmtree(self._folders.popleft(), ignore_errors=True)
        return Picture(folder / name, recipe)

    def close(self) -> None:
        """Removes the temporary folder."""
        self._temporary.cleanup()


def picture_name(recipe: Recipe) -> str:
    """Returns a file name that says prompt, seed and recipe: `a_red_circle_seed42_0123abcd.png`, in ASCII."""
    words = re.sub(r"[^A-Za-z0-9]+", "_", safe_name(recipe.prompt, set()))[:NAME].strip("_") or "picture"
    return f"{words}_seed{recipe.seed}_{recipe.hash[:8]}.png"
