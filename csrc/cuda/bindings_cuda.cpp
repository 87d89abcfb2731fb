// Registration only. The schemas live here and not in Python because the ops of vgg_fast:: choose between
// several libraries on a GPU, and this one may be absent.
#include <torch/csrc/stable/library.h>

#include "torch_ops.h"

STABLE_TORCH_LIBRARY(vgg_fast_cuda, m) {
  m.def("conv3x3(Tensor x, Tensor weight_ohwi, Tensor affine, bool relu, bool pool, str kernel='cuda') -> Tensor");
  m.def("maxpool2x2(Tensor x) -> Tensor");
  m.def("maxpool2x2_backward(Tensor grad, Tensor x) -> Tensor");
  m.def("conv_stack(Tensor x, Tensor[] weights, Tensor[] affines, int[] program, str kernel='cuda') -> Tensor");
  m.def("conv_stack_taps(Tensor x, Tensor[] weights, Tensor[] affines, int[] program, str kernel='cuda') -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(vgg_fast_cuda, CUDA, m) {
  m.impl("conv3x3", TORCH_BOX(&vgg_fast::cuda::conv3x3));
  m.impl("maxpool2x2", TORCH_BOX(&vgg_fast::cuda::maxpool2x2));
  m.impl("maxpool2x2_backward", TORCH_BOX(&vgg_fast::cuda::maxpool2x2_backward));
  m.impl("conv_stack", TORCH_BOX(&vgg_fast::cuda::conv_stack));
  m.impl("conv_stack_taps", TORCH_BOX(&vgg_fast::cuda::conv_stack_taps));
}
