// conv3x3_weight_grad: see vgg_fast/ops/conv3x3_weight_grad.py and weight_grad.h.
#include <algorithm>

#include "batch_norm.h"
#include "denormals.h"
#include "kept_memory.h"
#include "torch_cpu.h"
#include "weight_grad.h"
#include "winograd.h"

namespace vgg_fast {
namespace {

constexpr WeightGrad kTable[] = {
#define WEIGHT_GRAD(kernel, amx, winograd, f32) {#kernel, amx, winograd, &f32},
#include "weight_grads.inc"
#undef WEIGHT_GRAD
};

// Tiles of one sum of Winograd's; operands and sums of 64 by 64 channels (0.6 MB) then stay in L2.
constexpr int64_t kChunkTiles = 128, kWinogradBlock = 64;
// Bytes of transformed operands that are there at a time, and the most chunks of tiles they are cut into.
constexpr int64_t kBandBytes = 1 << 24, kBandChunks = 8;
// Pixels of one sum of the direct method, and the most slots of an image.
constexpr int64_t kDirectPixels = 1024, kDirectSlots = 16, kDirectIn = kVector, kDirectOut = 2 * kVector;
// Units of work that AMX is cut into where there are few channels.
constexpr int64_t kAmxBlock = 32, kAmxUnits = 64;

template <class Body>
void parallel(int64_t units, const Body& body) {
  torch::stable::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    const FlushDenormals mode;
    for (int64_t unit = begin; unit < end; ++unit) body(unit);
  });
}

float* scratch(int64_t floats) {
  return reinterpret_cast<float*>(kept(Kept::scratch, floats * int64_t{sizeof(float)}));
}

float* floats(char* bytes) { return reinterpret_cast<float*>(bytes); }

// The sums of weight_grad.h.
struct Sums {
  int64_t slots, block_in, block_out, blocks_in, blocks_out;
  Sums(int64_t slots_, int64_t in, int64_t out, const WeightGradArgs& a)
      : slots(slots_),
        block_in(in),
        block_out(out),
        blocks_in(ceil_div(a.cin, in)),
        blocks_out(ceil_div(a.cout, out)) {}
  int64_t blocks() const { return blocks_in * blocks_out; }
  int64_t block_floats() const { return kTaps * block_in * block_out; }
  int64_t units() const { return slots * blocks(); }
  int64_t bytes() const { return units() * block_floats() * int64_t{sizeof(float)}; }
};

// Writes dw block by block, and sees whether all of it is finite.
class Writer {
 public:
  Writer(const Sums& sums, const WeightGradArgs& args, const Tensor& dw, DType type)
      : s_(sums), a_(args), type_(type), passes_(select_passes(cpu_flags())), finite_(sums.blocks()) {
    data_ = static_cast<char*>(dw.mutable_data_ptr());
    for (int d = 0; d < 4; ++d) stride_[d] = dw.stride(d);
  }

  // dw[o][i][tap] of a block from its sums [i][tap][o].
  void write(int64_t block, const float* sums) {
    const int64_t in = block / s_.blocks_out * s_.block_in, out = block % s_.blocks_out * s_.block_out;
    const int64_t rows = std::min(s_.block_in, a_.cin - in) * kTaps, outs = std::min(s_.block_out, a_.cout - out);
    const int64_t pitch = s_.block_out, size = element_size(type_);
    bool finite = true;
    char* to = data_ + (out * stride_[0] + in * stride_[1]) * size;
    if (stride_[1] == kTaps && stride_[2] == 3 && stride_[3] == 1) {
      // Some rows at a time, which stay in L1 while every o takes its part of a line.
      constexpr int64_t kRows = 8 * kTaps;
      for (int64_t r = 0; r < rows; r += kRows) {
        const int64_t count = std::min(kRows, rows - r);
        finite &= passes_.transpose(sums + r * pitch, pitch, count, outs, to + r * size, stride_[0], type_);
      }
      finite_[block] = finite;
      return;
    }
    for (int64_t tap = 0; tap < kTaps; ++tap) {  // channels_last
      char* first = to + (tap / 3 * stride_[2] + tap % 3 * stride_[3]) * size;
      finite &= passes_.transpose(sums + tap * pitch, kTaps * pitch, rows / kTaps, outs, first, stride_[0], type_);
    }
    finite_[block] = finite;
  }

