// conv_act for 128 positions by 64 channels, with a ReLU mask and a batch norm gradient's sums.
#include "cuda/sm90/conv_act.cuh"

RESNET_KERNELS_CONV_TILE(sums128x64)
