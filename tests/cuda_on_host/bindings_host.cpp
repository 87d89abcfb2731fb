// csrc/cuda, registered for CPU tensors as vgg_fast_cuda_on_host: the same checks, outputs and kernels as on a GPU.
// Only the device and stream are other.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <utility>
#include <vector>

#include "block1_cuda.h"
#include "conv3x3_cuda.h"
#include "conv3x3_mma_cuda.h"
#include "conv3x3_sm90_cuda.h"
#include "cuda_runtime.h"
#include "maxpool2x2_cuda.h"
#include "torch_device.h"
#include "torch_ops.h"

namespace vgg_fast::cuda {

DeviceScope::DeviceScope(const torch::stable::Tensor&) {}

static DeviceLimits limits{};  // none: the plain kernels
static int tensor_core_launches = 0, hopper_launches = 0, first_blocks = 0;

DeviceLimits device_limits(int) { return limits; }

// The contract of the tensor-core kernel, kept by the plain ones: what is tested so is how the chain is wired. (The
// kernel itself runs on the virtual GPU: tests/virtual_gpu/test_cuda_mma.py.) Its scratch memory is spoiled.
const char* launch_conv3x3_mma(const MmaArgs& a, DType dtype, const MmaPlan& plan, Queue queue) {
  ++tensor_core_launches;
  if ((plan.split > 1) != (plan.partial_bytes > 0)) return "partial sums without a split, or a split without";
  for (int64_t i = 0; i < plan.counter_bytes / 4; ++i)
    if (a.arrived[i]) return "a counter is not zero";
  if (plan.partial_bytes) std::memset(a.partial, 0xff, plan.partial_bytes);
  Conv3x3Args plain{a.x, a.weight, a.affine, a.out, a.n, a.h, a.w, a.cin, a.cout, dtype, a.relu, false};
  if (a.out) launch_conv3x3(plain, queue);
  plain.out = a.pooled;
  plain.pool = true;
  return a.pooled ? launch_conv3x3(plain, queue) : nullptr;
}

// The same for Hopper's.
const char* launch_conv3x3_sm90(const Sm90Args& a, const Sm90Problem& p, int multiprocessors, Queue queue) {
  const Sm90Plan cut = plan_sm90(p, multiprocessors);
  MmaPlan plan{};
  plan.split = cut.split;
  plan.partial_bytes = cut.partial_bytes;
  plan.counter_bytes = cut.counter_bytes;
  MmaArgs args = mma_args({p.n, p.h, p.w, p.cin, p.cout, p.dtype}, plan);
  args.x = a.x;
  args.weight = a.weight;
  args.affine = a.affine;
  args.out = a.out;
  args.pooled = a.pooled;
  args.partial = a.partial;
  args.arrived = a.arrived;
  args.relu = a.relu;
  ++hopper_launches;
  return launch_conv3x3_mma(args, p.dtype, plan, queue);
}

// The same for the first block.
const char* launch_block1(const Block1Args& a, DType dtype, const MmaPlan& plan, Queue queue) {
  ++first_blocks;
  const MmaArgs& b = a.second;
  std::vector<uint16_t> middle(static_cast<size_t>(b.n) * b.h * b.w * kBlock1Channels);
  const Conv3x3Args first{a.x, a.weight, a.affine,        middle.data(), b.n,    b.h,
                          b.w, a.cin,    kBlock1Channels, dtype,         a.relu, false};
  if (const char* message = launch_conv3x3(first, queue)) return message;
  MmaArgs second = b;
  second.x = middle.data();
  return launch_conv3x3_mma(second, dtype, plan, queue);
}

}  // namespace vgg_fast::cuda

STABLE_TORCH_LIBRARY(vgg_fast_cuda_on_host, m) {
  m.def("conv3x3(Tensor x, Tensor weight_ohwi, Tensor affine, bool relu, bool pool, str kernel='cuda') -> Tensor");
  m.def("maxpool2x2(Tensor x) -> Tensor");
  m.def("maxpool2x2_backward(Tensor grad, Tensor x) -> Tensor");
  m.def("conv_stack(Tensor x, Tensor[] weights, Tensor[] affines, int[] program, str kernel='cuda') -> Tensor");
  m.def("conv_stack_taps(Tensor x, Tensor[] weights, Tensor[] affines, int[] program, str kernel='cuda') -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(vgg_fast_cuda_on_host, CPU, m) {
  m.impl("conv3x3", TORCH_BOX(&vgg_fast::cuda::conv3x3));
  m.impl("maxpool2x2", TORCH_BOX(&vgg_fast::cuda::maxpool2x2));
  m.impl("maxpool2x2_backward", TORCH_BOX(&vgg_fast::cuda::maxpool2x2_backward));
  m.impl("conv_stack", TORCH_BOX(&vgg_fast::cuda::conv_stack));
  m.impl("conv_stack_taps", TORCH_BOX(&vgg_fast::cuda::conv_stack_taps));
}

// For tests that bring their own output, or look at a part of a launch.
extern "C" {

__attribute__((visibility("default"))) int pretend_device(int sm, int multiprocessors) {
  vgg_fast::cuda::limits = {sm, multiprocessors};
  return std::exchange(vgg_fast::cuda::tensor_core_launches, 0);
}

__attribute__((visibility("default"))) int hopper_launches() {
  return std::exchange(vgg_fast::cuda::hopper_launches, 0);
}

__attribute__((visibility("default"))) int block1_launches() { return std::exchange(vgg_fast::cuda::first_blocks, 0); }

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
