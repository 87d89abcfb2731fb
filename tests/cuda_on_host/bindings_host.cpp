// csrc/cuda, registered for CPU tensors as vgg_fast_cuda_on_host: the same checks, outputs and kernels as on a GPU.
// Only the device and stream are other.
#include <torch/csrc/stable/library.h>

#include "conv3x3_cuda.h"
#include "cuda_runtime.h"
#include "maxpool2x2_cuda.h"
#include "torch_device.h"
#include "torch_ops.h"

namespace vgg_fast::cuda {

DeviceScope::DeviceScope(const torch::stable::Tensor&) {}

}  // namespace vgg_fast::cuda

STABLE_TORCH_LIBRARY(vgg_fast_cuda_on_host, m) {
  m.def("conv3x3(Tensor x, Tensor weight_ohwi, Tensor affine, bool relu, bool pool) -> Tensor");
  m.def("maxpool2x2(Tensor x) -> Tensor");
  m.def("conv_stack(Tensor x, Tensor[] weights, Tensor[] affines, int[] program) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(vgg_fast_cuda_on_host, CPU, m) {
  m.impl("conv3x3", TORCH_BOX(&vgg_fast::cuda::conv3x3));
  m.impl("maxpool2x2", TORCH_BOX(&vgg_fast::cuda::maxpool2x2));
  m.impl("conv_stack", TORCH_BOX(&vgg_fast::cuda::conv_stack));
}

// For tests that bring their own output, or look at a part of a launch.
extern "C" {

__attribute__((visibility("default"))) void run_blocks(unsigned first, unsigned last) {
  first_block = first;
  last_block = last;
}

__attribute__((visibility("default"))) const char* launch_conv3x3(const vgg_fast::cuda::Conv3x3Args* args) {
  return vgg_fast::cuda::launch_conv3x3(*args, {});
}

__attribute__((visibility("default"))) const char* launch_maxpool2x2(const vgg_fast::cuda::Maxpool2x2Args* args) {
  return vgg_fast::cuda::launch_maxpool2x2(*args, {});
}
}
