// The one way a kernel is launched here: one thread per item, 64-bit item count, errors as text.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "launch_cuda.h"

namespace vgg_fast::cuda {

constexpr int kThreads = 128;

__device__ inline int64_t item_index() {
  return static_cast<int64_t>(blockIdx.x) * kThreads + static_cast<int64_t>(threadIdx.x);
}

// Runs kernel(args) over ceil(items / kThreads) blocks; each thread must return early where item_index() >= items.
// The device is set although PyTorch's guard has done so: this library links its own static CUDA runtime, whose idea
// of the current device must not be left to chance.
template <typename Args>
const char* launch(void (*kernel)(Args), int64_t items, const Args& args, Queue queue) {
  if (items == 0) return nullptr;
  const int64_t blocks = (items + kThreads - 1) / kThreads;
  if (blocks > INT32_MAX) return "more than 2^31 - 1 blocks; split the batch";
  if (cudaError_t error = cudaSetDevice(queue.device); error != cudaSuccess) return cudaGetErrorString(error);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(queue.stream);
  cudaError_t error = cudaLaunchKernelEx(&config, kernel, args);
  if (error == cudaSuccess) error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace vgg_fast::cuda
