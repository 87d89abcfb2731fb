// maxpool2x2 and its backward: one thread for 16 bytes of one window's channels, or of one row of one channel.
//
// A thread's packet is V elements that lie side by side, V * sizeof(T) = 16 bytes:
//   channels   [n, h, w, c] with c a multiple of V: V channels of one window
//   columns    c = 1 (NCHW) with w a multiple of V: V / 2 windows of a row
//   V = 1      everything else, as "channels"
// Each thread stands for itself: neither shared memory nor a barrier, and the same code runs on the CPU in the tests.
#pragma once

#include <cuda_runtime.h>

#include "launch.cuh"
#include "maxpool2x2_cuda.h"
#include "numeric.cuh"
#include "packet.cuh"

namespace vgg_fast::cuda {

// A window of the map, or of its edge: with an odd size the last row and column belong to no window.
struct Window {
  int64_t c, x, y, n;

  // items: windows of V channels, or V / 2 windows side by side; `across` and `down` of them in a map.
  __device__ Window(int64_t item, int64_t packets, int64_t across, int64_t down) {
    c = item % packets;
    x = item / packets % across;
    y = item / packets / across % down;
    n = item / packets / across / down;
  }
};

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) maxpool2x2_kernel(Maxpool2x2Args a) {
  const int64_t item = item_index(), across = a.w / 2, down = a.h / 2;
  if (item >= a.n * down * across * (a.c / V)) return;
  const Window at(item, a.c / V, across, down);
  const int64_t first = ((at.n * a.h + 2 * at.y) * a.w + 2 * at.x) * a.c + at.c * V, below = a.w * a.c;
  const Packet<T, V> x[4] = {load<T, V>(a.x, first), load<T, V>(a.x, first + a.c), load<T, V>(a.x, first + below),
                             load<T, V>(a.x, first + below + a.c)};
  Packet<T, V> out;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    float best = widen(x[0].v[i]);
#pragma unroll
    for (int q = 1; q < 4; ++q) best = pool_max(best, widen(x[q].v[i]));
    narrow(best, out.v[i]);
  }
  store(a.out, item * V, out);
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) maxpool2x2_columns_kernel(Maxpool2x2Args a) {
  const int64_t item = item_index(), across = a.w / V, down = a.h / 2;
  if (item >= a.n * down * across) return;
  const Window at(item, 1, across, down);
  const int64_t first = (at.n * a.h + 2 * at.y) * a.w + at.x * V;
  const Packet<T, V> upper = load<T, V>(a.x, first), lower = load<T, V>(a.x, first + a.w);
  Packet<T, V / 2> out;
#pragma unroll
  for (int i = 0; i < V / 2; ++i) {
    float best = pool_max(widen(upper.v[2 * i]), widen(upper.v[2 * i + 1]));
    best = pool_max(pool_max(best, widen(lower.v[2 * i])), widen(lower.v[2 * i + 1]));
    narrow(best, out.v[i]);
  }
  store(a.out, item * (V / 2), out);
}

// Which of the four values is the maximum.
__device__ inline int pool_argmax(float a, float b, float c, float d) {
  int at = 0;
  float best = a;
  const float others[3] = {b, c, d};
#pragma unroll
  for (int q = 0; q < 3; ++q) {
    const bool better = others[q] > best || others[q] != others[q];  // as pool_max
    best = better ? others[q] : best;
    at = better ? q + 1 : at;
  }
  return at;
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) maxpool2x2_backward_kernel(Maxpool2x2BackwardArgs a) {
  const int64_t item = item_index(), across = (a.w + 1) / 2, down = (a.h + 1) / 2;  // with the edge
  if (item >= a.n * down * across * (a.c / V)) return;
  const Window at(item, a.c / V, across, down);
  const int64_t first = ((at.n * a.h + 2 * at.y) * a.w + 2 * at.x) * a.c + at.c * V, below = a.w * a.c;
  const int64_t offsets[4] = {first, first + a.c, first + below, first + below + a.c};
  const bool right = 2 * at.x + 1 < a.w, bottom = 2 * at.y + 1 < a.h;
  Packet<T, V> grad[4] = {};
  if (right && bottom) {
    const Packet<T, V> out = load<T, V>(a.grad_out, ((at.n * (a.h / 2) + at.y) * (a.w / 2) + at.x) * a.c + at.c * V);
    Packet<T, V> x[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) x[q] = load<T, V>(a.x, offsets[q]);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int best = pool_argmax(widen(x[0].v[i]), widen(x[1].v[i]), widen(x[2].v[i]), widen(x[3].v[i]));
#pragma unroll
      for (int q = 0; q < 4; ++q)
        if (q == best) grad[q].v[i] = out.v[i];
    }
  }
  store(a.grad_x, offsets[0], grad[0]);
  if (right) store(a.grad_x, offsets[1], grad[1]);
  if (bottom) store(a.grad_x, offsets[2], grad[2]);
  if (right && bottom) store(a.grad_x, offsets[3], grad[3]);
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) maxpool2x2_backward_columns_kernel(Maxpool2x2BackwardArgs a) {
  const int64_t item = item_index(), across = a.w / V, down = (a.h + 1) / 2;
  if (item >= a.n * down * across) return;
  const Window at(item, 1, across, down);
  const int64_t first = (at.n * a.h + 2 * at.y) * a.w + at.x * V;
  const bool bottom = 2 * at.y + 1 < a.h;
  Packet<T, V> upper_grad = {}, lower_grad = {};
  if (bottom) {
    const Packet<T, V / 2> out = load<T, V / 2>(a.grad_out, (at.n * (a.h / 2) + at.y) * (a.w / 2) + at.x * (V / 2));
    const Packet<T, V> upper = load<T, V>(a.x, first), lower = load<T, V>(a.x, first + a.w);
#pragma unroll
    for (int i = 0; i < V / 2; ++i) {
      const int best = pool_argmax(widen(upper.v[2 * i]), widen(upper.v[2 * i + 1]), widen(lower.v[2 * i]),
                                   widen(lower.v[2 * i + 1]));
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        if (q == best) upper_grad.v[2 * i + q] = out.v[i];
        if (q + 2 == best) lower_grad.v[2 * i + q] = out.v[i];
      }
    }
  }
  store(a.grad_x, first, upper_grad);
  if (bottom) store(a.grad_x, first + a.w, lower_grad);
}

}  // namespace vgg_fast::cuda
