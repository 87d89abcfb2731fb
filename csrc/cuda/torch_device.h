// The CUDA device and stream that PyTorch is using, through its stable ABI.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "launch_cuda.h"

namespace vgg_fast::cuda {

// Makes the device of x current while it lives, and knows PyTorch's current stream there.
class DeviceScope {
 public:
  explicit DeviceScope(const torch::stable::Tensor& x);
  Queue queue() const { return queue_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  Queue queue_{};
};

}  // namespace vgg_fast::cuda
