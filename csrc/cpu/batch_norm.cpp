// The ops around a convolution under gradients: see vgg_fast/ops/batch_norm.py and batch_norm.h.
#include "batch_norm.h"

#include "torch_cpu.h"

namespace vgg_fast {
namespace {

const float* vectors_of(const Tensor& tensor, int64_t count, int64_t c, const char* what) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == count && tensor.size(1) == c && tensor.is_contiguous() &&
                      tensor.scalar_type() == ScalarType::Float && tensor.is_cpu(),
                  what, " must be a contiguous fp32 CPU tensor [", count, ", ", c, "]");
  return static_cast<const float*>(tensor.const_data_ptr());
}

PassArgs pass_args(const Tensor& z, const char* what, bool relu, bool pool) {
  check_map(z, what);
  PassArgs args{};
  args.z = static_cast<const char*>(z.const_data_ptr());
  args.n = z.size(0);
  args.c = z.size(1);
  args.h = z.size(2);
  args.w = z.size(3);
  args.type = dtype_of(z, what);
  STD_TORCH_CHECK(args.type != DType::f16, what, " must be float32 or bfloat16");
  args.relu = relu;
  args.pool = pool;
  return args;
}

PassArgs gradient_args(const Tensor& dy, const Tensor& z, const Tensor& affine, bool relu, bool pool) {
  PassArgs args = pass_args(z, "bn_relu_pool_backward: z", relu, pool);
  check_map(dy, "bn_relu_pool_backward: dy");
  STD_TORCH_CHECK(dy.size(0) == args.n && dy.size(1) == args.c && dy.size(2) == args.out_h() &&
                      dy.size(3) == args.out_w() && dy.scalar_type() == z.scalar_type(),
                  "bn_relu_pool_backward: dy must have the dtype of z and be [", args.n, ", ", args.c, ", ",
                  args.out_h(), ", ", args.out_w(), "]");
  args.dy = static_cast<const char*>(dy.const_data_ptr());
  args.scale = vectors_of(affine, 2, args.c, "bn_relu_pool_backward: affine");
  args.shift = args.scale + args.c;
  return args;
}

void run(PassFn pass, const PassArgs& args) {
  torch::stable::parallel_for(0, args.units(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) pass(args, unit);
  });
}

Tensor doubles(std::initializer_list<int64_t> sizes, const Tensor& like) {
  return torch::stable::empty(std::vector<int64_t>(sizes), ScalarType::Double, std::nullopt, like.device());
}

}  // namespace

void check_map(const Tensor& tensor, const char* what) {
  STD_TORCH_CHECK(tensor.dim() == 4 && tensor.is_cpu(), what, " must be a CPU tensor [N, C, H, W], got ", tensor.dim(),
                  " dimensions");
  int64_t dense = 1;
  for (int d : {1, 3, 2, 0}) {
    STD_TORCH_CHECK(tensor.size(d) <= 1 || tensor.stride(d) == dense, what,
                    " must be dense in channels_last; call .contiguous(memory_format=torch.channels_last)");
    dense *= tensor.size(d);
  }
}

Tensor bn_relu_pool_cpu(const Tensor& z, const Tensor& affine, bool relu, bool pool) {
  PassArgs args = pass_args(z, "bn_relu_pool: z", relu, pool);
  STD_TORCH_CHECK(!pool || (args.h >= 2 && args.w >= 2), "bn_relu_pool: a ", args.h, "x", args.w,
                  " map cannot be pooled 2x2: Output size is too small");
  args.scale = vectors_of(affine, 2, args.c, "bn_relu_pool: affine");
  args.shift = args.scale + args.c;
  Tensor y = empty_image(z, args.n, args.c, args.out_h(), args.out_w(), true);
  args.out = static_cast<char*>(y.mutable_data_ptr());
  run(select_passes(cpu_flags()).value, args);
  return y;
}

