// What every CUDA launch of this project is described with: no torch, no CUDA headers.
#pragma once

#include <cstdint>

namespace vgg_fast::cuda {

enum class DType { kFloat32, kFloat16, kBFloat16 };

inline int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Where a launch goes: a device and one of its streams (a cudaStream_t).
struct Queue {
  int device;
  void* stream;
};

// What the choice of a kernel asks of a device.
struct DeviceLimits {
  int sm;  // compute capability, 80 for 8.0
  int multiprocessors;
};

DeviceLimits device_limits(int device);

}  // namespace vgg_fast::cuda
