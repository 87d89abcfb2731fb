// The CUDA launches of maxpool2x2 as the Torch-facing file sees them: no torch, no CUDA headers.
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

//   grad_x[n, 2y + i, 2x + j, c] = grad_out[n, y, x, c] at the one (i, j) that the maximum is taken from, 0 elsewhere
// which is the first of equal values and the last NaN, as PyTorch has it. Windows do not overlap: nothing is added up,
// so the result is always the same.
struct Maxpool2x2BackwardArgs {
  const void* grad_out;  // [n, h / 2, w / 2, c], dtype
  const void* x;         // [n, h, w, c], dtype
  void* grad_x;          // [n, h, w, c], dtype
  int64_t n, h, w, c;
  DType dtype;
};

const char* launch_maxpool2x2_backward(const Maxpool2x2BackwardArgs& args, Queue queue);

}  // namespace vgg_fast::cuda
