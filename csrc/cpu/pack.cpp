// Batch-norm as an affine epilogue (see vgg_fast/fold.py), and weights in the layout of a micro-kernel.
#include <cmath>

#include "convert.h"
#include "denormals.h"
#include "torch_cpu.h"

namespace vgg_fast {
namespace {

// The vector in float64; `otherwise` where there is none.
std::vector<double> read_vector(const std::optional<Tensor>& tensor, int64_t n, double otherwise, const char* what) {
  std::vector<double> values(n, otherwise);
  if (!tensor) return values;
  STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == n && tensor->is_cpu(), "pack: ", what,
                  " must be a CPU tensor of ", n, " elements");
  const int64_t stride = tensor->stride(0);
  const void* data = tensor->const_data_ptr();
  if (tensor->scalar_type() == ScalarType::Double) {
    for (int64_t i = 0; i < n; ++i) values[i] = static_cast<const double*>(data)[i * stride];
    return values;
  }
  const DType dtype = dtype_of(*tensor, what);
  for (int64_t i = 0; i < n; ++i) {
    values[i] = dtype == DType::f32    ? static_cast<const float*>(data)[i * stride]
                : dtype == DType::bf16 ? bf16_to_float(static_cast<const uint16_t*>(data)[i * stride])
                                       : f16_to_float(static_cast<const uint16_t*>(data)[i * stride]);
  }
  return values;
}

void check_weight(const Tensor& weight, const char* what) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3, what,
                  ": weight must be [Cout, Cin, 3, 3], got ", weight.dim(), " dimensions or another kernel size");
  STD_TORCH_CHECK(weight.size(0) > 0 && weight.size(1) > 0, what, ": weight has no channels: [", weight.size(0), ", ",
                  weight.size(1), ", 3, 3]");
}

Tensor packed_weight(const Weight& plain, const MicroKernel& kernel, const Tensor& like) {
  const int64_t size = kernel.weight_words(plain.cout, plain.cin);
  const Tensor packed = torch::stable::empty({size}, ScalarType::Int, std::nullopt, like.device());
  uint32_t* words = static_cast<uint32_t*>(packed.mutable_data_ptr());
  const Passes& passes = select_passes(cpu_flags());
  torch::stable::parallel_for(0, weight_units(plain, kernel), 1, [&](int64_t begin, int64_t end) {
    const FlushDenormals mode;
    for (int64_t unit = begin; unit < end; ++unit) pack_weight_unit(plain, kernel, passes, words, unit);
  });
  return packed;
}

}  // namespace

std::tuple<Tensor, Tensor> pack_cpu(const Tensor& weight, const std::optional<Tensor>& bias,
                                    const std::optional<Tensor>& bn_mean, const std::optional<Tensor>& bn_var,
                                    const std::optional<Tensor>& bn_weight, const std::optional<Tensor>& bn_bias,
                                    double bn_eps, const std::string& kernel_name) {
  check_weight(weight, "pack");
  const int64_t cout = weight.size(0);
  STD_TORCH_CHECK(bn_mean.has_value() == bn_var.has_value(), "pack: bn_mean and bn_var go together");
  const DType dtype = dtype_of(weight, "pack: weight");
  const MicroKernel& kernel = find_microkernel(kernel_name, dtype, Precision::highest, cpu_flags());

  const std::vector<double> mean = read_vector(bn_mean, cout, 0, "bn_mean");
  const std::vector<double> var = read_vector(bn_var, cout, 1, "bn_var");
  const std::vector<double> gamma = read_vector(bn_weight, cout, 1, "bn_weight");
  const std::vector<double> beta = read_vector(bn_bias, cout, 0, "bn_bias");
  const std::vector<double> offset = read_vector(bias, cout, 0, "bias");
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
  check_weight(weight, "pack_transposed");
  const DType dtype = dtype_of(weight, "pack_transposed: weight");
  const MicroKernel& kernel = find_microkernel(kernel_name, dtype, Precision::highest, cpu_flags());
  const std::vector<float> sign(weight.size(1), 1.0f);
  // Taps backwards, from the last one.
  const int64_t last = 2 * (weight.stride(2) + weight.stride(3));
  const Weight turned{static_cast<const char*>(weight.const_data_ptr()) + last * element_size(dtype),
                      dtype,
                      weight.size(1),
                      weight.size(0),
                      {weight.stride(1), weight.stride(0), -weight.stride(2), -weight.stride(3)},
                      sign.data()};
  return packed_weight(turned, kernel, weight);
}

}  // namespace vgg_fast
