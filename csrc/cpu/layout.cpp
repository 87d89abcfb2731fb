#include "layout.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

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

// The lower or the upper halves of two vectors, element by element in turns.
template <class V, class Index>
V interleave(V a, V b, Index index) {
#if defined(__clang__)
  V result;
  constexpr int kN = sizeof(V) / sizeof(a[0]);
  for (int i = 0; i < kN; ++i) result[i] = index[i] < kN ? a[index[i]] : b[index[i] - kN];
  return result;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// to[c * to_column + r] = from[r * from_row + c] for whole tiles of one 16-byte vector squared; returns how many rows
// and columns these cover. Between NCHW and channels next to each other, where single elements would take longer than
// many a convolution.
template <class T>
std::pair<int64_t, int64_t> transpose_tiles(const T* from, int64_t from_row, T* to, int64_t to_column, int64_t rows,
                                            int64_t columns) {
  constexpr int kN = 16 / sizeof(T);
  typedef T V __attribute__((vector_size(16), aligned(sizeof(T)), may_alias));
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int16_t>;
  typedef Int Index __attribute__((vector_size(16)));
  Index low, high;
  for (int i = 0; i < kN; ++i) {
    low[i] = Int(i / 2 + i % 2 * kN);
    high[i] = Int(low[i] + kN / 2);
  }
  rows = rows / kN * kN;
  columns = columns / kN * kN;
  for (int64_t r = 0; r < rows; r += kN) {
    for (int64_t c = 0; c < columns; c += kN) {
      V tile[kN], shuffled[kN];
      for (int i = 0; i < kN; ++i) tile[i] = *reinterpret_cast<const V*>(from + (r + i) * from_row + c);
      for (int step = 1; step < kN; step *= 2) {  // log2(kN) perfect shuffles make a transposition
        for (int i = 0; i < kN / 2; ++i) {
          shuffled[2 * i] = interleave(tile[i], tile[i + kN / 2], low);
          shuffled[2 * i + 1] = interleave(tile[i], tile[i + kN / 2], high);
        }
        std::copy_n(shuffled, kN, tile);
      }
      for (int i = 0; i < kN; ++i) *reinterpret_cast<V*>(to + (c + i) * to_column + r) = tile[i];
    }
  }
  return {rows, columns};
}

// A plane of rows x columns elements, converted; equal types are copied bit by bit.
template <DType kFrom, DType kTo>
void copy_plane(const char* from, int64_t from_row, int64_t from_column, char* to, int64_t to_row, int64_t to_column,
                int64_t rows, int64_t columns) {
  auto* source = reinterpret_cast<const typename Element<kFrom>::Type*>(from);
  auto* target = reinterpret_cast<typename Element<kTo>::Type*>(to);
  int64_t done_rows = 0, done_columns = 0;
  if constexpr (kFrom == kTo) {
    if (from_column == 1 && to_row == 1) {
      std::tie(done_rows, done_columns) = transpose_tiles(source, from_row, target, to_column, rows, columns);
    } else if (from_row == 1 && to_column == 1) {
      std::tie(done_columns, done_rows) = transpose_tiles(source, from_column, target, to_row, columns, rows);
    }
  }
  for (int64_t r = 0; r < rows; ++r, source += from_row, target += to_row) {
    for (int64_t c = r < done_rows ? done_columns : 0; c < columns; ++c) {
      if constexpr (kFrom == kTo) {
        target[c * to_column] = source[c * from_column];
      } else {
        Element<kTo>::store(target + c * to_column, Element<kFrom>::load(source + c * from_column));
      }
    }
  }
}

using CopyPlane = decltype(&copy_plane<DType::f32, DType::f32>);

template <DType kFrom>
CopyPlane copy_plane_from(DType to) {
  if (to == DType::f32) return copy_plane<kFrom, DType::f32>;
  return to == DType::bf16 ? copy_plane<kFrom, DType::bf16> : copy_plane<kFrom, DType::f16>;
}

CopyPlane copy_plane_for(DType from, DType to) {
  return from == DType::f32    ? copy_plane_from<DType::f32>(to)
         : from == DType::bf16 ? copy_plane_from<DType::bf16>(to)
                               : copy_plane_from<DType::f16>(to);
}

// `vectors` x 16 fp32 values in the parts of a kernel that has them.
void split_parts(const float* from, int64_t vectors, char* to, int64_t stride, const MicroKernel& kernel) {
#if defined(__x86_64__)
  split_parts_avx512(from, vectors, to, stride, kernel.parts);
#else
  (void)from, (void)vectors, (void)to, (void)stride, (void)kernel;  // no kernel there has parts
#endif
}

}  // namespace

