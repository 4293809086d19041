"""The tables of allowed values agree with the code that uses the values, and the official defaults pass."""

from typing import Any, Dict, List, Optional, Union  # noqa: UP035 the spelling that pyrallis needs

import pytest

from sana.config import ConfigError, SanaConfig, schema, validate
from sana.config_checks import CHOICES, RULES, describe, matches, nearest_key
from sana.models.transformer import architecture
from sana.utils.dtype import parse_dtype


def test_every_rule_is_about_a_key() -> None:
    assert set(CHOICES) | set(RULES) <= set(schema())
    validate(SanaConfig())


def test_choices_are_those_of_the_transformer() -> None:
    assert CHOICES["model.attn_type"] == architecture.ATTENTION_TYPES
    assert CHOICES["model.cross_attn_type"] == architecture.CROSS_ATTENTION_TYPES
    assert CHOICES["model.ffn_type"] == architecture.FFN_TYPES
    assert CHOICES["model.pos_embed_type"] == architecture.POSITION_TYPES


@pytest.mark.parametrize("name", CHOICES["model.mixed_precision"])
def test_every_precision_is_a_dtype(name: str) -> None:
    assert parse_dtype(name).is_floating_point


REFUSED: dict[str, list[Any]] = {
    "data.image_size": [0, -1],
    "data.clip_thr_temperature": [0.0],
    "model.image_size": [0, -1, 1000],
    "model.mlp_acts": [["silu"], []],
    "model.class_dropout_prob": [-0.1, 1.1, float("nan")],
    "model.pag_applied_layers": [[-1]],
    "model.mixed_precision": ["int8", ""],
    "text_encoder.model_max_length": [2],
    "scheduler.flow_shift": [0.0, -3.0, float("inf")],
    "scheduler.weighting_scheme": ["normal"],
    "train.seed": [-1, 2**63],
    "train.num_workers": [-1],
    "train.train_batch_size": [0],
    "train.optimizer": [{}, {"type": "AdamW", "lr": 0}, {"type": "AdamW", "lr": "fast"}, {"type": 1, "lr": 1.0}],
    "train.cfg_interval": [[1.0], [2.0, 1.0]],
    "train.scm_cfg_scale": [[1.0, float("nan")]],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in REFUSED.items() for value in values])
def test_refused_values_are_named(key: str, value: Any) -> None:
    config = SanaConfig()
    section, _, name = key.partition(".")
    setattr(getattr(config, section), name, value)
    with pytest.raises(ConfigError) as caught:
        validate(config)
    assert key in str(caught.value)
    assert repr(value) in str(caught.value)
    assert "Allowed" in str(caught.value) or "finite" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (1, float, True),
        (1.0, int, True),
        (1.5, int, False),
        (True, int, False),
        (True, float, False),
        (True, str, False),
        (1, bool, False),
        (3, str, True),
        (None, str, False),
        (None, Optional[str], True),
        ([1, None], List[Optional[int]], True),
        (["a"], List[int], False),
        ({"a": 1}, Dict[str, int], True),
        ({"a": "b"}, Dict[str, int], False),
        (4, Union[float, List[float]], True),
        ([4], Union[float, List[float]], True),
        ("4", Union[float, List[float]], False),
        (object(), Any, True),
    ],
)
def test_matches(value: Any, annotation: Any, expected: bool) -> None:
    assert matches(value, annotation) is expected


def test_describe() -> None:
    assert describe(Union[float, List[Optional[int]]]) == "a number or a list, each item a whole number or null"
    assert describe(Dict[str, int]) == "a mapping, each value a whole number"


def test_nearest_key_prefers_the_same_name_elsewhere() -> None:
    known = ["model", "train", "model.image_size", "train.seed", "data.seeds"]
    assert nearest_key("data.seed", known) == " Did you mean 'train.seed'?"
    assert nearest_key("modle", known) == " Did you mean 'model'?"
    assert nearest_key("qqqq", known) == ""
