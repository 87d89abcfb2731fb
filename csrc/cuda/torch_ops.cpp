#include "torch_ops.h"

#include <torch/csrc/stable/tensor_inl.h>

namespace vgg_fast::cuda {

bool is_channels_last(const Tensor& t) {
  int64_t dense = 1;
  for (int64_t dim : {1, 3, 2, 0}) {
    if (t.size(dim) != 1 && t.stride(dim) != dense) return false;
    dense *= t.size(dim);
  }
  return true;
}

std::string describe_sizes(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

DType kernel_dtype(const char* op, const Tensor& x) {
  switch (x.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return DType::kFloat32;
    case torch::headeronly::ScalarType::Half:
      return DType::kFloat16;
    case torch::headeronly::ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, op, " (cuda): x is ", torch::headeronly::toString(x.scalar_type()),
                      ", not Float, Half or BFloat16; convert it");
  }
}

void check_launch(const char* op, const char* message) {
  STD_TORCH_CHECK(!message, op, " (cuda): launch failed: ", message);
}

}  // namespace vgg_fast::cuda