  // The same for all blocks, from the sums of all slots.
  void reduce(float* sums) {
    const int64_t step = s_.blocks() * s_.block_floats();
    parallel(s_.blocks(), [&](int64_t block) {
      float* total = sums + block * s_.block_floats();
      for (int64_t slot = 1; slot < s_.slots; ++slot) {
        const float* more = total + slot * step;
        for (int64_t i = 0; i < s_.block_floats(); ++i) total[i] += more[i];
      }
      write(block, total);
    });
  }

  bool finite() const { return std::find(finite_.begin(), finite_.end(), 0) == finite_.end(); }

 private:
  const Sums& s_;
  const WeightGradArgs& a_;
  DType type_;
  const Passes& passes_;
  std::vector<char> finite_;
  char* data_;
  int64_t stride_[4];
};

bool by_winograd(const WeightGradArgs& a, const WeightGrad& method) {
  const int64_t tiles = ceil_div(a.h, kTile) * ceil_div(a.w, kTile);
  // The way back from the 36 planes costs some 250 products for a pair of channels.
  return method.winograd && a.type == DType::f32 && a.cin % kVector == 0 && a.cout % kVector == 0 &&
         a.n * kPlanes * tiles + 250 < a.n * kTaps * a.h * a.w;
}

bool run_winograd(const WeightGradArgs& a, const WeightGradF32& isa, const Tensor& dw, DType type) {
  const int64_t tiles = a.n * ceil_div(a.h, kTile) * ceil_div(a.w, kTile), chunks = ceil_div(tiles, kChunkTiles);
  const int64_t blocks_x = a.cin / kVector, blocks = blocks_x + a.cout / kVector, most = std::min(tiles, kChunkTiles);
  const int64_t block_floats = most * kVector, plane = blocks * block_floats + kSkew, chunk_floats = kPlanes * plane;
  const int64_t fit = kBandBytes / (chunk_floats * int64_t{sizeof(float)});
  const int64_t band = std::min(chunks, std::clamp<int64_t>(fit, 1, kBandChunks));
  const Sums s(band, kWinogradBlock, kWinogradBlock, a);
  // Sums that are complete when a unit is done need not be kept.
  const bool at_once = chunks == 1;
  float* const operands = floats(kept(Kept::x, band * chunk_floats * int64_t{sizeof(float)}));
  float* const sums = floats(kept(Kept::sums, at_once ? 0 : s.bytes()));
  Writer writer(s, a, dw, type);
  const int64_t m_plane = kWinogradBlock * kWinogradBlock + kSkew;
  for (int64_t first = 0; first < chunks; first += band) {
    const int64_t count = std::min(band, chunks - first);
    parallel(count * blocks, [&](int64_t unit) {
      const int64_t chunk = unit / blocks, block = unit % blocks, begin = (first + chunk) * kChunkTiles;
      const int64_t end = std::min(begin + kChunkTiles, tiles);
      float* out = operands + chunk * chunk_floats + block * block_floats;
      if (block < blocks_x) {
        isa.transform_x(a, block * kVector, begin, end, out, plane);
      } else {
        isa.transform_dy(a, (block - blocks_x) * kVector, begin, end, out, plane);
      }
    });
    parallel(count * s.blocks(), [&](int64_t unit) {
      const int64_t chunk = unit / s.blocks(), block = unit % s.blocks();
      const int64_t in = block / s.blocks_out * kWinogradBlock, out = block % s.blocks_out * kWinogradBlock;
      const int64_t ins = std::min(kWinogradBlock, a.cin - in), outs = std::min(kWinogradBlock, a.cout - out);
      const int64_t k = std::min(kChunkTiles, tiles - (first + chunk) * kChunkTiles);
      float* m = scratch(kPlanes * m_plane + s.block_floats());
      float* total = at_once ? m + kPlanes * m_plane : sums + unit * s.block_floats();
      for (int64_t xi = 0; xi < kPlanes; ++xi) {
        const float* v = operands + chunk * chunk_floats + xi * plane + in / kVector * block_floats;
        const float* w = operands + chunk * chunk_floats + xi * plane + (blocks_x + out / kVector) * block_floats;
        // Each call fetches half a block of the next plane: they come from far away, and in pieces too short for the
        // processor to foresee.
        const int64_t half = block_floats / 2, halves = 2 * ins / kVector;
        int64_t call = 0;
        for (int64_t o = 0; o < outs; o += 2 * kVector) {
          for (int64_t i = 0; i < ins; i += isa.rows, ++call) {
            const float* ahead = plane + (call < halves ? v + call * half : w + (call - halves) * half);
            isa.outer(v + i / kVector * block_floats + i % kVector, isa.rows, w + o / kVector * block_floats,
                      block_floats, (outs - o) / kVector, k, true, m + xi * m_plane + i * kWinogradBlock + o,
                      kWinogradBlock, ahead);
          }
        }
      }
      for (int64_t i = 0; i < ins; ++i) {
        isa.transform_back(m + i * kWinogradBlock, m_plane, kWinogradBlock / kVector, first == 0,
                           total + i * kTaps * kWinogradBlock, kWinogradBlock);
      }
      if (at_once) writer.write(block, total);
    });
  }
  if (!at_once) writer.reduce(sums);
  return writer.finite();
}

