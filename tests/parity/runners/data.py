"""Runs the recorded data functions: kind buckets, and the functions data/* but guidance."""

import torch

from sana.data.aspect_ratio import ASPECT_RATIOS, classify_height_width_bin, closest_ratio
from sana.data.transforms import resize_and_crop_tensor
from sana.pipelines.prompts import parse_suffixes
from tests.parity.common import Case


def run_buckets(case: Case) -> None:
    """Rows [height, width, nearest ratio by table, size by table (None where the table is for training)]."""
    recorded = case.load(case.call["json"])
    assert recorded["rows"]
    for height, width, ratios, bins in recorded["rows"]:
        for name, ratio, size in zip(recorded["tables"], ratios, bins, strict=True):
            table = ASPECT_RATIOS[name]
            what = f"{name} of {height}x{width}"
            case.assert_close(float(closest_ratio(height, width, table)), ratio, what)
            if size is not None:
                case.assert_close(classify_height_width_bin(height, width, table), size, what)


def run_resize_and_crop(case: Case) -> None:
    inputs, expected = case.tensors("in."), case.tensors("out.")
    for run in case.call["runs"]:
        key = str(run["i"])
        actual = resize_and_crop_tensor(inputs[key], run["new_width"], run["new_height"])
        case.assert_close(actual, expected[key], f"run {key}")


def run_prompt_suffixes(case: Case) -> None:
    """Officially one function parses, looks up the size and makes a text for the screen; ours only parses."""
    table_name = next(
        (word for word in case.raw.get("made_by", "").replace(",", " ").split() if word in ASPECT_RATIOS), ""
    )
    table = ASPECT_RATIOS[table_name or "ASPECT_RATIO_1024_TEST"]
    for run in case.call["runs"]:
        clean, shown, default_size, ratio, custom_size = run["result"]
        parsed = parse_suffixes(run["prompt"])
        written = closest_ratio(parsed.aspect_ratio or 1.0, 1.0, table)
        size = [float(side) for side in table[written]]
        custom = [float(parsed.height), float(parsed.width)] if parsed.height and parsed.width else size
        assert parsed.prompt == clean
        assert f"prompt: {clean.strip()}\nSize: --ar {written}, --bin hw {size}, --custom hw {custom}" == shown
        case.assert_close([size], default_size, "size of the bin")
        case.assert_close(torch.tensor([[float(written)]]), torch.tensor(ratio), "ratio")
        case.assert_close([custom], custom_size, "size asked for")


RUNNERS = {"buckets": run_buckets}
FUNCTIONS = {
    "data/resize_and_crop_tensor": run_resize_and_crop,
    "data/prepare_prompt_ar": run_prompt_suffixes,
}
