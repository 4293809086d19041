"""From an official name, hub id, folder or file of embeddings to a loaded text encoder. No network is defined here."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sana.models.text_encoder.base import TextEncoder, TextEncoderError
from sana.models.text_encoder.precomputed import PrecomputedTextEncoder, load_prompt_embeds
from sana.registry import UnknownNameError, suggest
from sana.utils import hub
from sana.utils.logging import get_logger

if TYPE_CHECKING:
    from sana.models.quantization.load import Wanted

logger = get_logger(__name__)


@dataclass(frozen=True)
class OfficialEncoder:
    """Where a text encoder of the official configs lives, and what fetching it means."""

    hub_id: str
    gigabytes: float  # size of the weights as published
    gated: bool = False  # the hub asks for accepted terms and a token
    weights: str = "*.safetensors"


OFFICIAL_ENCODERS = {
    "gemma-2b": OfficialEncoder("google/gemma-2b", 5.0, gated=True),
    "gemma-2b-it": OfficialEncoder("google/gemma-2b-it", 5.0, gated=True),
    "gemma-2-2b": OfficialEncoder("google/gemma-2-2b", 10.5, gated=True),
    "gemma-2-2b-it": OfficialEncoder("Efficient-Large-Model/gemma-2-2b-it", 5.2),
    "gemma-2-9b": OfficialEncoder("google/gemma-2-9b", 37.0, gated=True),
    "gemma-2-9b-it": OfficialEncoder("google/gemma-2-9b-it", 18.5, gated=True),
    "Qwen2-0.5B-Instruct": OfficialEncoder("Qwen/Qwen2-0.5B-Instruct", 1.0),
    "Qwen2-1.5B-Instruct": OfficialEncoder("Qwen/Qwen2-1.5B-Instruct", 3.1),
    "T5": OfficialEncoder("DeepFloyd/t5-v1_1-xxl", 19.0, weights="*.bin"),
    "T5-small": OfficialEncoder("google/t5-v1_1-small", 0.3, weights="*.bin"),
    "T5-base": OfficialEncoder("google/t5-v1_1-base", 1.0, weights="*.bin"),
    "T5-large": OfficialEncoder("google/t5-v1_1-large", 3.1, weights="*.bin"),
    "T5-xl": OfficialEncoder("google/t5-v1_1-xl", 11.4, weights="*.bin"),
    "T5-xxl": OfficialEncoder("google/t5-v1_1-xxl", 44.5, weights="*.bin"),
}
_SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
_REMEDY = (
    "Give text_encoder.text_encoder_name a local folder in transformers' layout, or a .safetensors file of embeddings "
    "made by save_prompt_embeds."
)


def load_text_encoder(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    model_max_length: int = 300,
    chi_prompt: str | Sequence[str | None] | None = (),
    tokenizer_path: str | Path | None = None,
    quantization: "Wanted | None" = None,
    runs_on: torch.device | None = None,
) -> TextEncoder | PrecomputedTextEncoder:
    """Loads a text encoder with its tokenizer.

    Args:
        name_or_path: an official name ("gemma-2-2b-it"), hub id, hf:// reference, local folder, or a `.safetensors`
            file written by `save_prompt_embeds` (then no network is needed).
        dtype: of the weights and embeddings; the released models used bfloat16.
        device: where it goes.
        model_max_length: L, the number of tokens the image model sees.
        chi_prompt: the complex human instruction, one string or its lines.
        tokenizer_path: folder of the tokenizer when it is not beside the weights.
        quantization: what its large weights become, layer by layer; not of a file of embeddings.
        runs_on: where it computes; None for `device`.

    Raises:
        TextEncoderError: it cannot be fetched (said before anything large is fetched), or the folder holds none.
        UnknownNameError: no such official name, and no path or hub id either.
    """
    from sana.models import TEXT_ENCODERS
    from sana.models.quantization.apply import quantize
    from sana.models.quantization.load import Target
    from sana.models.quantization.text import load_network

    if str(name_or_path).endswith(".safetensors"):
        precomputed = load_prompt_embeds(name_or_path, dtype=dtype, device=device)
        precomputed.require(model_max_length=model_max_length, chi_prompt=chi_prompt)
        return precomputed
    folder = find_text_encoder(name_or_path)
    weights, tokenizer_folder = _split_folder(folder)
    tokenizer_folder = Path(tokenizer_path) if tokenizer_path is not None else tokenizer_folder
    model_type = _read_model_type(weights)
    if model_type not in TEXT_ENCODERS:
        known = ", ".join(sorted(TEXT_ENCODERS))
        raise TextEncoderError(f"{weights} holds a {model_type!r} network; known text encoders are {known}.")
    encoder_class = TEXT_ENCODERS[model_type]
    logger.info("loading the text encoder %s from %s", name_or_path, folder)
    device = torch.device(device)
    network = load_network(encoder_class, weights, Target(dtype, device, runs_on or device, quantization))
    encoder = encoder_class(
        _load_model(encoder_class, weights, dtype) if network is None else network,
        _load_tokenizer(tokenizer_folder),
        model_max_length=model_max_length,
        chi_prompt=chi_prompt,
        name=str(name_or_path),
    )
    encoder = encoder.to(device).eval()
    if network is None and quantization is not None:
        encoder.requires_grad_(False)
        quantize(encoder, quantization.scheme, keep=quantization.keep, device=runs_on)
    return encoder


def find_text_encoder(name_or_path: str | Path) -> Path:
    """Returns the local folder of a text encoder, fetching it when it is on the hub and may be had.

    A small file is asked for first, so that a gated or missing model is reported before anything large is fetched.
    """
    if Path(name_or_path).expanduser().exists():
        return hub.resolve(name_or_path, kind="folder")
    official, reference = _on_the_hub(str(name_or_path))
    require_text_encoder(name_or_path)
    inside = _path_inside(reference)
    weights = official.weights if official else "*.safetensors"
    patterns = [f"{inside}{pattern}" for pattern in (*_SMALL_FILES, weights)]
    if inside:  # diffusers keeps the tokenizer beside the folder of the weights
        patterns.append(f"{inside.rstrip('/').rpartition('/')[0]}/tokenizer/*".lstrip("/"))
    if official:
        logger.info("text encoder %s: %s on the hub, about %.1f GB", name_or_path, reference, official.gigabytes)
    try:
        return hub.resolve(reference, kind="folder", allow_patterns=patterns)
    except hub.FetchError as error:
        raise _unavailable(str(name_or_path), reference, official, error) from error


def require_text_encoder(name_or_path: str | Path) -> None:
    """Checks that a text encoder is here or may be fetched; asks for no more than its config.json (1 kB).

    Asked through the folder, since the hub client retries a single file for half a minute when there is no network.

    Raises:
        TextEncoderError: it is gated, missing or unreachable; the message says what to do.
        UnknownNameError: no such official name, and no path or hub id either.
    """
    if Path(name_or_path).expanduser().exists():
        return
    if str(name_or_path).endswith(".safetensors") and not str(name_or_path).startswith("hf://"):
        raise TextEncoderError(f"The file of embeddings {name_or_path} does not exist.")
    official, reference = _on_the_hub(str(name_or_path))
    try:
        hub.resolve(reference, kind="folder", allow_patterns=[f"{_path_inside(reference)}config.json"])
    except hub.FetchError as error:
        raise _unavailable(str(name_or_path), reference, official, error) from error


def _on_the_hub(name: str) -> tuple[OfficialEncoder | None, str]:
    """The table's line, if any, and the hf:// reference of a name."""
    official = OFFICIAL_ENCODERS.get(name)
    if official is not None:
        return official, f"hf://{official.hub_id}"
    parsed = hub.parse_hub_reference(name)
    if parsed is None:
        known = ", ".join(OFFICIAL_ENCODERS)
        raise UnknownNameError(
            f"Unknown text encoder {name!r}: no such folder, and not an official name."
            f"{suggest(name, list(OFFICIAL_ENCODERS))} Official names: {known}. A hub id owner/repository works too."
        )
    return next((known for known in OFFICIAL_ENCODERS.values() if known.hub_id == parsed.repo_id), None), str(parsed)


