#include "maxpool2x2.cuh"

namespace vgg_fast::cuda {

const char* launch_maxpool2x2(const Maxpool2x2Args& args, Queue queue) {
  const int64_t items = maxpool2x2_items(args);
  switch (args.dtype) {
    case DType::kFloat32:
      return launch(maxpool2x2_kernel<float>, items, args, queue);
    case DType::kFloat16:
      return launch(maxpool2x2_kernel<__half>, items, args, queue);
    case DType::kBFloat16:
      return launch(maxpool2x2_kernel<__nv_bfloat16>, items, args, queue);
  }
  return "unknown dtype";
}

}  // namespace vgg_fast::cuda
