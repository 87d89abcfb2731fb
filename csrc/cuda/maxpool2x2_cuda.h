// The CUDA launch of maxpool2x2 as the Torch-facing file sees it: no torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "launch_cuda.h"

namespace vgg_fast::cuda {

//   out[n, y, x, c] = max of x[n, 2y .. 2y + 1, 2x .. 2x + 1, c]
// NaN is passed on. Contiguous NCHW is this layout too, with n * c images of one channel.
struct Maxpool2x2Args {
  const void* x;  // [n, h, w, c], dtype
  void* out;      // [n, h / 2, w / 2, c], dtype
  int64_t n, h, w, c;
  DType dtype;
};

// Queues the kernel. Returns null, or CUDA's message where the launch was refused.
const char* launch_maxpool2x2(const Maxpool2x2Args& args, Queue queue);

}  // namespace vgg_fast::cuda