def _path_inside(reference: str) -> str:
    """The folder of an hf:// reference inside its repository, with a slash at the end; "" for the whole repository."""
    parsed = hub.parse_hub_reference(reference)
    return f"{parsed.path}/" if parsed is not None and parsed.path else ""


def _unavailable(
    name: str, reference: str, official: OfficialEncoder | None, error: hub.FetchError
) -> TextEncoderError:
    what = f"The text encoder {name!r}" + (f" ({reference})" if official else "")
    gated = (
        f" It is gated: accept its terms at https://huggingface.co/{official.hub_id} and log in with `hf auth login`."
        if official and official.gated and "gated" not in str(error)
        else ""
    )
    return TextEncoderError(f"{what} cannot be had. {error}{gated} {_REMEDY}")


def _split_folder(folder: Path) -> tuple[Path, Path]:
    """The folders of weights and of tokenizer: one folder, or diffusers' `text_encoder/` beside `tokenizer/`."""
    weights = folder / "text_encoder" if (folder / "text_encoder" / "config.json").is_file() else folder
    if not (weights / "config.json").is_file():
        raise TextEncoderError(f"{folder} is no text encoder folder: it has no config.json. {_REMEDY}")
    for candidate in (weights, weights / "tokenizer", weights.parent / "tokenizer"):
        if any((candidate / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "spiece.model")):
            return weights, candidate
    return weights, weights


def _read_model_type(folder: Path) -> str:
    file = folder / "config.json"
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["model_type"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise TextEncoderError(f"{file} is no model config: it is not JSON with a model_type ({error}).") from error


def _load_model(encoder_class: type[TextEncoder], folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # one line per tensor block; a model of this size loads in seconds
    try:
        return encoder_class.load_model(
            folder,
            dtype=dtype,
            attn_implementation=encoder_class.attention,
            local_files_only=True,
            variant=hub.only_variant(folder),
        )
    except Exception as error:  # transformers raises many kinds for a damaged folder; none of them names the folder
        raise TextEncoderError(f"The text encoder in {folder} cannot be loaded: {_first_line(error)}") from error


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as above
        raise TextEncoderError(f"The tokenizer in {folder} cannot be loaded: {_first_line(error)}") from error
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        raise TextEncoderError(f"The tokenizer in {folder} has no padding token.")
    return tokenizer


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
