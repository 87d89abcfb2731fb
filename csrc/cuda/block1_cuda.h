// The first block of a VGG in one launch, as the Torch-facing files see it: no torch, no CUDA headers.
#pragma once

#include "conv3x3_mma_cuda.h"

namespace vgg_fast::cuda {

constexpr int kBlock1Channels = 64;  // between the two convolutions

//   middle = relu(affine(conv3x3(x, weight)))       never in global memory
//   out    = relu(affine(conv3x3(middle, second.weight))), pooled = its maxima
struct Block1Args {
  const void* x;        // [n, h, w, cin], cin <= 4; begins, as the next, at a multiple of 16 bytes
  const void* weight;   // [64, 3, 3, cin]
  const float* affine;  // [2, 64]
  int cin;
  bool relu;
  MmaArgs second;  // of the second convolution; its x is not read, its cin is 64, its cout at most 64
};

// Whether two neighbouring layers can be one launch: 16-bit types, 1 to 4 channels to 64 to at most 64.
bool is_block1(DType dtype, int64_t cin, int64_t middle, int64_t cout);

// Tiles of 16 x 16 pixels, which lie in one image each.
MmaPlan plan_block1(int64_t n, int64_t h, int64_t w);

const char* launch_block1(const Block1Args& args, DType dtype, const MmaPlan& plan, Queue queue);

}  // namespace vgg_fast::cuda
