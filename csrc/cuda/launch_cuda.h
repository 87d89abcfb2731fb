// What every CUDA launch of this project is described with: no torch, no CUDA headers.
#pragma once

namespace vgg_fast::cuda {

enum class DType { kFloat32, kFloat16, kBFloat16 };

// Where a launch goes: a device and one of its streams (a cudaStream_t).
struct Queue {
  int device;
  void* stream;
};

}  // namespace vgg_fast::cuda
