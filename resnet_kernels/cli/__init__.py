"""The command resnet-kernels."""

from .main import main

__all__ = ["main"]
