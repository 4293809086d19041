"""Constructor arguments: official defaults, JSON form, and one clear sentence for impossible values."""

import json

import pytest

from sana.models.transformer.architecture import SanaArchitecture


def test_kwargs_survive_json() -> None:
    arch = SanaArchitecture.from_kwargs({"depth": 3, "mlp_acts": ["gelu", "silu", None], "qk_norm": True})
    assert SanaArchitecture.from_kwargs(json.loads(json.dumps(arch.to_kwargs()))) == arch


def test_official_arguments_without_effect_are_accepted() -> None:
    arguments = {"config": None, "micro_condition": False, "lr_scale": None, "null_embed_path": None}
    assert SanaArchitecture.from_kwargs(arguments) == SanaArchitecture()


def test_output_channels_follow_pred_sigma_alone() -> None:
    for learn_sigma in (True, False):
        assert SanaArchitecture(in_channels=5, pred_sigma=True, learn_sigma=learn_sigma).out_channels == 10
        assert SanaArchitecture(in_channels=5, pred_sigma=False, learn_sigma=learn_sigma).out_channels == 5


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"hiden_size": 3}, TypeError, "'hiden_size'.*Did you mean 'hidden_size'"),
        ({"micro_condition": True}, ValueError, "micro_condition"),
        ({"attn_type": "lineal"}, ValueError, "attn_type='lineal'.*Did you mean 'linear'"),
        ({"attn_type": "triton_flash"}, ValueError, "attn_type='triton_flash'"),
        ({"ffn_type": "moe"}, ValueError, "ffn_type='moe'"),
        ({"cross_attn_type": "linear"}, ValueError, "cross_attn_type='linear'"),
        ({"pos_embed_type": "2d"}, ValueError, "pos_embed_type='2d'"),
        ({"depth": 0}, ValueError, "depth must be at least 1, not 0"),
        ({"hidden_size": 100, "num_heads": 3}, ValueError, "100 must be a multiple of num_heads 3"),
        (
            {"attn_type": "linear", "hidden_size": 80, "num_heads": 2},
            ValueError,
            "80 must be a multiple of linear_head_dim 32",
        ),
        ({"hidden_size": 6, "num_heads": 2}, ValueError, "hidden_size % 4 == 0, not 6"),
        ({"hidden_size": 12, "num_heads": 2, "pos_embed_type": "3d_rope"}, ValueError, "multiple of 4, not 6"),
        ({"mlp_acts": ["silu"]}, ValueError, "three names"),
    ],
)
def test_impossible_values_are_refused(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SanaArchitecture.from_kwargs(arguments)
