"""`sana.models.weights`: strict loading, what a mismatch says, and what may be left as it was."""

from pathlib import Path

import pytest
import torch
from torch import nn

from sana.config import config_from_dict
from sana.models import build_transformer
from sana.models.checkpoint import extra_file
from sana.models.diffusers_folder import write_transformer
from sana.models.weights import CheckpointError, load_state_dict, load_weights, read_metadata
from tests.models.tiny_folder import assert_same, tiny_metadata, tiny_state


def built(**changes: object) -> nn.Module:
    """The tiny transformer with changed config fields, "section.key" written section__key."""
    config = tiny_metadata().config
    for name, value in changes.items():
        section, key = name.split("__")
        config[section][key] = value
    return build_transformer(config_from_dict(config))


def test_weights_arrive_in_the_model() -> None:
    model = built()
    kept = load_weights(model, tiny_state())
    assert kept == ()
    assert_same(dict(model.state_dict()), tiny_state())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__qk_norm": True}, r"blocks.0.attn.q_norm.weight of shape \(32,\) .*; check model.qk_norm"),
        ({"model__cross_norm": True}, r"blocks.0.cross_attn.q_norm.weight .*; check model.cross_norm"),
        (
            {"model__mlp_ratio": 4.0},
            r"inverted_conv.conv.weight is \(160, 32, 1, 1\) in the file and \(256, 32, 1, 1\)",
        ),
        ({"model__mlp_ratio": 4.0}, "check model.mlp_ratio"),
        ({"model__ffn_type": "mlp"}, "check model.ffn_type"),
        ({"model__cfg_embed": True}, "cfg_embedder.* is in the model and not in the file; check model.cfg_embed"),
        ({"vae__vae_latent_dim": 8}, r"x_embedder.proj.weight is \(32, 4, 1, 1\) in the file and \(32, 8, 1, 1\)"),
        ({"vae__vae_latent_dim": 8}, "check vae.vae_latent_dim"),
        ({"text_encoder__caption_channels": 64}, "check text_encoder.caption_channels"),
        ({"text_encoder__model_max_length": 30}, "check text_encoder.model_max_length"),
        ({"text_encoder__y_norm": False}, "is in the file and not in the model; check text_encoder.y_norm"),
        ({"scheduler__pred_sigma": True}, r"final_layer.linear.weight is \(4, 32\) .*scheduler.pred_sigma"),
        (
            {"model__extra": {"depth": 3, "hidden_size": 32, "num_heads": 4}},
            r"it has 2 blocks and the model 3; check model.model \(its depth\)",
        ),
        ({"model__extra": {"depth": 2, "hidden_size": 64, "num_heads": 4}}, r"check model.model \(its hidden size\)"),
    ],
)
def test_a_mismatch_names_key_shape_and_config_field(changes: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_weights(built(**changes), tiny_state())
    assert str(caught.value).startswith("The state dict does not fit SanaMS: ")
    assert "\n" not in str(caught.value)


def test_only_pos_embed_may_differ(caplog: pytest.LogCaptureFixture) -> None:
    state = tiny_state()
    state["pos_embed"] = torch.zeros(1, 4, 32)
    model = built()
    own = model.pos_embed.clone()
    with caplog.at_level("WARNING", logger="sana"):
        assert load_weights(model, state) == ("pos_embed",)
    assert "re-initialised pos_embed" in caplog.text
    assert torch.equal(model.pos_embed, own)
    state.pop("y_embedder.y_embedding")
    with pytest.raises(CheckpointError, match="y_embedder.y_embedding"):
        load_weights(model, state)
    assert load_weights(model, state, ignorable=("pos_embed", "y_embedder.y_embedding")) == (
        "pos_embed",
        "y_embedder.y_embedding",
    )


def test_an_unrelated_file_is_told_apart() -> None:
    with pytest.raises(CheckpointError, match=r"none of its keys \(such as layer.weight\) is a key of the model"):
        load_weights(built(), {"layer.weight": torch.ones(2)})


def test_a_foreign_diffusers_folder_says_what_was_reinitialised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_transformer(tmp_path / "transformer", tiny_state(), tiny_metadata())
    extra_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    model = built()
    with caplog.at_level("WARNING", logger="sana"):
        kept = load_weights(model, tmp_path)
    assert set(kept) == {"pos_embed", "y_embedder.y_embedding"}
    assert "re-initialised" in caplog.text and "y_embedder.y_embedding" in caplog.text
    rest = {key: value for key, value in tiny_state().items() if key not in kept}
    assert_same({key: value for key, value in model.state_dict().items() if key not in kept}, rest)


def test_a_model_without_storage_receives_its_own_copies(tmp_path: Path) -> None:
    torch.save({"state_dict": tiny_state()}, tmp_path / "w.pth")
    with torch.device("meta"):
        model = built()
    assert load_weights(model, tmp_path / "w.pth") == ()
    assert_same(dict(model.state_dict()), tiny_state())
    with torch.no_grad():
        model.x_embedder.proj.weight.zero_()  # memory of its own, not the file's
    assert_same(load_state_dict(tmp_path / "w.pth"), tiny_state())
    with torch.device("meta"):
        model = built()
    state = tiny_state()
    state.pop("pos_embed")
    with pytest.raises(CheckpointError, match="has no pos_embed, and the model is on the meta device"):
        load_weights(model, state)


def test_weights_are_cast_to_the_models_dtype() -> None:
    model = built().to(torch.bfloat16)
    load_weights(model, tiny_state())
    assert torch.equal(model.x_embedder.proj.weight, tiny_state()["x_embedder.proj.weight"].bfloat16())


def test_an_fsdp_folder_says_nothing_about_itself(tmp_path: Path) -> None:
    torch.save(tiny_state(), tmp_path / "pytorch_model_fsdp.bin")
    assert read_metadata(tmp_path) is None
    model = built()
    assert load_weights(model, tmp_path) == ()
