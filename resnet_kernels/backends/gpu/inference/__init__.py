"""Triton kernels for inference, and the choice between them and the CUDA kernels for Hopper."""
