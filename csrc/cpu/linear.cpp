// Fully connected layers: the inputs laid out for a kernel, then units of rows over the threads; and packed weights.
#include "../linear.h"

#include <algorithm>
#include <cstring>

#include "convert.h"
#include "denormals.h"
#include "huge_pages.h"
#include "torch_cpu.h"

namespace vgg_fast {
namespace {

// A tensor [..., in] as rows of values; the leading dimensions count them.
struct Rows {
  const Tensor& tensor;
  const DType dtype;

  // Row i as `n` floats: the values there are, then zeros.
  void read(int64_t i, float* to, int64_t n) const {
    int64_t offset = 0;
    if (n == 0) return;
    for (int64_t d = tensor.dim() - 2; d >= 0; --d) {
      offset += i % tensor.size(d) * tensor.stride(d);
      i /= tensor.size(d);
    }
    const int64_t in = tensor.size(tensor.dim() - 1), size = element_size(dtype);
    const int64_t step = tensor.stride(tensor.dim() - 1) * size;
    const char* row = static_cast<const char*>(tensor.const_data_ptr()) + offset * size;
    if (dtype == DType::f32 && step == size) {
      std::memcpy(to, row, in * size);
    } else if (dtype == DType::bf16 && step == size) {  // a loop that the compiler makes vectors of
      for (int64_t k = 0; k < in; ++k) to[k] = read_value(row + 2 * k, DType::bf16);
    } else {
      for (int64_t k = 0; k < in; ++k) to[k] = read_value(row + k * step, dtype);
    }
    std::fill(to + in, to + n, 0.0f);
  }
};

// Pairs of bf16 of one image, `columns` words from one to the next.
void write_pairs(const float* values, int64_t pairs, int64_t columns, uint32_t* to) {
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const uint32_t low = float_to_bf16(values[2 * pair]), high = float_to_bf16(values[2 * pair + 1]);
    to[pair * columns] = low | high << 16;
  }
}

// The upper 24 bits of the nearest such value. A finite value that would round up to infinity is cut off.
uint32_t to_f24(float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return (bits | 0x400000u) >> 8;  // a NaN stays one
  if (magnitude >= 0x7f7fff80u) return bits >> 8;
  return (bits + 0x7fu + ((bits >> 8) & 1)) >> 8;
}

char* aligned(const Tensor& bytes) { return next_line(bytes.mutable_data_ptr()); }

Tensor empty_bytes(int64_t n, const Tensor& like) {
  return torch::stable::empty({n + kLine}, ScalarType::Byte, std::nullopt, like.device());
}

std::vector<float> bias_of(const std::optional<Tensor>& bias, int64_t out, DType dtype) {
  if (!bias) return {};
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == out, "linear: bias must have ", out, " elements, one per row");
  STD_TORCH_CHECK(dtype_of(*bias, "linear: bias") == dtype,
                  "linear: x and bias must have the same dtype, got a bias of ", name_of(bias->scalar_type()));
  const char* data = static_cast<const char*>(bias->const_data_ptr());
  std::vector<float> values(out);
  for (int64_t i = 0; i < out; ++i) values[i] = read_value(data + i * bias->stride(0) * element_size(dtype), dtype);
  return values;
}

void check_weight(const Tensor& weight, const LinearKernel& kernel, DType dtype, int64_t in) {
  const WeightFormat format = kernel.format(dtype);
  const ScalarType wanted = format == WeightFormat::f24    ? ScalarType::Byte
                            : format == WeightFormat::bf16 ? ScalarType::BFloat16
                            : format == WeightFormat::f16  ? ScalarType::Half
                                                           : ScalarType::Float;
  STD_TORCH_CHECK(weight.scalar_type() == wanted, "linear: kernel ", kernel.name, " reads weights of this x as ",
                  kernel.packs(dtype) ? "linear_pack(weight, kernel) makes them" : "they are, in the dtype of x",
                  ", not in another type");
  const int64_t columns = format == WeightFormat::f24 ? packed_row(format, in) : in;
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == columns, "linear: weight must be [out, ", columns,
                  "] for this x and kernel ", kernel.name, ", got ", weight.dim() == 2 ? weight.size(1) : -1);
  STD_TORCH_CHECK(weight.size(0) == 0 || columns <= 1 || weight.stride(1) == 1,
                  "linear: rows of weight must be dense (stride 1), not of stride ", weight.stride(1),
                  ": use weight.contiguous()");
}

}  // namespace

