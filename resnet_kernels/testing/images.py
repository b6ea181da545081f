"""Models and images for the commands: real photographs, and weights from a file or calibrated random ones."""

from __future__ import annotations

from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import resnet

from .parameters import calibrate_

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photographs(count: int, size: int) -> Tensor:
    """Square crops of the two photographs that scikit-learn ships, normalised as torchvision's models expect.

    Returns (count, 3, size, size) fp32; the first two are the whole photographs' centres, the rest random crops.
    Raises ModuleNotFoundError, naming the extra to install, without scikit-learn.
    """
    try:
        from sklearn.datasets import load_sample_images
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "photographs need scikit-learn and pillow: pip install 'resnet_kernels[demo]'"
        ) from error
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    whole = [
        (torch.from_numpy(image.copy()).permute(2, 0, 1) / 255 - mean) / std for image in load_sample_images().images
    ]
    generator = torch.Generator().manual_seed(0)
    crops = []
    for i in range(count):
        image = whole[i % len(whole)]
        side = min(image.shape[1:])
        if i >= len(whole):
            side = int(torch.randint(side // 2, side + 1, (), generator=generator))
        corner = [
            (n - side) // 2 if i < len(whole) else int(torch.randint(n - side + 1, (), generator=generator))
            for n in image.shape[1:]
        ]
        crop = image[None, :, corner[0] : corner[0] + side, corner[1] : corner[1] + side]
        crops.append(nn.functional.interpolate(crop, (size, size), mode="bilinear", antialias=True))
    return torch.cat(crops)


def residual_networks() -> list[str]:
    """Names of torchvision's classifiers made of residual blocks."""
    return [
        name
        for name in torchvision.models.list_models(torchvision.models)
        if name.startswith(("resnet", "resnext", "wide_resnet"))
    ]


def classifier(name: str, weights: Path | None, images: Tensor | None) -> resnet.ResNet:
    """torchvision's model in evaluation mode, with a checkpoint's weights, or random ones whose batch norms hold the
    images' statistics, if there are any.

    Raises ValueError for a name that is no residual network's, and for a file that is no checkpoint of it.
    """
    if name not in residual_networks():
        raise ValueError(f"model: expected one of {', '.join(residual_networks())}, got {name!r}")
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None)
    if weights is None:
        return (model if images is None else calibrate_(model, images)).eval()
    if not weights.is_file():
        raise ValueError(f"weights: expected a torchvision checkpoint of {name}, got {weights}, which is no file")
    try:
        model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True), strict=True)
    except Exception as error:  # torch.load raises whatever the bytes lead it to
        raise ValueError(f"weights: {weights} is no checkpoint of {name}: {error}") from error
    return model.eval()
