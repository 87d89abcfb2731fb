#include "conv3x3.cuh"

namespace vgg_fast::cuda {

const char* launch_conv3x3(const Conv3x3Args& args, Queue queue) {
  const int64_t items = conv3x3_items(args);
  switch (args.dtype) {
    case DType::kFloat32:
      return launch(conv3x3_kernel<float>, items, args, queue);
    case DType::kFloat16:
      return launch(conv3x3_kernel<__half>, items, args, queue);
    case DType::kBFloat16:
      return launch(conv3x3_kernel<__nv_bfloat16>, items, args, queue);
  }
  return "unknown dtype";
}

}  // namespace vgg_fast::cuda
