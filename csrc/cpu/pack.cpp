// Batch-norm as an affine epilogue (see vgg_fast/fold.py), and weights in the layout of a micro-kernel.
#include <cmath>

#include "convert.h"
#include "denormals.h"
#include "kept_memory.h"
#include "torch_cpu.h"

namespace vgg_fast {
namespace {

void check_weight(const Tensor& weight, const char* what) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3, what,
                  ": weight must be [Cout, Cin, 3, 3], got ", weight.dim(), " dimensions or another kernel size");
  STD_TORCH_CHECK(weight.size(0) > 0 && weight.size(1) > 0, what, ": weight has no channels: [", weight.size(0), ", ",
                  weight.size(1), ", 3, 3]");
}

void pack_words(const Weight& plain, const MicroKernel& kernel, uint32_t* words) {
  const Passes& passes = select_passes(cpu_flags());
  torch::stable::parallel_for(0, weight_units(plain, kernel), 1, [&](int64_t begin, int64_t end) {
    const FlushDenormals mode;
    for (int64_t unit = begin; unit < end; ++unit) pack_weight_unit(plain, kernel, passes, words, unit);
  });
}

Tensor packed_weight(const Weight& plain, const MicroKernel& kernel, const Tensor& like) {
  const int64_t size = kernel.weight_words(plain.cout, plain.cin);
  const Tensor packed = torch::stable::empty({size}, ScalarType::Int, std::nullopt, like.device());
  pack_words(plain, kernel, static_cast<uint32_t*>(packed.mutable_data_ptr()));
  return packed;
}

// Cin and Cout change places, and the taps go backwards, from the last one. sign: ones, [Cin].
Weight turned(const Tensor& weight, const char* what, const float* sign) {
  check_weight(weight, what);
  const DType dtype = dtype_of(weight, what);
  const int64_t last = 2 * (weight.stride(2) + weight.stride(3));
  return {static_cast<const char*>(weight.const_data_ptr()) + last * element_size(dtype),
          dtype,
          weight.size(1),
          weight.size(0),
          {weight.stride(1), weight.stride(0), -weight.stride(2), -weight.stride(3)},
          sign};
}

}  // namespace

std::tuple<Tensor, Tensor> pack_cpu(const Tensor& weight, const std::optional<Tensor>& bias,
                                    const std::optional<Tensor>& bn_mean, const std::optional<Tensor>& bn_var,
                                    const std::optional<Tensor>& bn_weight, const std::optional<Tensor>& bn_bias,
                                    double bn_eps, const std::string& kernel_name) {
  check_weight(weight, "pack");
  const int64_t cout = weight.size(0);
  STD_TORCH_CHECK(bn_mean.has_value() == bn_var.has_value(),
                  "pack: bn_mean and bn_var go together: give both, or neither");
  const DType dtype = dtype_of(weight, "pack: weight");
  const MicroKernel& kernel = find_microkernel(kernel_name, dtype, Precision::highest, cpu_flags());

  const std::vector<double> mean = read_vector(bn_mean, cout, 0, "pack: bn_mean");
  const std::vector<double> var = read_vector(bn_var, cout, 1, "pack: bn_var");
  const std::vector<double> gamma = read_vector(bn_weight, cout, 1, "pack: bn_weight");
  const std::vector<double> beta = read_vector(bn_bias, cout, 0, "pack: bn_bias");
  const std::vector<double> offset = read_vector(bias, cout, 0, "pack: bias");
  const Tensor affine = torch::stable::empty({2, cout}, ScalarType::Float, std::nullopt, weight.device());
  float* vectors = static_cast<float*>(affine.mutable_data_ptr());
  std::vector<float> sign(cout);
  for (int64_t c = 0; c < cout; ++c) {
    const double scale = bn_mean ? gamma[c] / std::sqrt(var[c] + bn_eps) : 1.0;
    sign[c] = scale < 0 ? -1.0f : scale == 0 ? 0.0f : 1.0f;
    vectors[c] = scale == 0 ? 1.0f : static_cast<float>(std::abs(scale));
    vectors[cout + c] = static_cast<float>(beta[c] + (offset[c] - mean[c]) * scale);
  }

  Weight plain{static_cast<const char*>(weight.const_data_ptr()), dtype, cout, weight.size(1), {}, sign.data()};
  for (int d = 0; d < 4; ++d) plain.stride[d] = weight.stride(d);
  return {packed_weight(plain, kernel, weight), affine};
}

Tensor pack_transposed_cpu(const Tensor& weight, const std::string& kernel_name) {
  const std::vector<float> sign(weight.size(1), 1.0f);
  const Weight plain = turned(weight, "pack_transposed: weight", sign.data());
  return packed_weight(plain, find_microkernel(kernel_name, plain.dtype, Precision::highest, cpu_flags()), weight);
}

const uint32_t* pack_transposed_kept(const Tensor& weight, const MicroKernel& kernel) {
  const std::vector<float> sign(weight.size(1), 1.0f);
  const Weight plain = turned(weight, "conv3x3_input_grad: weight", sign.data());
  auto* words = reinterpret_cast<uint32_t*>(kept(Kept::weight, kernel.weight_words(plain.cout, plain.cin) * 4));
  pack_words(plain, kernel, words);
  return words;
}

}  // namespace vgg_fast