int64_t map_bytes(int64_t planes, int64_t h, int64_t w) { return (planes * (h + 2) * (w + 2) + 64) * kLine; }

void pack_row(const Image& image, const MicroKernel& kernel, int64_t row, char* to, int64_t plane) {
  const int64_t block = kernel.block(), pitch = (image.w + 2) * kLine, size = element_size(image.dtype);
  const bool split = kernel.parts > 1;
  const CopyPlane copy = copy_plane_for(image.dtype, split ? DType::f32 : kernel.compute);
  std::vector<float> whole(split ? image.w * block : 0);
  for (int64_t b = 0; b < ceil_div(image.c, block); ++b) {
    char* line = to + b * kernel.parts * plane;
    for (int64_t part = 0; part < kernel.parts; ++part) std::memset(line + part * plane, 0, pitch);
    if (row == 0 || row == image.h + 1) continue;
    const int64_t channels = std::min(block, image.c - b * block);
    if (split && channels < block) std::fill(whole.begin(), whole.end(), 0.0f);
    const char* source = image.data + (b * block * image.stride_c + (row - 1) * image.stride_h) * size;
    char* target = split ? reinterpret_cast<char*>(whole.data()) : line + kLine;
    if (image.stride_c == 1) {
      copy(source, image.stride_w, 1, target, block, 1, image.w, channels);
    } else {
      copy(source, image.stride_c, image.stride_w, target, 1, block, channels, image.w);
    }
    if (split) split_parts(whole.data(), image.w * block / kVector, line + kLine, plane, kernel);
  }
}

namespace {

// [tap][channel] of every pixel of a row, from bordered rows [column][channel] that are `line` values apart. The sizes
// of the pieces are constants: copies of a few bytes whose size has to be looked up take most of a first layer's time.
template <int kChannels>
void gather_row(const uint16_t* above, int64_t line, int64_t w, char* pixels) {
  constexpr int64_t kPiece = 3 * kChannels * sizeof(uint16_t);
  for (int64_t x = 0; x < w; ++x, pixels += kLine, above += kChannels) {
    for (int64_t tap_row = 0; tap_row < 3; ++tap_row) {
      std::memcpy(pixels + tap_row * kPiece, above + tap_row * line, kPiece);
    }
  }
}

}  // namespace

void gather_rows(const Image& image, const MicroKernel& kernel, int64_t row_begin, int64_t row_end, char* to,
                 int64_t plane) {
  const int64_t pitch = (image.w + 2) * kLine, size = element_size(image.dtype), rows = row_end - row_begin;
  const bool split = kernel.parts > 1;
  const CopyPlane copy = copy_plane_for(image.dtype, split ? DType::f32 : DType::bf16);
  // The image's rows as bf16 [row][column][channel] with a border: the three neighbours of a pixel in a row are then
  // one piece of 3 * c values. In parts, an fp32 copy comes first.
  const int64_t line = (image.w + 2) * image.c, vectors = ceil_div((rows + 2) * line, kVector);
  std::vector<uint16_t> bordered(kernel.parts * vectors * kVector);
  std::vector<float> whole(split ? vectors * kVector : 0);
  for (int64_t y = std::max<int64_t>(row_begin - 1, 0); y < std::min(row_end + 1, image.h); ++y) {
    const int64_t first = (y - row_begin + 1) * line + image.c;
    char* target = split ? reinterpret_cast<char*>(whole.data() + first) : reinterpret_cast<char*>(&bordered[first]);
    copy(image.data + y * image.stride_h * size, image.stride_c, image.stride_w, target, 1, image.c, image.c, image.w);
  }
  if (split)
    split_parts(whole.data(), vectors, reinterpret_cast<char*>(bordered.data()), vectors * kVector * 2, kernel);
  for (int64_t part = 0; part < kernel.parts; ++part) {
    for (int64_t row = row_begin; row < row_end; ++row) {
      char* pixels = to + part * plane + (row - row_begin) * pitch;
      std::memset(pixels, 0, pitch);
      const uint16_t* above = bordered.data() + part * vectors * kVector + (row - row_begin) * line;
      (image.c == 1 ? gather_row<1> : image.c == 2 ? gather_row<2> : gather_row<3>)(above, line, image.w, pixels);
    }
  }
}

