"""Finding and loading models and processors of transformers with errors that say what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sana.models.checkpoint import CheckpointError
from sana.utils import hub

FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.safetensors")


def find_model_folder(reference: str | Path) -> Path:
    """Returns the local folder of a model, fetching one of the hub.

    Raises:
        FetchError: it cannot be had.
        CheckpointError: the folder holds no model of transformers.
    """
    folder = hub.resolve(reference, kind="folder", allow_patterns=FILES)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is no model folder of transformers: it has no config.json.")
    return folder


def load_part(what: str, folder: Path, load: Callable[..., Any], **options: Any) -> Any:
    """Calls a `from_pretrained`, from local files only and running no code of the folder.

    Raises:
        CheckpointError: it failed; transformers raises many kinds, none of which names the folder.
    """
    try:
        return load(folder, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise CheckpointError(f"The {what} in {folder} cannot be loaded: {reason}") from error
