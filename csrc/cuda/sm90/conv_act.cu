// Host side of conv_act.cuh: tensor maps, kernel parameters and the launch; and the library's queries.
#include <cuda_runtime_api.h>

#include <iterator>
#include <stdexcept>
#include <string>

#include "cuda/sm90/api.h"
#include "cuda/sm90/call.h"
#include "cuda/sm90/conv_act_tiles.h"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/tensor_map.h"

namespace resnet_kernels::sm90 {
namespace {

int slices(int channels) { return (channels + 63) / 64; }

ConvParams parameters(const ResnetKernelsConv& c, TileShape t) {
  ConvParams p{};
  p.P = output_size(c.H, c.R, c.stride, c.padding, c.dilation);
  p.Q = output_size(c.W, c.S, c.stride, c.padding, c.dilation);
  p.M = c.N * p.P * p.Q, p.K = c.K;
  const int positions = t.positions();
  p.k_tiles = (c.K + t.columns - 1) / t.columns;
  p.tiles = (p.M + positions - 1) / positions * p.k_tiles;
  p.stride = c.stride, p.padding = c.padding, p.dilation = c.dilation;
  p.S = c.S, p.taps = c.R * c.S, p.slices = slices(c.C);
  p.parts = c.parts, p.masks = reinterpret_cast<const float4*>(c.masks), p.scale = c.scale, p.shift = c.shift,
  p.relu = c.relu, p.residual_there = c.residual;
  const bool half = c.half;
  p.x = im2col_map("x", half, c.x, {c.N, c.H, c.W, c.C}, {c.x_strides[0], c.x_strides[1], c.x_strides[2]}, c.stride,
                   c.padding, c.dilation * (c.S - 1), c.dilation * (c.R - 1), positions);
  p.w = tiled_map<3>("w", half, c.w, {c.C, p.taps, c.K}, {c.C, int64_t{c.C} * p.taps}, {64, 1, t.columns});
  if (c.x2) {
    p.slices2 = slices(c.C2);
    p.x2 = im2col_map("x2", half, c.x2, {c.N, p.P, p.Q, c.C2}, {c.x2_strides[0], c.x2_strides[1], c.x2_strides[2]}, 1,
                      0, 0, 0, positions);
    p.w2 = tiled_map<3>("w2", half, c.w2, {c.C2, 1, c.K}, {c.C2, c.C2}, {64, 1, t.columns});
  }
  if (c.residual) p.residual = tiled_map<2>("residual", half, c.residual, {c.K, p.M}, {c.K}, {64, t.rows});
  p.y = tiled_map<2>("y", half, c.y, {c.K, p.M}, {c.K}, {64, t.rows});
  return p;
}

void launch(const ResnetKernelsConv& c, cudaStream_t stream) {
  if (c.tile < 0 || c.tile >= static_cast<int>(std::size(kTiles)))
    throw std::runtime_error("there is no tile " + std::to_string(c.tile));
  const ConvTile& tile = kTiles[c.tile];
  const Reduce reduce = tile.shape.reduce;
  if ((reduce != Reduce::kNothing) != (c.parts != nullptr))
    throw std::runtime_error(std::string(tile.name) + (c.parts ? " reduces nothing" : " reduces, and nothing takes it"));
  if ((reduce == Reduce::kSums) != (c.masks != nullptr) || (c.masks && !c.residual))
    throw std::runtime_error(std::string(tile.name) + ": masks belong to tiles of sums, and to what they mask");
  ConvParams p = parameters(c, tile.shape);
  run(tile.kernel(c.half), p.tiles, c.multiprocessors, kConvThreads, shared_bytes(tile.shape), p, stream);
}

}  // namespace
}  // namespace resnet_kernels::sm90

extern "C" {

const char* resnet_kernels_sm90_conv_act(const ResnetKernelsConv* call, void* stream) {
  return resnet_kernels::sm90::told("sm90 conv_act",
                                    [&] { resnet_kernels::sm90::launch(*call, static_cast<cudaStream_t>(stream)); });
}

int32_t resnet_kernels_sm90_bytes(const char* name) {
  const std::string of = name;
  return of == "conv_act"     ? sizeof(ResnetKernelsConv)
         : of == "bottleneck" ? sizeof(ResnetKernelsBottleneck)
         : of == "pair"       ? sizeof(ResnetKernelsPair)
         : of == "tail"       ? sizeof(ResnetKernelsTail)
         : of == "stem"       ? sizeof(ResnetKernelsStem)
         : of == "wgrad"      ? sizeof(ResnetKernelsWgrad)
                              : 0;
}

const char* resnet_kernels_sm90_tiles() {
  static const std::string names = [] {
    std::string all;
    for (const auto& tile : resnet_kernels::sm90::kTiles) all += (all.empty() ? "" : " ") + std::string(tile.name);
    return all;
  }();
  return names.c_str();
}
}
