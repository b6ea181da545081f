"""Gives batch norms the kind of statistics and affine parameters that a trained model has."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def randomize_(model: nn.Module) -> nn.Module:
    """Give every batch norm random statistics and affine parameters, away from 0 and 1; returns the model."""
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            assert m.running_mean is not None and m.running_var is not None
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 2)
            if m.weight is not None:
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.normal_(m.bias, 0, 0.3)
    return model


def calibrate_(model: nn.Module, images: Tensor) -> nn.Module:
    """Set the statistics of every batch norm to those of its input for these images; returns the model.

    images: (N, 3, H, W), one batch, which the model runs once in training mode.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    training = model.training
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # cumulative average: after one batch the statistics are those of the batch
    with torch.no_grad():
        model.train()(images)
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
    return model.train(training)
