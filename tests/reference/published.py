"""Write synthetic sets in the file formats of the papers' code, some of which are pickles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def res(folder: Path, images: Tensor, labels: Tensor) -> Path:
    """Write the format of DC, DSA and DM: all runs so far, and the accuracies of every evaluation as NumPy scalars."""
    accuracies = {"ConvNet": [np.float64(0.41), np.float64(0.43)]}
    path = folder / "res_DC_FashionMNIST_ConvNet_1ipc.pt"
    runs = [[torch.zeros_like(images), labels], [images, labels]]
    torch.save({"data": runs, "accs_all_exps": accuracies}, path)
    return path


def mtt(folder: Path, images: Tensor, labels: Tensor, lr: float | None = None) -> Path:
    """Write the format of MTT, and of DATM, whose labels are logits. The images are a leaf that requires grad."""
    torch.save(images.clone().requires_grad_(), folder / "images_best.pt")
    torch.save(labels, folder / "labels_best.pt")
    if lr is not None:
        torch.save(torch.tensor(lr, requires_grad=True), folder / "lr_best.pt")
    return folder / "images_best.pt"


def idc(folder: Path, pixels: Tensor, labels: Tensor) -> Path:
    path = folder / "data_best.pt"
    torch.save([pixels, labels], path)
    return path


def jpegs(folder: Path, pixels: Tensor, labels: Tensor, names: list[str]) -> Path:
    """Write the format of SRe2L, CDA and RDED: one folder of JPEG images per class."""
    for i, (image, label) in enumerate(zip((pixels * 255).byte(), labels.tolist(), strict=True)):
        target = folder / "syn" / names[label]
        target.mkdir(parents=True, exist_ok=True)
        array = image.permute(1, 2, 0).numpy()
        picture = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
        picture.save(target / f"class{label:03d}_id{i:03d}.jpg", quality=95)
    return folder / "syn"
