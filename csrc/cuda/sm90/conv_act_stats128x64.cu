// conv_act for 128 positions by 64 channels, with statistics.
#include "cuda/sm90/conv_act.cuh"

RESNET_KERNELS_CONV_TILE(stats128x64)
