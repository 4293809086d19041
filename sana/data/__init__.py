"""Image sizes, transforms, captions and data sets. No model and no pipeline is known here."""

from sana.registry import Registry

DATASETS = Registry(
    "data set",
    {
        "SanaImgDataset": "sana.data.image_folder:SanaImgDataset",
        "SanaWebDataset": "sana.data.webdataset:SanaWebDataset",
        "SanaWebDatasetMS": "sana.data.webdataset:SanaWebDatasetMS",
    },
)
