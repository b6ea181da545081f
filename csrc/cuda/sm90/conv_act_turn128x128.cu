// conv_act for the ping-pong tile of 128 positions by 128 channels.
#include "cuda/sm90/conv_act.cuh"

RESNET_KERNELS_CONV_TILE(turn128x128)
