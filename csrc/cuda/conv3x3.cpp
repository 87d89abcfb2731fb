// conv3x3 and conv_stack on tensors: checks, output, launch.
#include <torch/csrc/stable/ops.h>

#include "conv3x3_cuda.h"
#include "torch_device.h"
#include "torch_ops.h"

namespace vgg_fast::cuda {
namespace {

constexpr int64_t kRelu = 1, kPool = 2;

void check_conv3x3(const Tensor& x, const Tensor& weight, const Tensor& affine, bool pool) {
  const char* op = "conv3x3 (cuda): ";
  STD_TORCH_CHECK(x.dim() == 4, op, "x has sizes ", describe_sizes(x), "; expected [N, Cin, H, W]");
  const int64_t cin = x.size(1), h = x.size(2), w = x.size(3);
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == 3 && weight.size(2) == 3 && weight.size(3) == cin &&
                      weight.is_contiguous(),
                  op, "weight has sizes ", describe_sizes(weight), "; expected contiguous [Cout, 3, 3, ", cin,
                  "] as pack() lays it out");
  const int64_t cout = weight.size(0);
  STD_TORCH_CHECK(affine.dim() == 2 && affine.size(0) == 2 && affine.size(1) == cout && affine.is_contiguous() &&
                      affine.scalar_type() == torch::headeronly::ScalarType::Float,
                  op, "affine is ", torch::headeronly::toString(affine.scalar_type()), " of sizes ",
                  describe_sizes(affine), "; expected contiguous Float [2, ", cout, "] as pack() makes it");
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), op, "weight is ",
                  torch::headeronly::toString(weight.scalar_type()), " and x is ",
                  torch::headeronly::toString(x.scalar_type()), "; they must be the same");
  STD_TORCH_CHECK(weight.device() == x.device() && affine.device() == x.device(), op,
                  "x, weight and affine must be on one device");
  STD_TORCH_CHECK(cin > 0 && cout > 0, op, cin, " input and ", cout, " output channels; both must be at least 1");
  const int64_t smallest = pool ? 2 : 1;
  STD_TORCH_CHECK(h >= smallest && w >= smallest, op, "a ", h, "x", w, " map is smaller than ", smallest, "x",
                  smallest);
}

Tensor queue_conv3x3(const Tensor& any_x, const Tensor& weight, const Tensor& affine, bool relu, bool pool,
                     Queue queue) {
  check_conv3x3(any_x, weight, affine, pool);
  const Tensor x = torch::stable::contiguous(any_x, torch::headeronly::MemoryFormat::ChannelsLast);
  const int64_t n = x.size(0), h = x.size(2), w = x.size(3), cout = weight.size(0);
  Tensor out = torch::stable::empty({n, cout, pool ? h / 2 : h, pool ? w / 2 : w}, x.scalar_type(), std::nullopt,
                                    x.device(), std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
  Conv3x3Args args{};
  args.x = x.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.affine = static_cast<const float*>(affine.const_data_ptr());
  args.out = out.mutable_data_ptr();
  args.n = n;
  args.h = h;
  args.w = w;
  args.cin = x.size(1);
  args.cout = cout;
  args.dtype = kernel_dtype("conv3x3", x);
  args.relu = relu;
  args.pool = pool;
  check_launch("conv3x3", launch_conv3x3(args, queue));
  return out;
}

}  // namespace

Tensor conv3x3(const Tensor& x, const Tensor& weight, const Tensor& affine, bool relu, bool pool) {
  const DeviceScope scope(x);
  return queue_conv3x3(x, weight, affine, relu, pool, scope.queue());
}

Tensor conv_stack(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& affines,
                  const std::vector<int64_t>& program) {
  STD_TORCH_CHECK(weights.size() == program.size() && affines.size() == program.size(),
                  "conv_stack (cuda): ", weights.size(), " weights, ", affines.size(), " affines and ", program.size(),
                  " program entries; there must be as many of each");
  STD_TORCH_CHECK(!program.empty(), "conv_stack (cuda): the program is empty; an op must not return its input");
  const DeviceScope scope(x);
  Tensor y = x;
  for (size_t i = 0; i < program.size(); ++i)
    y = queue_conv3x3(y, weights[i], affines[i], program[i] & kRelu, program[i] & kPool, scope.queue());
  return y;
}

}  // namespace vgg_fast::cuda
