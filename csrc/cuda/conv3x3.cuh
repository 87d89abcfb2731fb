// conv3x3, the plain kernel: correct for every size, a yardstick for the tiled ones.
//
// One thread computes a 2x2 quad of output pixels for kChannels output channels:
//   +- parallel -----------------+- parallel ---------------+- sequential -+
//   | quad (n, y / 2, x / 2)     | kChannels of cout        | ci, then tap |
//   +----------------------------+--------------------------+--------------+
// A quad is also a pooling window, so the pooled form needs no exchange between threads: there is no shared memory and
// no barrier, and every thread stands for itself. 4 x 4 inputs and 9 * kChannels weights feed 36 * kChannels
// multiply-adds. The order of the sum is fixed: the same bits for any batch and any place in it.
#pragma once

#include <cuda_runtime.h>

#include "conv3x3_cuda.h"
#include "launch.cuh"
#include "numeric.cuh"

namespace vgg_fast::cuda {

constexpr int kChannels = 4;

// Without pool the quads of an odd map hang over its edge; with pool the odd row and column belong to no window.
__host__ __device__ inline int64_t quads_across(int64_t size, bool pool) { return pool ? size / 2 : (size + 1) / 2; }

__host__ __device__ inline int64_t channel_groups(const Conv3x3Args& a) { return (a.cout + kChannels - 1) / kChannels; }

inline int64_t conv3x3_items(const Conv3x3Args& a) {
  return a.n * quads_across(a.h, a.pool) * quads_across(a.w, a.pool) * channel_groups(a);
}

template <typename T>
__device__ void store_conv3x3(const Conv3x3Args& a, int64_t pixel, int64_t co, float sum) {
  float y = fmaf(sum, a.affine[co], a.affine[a.cout + co]);
  if (a.relu && y < 0.0f) y = 0.0f;  // keeps NaN
  narrow(y, static_cast<T*>(a.out)[pixel * a.cout + co]);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) conv3x3_kernel(Conv3x3Args a) {
  const int64_t groups = channel_groups(a), across = quads_across(a.w, a.pool), down = quads_across(a.h, a.pool);
  const int64_t item = item_index();
  if (item >= a.n * down * across * groups) return;
  // Neighbouring threads share a quad: its inputs are a broadcast, and a pixel's outputs are written side by side.
  const int64_t first = item % groups * kChannels, quad = item / groups;
  const int64_t left = quad % across * 2, top = quad / across % down * 2, n = quad / across / down;

  // Bit 4 * r + c: whether (top - 1 + r, left - 1 + c) lies inside the image.
  unsigned inside = 0;
  for (int r = 0; r < 4; ++r)
    for (int c = 0; c < 4; ++c)
      if (top + r >= 1 && top + r <= a.h && left + c >= 1 && left + c <= a.w) inside |= 1u << (4 * r + c);

  const T* x = static_cast<const T*>(a.x);
  const int64_t origin = ((n * a.h + top - 1) * a.w + left - 1) * a.cin;  // may lie before the image
  const T* weight[kChannels];
  for (int j = 0; j < kChannels; ++j) {
    const int64_t co = first + j < a.cout ? first + j : a.cout - 1;  // a copy of the last, never stored
    weight[j] = static_cast<const T*>(a.weight) + co * 9 * a.cin;
  }

  float sum[kChannels][4] = {};
  for (int64_t ci = 0; ci < a.cin; ++ci) {
    float patch[4][4];
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int c = 0; c < 4; ++c)
        patch[r][c] = inside >> (4 * r + c) & 1 ? widen(x[origin + (r * a.w + c) * a.cin + ci]) : 0.0f;
#pragma unroll
    for (int tap = 0; tap < 9; ++tap)
#pragma unroll
      for (int j = 0; j < kChannels; ++j) {
        const float value = widen(weight[j][tap * a.cin + ci]);
#pragma unroll
        for (int q = 0; q < 4; ++q) sum[j][q] = fmaf(patch[q / 2 + tap / 3][q % 2 + tap % 3], value, sum[j][q]);
      }
  }

#pragma unroll
  for (int j = 0; j < kChannels; ++j) {
    const int64_t co = first + j;
    if (co >= a.cout) continue;
    if (a.pool) {
      const float best = pool_max(pool_max(pool_max(sum[j][0], sum[j][1]), sum[j][2]), sum[j][3]);
      store_conv3x3<T>(a, quad, co, best);
      continue;
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int64_t y = top + q / 2, px = left + q % 2;
      if (y < a.h && px < a.w) store_conv3x3<T>(a, (n * a.h + y) * a.w + px, co, sum[j][q]);
    }
  }
}

}  // namespace vgg_fast::cuda
