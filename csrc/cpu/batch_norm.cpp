// The ops around a convolution under gradients: see vgg_fast/ops/batch_norm.py and batch_norm.h.
#include "batch_norm.h"

#include <cmath>

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

// affine: scale, shift, [2][c].
PassArgs gradient_args(const Tensor& dy, const Tensor& z, const float* affine, bool relu, bool pool) {
  PassArgs args = pass_args(z, "bn_relu_pool_backward: z", relu, pool);
  check_map(dy, "bn_relu_pool_backward: dy");
  STD_TORCH_CHECK(dy.size(0) == args.n && dy.size(1) == args.c && dy.size(2) == args.out_h() &&
                      dy.size(3) == args.out_w() && dy.scalar_type() == z.scalar_type(),
                  "bn_relu_pool_backward: dy must have the dtype of z and be [", args.n, ", ", args.c, ", ",
                  args.out_h(), ", ", args.out_w(), "]");
  args.dy = static_cast<const char*>(dy.const_data_ptr());
  args.scale = affine;
  args.shift = affine + args.c;
  return args;
}

const float* affine_of(const Tensor& affine, const Tensor& z) {
  return vectors_of(affine, 2, z.dim() == 4 ? z.size(1) : 0, "bn_relu_pool_backward: affine");
}

void run(PassFn pass, const PassArgs& args) {
  torch::stable::parallel_for(0, args.units(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) pass(args, unit);
  });
}

Tensor doubles(std::initializer_list<int64_t> sizes, const Tensor& like) {
  return torch::stable::empty(std::vector<int64_t>(sizes), ScalarType::Double, std::nullopt, like.device());
}

Tensor value_of(const Tensor& z, PassArgs args) {
  STD_TORCH_CHECK(!args.pool || (args.h >= 2 && args.w >= 2), "bn_relu_pool: a ", args.h, "x", args.w,
                  " map cannot be pooled 2x2: Output size is too small");
  Tensor y = empty_image(z, args.n, args.c, args.out_h(), args.out_w(), true);
  args.out = static_cast<char*>(y.mutable_data_ptr());
  run(select_passes(cpu_flags()).value, args);
  return y;
}

Tensor sums_of(const Tensor& z, PassArgs args) {
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

Tensor gradient_of(const Tensor& z, PassArgs args) {
  Tensor dz = empty_image(z, args.n, args.c, args.h, args.w, true);
  args.out = static_cast<char*>(dz.mutable_data_ptr());
  run(select_passes(cpu_flags()).gradient, args);
  return dz;
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
  args.scale = vectors_of(affine, 2, args.c, "bn_relu_pool: affine");
  args.shift = args.scale + args.c;
  return value_of(z, args);
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
  PassArgs args = gradient_args(dy, z, affine_of(affine, z), relu, pool);
  args.mean = vectors_of(mean, 1, args.c, "bn_relu_pool_sums: mean");
  return sums_of(z, args);
}

Tensor bn_relu_pool_backward_cpu(const Tensor& dy, const Tensor& z, const Tensor& affine, const Tensor& factor,
                                 const std::optional<Tensor>& centre, bool relu, bool pool) {
  PassArgs args = gradient_args(dy, z, affine_of(affine, z), relu, pool);
  args.factor = vectors_of(factor, 1, args.c, "bn_relu_pool_backward: factor");
  if (centre) {
    args.mean = vectors_of(*centre, 3, args.c, "bn_relu_pool_backward: centre");
    args.slope = args.mean + args.c;
    args.offset = args.slope + args.c;
  }
  return gradient_of(z, args);
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

// state: float64 [4, C], mean, 1 / sqrt(variance + eps), scale, shift.
std::tuple<Tensor, Tensor> batch_norm_forward_cpu(const Tensor& z, const std::optional<Tensor>& weight,
                                                  const std::optional<Tensor>& bias, const std::optional<Tensor>& mean,
                                                  const std::optional<Tensor>& variance, double eps, bool relu,
                                                  bool pool) {
  PassArgs args = pass_args(z, "batch_norm_forward: z", relu, pool);
  const int64_t c = args.c;
  const std::vector<double> gamma = read_vector(weight, c, 1, "batch_norm_forward: weight");
  const std::vector<double> beta = read_vector(bias, c, 0, "batch_norm_forward: bias");
  STD_TORCH_CHECK(mean.has_value() == variance.has_value(),
                  "batch_norm_forward: mean and variance go together: give both, or neither (the batch's)");
  const Tensor state = doubles({4, c}, z);
  double *centre = static_cast<double*>(state.mutable_data_ptr()), *spread = centre + c, *invstd = centre + c;
  if (mean) {
    std::copy_n(read_vector(mean, c, 0, "batch_norm_forward: mean").begin(), c, centre);
    std::copy_n(read_vector(variance, c, 0, "batch_norm_forward: variance").begin(), c, spread);
  } else {
    const Tensor moments = batch_moments_cpu(z);
    std::copy_n(static_cast<const double*>(moments.const_data_ptr()), 2 * c, centre);
  }
  double *scale = centre + 2 * c, *shift = centre + 3 * c;
  std::vector<float> affine(2 * c);
  for (int64_t i = 0; i < c; ++i) {
    invstd[i] = 1.0 / std::sqrt(spread[i] + eps);
    scale[i] = invstd[i] * gamma[i];
    shift[i] = beta[i] - centre[i] * scale[i];
    affine[i] = float(scale[i]);
    affine[c + i] = float(shift[i]);
  }
  args.scale = affine.data();
  args.shift = affine.data() + c;
  return {value_of(z, args), state};
}

// sums: float64 [2, C], the gradients of the weight and of the bias.
std::tuple<Tensor, Tensor> batch_norm_backward_cpu(const Tensor& dy, const Tensor& z, const Tensor& state, bool batch,
                                                   bool relu, bool pool) {
  STD_TORCH_CHECK(state.dim() == 2 && state.size(0) == 4 && state.size(1) == z.size(1) && state.is_contiguous() &&
                      state.scalar_type() == ScalarType::Double,
                  "batch_norm_backward: state is not what batch_norm_forward returned for this z");
  const int64_t c = z.size(1);
  const double* mean = static_cast<const double*>(state.const_data_ptr());
  const double *invstd = mean + c, *scale = mean + 2 * c;
  // scale, shift; mean, slope, offset
  std::vector<float> vectors(5 * c);
  for (int64_t i = 0; i < c; ++i) {
    vectors[i] = float(scale[i]);
    vectors[c + i] = float(scale[c + i]);
    vectors[2 * c + i] = float(mean[i]);
  }
  PassArgs args = gradient_args(dy, z, vectors.data(), relu, pool);
  args.mean = vectors.data() + 2 * c;
  const Tensor sums = sums_of(z, args);
  double* total = static_cast<double*>(sums.mutable_data_ptr());
  const double count = double(args.n * args.h * args.w);
  for (int64_t i = 0; i < c; ++i) {
    vectors[3 * c + i] = float(-scale[i] * invstd[i] * invstd[i] * total[c + i] / count);
    vectors[4 * c + i] = float(-scale[i] * total[i] / count);
    const double bias = total[i];
    total[i] = total[c + i] * invstd[i];
    total[c + i] = bias;
  }
  args.factor = args.scale;
  args.mean = batch ? vectors.data() + 2 * c : nullptr;
  args.slope = vectors.data() + 3 * c;
  args.offset = vectors.data() + 4 * c;
  return {gradient_of(z, args), sums};
}

std::string cpu_passes() { return select_passes(cpu_flags()).name; }

}  // namespace vgg_fast
