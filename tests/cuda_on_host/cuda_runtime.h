// The part of CUDA that the plain kernels of csrc/cuda use, on the CPU: the tests compile the .cu files themselves, as
// they are, against this header, and run every thread of a launch one after the other. That is faithful for kernels
// without shared memory, barriers and shuffles, which is why none of those is declared here.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
using cudaStream_t = struct CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

// The blocks that a launch runs, so that a test can look at the last few of a grid of millions.
inline unsigned first_block = 0, last_block = UINT32_MAX;

inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  const bool one_dimensional = gridDim.y * gridDim.z * blockDim.y * blockDim.z == 1;
  if (!one_dimensional || gridDim.x == 0 || gridDim.x > INT32_MAX || blockDim.x == 0 || blockDim.x > 1024)
    return cudaErrorInvalidConfiguration;
  for (blockIdx.x = first_block; blockIdx.x < gridDim.x && blockIdx.x <= last_block; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) kernel(args...);
  return cudaSuccess;
}
