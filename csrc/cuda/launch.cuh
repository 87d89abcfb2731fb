// The one way a kernel is launched here: 64-bit counts, errors as text.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "launch_cuda.h"

namespace vgg_fast::cuda {

constexpr int kThreads = 128;  // of a block of the kernels with one thread per item

__device__ inline int64_t item_index() {
  return static_cast<int64_t>(blockIdx.x) * kThreads + static_cast<int64_t>(threadIdx.x);
}

// Runs kernel(args) on so many blocks of so many threads, each with shared_bytes of dynamic shared memory.
// The device is set although PyTorch's guard has done so: this library links its own static CUDA runtime, whose idea
// of the current device must not be left to chance.
template <typename Args>
const char* launch_blocks(void (*kernel)(Args), int64_t blocks, int threads, int shared_bytes, const Args& args,
                          Queue queue) {
  if (blocks == 0) return nullptr;
  if (blocks > INT32_MAX) return "more than 2^31 - 1 blocks; split the batch";
  if (cudaError_t error = cudaSetDevice(queue.device); error != cudaSuccess) return cudaGetErrorString(error);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(queue.stream);
  cudaError_t error = cudaLaunchKernelEx(&config, kernel, args);
  if (error == cudaSuccess) error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// One thread per item; each must return early where item_index() >= items.
template <typename Args>
const char* launch(void (*kernel)(Args), int64_t items, const Args& args, Queue queue) {
  return launch_blocks(kernel, (items + kThreads - 1) / kThreads, kThreads, 0, args, queue);
}

}  // namespace vgg_fast::cuda
