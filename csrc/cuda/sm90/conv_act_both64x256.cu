// conv_act for the cooperative tile of 2 x 64 positions by 256 channels.
#include "cuda/sm90/conv_act.cuh"

RESNET_KERNELS_CONV_TILE(both64x256)
