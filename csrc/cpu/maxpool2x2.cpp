// The 2x2/2 max-pool by itself, on whatever strides the tensor has.
#include <cmath>

#include "convert.h"
#include "torch_cpu.h"

namespace vgg_fast {
namespace {

// Values compare as floats. The first of equals stays, a NaN always wins.
template <DType kType>
void pool_row(const Image& x, const Image& y, int64_t row) {
  constexpr int64_t kSize = element_size(kType);
  // Channels innermost in channels_last, columns innermost otherwise: unit stride on both sides.
  const bool channels_inside = y.stride_c == 1;
  const int64_t outer = channels_inside ? y.w : y.c, inner = channels_inside ? y.c : y.w;
  const int64_t down = x.stride_h * kSize, right = x.stride_w * kSize;
  const int64_t x_inner = (channels_inside ? x.stride_c : 2 * x.stride_w) * kSize;
  const int64_t x_outer = (channels_inside ? 2 * x.stride_w : x.stride_c) * kSize;
  const int64_t y_inner = (channels_inside ? y.stride_c : y.stride_w) * kSize;
  const int64_t y_outer = (channels_inside ? y.stride_w : y.stride_c) * kSize;
  for (int64_t o = 0; o < outer; ++o) {
    const char* from = x.data + 2 * row * down + o * x_outer;
    char* to = y.data + row * y.stride_h * kSize + o * y_outer;
    for (int64_t i = 0; i < inner; ++i, from += x_inner, to += y_inner) {
      const char* best = from;
      float most = read_value(from, kType);
      for (const char* p : {from + right, from + down, from + down + right}) {
        const float value = read_value(p, kType);
        const bool take = value > most || std::isnan(value);
        most = take ? value : most;
        best = take ? p : best;
      }
      std::memcpy(to, best, kSize);
    }
  }
}

}  // namespace

Tensor maxpool2x2_cpu(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, "maxpool2x2: x must be [N, C, H, W], got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(x.size(2) >= 2 && x.size(3) >= 2, "maxpool2x2: a ", x.size(2), "x", x.size(3),
                  " map cannot be pooled 2x2: Output size is too small");
  const DType dtype = dtype_of(x, "maxpool2x2: x");
  Tensor y = empty_image(x, x.size(0), x.size(1), x.size(2) / 2, x.size(3) / 2, suggests_channels_last(x));
  const int64_t h = y.size(2);
  torch::stable::parallel_for(0, y.size(0) * h, 4, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const Image from = image_of(x, dtype, unit / h), to = image_of(y, dtype, unit / h);
      if (dtype == DType::f32) {
        pool_row<DType::f32>(from, to, unit % h);
      } else if (dtype == DType::bf16) {
        pool_row<DType::bf16>(from, to, unit % h);
      } else {
        pool_row<DType::f16>(from, to, unit % h);
      }
    }
  });
  return y;
}

}  // namespace vgg_fast
