"""Options that do not fit together are refused in words."""

from pathlib import Path

import pytest

from sana.training.dcae_losses import LOSSES
from sana.training.dcae_options import DCAETraining


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"optimizer": "sgd"}, "muon, adamw"),
        ({"mixed_precision": "fp16"}, "bf16 or fp32"),
        ({"steps": 0}, "steps is 0"),
        ({"freeze_encoder": True}, "needs vae_pretrained"),
        ({"weights": LOSSES["lpips"]}, "lpips_weights"),
        ({"lpips_linear": Path("x.pth")}, "VGG16"),
    ],
)
def test_impossible_options(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        DCAETraining(work_dir=Path("x"), **options)


def test_a_recipe_holds_what_changes_the_result_and_is_plain():
    recipe = DCAETraining(work_dir=Path("x"), vae_pretrained=Path("vae"), steps=3).recipe()
    assert recipe["vae_pretrained"] == "vae" and recipe["weights"]["mse"] == 2
    assert not {"steps", "minutes", "work_dir", "save_every", "workers"} & set(recipe)