void clear_border(char* plane, int64_t h, int64_t w, bool top, bool bottom) {
  const int64_t pitch = (w + 2) * kLine;
  if (top) std::memset(plane, 0, pitch);
  for (int64_t row = 0; row < h + 2; ++row) {
    std::memset(plane + row * pitch, 0, kLine);
    std::memset(plane + (row + 1) * pitch - kLine, 0, kLine);
  }
  if (bottom) std::memset(plane + (h + 1) * pitch, 0, pitch);
}

void copy_row(const Image& from, const Image& to, int64_t row) {
  const int64_t size = element_size(from.dtype);
  copy_plane_for(from.dtype, to.dtype)(from.data + row * from.stride_h * size, from.stride_c, from.stride_w,
                                       to.data + row * to.stride_h * size, to.stride_c, to.stride_w, to.c, to.w);
}

namespace {

// The packing of every kernel but those of parts or neighbourhoods, for which it would be too much to ask: a training
// step packs all weights twice. A unit is a group where the weights of an output channel lie together in memory, and a
// block of input channels where those of an input channel do: it reads them in one piece, and writes into tiles that
// stay in L2 meanwhile.
bool units_are_blocks(const Weight& weight) { return weight.stride[0] < weight.stride[1]; }

template <DType kFrom, DType kTo>
void pack_plain_unit(const Weight& weight, int64_t g, int64_t unit, char* out) {
  using From = typename Element<kFrom>::Type;
  using To = typename Element<kTo>::Type;
  constexpr int64_t kBlock = kLine / sizeof(To), kPerWord = 4 / sizeof(To);
  const int64_t blocks = ceil_div(weight.cin, kBlock), groups = ceil_div(weight.cout, g), tile = kTaps * kBlock * g;
  const From* first = reinterpret_cast<const From*>(weight.data);
  To* to = reinterpret_cast<To*>(out);
  int64_t taps[kTaps];
  for (int64_t tap = 0; tap < kTaps; ++tap) taps[tap] = tap / 3 * weight.stride[2] + tap % 3 * weight.stride[3];
  const auto copy = [&](int64_t group, int64_t lane, int64_t block, int64_t k) {
    const int64_t o = group * g + lane;
    const From* from = first + o * weight.stride[0] + (block * kBlock + k) * weight.stride[1];
    To* target = to + (group * blocks + block) * tile + (k / kPerWord * g + lane) * kPerWord + k % kPerWord;
    const float sign = weight.sign[o];
    for (int64_t tap = 0; tap < kTaps; ++tap, target += kBlock * g) {
      Element<kTo>::store(target, Element<kFrom>::load(from + taps[tap]) * sign);
    }
  };
  const auto lanes = [&](int64_t group) { return std::min(g, weight.cout - group * g); };
  const auto channels = [&](int64_t block) { return std::min(kBlock, weight.cin - block * kBlock); };
  const auto clear = [&](int64_t group, int64_t block) {
    if (lanes(group) < g || channels(block) < kBlock) std::fill_n(to + (group * blocks + block) * tile, tile, To{});
  };
  if (units_are_blocks(weight)) {
    for (int64_t group = 0; group < groups; ++group) clear(group, unit);
    for (int64_t k = 0; k < channels(unit); ++k)
      for (int64_t group = 0; group < groups; ++group)
        for (int64_t lane = 0; lane < lanes(group); ++lane) copy(group, lane, unit, k);
  } else {
    for (int64_t block = 0; block < blocks; ++block) clear(unit, block);
    for (int64_t lane = 0; lane < lanes(unit); ++lane)
      for (int64_t block = 0; block < blocks; ++block)
        for (int64_t k = 0; k < channels(block); ++k) copy(unit, lane, block, k);
  }
}

// Whether `pack_taps` does it: the same type, and the taps in one piece.
bool packs_taps(const Weight& weight, const MicroKernel& kernel) {
  return weight.dtype == kernel.compute && std::abs(weight.stride[3]) == 1 && weight.stride[2] == 3 * weight.stride[3];
}

void pack_taps_unit(const Weight& weight, const MicroKernel& kernel, const Passes& passes, int64_t unit, char* out) {
  const int64_t g = kernel.group, k = kernel.block(), size = element_size(weight.dtype);
  const int64_t blocks = kernel.cin_blocks(weight.cin), groups = kernel.groups(weight.cout);
  const bool reversed = weight.stride[3] < 0, by_block = units_are_blocks(weight);
  const char* first = weight.data - (reversed ? (kTaps - 1) * size : 0);
  const char* end = first + ((weight.cout - 1) * weight.stride[0] + (weight.cin - 1) * weight.stride[1] + kTaps) * size;
  for (int64_t i = 0; i < (by_block ? groups : blocks); ++i) {
    const int64_t group = by_block ? i : unit, block = by_block ? unit : i;
    const char* from = first + (group * g * weight.stride[0] + block * k * weight.stride[1]) * size;
    passes.pack_taps({from, end, weight.stride[0], weight.stride[1], std::min(g, weight.cout - group * g),
                      std::min(k, weight.cin - block * k), g, reversed, weight.sign + group * g,
                      out + (group * blocks + block) * kTaps * kWords * g * 4, weight.dtype});
  }
}

using PackPlainUnit = decltype(&pack_plain_unit<DType::f32, DType::f32>);

PackPlainUnit pack_plain_unit_for(DType from, DType to) {
  constexpr auto f32 = DType::f32, bf16 = DType::bf16, f16 = DType::f16;
  if (to == f32) {
    return from == f32    ? pack_plain_unit<f32, f32>
           : from == bf16 ? pack_plain_unit<bf16, f32>
                          : pack_plain_unit<f16, f32>;
  }
  return from == f32    ? pack_plain_unit<f32, bf16>
         : from == bf16 ? pack_plain_unit<bf16, bf16>
                        : pack_plain_unit<f16, bf16>;
}

}  // namespace

