#include "maxpool2x2.cuh"

namespace vgg_fast::cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
const char* forward(const Maxpool2x2Args& a, Queue queue) {
  constexpr int V = kPacketBytes / sizeof(T);
  const bool aligned = is_aligned(a.x) && is_aligned(a.out);
  const int64_t windows = a.n * (a.h / 2) * (a.w / 2);
  if (aligned && a.c % V == 0) return launch(maxpool2x2_kernel<T, V>, windows * (a.c / V), a, queue);
  if (aligned && a.c == 1 && a.w % V == 0)
    return launch(maxpool2x2_columns_kernel<T, V>, a.n * (a.h / 2) * (a.w / V), a, queue);
  return launch(maxpool2x2_kernel<T, 1>, windows * a.c, a, queue);
}

template <typename T>
const char* backward(const Maxpool2x2BackwardArgs& a, Queue queue) {
  constexpr int V = kPacketBytes / sizeof(T);
  const bool aligned = is_aligned(a.x) && is_aligned(a.grad_out) && is_aligned(a.grad_x);
  const int64_t rows = a.n * ceil_div(a.h, 2), windows = rows * ceil_div(a.w, 2);
  if (aligned && a.c % V == 0) return launch(maxpool2x2_backward_kernel<T, V>, windows * (a.c / V), a, queue);
  if (aligned && a.c == 1 && a.w % V == 0)
    return launch(maxpool2x2_backward_columns_kernel<T, V>, rows * (a.w / V), a, queue);
  return launch(maxpool2x2_backward_kernel<T, 1>, windows * a.c, a, queue);
}

}  // namespace

const char* launch_maxpool2x2(const Maxpool2x2Args& args, Queue queue) {
  switch (args.dtype) {
    case DType::kFloat32:
      return forward<float>(args, queue);
    case DType::kFloat16:
      return forward<__half>(args, queue);
    case DType::kBFloat16:
      return forward<__nv_bfloat16>(args, queue);
  }
  return "unknown dtype";
}

const char* launch_maxpool2x2_backward(const Maxpool2x2BackwardArgs& args, Queue queue) {
  switch (args.dtype) {
    case DType::kFloat32:
      return backward<float>(args, queue);
    case DType::kFloat16:
      return backward<__half>(args, queue);
    case DType::kBFloat16:
      return backward<__nv_bfloat16>(args, queue);
  }
  return "unknown dtype";
}

}  // namespace vgg_fast::cuda
