"""Triton kernels of inference, and the choice between them and Hopper's CUDA kernels."""
