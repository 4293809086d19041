"""Text encoders with quantised weights: out of exact files layer by layer, and to and from files of their own."""

import json
from pathlib import Path

from torch import nn

from sana.models.checkpoint import CheckpointError
from sana.models.metadata import write_safetensors
from sana.models.quantization.load import Source, Target, fill, from_record, to_record
from sana.models.text_encoder.base import TextEncoder
from sana.models.text_encoder.streamed import StoredTensors, empty_network, weight_files
from sana.utils.logging import get_logger

logger = get_logger(__name__)

STORED = "quantized.safetensors"  # not a name that transformers would read: it knows nothing of these tensors
RECORD = "quantization"


def save_text_encoder(encoder: TextEncoder, folder: Path) -> None:
    """Writes a quantised text encoder in transformers' layout but for its weights, which only we read.

    Args:
        encoder: quantised.
        folder: created when missing.

    Raises:
        ValueError: it is exact.
    """
    network = encoder.model
    record = {"format": "pt", RECORD: json.dumps(to_record(network, "text_encoder"))}
    folder.mkdir(parents=True, exist_ok=True)
    encoder.tokenizer.save_pretrained(folder)
    network.config.save_pretrained(folder)
    write_safetensors(folder / STORED, network.state_dict(), record)


def load_network(encoder_class: type[TextEncoder], folder: Path, target: Target) -> nn.Module | None:
    """Loads the network of a text encoder that is or becomes quantised.

    Args:
        encoder_class: its kind.
        folder: in transformers' layout, or one of `save_text_encoder`.
        target: what it is to be.

    Returns:
        The network, in evaluation mode and without gradients; None where it has to be loaded as a whole first: exact
        weights that stay exact, or that lie in another format than safetensors under the network's own keys.

    Raises:
        CheckpointError: the files are damaged, do not fit, or are quantised in another way than asked for.
        ValueError, QuantizationUnavailableError: see `quantize`.
    """
    stored = (folder / STORED).is_file()
    if not stored and target.wanted is None:
        return None
    tensors = StoredTensors([folder / STORED] if stored else weight_files(folder))
    network = empty_network(encoder_class, folder, target.dtype)
    if not stored and set(tensors) != set(network.state_dict()):
        logger.info("%s is loaded as a whole, then quantised: its files are not laid out like the network", folder)
        return None
    record = None
    if stored:
        try:
            record = from_record(json.loads(tensors.metadata[RECORD]), str(folder / STORED))
        except (KeyError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{folder / STORED} does not say how it is quantised; make it anew.") from error
    source = Source(str(folder), tensors, record)
    fill(network, "text_encoder", source, target)
    network.tie_weights()  # type: ignore[operator]  # T5 has its embedding under two names
    return network.eval().requires_grad_(False)
