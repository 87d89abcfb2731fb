// Registration only: the CPU implementations of the ops that vgg_fast/ops declares, through PyTorch's stable ABI.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "cpu/torch_cpu.h"

namespace vgg_fast {
namespace {

DType dtype_named(const std::string& name) {
  if (name == "float32") return DType::f32;
  if (name == "bfloat16") return DType::bf16;
  if (name == "float16") return DType::f16;
  STD_TORCH_CHECK(false, "dtype must be float32, bfloat16 or float16, not ", name);
}

Precision precision_named(const std::string& name) {
  if (name == "highest") return Precision::highest;
  if (name == "high") return Precision::high;
  if (name == "medium") return Precision::medium;
  STD_TORCH_CHECK(false, "precision must be highest, high or medium, not ", name);
}

std::string cpu_select(const std::string& dtype, const std::string& precision, const std::string& kernel,
                       const std::string& flags) {
  return find_microkernel(kernel, dtype_named(dtype), precision_named(precision), flags).name;
}

template <class Kernel>
std::string names_of(const Kernel* begin, const Kernel* end) {
  std::string names;
  for (const Kernel* k = begin; k != end; ++k) names += std::string(names.empty() ? "" : " ") + k->name;
  return names;
}

std::string cpu_kernels() { return names_of(microkernels_begin(), microkernels_end()); }

std::string cpu_linear_select(const std::string& dtype, const std::string& precision, const std::string& kernel,
                              const std::string& flags) {
  return find_linear_kernel(kernel, dtype_named(dtype), precision_named(precision), flags).name;
}

std::string cpu_linear_kernels() { return names_of(linear_kernels_begin(), linear_kernels_end()); }

std::string cpu_flags_op() { return cpu_flags(); }

int64_t cpu_packed_words(int64_t cout, int64_t cin, const std::string& kernel) {
  for (const MicroKernel* k = microkernels_begin(); k != microkernels_end(); ++k) {
    if (kernel == k->name) return k->weight_words(cout, cin);
  }
  STD_TORCH_CHECK(false, "there is no CPU kernel '", kernel, "'; the kernels are ", cpu_kernels());
}

}  // namespace
}  // namespace vgg_fast

STABLE_TORCH_LIBRARY_IMPL(vgg_fast, CPU, m) {
  m.impl("conv3x3", TORCH_BOX(&vgg_fast::conv3x3_cpu));
  m.impl("maxpool2x2", TORCH_BOX(&vgg_fast::maxpool2x2_cpu));
  m.impl("pack", TORCH_BOX(&vgg_fast::pack_cpu));
  m.impl("conv_stack", TORCH_BOX(&vgg_fast::conv_stack_cpu));
  m.impl("pack_transposed", TORCH_BOX(&vgg_fast::pack_transposed_cpu));
  m.impl("conv3x3_weight_grad", TORCH_BOX(&vgg_fast::conv3x3_weight_grad_cpu));
  m.impl("bn_relu_pool", TORCH_BOX(&vgg_fast::bn_relu_pool_cpu));
  m.impl("batch_moments", TORCH_BOX(&vgg_fast::batch_moments_cpu));
  m.impl("bn_relu_pool_sums", TORCH_BOX(&vgg_fast::bn_relu_pool_sums_cpu));
  m.impl("bn_relu_pool_backward", TORCH_BOX(&vgg_fast::bn_relu_pool_backward_cpu));
  m.impl("batch_norm_forward", TORCH_BOX(&vgg_fast::batch_norm_forward_cpu));
  m.impl("batch_norm_backward", TORCH_BOX(&vgg_fast::batch_norm_backward_cpu));
  m.impl("conv3x3_input_grad", TORCH_BOX(&vgg_fast::conv3x3_input_grad_cpu));
  m.impl("linear", TORCH_BOX(&vgg_fast::linear_cpu));
  m.impl("linear_pack", TORCH_BOX(&vgg_fast::linear_pack_cpu));
  m.impl("conv_stack_taps", TORCH_BOX(&vgg_fast::conv_stack_taps_cpu));
  m.impl("conv_stack_masks", TORCH_BOX(&vgg_fast::conv_stack_masks_cpu));
  m.impl("conv_stack_backward", TORCH_BOX(&vgg_fast::conv_stack_backward_cpu));
  m.impl("fingerprint", TORCH_BOX(&vgg_fast::fingerprint_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(vgg_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_select", TORCH_BOX(&vgg_fast::cpu_select));
  m.impl("cpu_kernels", TORCH_BOX(&vgg_fast::cpu_kernels));
  m.impl("cpu_linear_select", TORCH_BOX(&vgg_fast::cpu_linear_select));
  m.impl("cpu_linear_kernels", TORCH_BOX(&vgg_fast::cpu_linear_kernels));
  m.impl("cpu_packed_words", TORCH_BOX(&vgg_fast::cpu_packed_words));
  m.impl("cpu_passes", TORCH_BOX(&vgg_fast::cpu_passes));
  m.impl("cpu_weight_grad", TORCH_BOX(&vgg_fast::cpu_weight_grad));
  m.impl("cpu_flags", TORCH_BOX(&vgg_fast::cpu_flags_op));
}