int64_t weight_units(const Weight& weight, const MicroKernel& kernel) {
  const bool plain = kernel.parts == 1 && !kernel.gathers(weight.cin);
  return plain && units_are_blocks(weight) ? kernel.cin_blocks(weight.cin) : kernel.groups(weight.cout);
}

void pack_weight_unit(const Weight& weight, const MicroKernel& kernel, const Passes& passes, uint32_t* packed,
                      int64_t group) {
  const int64_t g = kernel.group, block = kernel.block(), taps = kernel.taps(weight.cin);
  const int64_t part_words = taps * kWords * g, group_words = kernel.cin_blocks(weight.cin) * kernel.parts * part_words;
  const int64_t per_word = block / kWords, size = element_size(weight.dtype);
  const bool gathered = kernel.gathers(weight.cin);
  if (kernel.parts == 1 && !gathered) {
    if (packs_taps(weight, kernel)) {
      return pack_taps_unit(weight, kernel, passes, group, reinterpret_cast<char*>(packed));
    }
    return pack_plain_unit_for(weight.dtype, kernel.compute)(weight, g, group, reinterpret_cast<char*>(packed));
  }
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
        // Position of this channel and tap: block, (part,) tap, word, lane, half of the word.
        const int64_t channel = gathered ? tap * weight.cin + i : i, row = gathered ? 0 : tap;
        const int64_t word =
            channel / block * kernel.parts * part_words + (row * kWords + channel % block / per_word) * g + lane;
        char* target = reinterpret_cast<char*>(out + word) + (channel % per_word) * 2;
        if (kernel.compute == DType::f32) {
          std::memcpy(target, &value, 4);
          continue;
        }
        for (int64_t part = 0; part < kernel.parts; ++part, target += part_words * 4) {
          const uint16_t bits = kernel.parts > 1 ? bf16_part(value, part) : float_to_bf16(value);
          std::memcpy(target, &bits, 2);
        }
      }
    }
  }
}

}  // namespace vgg_fast
