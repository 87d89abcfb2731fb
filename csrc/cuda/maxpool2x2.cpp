// maxpool2x2 on tensors: checks, output, launch.
#include <torch/csrc/stable/ops.h>

#include "maxpool2x2_cuda.h"
#include "torch_device.h"
#include "torch_ops.h"

namespace vgg_fast::cuda {

Tensor maxpool2x2(const Tensor& any_x) {
  STD_TORCH_CHECK(any_x.dim() == 4, "maxpool2x2 (cuda): x has sizes ", describe_sizes(any_x),
                  "; expected [N, C, H, W]");
  const int64_t n = any_x.size(0), c = any_x.size(1), h = any_x.size(2), w = any_x.size(3);
  STD_TORCH_CHECK(h >= 2 && w >= 2, "maxpool2x2 (cuda): a ", h, "x", w, " map is smaller than 2x2");
  const bool planar = any_x.is_contiguous() || !is_channels_last(any_x);
  const auto format =
      planar ? torch::headeronly::MemoryFormat::Contiguous : torch::headeronly::MemoryFormat::ChannelsLast;
  const DeviceScope scope(any_x);
  const Tensor x = torch::stable::contiguous(any_x, format);
  Tensor out =
      torch::stable::empty({n, c, h / 2, w / 2}, x.scalar_type(), std::nullopt, x.device(), std::nullopt, format);
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

}  // namespace vgg_fast::cuda
