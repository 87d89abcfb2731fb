#include <algorithm>

#include "conv3x3_mma.cuh"
#include "launch.cuh"

namespace vgg_fast::cuda {
namespace {

template <class K>
const char* launch_tile(const MmaArgs& args, const MmaPlan& plan, Queue queue) {
  const int64_t blocks = static_cast<int64_t>(plan.rows) * plan.columns * plan.split;
  cudaError_t error = cudaSetDevice(queue.device);
  if (error == cudaSuccess)  // more than the 48 KiB that every kernel may have must be asked for
    error = cudaFuncSetAttribute(conv3x3_mma_kernel<K>, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return launch_blocks(conv3x3_mma_kernel<K>, blocks, K::kThreads, plan.shared_bytes, args, queue);
}

template <typename T>
const char* launch_dtype(const MmaArgs& args, const MmaPlan& plan, Queue queue) {
  if (plan.tile == 0) return launch_tile<MmaTraits<T, 0>>(args, plan, queue);
  if (plan.tile == 1) return launch_tile<MmaTraits<T, 1>>(args, plan, queue);
  return launch_tile<MmaTraits<T, 2>>(args, plan, queue);
}

}  // namespace

DeviceLimits device_limits(int device) {
  int major = 0, minor = 0, multiprocessors = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  return {10 * major + minor, std::max(1, multiprocessors)};
}

const char* launch_conv3x3_mma(const MmaArgs& args, DType dtype, const MmaPlan& plan, Queue queue) {
  switch (dtype) {
    case DType::kFloat32:
      return launch_dtype<float>(args, plan, queue);
    case DType::kFloat16:
      return launch_dtype<__half>(args, plan, queue);
    case DType::kBFloat16:
      return launch_dtype<__nv_bfloat16>(args, plan, queue);
  }
  return "unknown dtype";
}

}  // namespace vgg_fast::cuda
