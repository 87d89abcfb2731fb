// maxpool2x2, the plain kernel: one thread per output element, neighbouring threads on neighbouring channels.
#pragma once

#include <cuda_runtime.h>

#include "launch.cuh"
#include "maxpool2x2_cuda.h"
#include "numeric.cuh"

namespace vgg_fast::cuda {

__host__ __device__ inline int64_t maxpool2x2_items(const Maxpool2x2Args& a) {
  return a.n * (a.h / 2) * (a.w / 2) * a.c;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) maxpool2x2_kernel(Maxpool2x2Args a) {
  const int64_t item = item_index();
  if (item >= maxpool2x2_items(a)) return;
  const int64_t c = item % a.c, pixel = item / a.c;
  const int64_t left = pixel % (a.w / 2) * 2, line = pixel / (a.w / 2);
  const int64_t top = line % (a.h / 2) * 2, n = line / (a.h / 2);
  const T* x = static_cast<const T*>(a.x) + ((n * a.h + top) * a.w + left) * a.c + c;
  const int64_t below = a.w * a.c;
  float best = widen(x[0]);
  best = pool_max(best, widen(x[a.c]));
  best = pool_max(best, widen(x[below]));
  best = pool_max(best, widen(x[below + a.c]));
  narrow(best, static_cast<T*>(a.out)[item]);
}

}  // namespace vgg_fast::cuda
