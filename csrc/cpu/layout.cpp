#include "layout.h"

#include <algorithm>
#include <cstring>

#include "convert.h"

namespace vgg_fast {
namespace {

template <DType kType>
struct Element;
template <>
struct Element<DType::f32> {
  using Type = float;
  static float load(const float* p) { return *p; }
  static void store(float* p, float v) { *p = v; }
};
template <>
struct Element<DType::bf16> {
  using Type = uint16_t;
  static float load(const uint16_t* p) { return bf16_to_float(*p); }
  static void store(uint16_t* p, float v) { *p = float_to_bf16(v); }
};
template <>
struct Element<DType::f16> {
  using Type = uint16_t;
  static float load(const uint16_t* p) { return f16_to_float(*p); }
  static void store(uint16_t* p, float v) { *p = float_to_f16(v); }
};

// n elements, converted; equal types are copied bit by bit.
template <DType kFrom, DType kTo>
void copy_strided(const typename Element<kFrom>::Type* from, int64_t from_stride, typename Element<kTo>::Type* to,
                  int64_t to_stride, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (kFrom == kTo) {
      to[i * to_stride] = from[i * from_stride];
    } else {
      Element<kTo>::store(to + i * to_stride, Element<kFrom>::load(from + i * from_stride));
    }
  }
}

// A plane of rows x columns elements. The longer contiguous direction is the inner loop.
template <DType kFrom, DType kTo>
void copy_plane(const char* from, int64_t from_row, int64_t from_column, char* to, int64_t to_row, int64_t to_column,
                int64_t rows, int64_t columns) {
  auto* source = reinterpret_cast<const typename Element<kFrom>::Type*>(from);
  auto* target = reinterpret_cast<typename Element<kTo>::Type*>(to);
  for (int64_t r = 0; r < rows; ++r) {
    copy_strided<kFrom, kTo>(source + r * from_row, from_column, target + r * to_row, to_column, columns);
  }
}

using CopyPlane = decltype(&copy_plane<DType::f32, DType::f32>);

CopyPlane copy_plane_for(DType from, DType to) {
  constexpr auto f32 = DType::f32, bf16 = DType::bf16, f16 = DType::f16;
  if (from == f32) return to == f32 ? copy_plane<f32, f32> : to == bf16 ? copy_plane<f32, bf16> : copy_plane<f32, f16>;
  if (from == bf16) return to == f32 ? copy_plane<bf16, f32> : copy_plane<bf16, bf16>;
  return to == f32 ? copy_plane<f16, f32> : copy_plane<f16, f16>;
}

}  // namespace

int64_t map_bytes(int64_t blocks, int64_t h, int64_t w) { return (blocks * (h + 2) * (w + 2) + 64) * kLine; }

void pack_row(const Image& image, const MicroKernel& kernel, char* map, int64_t row) {
  const int64_t block = kernel.block(), pitch = (image.w + 2) * kLine, size = element_size(image.dtype);
  const CopyPlane copy = copy_plane_for(image.dtype, kernel.compute);
  for (int64_t b = 0; b < ceil_div(image.c, block); ++b) {
    char* line = map + (b * (image.h + 2) + row) * pitch;
    std::memset(line, 0, pitch);
    if (row == 0 || row == image.h + 1) continue;
    const int64_t channels = std::min(block, image.c - b * block);
    const char* source = image.data + (b * block * image.stride_c + (row - 1) * image.stride_h) * size;
    if (image.stride_c == 1) {
      copy(source, image.stride_w, 1, line + kLine, block, 1, image.w, channels);
    } else {
      copy(source, image.stride_c, image.stride_w, line + kLine, 1, block, channels, image.w);
    }
  }
}

