// conv3x3, the plain kernel: correct for every size, a yardstick for the tiled ones.
//
// One thread computes a 2x2 quad of output pixels for kChannels output channels:
//   +- parallel -----------------+- parallel ---------------+- sequential -+
//   | quad (n, y / 2, x / 2)     | kChannels of cout        | ci, then tap |
//   +----------------------------+--------------------------+--------------+
// A quad is also a pooling window, so the pooled form needs no exchange between threads: there is no shared memory and
// no barrier, and every thread stands for itself. 4 x 4 inputs and 9 * kChannels weights feed 36 * kChannels
// multiply-adds.
//
// A warp is 4 quads side by side and 8 groups of channels. V input channels are a part of a sector, half of it in fp32
// and a quarter in 16 bits, and the threads take the parts of 32 bytes in different orders: those that read a pixel
// together, or a weight, read its whole sector at once.
//
//   lane  bit 0: group, 1: quad, 2 and 3: group, 4: quad      part = step ^ (bits 0 and 2) ^ (bits 1 and 4)
//
// The order of the sum is fixed by the channel and the column: the same bits for any batch and any place in it.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "conv3x3_cuda.h"
#include "launch.cuh"
#include "numeric.cuh"
#include "packet.cuh"

namespace vgg_fast::cuda {

constexpr int kChannels = 4;
constexpr int kWarpQuads = 4, kWarpGroups = 8;

// Without pool the quads of an odd map hang over its edge; with pool the odd row and column belong to no window.
__host__ __device__ inline int64_t quads(int64_t size, bool pool) { return pool ? size / 2 : (size + 1) / 2; }

// Warps side by side, and for the same pixels.
__host__ __device__ inline int64_t warps_across(const Conv3x3Args& a) {
  return (quads(a.w, a.pool) + kWarpQuads - 1) / kWarpQuads;
}

__host__ __device__ inline int64_t warps_deep(const Conv3x3Args& a) {
  return (a.cout + kWarpGroups * kChannels - 1) / (kWarpGroups * kChannels);
}

inline int64_t conv3x3_items(const Conv3x3Args& a) {
  return a.n * quads(a.h, a.pool) * warps_across(a) * warps_deep(a) * 32;
}

// What a thread needs at its end. Where the channels are whole packets, a warp reads the scales of 32 of them at once,
// and stores as many of a pixel.
template <typename T>
struct Epilogue {
  using Channels = Packet<T, kChannels>;
  Packet<float, kChannels> scale, shift;
  T* out;
  int64_t cout, count;  // count: channels that there are
  bool whole;           // kChannels of them, and aligned
  float floor;          // what is less becomes 0

  __device__ Epilogue(const Conv3x3Args& a, int64_t first)
      : out(static_cast<T*>(a.out) + first),
        cout(a.cout),
        count(a.cout - first),
        whole(a.cout % kChannels == 0 && is_aligned(a.out) && is_aligned(a.affine)),
        floor(a.relu ? 0.0f : -INFINITY) {
    if (whole) {
      scale = load<float, kChannels>(a.affine, first);
      shift = load<float, kChannels>(a.affine, a.cout + first);
      return;
    }
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      const int64_t channel = j < count ? first + j : first;
      scale.v[j] = a.affine[channel];
      shift.v[j] = a.affine[a.cout + channel];
    }
  }

  __device__ void store(int64_t pixel, const float (&sum)[kChannels]) const {
    Channels y;
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      const float value = fmaf(sum[j], scale.v[j], shift.v[j]);
      narrow(value < floor ? 0.0f : value, y.v[j]);  // keeps NaN
    }
    if (whole) {
      // As an array of packets: then nvcc sees that they are aligned, and stores them as a whole.
      reinterpret_cast<Channels*>(out)[pixel * (cout / kChannels)] = y;
      return;
    }
#pragma unroll
    for (int j = 0; j < kChannels; ++j)
      if (j < count) out[pixel * cout + j] = y.v[j];
  }
};

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) conv3x3_kernel(Conv3x3Args a) {
  const int64_t across = quads(a.w, a.pool), down = quads(a.h, a.pool), deep = warps_deep(a);
  const int64_t warp = item_index() / 32, row = warp / deep / warps_across(a), n = row / down;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t first = (warp % deep * kWarpGroups + lane / 4 % 4 * 2 + lane % 2) * kChannels;
  const int64_t column = warp / deep % warps_across(a) * kWarpQuads + lane / 16 * 2 + lane / 2 % 2;
  if (n >= a.n || first >= a.cout) return;
  const int64_t left = column * 2, top = row % down * 2;

  // Bit 4 * r + c: whether (top - 1 + r, left - 1 + c) lies inside the image.
  unsigned inside = 0;
  for (int r = 0; r < 4; ++r)
    for (int c = 0; c < 4; ++c)
      if (top + r >= 1 && top + r <= a.h && left + c >= 1 && left + c <= a.w) inside |= 1u << (4 * r + c);

  const int64_t origin = ((n * a.h + top - 1) * a.w + left - 1) * a.cin;  // may lie before the image
  int64_t weight[kChannels];
  for (int j = 0; j < kChannels; ++j)  // a copy of the last, never stored
    weight[j] = (first + j < a.cout ? first + j : a.cout - 1) * 9 * a.cin;

  constexpr int kParts = V > 1 ? 32 / (V * sizeof(T)) : 1;
  const int64_t other_part = (((lane ^ lane / 2) & 1) + ((lane ^ lane / 4) & 4) / 2) % kParts * V;
  float sum[4][kChannels] = {};
  for (int64_t step = 0; step < a.cin; step += V) {
    const int64_t ci = step ^ other_part;
    Packet<T, V> patch[4][4];
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        patch[r][c] = {};
        if (inside >> (4 * r + c) & 1) patch[r][c] = load<T, V>(a.x, origin + (r * a.w + c) * a.cin + ci);
      }
#pragma unroll
    for (int tap = 0; tap < 9; ++tap)
#pragma unroll
      for (int j = 0; j < kChannels; ++j) {
        const Packet<T, V> values = load<T, V>(a.weight, weight[j] + tap * a.cin + ci);
#pragma unroll
        for (int v = 0; v < V; ++v)
#pragma unroll
          for (int q = 0; q < 4; ++q)
            sum[q][j] = fmaf(widen(patch[q / 2 + tap / 3][q % 2 + tap % 3].v[v]), widen(values.v[v]), sum[q][j]);
      }
  }

  if (column >= across) return;  // not before: it has read its parts of the weights' sectors
  const Epilogue<T> epilogue(a, first);
  if (a.pool) {
#pragma unroll
    for (int j = 0; j < kChannels; ++j)
      sum[0][j] = pool_max(pool_max(pool_max(sum[0][j], sum[1][j]), sum[2][j]), sum[3][j]);
    return epilogue.store(row * across + column, sum[0]);
  }
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const int64_t y = top + q / 2, x = left + q % 2;
    if (y < a.h && x < a.w) epilogue.store((n * a.h + y) * a.w + x, sum[q]);
  }
}

}  // namespace vgg_fast::cuda
