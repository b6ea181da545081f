"""Models and images for the commands: photographs, and weights from a checkpoint or random and calibrated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import resnet

from .parameters import calibrate_

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photographs(count: int, size: int) -> Tensor:
    """Return square crops of the two photographs in scikit-learn, normalised as torchvision's models expect.

    Returns:
        (count, 3, size, size) fp32: the centres of the two whole photographs, then random crops.
    Raises:
        ModuleNotFoundError: scikit-learn is not installed; the message names the extra to install.
    """
    try:
        from sklearn.datasets import load_sample_images
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the photographs need scikit-learn and pillow: pip install 'resnet_kernels[demo]'"
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
    """Return the names of torchvision's classifiers that are made of residual blocks."""
    return [
        name
        for name in torchvision.models.list_models(torchvision.models)
        if name.startswith(("resnet", "resnext", "wide_resnet"))
    ]


def classifier(name: str, weights: Path | None, images: Tensor | None) -> resnet.ResNet:
    """Return torchvision's model in evaluation mode.

    Args:
        name: one of `residual_networks()`.
        weights: a checkpoint of the model: a state dict, also inside {"state_dict": ...} or {"model": ...}, also with
            the prefix "module." that DataParallel adds; None for random weights of seed 0.
        images: (N, 3, H, W) fp32 or None: with random weights, the batch norms are given the statistics of these.
    Raises:
        ValueError: `name` is no residual network, or the file is no checkpoint of it.
    """
    if name not in residual_networks():
        raise ValueError(f"model: expected one of {', '.join(residual_networks())}, got {name!r}")
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None)
    if weights is None:
        return (model if images is None else calibrate_(model, images)).eval()
    if not weights.is_file():
        raise ValueError(f"weights: expected a torchvision checkpoint of {name}, got {weights}, which is not a file")
    state = _state_dict(weights)
    reason = _mismatch(name, model.state_dict(), state)
    if reason:
        raise ValueError(f"weights: {weights} is no checkpoint of {name}: {reason}")
    model.load_state_dict(state)
    return model.eval()


def _state_dict(path: Path) -> dict[str, Tensor]:
    """Return the state dict in a file, out of its wrappers and without the prefix "module."."""
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises what the bytes happen to lead to
        raise ValueError(
            f"weights: torch.load cannot read {path}: it is truncated, no PyTorch checkpoint, or holds other objects "
            f"than tensors ({type(error).__name__})"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = isinstance(content, Mapping) and all(isinstance(v, Tensor) for v in content.values())
    if not tensors or not content:
        raise ValueError(
            f"weights: expected {path} to hold a state dict of tensors, also as the item 'state_dict' or 'model' of a "
            f"dict, got {type(content).__name__}"
        )
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def _depth(state: Mapping[str, Tensor]) -> int:
    """Return the number of convolutions on the main path and linear layers: 50 for a resnet50; 0 for other networks."""
    if not any(key.startswith("layer1.0.conv1.") for key in state):
        return 0
    main_path = [k for k in state if k.endswith("weight") and "downsample" not in k and state[k].dim() in (2, 4)]
    return len(main_path)


def _mismatch(name: str, expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> str | None:
    """Return why a state dict does not fit the model, or None."""
    missing = [key for key in expected if key not in got]
    unexpected = [key for key in got if key not in expected]
    # Checkpoints from before PyTorch 0.4.1 have no counters of batches; load_state_dict takes them without.
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    if _depth(got) and _depth(got) != _depth(expected):
        return f"expected {_depth(expected)} layers with weights, got {_depth(got)}"
    if missing or unexpected:
        examples = [
            f"{len(keys)} {what} (first: {keys[0]})"
            for what, keys in (("missing", missing), ("unexpected", unexpected))
            if keys
        ]
        return "keys: " + ", ".join(examples)
    for key, value in expected.items():
        if key in got and got[key].shape != value.shape:
            return f"{key}: expected shape {tuple(value.shape)}, got {tuple(got[key].shape)}"
    return None
