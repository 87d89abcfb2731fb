// maxpool2x2 and its backward on tensors: checks, output, launch.
#include <torch/csrc/stable/ops.h>

#include "maxpool2x2_cuda.h"
#include "torch_device.h"
#include "torch_ops.h"

namespace vgg_fast::cuda {
namespace {

void check_map(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, "maxpool2x2 (cuda): x has sizes ", describe_sizes(x), "; expected [N, C, H, W]");
  STD_TORCH_CHECK(x.size(2) >= 2 && x.size(3) >= 2, "maxpool2x2 (cuda): a ", x.size(2), "x", x.size(3),
                  " map is smaller than 2x2");
}

bool is_planar(const Tensor& x) { return x.is_contiguous() || !is_channels_last(x); }

torch::headeronly::MemoryFormat format_of(bool planar) {
  return planar ? torch::headeronly::MemoryFormat::Contiguous : torch::headeronly::MemoryFormat::ChannelsLast;
}

}  // namespace

Tensor maxpool2x2(const Tensor& any_x) {
  check_map(any_x);
  const int64_t n = any_x.size(0), c = any_x.size(1), h = any_x.size(2), w = any_x.size(3);
  const bool planar = is_planar(any_x);
  const DeviceScope scope(any_x);
  const Tensor x = torch::stable::contiguous(any_x, format_of(planar));
  Tensor out = torch::stable::empty({n, c, h / 2, w / 2}, x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                                    format_of(planar));
  Maxpool2x2Args args{};
  args.x = x.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.n = planar ? n * c : n;
  args.h = h;
  args.w = w;
  args.c = planar ? 1 : c;
  args.dtype = kernel_dtype("maxpool2x2", x);
  check_launch("maxpool2x2", launch_maxpool2x2(args, scope.queue()));
  return out;
}

Tensor maxpool2x2_backward(const Tensor& any_grad, const Tensor& any_x) {
  check_map(any_x);
  const int64_t n = any_x.size(0), c = any_x.size(1), h = any_x.size(2), w = any_x.size(3);
  STD_TORCH_CHECK(any_grad.dim() == 4 && any_grad.size(0) == n && any_grad.size(1) == c && any_grad.size(2) == h / 2 &&
                      any_grad.size(3) == w / 2,
                  "maxpool2x2_backward (cuda): grad has sizes ", describe_sizes(any_grad), "; expected [", n, ", ", c,
                  ", ", h / 2, ", ", w / 2, "]");
  STD_TORCH_CHECK(any_grad.scalar_type() == any_x.scalar_type() && any_grad.device() == any_x.device(),
                  "maxpool2x2_backward (cuda): grad is ", torch::headeronly::toString(any_grad.scalar_type()),
                  " and x is ", torch::headeronly::toString(any_x.scalar_type()),
                  "; they must be the same, and on one device");
  const bool planar = is_planar(any_x);
  const DeviceScope scope(any_x);
  const Tensor x = torch::stable::contiguous(any_x, format_of(planar));
  const Tensor grad = torch::stable::contiguous(any_grad, format_of(planar));
  Tensor grad_x =
      torch::stable::empty({n, c, h, w}, x.scalar_type(), std::nullopt, x.device(), std::nullopt, format_of(planar));
  Maxpool2x2BackwardArgs args{};
  args.grad_out = grad.const_data_ptr();
  args.x = x.const_data_ptr();
  args.grad_x = grad_x.mutable_data_ptr();
  args.n = planar ? n * c : n;
  args.h = h;
  args.w = w;
  args.c = planar ? 1 : c;
  args.dtype = kernel_dtype("maxpool2x2_backward", x);
  check_launch("maxpool2x2_backward", launch_maxpool2x2_backward(args, scope.queue()));
  return grad_x;
}

}  // namespace vgg_fast::cuda
