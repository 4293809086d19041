"""Tables: the names that the lists of the nodes show, and the official configuration behind each. Nothing is loaded."""

from sana.data.aspect_ratio import ASPECT_RATIOS

BUNDLED = "sana_tiny (bundled)"
_1024, _15 = "configs/sana_config/1024ms", "configs/sana1-5_config/1024ms"
_512 = "configs/sana_config/512ms"

CONFIGURATIONS = {  # what a weight file is that does not say so itself -> the YAML of the release
    "SanaMS_600M_P1_D28": f"{_1024}/Sana_600M_img1024.yaml",
    "SanaMS_1600M_P1_D20": f"{_1024}/Sana_1600M_img1024.yaml",
    "SanaMS_1600M_P1_D20_2K": "configs/sana_config/2048ms/Sana_1600M_img2048_bf16.yaml",
    "SanaMS_1600M_P1_D20_4K": "configs/sana_config/4096ms/Sana_1600M_img4096_bf16.yaml",
    "SanaMS1.5_1600M_P1_D20": f"{_15}/Sana_1600M_1024px_allqknorm_bf16_lr2e5.yaml",
    "SanaMS1.5_4800M_P1_D60": f"{_15}/Sana_4800M_1024px_came8bit_grow_constant_allqknorm_bf16_lr2e5.yaml",
}
DEFAULT_CONFIGURATION = "SanaMS_1600M_P1_D20"

_OWNER = "Efficient-Large-Model"
CHECKPOINTS = {  # repository of the release -> its YAML; the weights are in checkpoints/<name>.pth
    f"{_OWNER}/SANA1.5_1.6B_1024px": CONFIGURATIONS["SanaMS1.5_1600M_P1_D20"],
    f"{_OWNER}/SANA1.5_4.8B_1024px": CONFIGURATIONS["SanaMS1.5_4800M_P1_D60"],
    f"{_OWNER}/Sana_1600M_1024px_MultiLing": CONFIGURATIONS["SanaMS_1600M_P1_D20"],
    f"{_OWNER}/Sana_1600M_512px_MultiLing": f"{_512}/Sana_1600M_img512.yaml",
    f"{_OWNER}/Sana_1600M_1024px_BF16": CONFIGURATIONS["SanaMS_1600M_P1_D20"],
    f"{_OWNER}/Sana_1600M_1024px": CONFIGURATIONS["SanaMS_1600M_P1_D20"],
    f"{_OWNER}/Sana_1600M_2Kpx_BF16": CONFIGURATIONS["SanaMS_1600M_P1_D20_2K"],
    f"{_OWNER}/Sana_1600M_4Kpx_BF16": CONFIGURATIONS["SanaMS_1600M_P1_D20_4K"],
    f"{_OWNER}/Sana_1600M_512px": f"{_512}/Sana_1600M_img512.yaml",
    f"{_OWNER}/Sana_600M_1024px": CONFIGURATIONS["SanaMS_600M_P1_D28"],
    f"{_OWNER}/Sana_600M_512px": f"{_512}/Sana_600M_img512.yaml",
}
TEXT_ENCODERS = ("Efficient-Large-Model/gemma-2-2b-it", "unsloth/gemma-2-2b-it-bnb-4bit")
AUTOENCODERS = ("mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers", "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers")
AUTOENCODER_KINDS = {  # for a file without its config.json -> the preset of sana.models.autoencoder.dc_ae
    "dcae-f32c32-sana-1.0-diffusers": "dc-ae-f32c32-sana-1.0",
    "dcae-f32c32-sana-1.1-diffusers": "dc-ae-f32c32-sana-1.1",
}
DEFAULT_AUTOENCODER_KIND = "dcae-f32c32-sana-1.0-diffusers"

DTYPES = ("auto", "FP32", "FP16", "BF16")
TEXT_DTYPES = ("default", "auto (comfy)", "BF16", "FP32", "FP16")


def _sizes(side: int) -> dict[str, tuple[int, int]]:
    """Returns ratio -> (width, height). The released node gives a table's first number as the width; so does this."""
    return {f"{float(ratio):.2f}": size for ratio, size in ASPECT_RATIOS[f"ASPECT_RATIO_{side}"].items()}


SIZES = {
    "1024px": _sizes(1024),
    "512px": _sizes(512),
    "2K": _sizes(2048),
    "4K": _sizes(4096),
    "SanaMS_600M_P1_D28": _sizes(1024),
    "SanaMS_1600M_P1_D20": _sizes(1024),
    "SanaMS_1600M_P1_D20_2K": _sizes(2048),
    "SanaMS_1600M_P1_D20_4K": _sizes(4096),
    "256px": _sizes(256),  # of the bundled model
}
