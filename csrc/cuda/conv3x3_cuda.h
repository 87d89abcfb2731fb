// The CUDA launch of conv3x3 as the Torch-facing file sees it: no torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "launch_cuda.h"

namespace vgg_fast::cuda {

//   sum[n, y, x, co] = sum over kh, kw, ci of x[n, y + kh - 1, x + kw - 1, ci] * weight[co, kh, kw, ci]
//   out[n, y, x, co] = relu(scale[co] * sum[n, y, x, co] + shift[co]), then with pool the maximum over 2x2 windows.
// scale >= 0, so that the maximum may be taken over the raw sums.
struct Conv3x3Args {
  const void* x;        // [n, h, w, cin], dtype
  const void* weight;   // [cout, 3, 3, cin], dtype
  const float* affine;  // [2, cout]: scale >= 0, shift
  void* out;            // [n, h, w, cout], or [n, h / 2, w / 2, cout] with pool; dtype
  int64_t n, h, w, cin, cout;
  DType dtype;
  bool relu, pool;
};

// Queues the kernel. Returns null, or CUDA's message where the launch was refused.
const char* launch_conv3x3(const Conv3x3Args& args, Queue queue);

}  // namespace vgg_fast::cuda