void run_direct(const WeightGradArgs& a, const WeightGradF32& isa, const Tensor& dw, DType type) {
  const MicroKernel& layout = find_microkernel("portable_f32", DType::f32, Precision::highest, "");
  const int64_t size = element_size(a.type), pitch = (a.w + 2) * kVector, plane = (a.h + 2) * pitch;
  const int64_t rows = std::max(ceil_div(kDirectPixels, a.w), ceil_div(a.h, kDirectSlots));
  const Sums s(ceil_div(a.h, rows), kDirectIn, kDirectOut, a);
  char* const x = kept(Kept::x, map_bytes(s.blocks_in, a.h, a.w));
  char* const dy = kept(Kept::dy, map_bytes(2 * s.blocks_out, a.h, a.w));
  float* const sums = floats(kept(Kept::sums, s.bytes()));
  for (int64_t image = 0; image < a.n; ++image) {
    const auto source = [&](const char* maps, int64_t c) {
      char* data = const_cast<char*>(maps) + image * a.h * a.w * c * size;
      return Image{data, a.type, c, a.h, a.w, 1, a.w * c, c};
    };
    const Image from[2] = {source(a.x, a.cin), source(a.dy, a.cout)};
    parallel(2 * (a.h + 2), [&](int64_t unit) {
      const int64_t which = unit % 2, row = unit / 2;
      char* map = which == 0 ? x : dy;
      pack_row(from[which], layout, row, map + row * pitch * 4, plane * 4);
    });
    parallel(s.units(), [&](int64_t unit) {
      const int64_t slot = unit / s.blocks(), block = unit % s.blocks();
      const int64_t in = block / s.blocks_out, out = block % s.blocks_out * 2;
      const int64_t ins = std::min(kDirectIn, a.cin - in * kDirectIn);
      const int64_t outs = std::min<int64_t>(2, ceil_div(a.cout, kVector) - out);
      const int64_t begin = slot * rows, end = std::min(begin + rows, a.h);
      alignas(64) float m[kTaps * kDirectIn * kDirectOut] = {};
      for (int64_t row = begin; row < end; ++row) {
        const float* w = floats(dy) + out * plane + (row + 1) * pitch + kVector;
        for (int64_t tap = 0; tap < kTaps; ++tap) {
          const float* v = floats(x) + in * plane + (row + tap / 3) * pitch + tap % 3 * kVector;
          for (int64_t i = 0; i < ins; i += isa.rows) {
            isa.outer(v + i, ins - i, w, plane, outs, a.w, row == begin, m + (i * kTaps + tap) * kDirectOut,
                      kTaps * kDirectOut, v);
          }
        }
      }
      float* total = sums + unit * s.block_floats();
      for (int64_t i = 0; i < s.block_floats(); ++i) total[i] = image == 0 ? m[i] : total[i] + m[i];
    });
  }
  Writer(s, a, dw, type).reduce(sums);
}

