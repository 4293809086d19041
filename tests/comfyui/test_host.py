"""What the pack takes from ComfyUI: lists of files, devices, progress, and what it does without."""

import sys
from types import ModuleType

import pytest
import torch

from comfyui import host
from tests.comfyui.conftest import Comfy


def test_without_comfyui_there_are_no_folders_and_torch_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert host.module("folder_paths") is None
    assert host.file_names("checkpoints") == host.folder_names("vae", ("config.json",)) == host.folders("vae") == []
    assert host.downloaded("sana", "*") is None
    assert host.device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert host.latent_device().type == "cpu"
    host.stop_if_asked()
    host.free_all()
    host.Progress(2).show(1)


def test_a_module_of_comfyui_that_lacks_a_package_is_not_taken_for_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == "folder_paths":
                raise ModuleNotFoundError("No module named 'yaml'", name="yaml")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match="yaml"):
        host.module("folder_paths")


def test_files_and_folders_of_comfyui(comfy: Comfy) -> None:
    (comfy.models / "checkpoints" / "mine").mkdir()
    file = comfy.models / "checkpoints" / "mine" / "model.pth"
    file.touch()
    (comfy.models / "vae" / "dcae").mkdir()
    (comfy.models / "vae" / "dcae" / "config.json").touch()
    (comfy.models / "vae" / "other").mkdir()
    assert host.file_names("checkpoints") == ["mine/model.pth"]
    assert host.folder_names("vae", ("config.json",)) == ["dcae/"]
    assert host.find(("checkpoints", "diffusers"), "mine/model.pth") == file
    assert host.find(("vae",), "dcae/") == comfy.models / "vae" / "dcae"
    assert host.file_names("unknown") == []
    with pytest.raises(ValueError, match="'gone.pth' is not in ComfyUI's models/checkpoints"):
        host.find(("checkpoints",), "gone.pth")


def test_what_an_earlier_pack_fetched_is_found_whatever_the_folders_case(comfy: Comfy) -> None:
    file = comfy.models / "Sana" / "models--sana--x" / "checkpoints" / "x.pth"
    file.parent.mkdir(parents=True)
    file.touch()
    assert host.downloaded("sana", "*/checkpoints/x.pth") == file
    assert host.downloaded("sana", "*/checkpoints/y.pth") is None


def test_devices_are_comfyuis(comfy: Comfy, monkeypatch: pytest.MonkeyPatch) -> None:
    management: ModuleType = sys.modules["comfy.model_management"]
    names = ("get_torch_device", "text_encoder_device", "vae_device", "vae_offload_device", "unet_offload_device")
    for index, name in enumerate(names):
        monkeypatch.setattr(management, name, lambda index=index: torch.device("cuda", index))
    assert [host.device(part).index for part in ("model", "text", "vae")] == [0, 1, 2]
    assert [host.resting_device(part).index for part in ("vae", "model")] == [3, 4]