void gather_row(const Image& image, char* map, int64_t row) {
  constexpr int64_t kBlock = 2 * kWords;
  const int64_t pitch = (image.w + 2) * kLine, size = element_size(image.dtype);
  const CopyPlane copy = copy_plane_for(image.dtype, DType::bf16);
  char* line = map + row * pitch;
  std::memset(line, 0, pitch);
  for (int64_t tap = 0; tap < kTaps; ++tap) {
    const int64_t y = row + tap / 3 - 1, shift = tap % 3 - 1;
    if (y < 0 || y >= image.h) continue;
    const int64_t begin = std::max<int64_t>(0, -shift), end = std::min(image.w, image.w - shift);
    if (begin >= end) continue;
    const char* source = image.data + (y * image.stride_h + (begin + shift) * image.stride_w) * size;
    copy(source, image.stride_c, image.stride_w, line + begin * kLine + tap * image.c * 2, 1, kBlock, image.c,
         end - begin);
  }
}

void clear_border(char* map, int64_t block, int64_t h, int64_t w) {
  const int64_t pitch = (w + 2) * kLine;
  char* first = map + block * (h + 2) * pitch;
  std::memset(first, 0, pitch);
  for (int64_t row = 1; row <= h; ++row) {
    std::memset(first + row * pitch, 0, kLine);
    std::memset(first + (row + 1) * pitch - kLine, 0, kLine);
  }
  std::memset(first + (h + 1) * pitch, 0, pitch);
}

void unpack_row(const char* map, const MicroKernel& kernel, const Image& image, int64_t row) {
  const int64_t block = kernel.block(), pitch = (image.w + 2) * kLine, size = element_size(image.dtype);
  const CopyPlane copy = copy_plane_for(kernel.compute, image.dtype);
  for (int64_t b = 0; b < ceil_div(image.c, block); ++b) {
    const char* line = map + (b * (image.h + 2) + row + 1) * pitch + kLine;
    char* target = image.data + (b * block * image.stride_c + row * image.stride_h) * size;
    const int64_t channels = std::min(block, image.c - b * block);
    if (image.stride_c == 1) {
      copy(line, block, 1, target, image.stride_w, 1, image.w, channels);
    } else {
      copy(line, 1, block, target, image.stride_c, image.stride_w, channels, image.w);
    }
  }
}

void pack_weight_group(const Weight& weight, const MicroKernel& kernel, uint32_t* packed, int64_t group) {
  const int64_t g = kernel.group, block = kernel.block(), taps = kernel.taps(weight.cin);
  const int64_t blocks = kernel.cin_blocks(weight.cin), group_words = blocks * taps * kWords * g;
  const int64_t per_word = block / kWords, size = element_size(weight.dtype);
  const bool gathered = kernel.gathers(weight.cin);
  uint32_t* out = packed + group * group_words;
  std::memset(out, 0, group_words * 4);
  const int64_t lanes = std::min(g, weight.cout - group * g);
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const int64_t o = group * g + lane;
    for (int64_t i = 0; i < weight.cin; ++i) {
      for (int64_t tap = 0; tap < kTaps; ++tap) {
        const char* source = weight.data + (o * weight.stride[0] + i * weight.stride[1] + (tap / 3) * weight.stride[2] +
                                            (tap % 3) * weight.stride[3]) *
                                               size;
        float value;
        if (weight.dtype == DType::f32) {
          std::memcpy(&value, source, 4);
        } else {
          uint16_t bits;
          std::memcpy(&bits, source, 2);
          value = weight.dtype == DType::bf16 ? bf16_to_float(bits) : f16_to_float(bits);
        }
        value *= weight.sign[o];
        // Position of this channel and tap: block, tap, word, lane, half of the word.
        const int64_t channel = gathered ? tap * weight.cin + i : i, row = gathered ? 0 : tap;
        const int64_t word = ((channel / block) * taps + row) * kWords + (channel % block) / per_word;
        char* target = reinterpret_cast<char*>(out + word * g + lane) + (channel % per_word) * 2;
        if (kernel.compute == DType::f32) {
          std::memcpy(target, &value, 4);
        } else {
          const uint16_t bits = float_to_bf16(value);
          std::memcpy(target, &bits, 2);
        }
      }
    }
  }
}

}  // namespace vgg_fast