Tensor linear_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool relu,
                  const std::string& kernel_name) {
  STD_TORCH_CHECK(x.dim() >= 1, "linear: x must be [..., in], got a scalar");
  const DType dtype = dtype_of(x, "linear: x");
  const LinearKernel& kernel = find_linear_kernel(kernel_name, dtype, Precision::highest, cpu_flags());
  const int64_t in = x.size(x.dim() - 1);
  check_weight(weight, kernel, dtype, in);
  const int64_t out = weight.size(0);
  const std::vector<float> shift = bias_of(bias, out, dtype);
  std::vector<int64_t> sizes(x.dim(), out);
  int64_t images = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) images *= sizes[d] = x.size(d);
  const Tensor y = torch::stable::empty(sizes, x.scalar_type(), std::nullopt, x.device());
  if (images * out == 0) return y;

  const int64_t columns = std::min<int64_t>(images, 16);
  const int64_t x_image = kernel.tiles ? ceil_div(in, 32) * 64 : ceil_div(in, kRowValues) * kRowValues * 4;
  const int64_t x_bytes = ceil_div(images, columns) * columns * x_image;
  const Tensor prepared = empty_bytes(x_bytes, x);
  char* inputs = aligned(prepared);
  // The columns of the last block that no image has are zeros.
  if (kernel.tiles)
    std::memset(inputs + images / columns * columns * x_image, 0, images % columns ? columns * x_image : 0);
  const Rows rows{x, dtype};
  torch::stable::parallel_for(0, images, 1, [&](int64_t begin, int64_t end) {
    const FlushDenormals mode;
    const int64_t padded = x_image / (kernel.tiles ? 2 : 4), pairs = padded / 2;
    std::vector<float> row(kernel.tiles ? padded : 0);
    for (int64_t i = begin; i < end; ++i) {
      if (kernel.tiles) {
        rows.read(i, row.data(), padded);
        uint32_t* column = reinterpret_cast<uint32_t*>(inputs) + i / columns * pairs * columns + i % columns;
        write_pairs(row.data(), pairs, columns, column);
      } else {
        rows.read(i, reinterpret_cast<float*>(inputs + i * x_image), padded);
      }
    }
  });

  LinearArgs args{};
  args.weight = static_cast<const char*>(weight.const_data_ptr());
  args.format = kernel.format(dtype);
  args.weight_row = weight.stride(0) * (args.format == WeightFormat::f24 ? 1 : packed_row(args.format, 1));
  if (in == 0) {  // tensors without elements have no memory either
    args.weight = inputs;
    args.weight_row = 0;
  }
  args.columns = columns;
  args.bias = bias ? shift.data() : nullptr;
  args.in = in;
  args.out = out;
  args.relu = relu;
  args.store_as = dtype;
  for (int64_t first = 0; first < images; first += kPassImages) {
    args.images = std::min(kPassImages, images - first);
    args.x = inputs + first * x_image;
    args.y = static_cast<char*>(y.mutable_data_ptr()) + first * out * element_size(dtype);
    const int64_t unit = kernel.unit_rows(args.images);
    torch::stable::parallel_for(0, ceil_div(out, unit), 1, [&](int64_t begin, int64_t end) {
      const FlushDenormals mode;
      const Tensor scratch = empty_bytes(kernel.scratch_bytes(args.images), x);
      for (; begin < end; ++begin) kernel.run(args, begin * unit, std::min((begin + 1) * unit, out), aligned(scratch));
    });
  }
  return y;
}

Tensor linear_pack_cpu(const Tensor& weight, const std::string& kernel_name) {
  STD_TORCH_CHECK(weight.dim() == 2, "linear_pack: weight must be [out, in], got ", weight.dim(), " dimensions");
  const DType dtype = dtype_of(weight, "linear_pack: weight");
  const LinearKernel& kernel = find_linear_kernel(kernel_name, dtype, Precision::highest, cpu_flags());
  STD_TORCH_CHECK(kernel.packs(dtype), "linear_pack: kernel ", kernel.name, " reads these weights as they are");
  const int64_t out = weight.size(0), in = weight.size(1), row = packed_row(kernel.format(dtype), in);
  const Tensor packed = kernel.f24
                            ? torch::stable::empty({out, row}, ScalarType::Byte, std::nullopt, weight.device())
                            : torch::stable::empty({out, in}, ScalarType::BFloat16, std::nullopt, weight.device());
  char* bytes = static_cast<char*>(packed.mutable_data_ptr());
  advise_huge_pages(bytes, out * row);
  const char* from = static_cast<const char*>(weight.const_data_ptr());
  torch::stable::parallel_for(0, out, 16, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      char* to = bytes + r * row;
      for (int64_t k = 0; k < (kernel.f24 ? row / 3 : in); ++k) {
        const float value = k < in ? read_value(from + (r * weight.stride(0) + k * weight.stride(1)) * 4, dtype) : 0.0f;
        if (kernel.f24) {
          const uint32_t bits = to_f24(value);
          for (int byte = 0; byte < 3; ++byte) to[3 * k + byte] = char(bits >> (8 * byte));
        } else {
          const uint16_t half = float_to_bf16(value);
          std::memcpy(to + 2 * k, &half, sizeof half);
        }
      }
    }
  });
  return packed;
}

}  // namespace vgg_fast
