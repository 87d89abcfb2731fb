#include "conv3x3.cuh"

namespace vgg_fast::cuda {
namespace {

template <typename T>
const char* launch_typed(const Conv3x3Args& a, Queue queue) {
  constexpr int V = 4;
  const bool by_sectors = is_aligned(a.x) && is_aligned(a.weight) && a.cin * sizeof(T) % 32 == 0;
  return launch(by_sectors ? conv3x3_kernel<T, V> : conv3x3_kernel<T, 1>, conv3x3_items(a), a, queue);
}

}  // namespace

const char* launch_conv3x3(const Conv3x3Args& args, Queue queue) {
  switch (args.dtype) {
    case DType::kFloat32:
      return launch_typed<float>(args, queue);
    case DType::kFloat16:
      return launch_typed<__half>(args, queue);
    case DType::kBFloat16:
      return launch_typed<__nv_bfloat16>(args, queue);
  }
  return "unknown dtype";
}

}  // namespace vgg_fast::cuda