#if defined(__x86_64__)
bool run_amx(const WeightGradArgs& a, const Tensor& dw, DType type) {
  const WeightGradAmx plan(a.h, a.w, a.cin, a.cout);
  const int64_t chunks = a.n * plan.chunks();
  const int64_t blocks = ceil_div(a.cin, kAmxBlock) * ceil_div(a.cout, kAmxBlock);
  const Sums s(std::clamp(kAmxUnits / blocks, int64_t{1}, chunks), kAmxBlock, kAmxBlock, a);
  const bool at_once = s.slots == 1;
  char* const x = kept(Kept::x, a.n * plan.x_image);
  char* const dy = kept(Kept::dy, a.n * plan.dy_image);
  float* const sums = floats(kept(Kept::sums, at_once ? 0 : s.bytes()));
  Writer writer(s, a, dw, type);
  parallel(a.n * a.h, [&](int64_t unit) {
    const int64_t image = unit / a.h, row = unit % a.h;
    weight_grad_pack_x_amx(a, plan, image, row, x + image * plan.x_image);
    weight_grad_pack_dy_amx(a, plan, image, row, dy + image * plan.dy_image);
  });
  parallel(s.units(), [&](int64_t unit) {
    const int64_t slot = unit / s.blocks(), block = unit % s.blocks();
    float* total = at_once ? scratch(s.block_floats()) : sums + unit * s.block_floats();
    weight_grad_amx(plan, x + block / s.blocks_out * kAmxBlock * plan.x_row_bytes,
                    dy + block % s.blocks_out * 2 * plan.dy_block, slot * chunks / s.slots,
                    (slot + 1) * chunks / s.slots, total);
    if (at_once) writer.write(block, total);
  });
  if (!at_once) writer.reduce(sums);
  return writer.finite();
}
#else
bool run_amx(const WeightGradArgs&, const Tensor&, DType) { return false; }
#endif

std::string method_name(const WeightGradArgs& a, const WeightGrad& method) {
  if (method.amx && a.type == DType::bf16) return "amx";
  return std::string(method.f32->name) + (by_winograd(a, method) ? " winograd" : "");
}

}  // namespace

const WeightGrad& weight_grad_of(const std::string& kernel) {
  for (const WeightGrad& row : kTable) {
    if (kernel == row.kernel) return row;
  }
  throw std::runtime_error("kernel '" + kernel + "' has no weight gradient");
}

Tensor conv3x3_weight_grad_cpu(const Tensor& x, const Tensor& dy, const Tensor& weight, const std::string& kernel) {
  check_map(x, "conv3x3_weight_grad: x");
  check_map(dy, "conv3x3_weight_grad: dy");
  WeightGradArgs a{};
  a.type = dtype_of(x, "conv3x3_weight_grad: x");
  a.n = x.size(0);
  a.cin = x.size(1);
  a.h = x.size(2);
  a.w = x.size(3);
  a.cout = dy.size(1);
  STD_TORCH_CHECK(x.scalar_type() == dy.scalar_type() && dy.size(0) == a.n && dy.size(2) == a.h && dy.size(3) == a.w,
                  "conv3x3_weight_grad: x and dy must have one dtype and one size, batch and pixels");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == a.cout && weight.size(1) == a.cin && weight.size(2) == 3 &&
                      weight.size(3) == 3,
                  "conv3x3_weight_grad: weight must be [", a.cout, ", ", a.cin, ", 3, 3]");
  STD_TORCH_CHECK(a.n > 0 && a.h > 0 && a.w > 0, "conv3x3_weight_grad: x has no pixels");
  const DType type = dtype_of(weight, "conv3x3_weight_grad: weight");
  STD_TORCH_CHECK(a.type != DType::f16 && type != DType::f16, "conv3x3_weight_grad: float32 and bfloat16 only");
  a.x = static_cast<const char*>(x.const_data_ptr());
  a.dy = static_cast<const char*>(dy.const_data_ptr());
  const DType selected = a.type == DType::bf16 ? DType::bf16 : DType::f32;
  const std::string name = find_microkernel(kernel, selected, Precision::highest, cpu_flags()).name;
  const WeightGrad& method = weight_grad_of(name);
  Tensor dw = empty_image(weight, a.cout, a.cin, 3, 3, suggests_channels_last(weight));
  const std::string how = method_name(a, method);
  // What overflows in a transform, and inf and NaN anywhere, would spread to where PyTorch has none.
  const bool done = how == "amx"              ? run_amx(a, dw, type)
                    : how != method.f32->name ? run_winograd(a, *method.f32, dw, type)
                                              : false;
  if (done) return dw;
  run_direct(a, *method.f32, dw, type);
  return dw;
}

std::string cpu_weight_grad(const std::string& kernel, const std::string& dtype, int64_t n, int64_t cin, int64_t cout,
                            int64_t h, int64_t w) {
  WeightGradArgs a{};
  a.type = dtype == "bfloat16" ? DType::bf16 : DType::f32;
  a.n = n;
  a.cin = cin;
  a.cout = cout;
  a.h = h;
  a.w = w;
  return method_name(a, weight_grad_of(kernel));
}

}  // namespace vgg_fast
