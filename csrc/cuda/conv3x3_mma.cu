#include "conv3x3_mma.cuh"
#include "launch.cuh"

namespace vgg_fast::cuda {
namespace {

template <class K>
const char* launch_tile(const MmaArgs& args, const MmaPlan& plan, Queue queue) {
  const int64_t blocks = static_cast<int64_t>(plan.rows) * plan.columns * plan.split;
  return launch_blocks(conv3x3_mma_kernel<K>, blocks, K::kThreads, plan.shared_bytes, args, queue);
}

template <typename T>
const char* launch_dtype(const MmaArgs& args, const MmaPlan& plan, Queue queue) {
  if (plan.tile == 0) return launch_tile<MmaTraits<T, 0>>(args, plan, queue);
  return launch_tile<MmaTraits<T, 1>>(args, plan, queue);
}

}  // namespace

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
