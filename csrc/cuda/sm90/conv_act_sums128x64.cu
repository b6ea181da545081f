#include "cuda/sm90/conv_act.cuh"

RESNET_KERNELS_CONV_TILE(sums128x64)
