// conv3x3 for Hopper (sm_90a) as the Torch-facing file and the planner see it: no torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "launch_cuda.h"

namespace vgg_fast::cuda {

constexpr int kSm90Rows[] = {14, 16}, kSm90Width = 8;  // pixels of a block: the plan chooses its height
constexpr int kSm90Whole = 4, kSm90Half = 2;           // blocks of a tile
constexpr int kSm90Columns = 64;                       // output channels of a tile
constexpr int kSm90Chunk = 128;                        // bytes: input channels of a pixel that are copied at once

struct Sm90Problem {
  int64_t n, h, w, cin, cout;
  DType dtype;  // fp32 is multiplied as tf32
};

// How a problem is cut. Work items in order: `whole` whole tiles, then half tiles, those of each tile `split` times.
struct Sm90Plan {
  int rows;          // of a block
  int down, across;  // blocks of an image
  int whole, items;
  int split;                             // items that share the sum of a (half) tile, each some of its chunks
  int64_t partial_bytes, counter_bytes;  // of the workspace for partial sums and of their counters; 0 unless split
};

// Null, or why there is no kernel of this form for the problem on a device of compute capability sm (90: 9.0).
const char* sm90_unsupported(const Sm90Problem& problem, int sm);

// The plan for a GPU of so many multiprocessors, a pure function.
Sm90Plan plan_sm90(const Sm90Problem& problem, int multiprocessors);

//   sum[n, y, x, co] = sum over kh, kw, ci of x[n, y + kh - 1, x + kw - 1, ci] * weight[co, kh, kw, ci]
//   y[n, y, x, co]   = relu(scale[co] * sum[n, y, x, co] + shift[co])
// All pointers are aligned to 16 bytes.
struct Sm90Args {
  const void* x;        // [n, h, w, cin], dtype
  const void* weight;   // [cout, 3, 3, cin], dtype
  const float* affine;  // [2, cout]: scale >= 0, so that the maximum may be taken over the sums, and shift
  void* out;            // y: [n, h, w, cout], dtype, or null
  void* pooled;         // y's maxima over 2x2 windows: [n, h / 2, w / 2, cout], dtype, or null
  float* partial;       // partial_bytes of the plan, or null without split
  unsigned* arrived;    // counter_bytes of zeros, and zeros afterwards
  bool relu;
};

// Queues the kernel. Returns null, or why nothing was queued.
const char* launch_conv3x3_sm90(const Sm90Args& args, const Sm90Problem& problem, int multiprocessors, Queue queue);

}  // namespace vgg_fast::cuda