Tensor batch_moments_cpu(const Tensor& z) {
  PassArgs args = pass_args(z, "batch_moments: z", false, false);
  STD_TORCH_CHECK(args.n * args.h * args.w > 0, "batch_moments: z has no pixels");
  const Tensor partial = doubles({args.units(), 2, args.c}, z);
  args.sums = static_cast<double*>(partial.mutable_data_ptr());
  run(select_passes(cpu_flags()).moments, args);
  // Chan, Golub and LeVeque's update, unit after unit.
  Tensor result = doubles({2, args.c}, z);
  double *mean = static_cast<double*>(result.mutable_data_ptr()), *squares = mean + args.c;
  std::fill_n(mean, 2 * args.c, 0.0);
  double count = 0;
  for (int64_t unit = 0; unit < args.units(); ++unit) {
    const int64_t begin = unit % args.image_units() * args.unit_rows();
    const double more = double((std::min(begin + args.unit_rows(), args.h) - begin) * args.w), sum = count + more;
    const double *unit_mean = args.sums + unit * 2 * args.c, *unit_squares = unit_mean + args.c;
    for (int64_t c = 0; c < args.c; ++c) {
      const double distance = unit_mean[c] - mean[c];
      mean[c] += distance * (more / sum);
      squares[c] += unit_squares[c] + distance * distance * (count * more / sum);
    }
    count = sum;
  }
  for (int64_t c = 0; c < args.c; ++c) squares[c] /= count;
  return result;
}

Tensor bn_relu_pool_sums_cpu(const Tensor& dy, const Tensor& z, const Tensor& affine, const Tensor& mean, bool relu,
                             bool pool) {
  PassArgs args = gradient_args(dy, z, affine, relu, pool);
  args.mean = vectors_of(mean, 1, args.c, "bn_relu_pool_sums: mean");
  const Tensor partial = doubles({args.units(), 2 * args.c}, z);
  args.sums = static_cast<double*>(partial.mutable_data_ptr());
  run(select_passes(cpu_flags()).gradient_sums, args);
  Tensor result = doubles({2, args.c}, z);
  double* total = static_cast<double*>(result.mutable_data_ptr());
  std::fill_n(total, 2 * args.c, 0.0);
  for (int64_t unit = 0; unit < args.units(); ++unit) {
    for (int64_t i = 0; i < 2 * args.c; ++i) total[i] += args.sums[unit * 2 * args.c + i];
  }
  return result;
}

Tensor bn_relu_pool_backward_cpu(const Tensor& dy, const Tensor& z, const Tensor& affine, const Tensor& factor,
                                 const std::optional<Tensor>& centre, bool relu, bool pool) {
  PassArgs args = gradient_args(dy, z, affine, relu, pool);
  args.factor = vectors_of(factor, 1, args.c, "bn_relu_pool_backward: factor");
  if (centre) {
    args.mean = vectors_of(*centre, 3, args.c, "bn_relu_pool_backward: centre");
    args.slope = args.mean + args.c;
    args.offset = args.slope + args.c;
  }
  Tensor dz = empty_image(z, args.n, args.c, args.h, args.w, true);
  args.out = static_cast<char*>(dz.mutable_data_ptr());
  run(select_passes(cpu_flags()).gradient, args);
  return dz;
}

Tensor gradient_through_gate(const Tensor& dy, const Gate& gate, const float* factors) {
  check_map(dy, "conv_stack_backward: dy");
  Tensor dz = empty_image(dy, dy.size(0), dy.size(1), gate.h, gate.w, true);
  PassArgs args = pass_args(dz, "conv_stack_backward: dy", false, gate.pooled);
  args.dy = static_cast<const char*>(dy.const_data_ptr());
  args.out = static_cast<char*>(dz.mutable_data_ptr());
  args.factor = factors;
  args.mask = gate.mask;
  run(select_passes(cpu_flags()).gated, args);
  return dz;
}

std::string cpu_passes() { return select_passes(cpu_flags()).name; }

}  // namespace vgg_fast
