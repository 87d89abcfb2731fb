// conv3x3 with plain weights: pack, then a stack of one layer. Also what the Torch-facing files share.
#include "convert.h"
#include "huge_pages.h"
#include "torch_cpu.h"

namespace vgg_fast {

const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Byte:
      return "uint8";
    default:
      return "another dtype";
  }
}

DType dtype_of(const Tensor& tensor, const char* what) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, what, " must be float32, bfloat16 or float16, got ", name_of(tensor.scalar_type()));
  }
}

std::vector<double> read_vector(const std::optional<Tensor>& tensor, int64_t n, double otherwise, const char* what) {
  std::vector<double> values(n, otherwise);
  if (!tensor) return values;
  STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == n && tensor->is_cpu(), what, " must be a CPU tensor of ", n,
                  " elements");
  const int64_t stride = tensor->stride(0);
  const void* data = tensor->const_data_ptr();
  if (tensor->scalar_type() == ScalarType::Double) {
    for (int64_t i = 0; i < n; ++i) values[i] = static_cast<const double*>(data)[i * stride];
    return values;
  }
  const DType dtype = dtype_of(*tensor, what);
  for (int64_t i = 0; i < n; ++i) {
    values[i] = read_value(static_cast<const char*>(data) + i * stride * element_size(dtype), dtype);
  }
  return values;
}

bool suggests_channels_last(const Tensor& tensor) {
  if (tensor.dim() != 4) return false;
  // is_channels_last_strides_2d of c10: strides grow in the order C, W, H, N, and a tie means NCHW.
  if (tensor.stride(1) == 0) return false;
  int64_t least = 0;
  for (int64_t d : {1, 3, 2, 0}) {
    const int64_t size = tensor.size(d), stride = tensor.stride(d);
    if (size == 0 || stride < least) return false;
    if (d == 0 && least == tensor.stride(1)) return false;
    least = size > 1 ? stride * size : stride;
  }
  return true;
}

Tensor empty_image(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  const Tensor image = torch::stable::empty({n, c, h, w}, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                                            channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  // Fresh memory, as that of a training step's maps often is, costs 1.6 us for every 4 KB of small pages.
  advise_huge_pages(image.mutable_data_ptr(), image.numel() * element_size(dtype_of(image, "an image")));
  return image;
}

Image image_of(const Tensor& tensor, DType dtype, int64_t n) {
  char* data = const_cast<char*>(static_cast<const char*>(tensor.const_data_ptr()));
  return {data + n * tensor.stride(0) * element_size(dtype),
          dtype,
          tensor.size(1),
          tensor.size(2),
          tensor.size(3),
          tensor.stride(1),
          tensor.stride(2),
          tensor.stride(3)};
}

Tensor conv3x3_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool relu, bool pool,
                   const std::string& kernel) {
  STD_TORCH_CHECK(x.dim() == 4, "conv3x3: x must be [N, C, H, W], got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == x.size(1), "conv3x3: weight must be [Cout, ", x.size(1),
                  ", 3, 3] for this x, got a Cin of ", weight.dim() == 4 ? weight.size(1) : -1);
  STD_TORCH_CHECK(x.scalar_type() == weight.scalar_type(), "conv3x3: x and weight must have the same dtype, got ",
                  name_of(x.scalar_type()), " and ", name_of(weight.scalar_type()));
  const std::string name = find_microkernel(kernel, dtype_of(x, "conv3x3: x"), Precision::highest, cpu_flags()).name;
  const auto [packed, affine] =
      pack_cpu(weight, bias, std::nullopt, std::nullopt, std::nullopt, std::nullopt, 0.0, name);
  return conv_stack_cpu(x, {packed}, {affine}, {int64_t{relu} + 2 * int64_t{pool}}, name,
                        suggests_channels_last(x) || suggests_channels_last(weight));
}

}  // namespace vgg_fast
