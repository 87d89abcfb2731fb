// fp32 on any CPU: the compiler splits a 16-lane vector into what the baseline instruction set has.
#include <algorithm>
#include <type_traits>

#include "../conv3x3.h"
#include "convert.h"
#include "weight_grad.h"

#define VGG_TARGET

namespace vgg_fast {
namespace {

struct Portable {
  static constexpr int kLanes = 16, kGroup = 16, kPixels = 2, kOuterRows = 2;
  typedef float Vec __attribute__((vector_size(64), aligned(4), may_alias));
  typedef int32_t Mask __attribute__((vector_size(64)));
  using Words = Vec;

  static Vec zero() { return Vec{}; }
  static Vec splat(float value) { return Vec{} + value; }
  static Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
  static void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
  static Words load_words(const uint32_t* p) { return *reinterpret_cast<const Vec*>(p); }
  static Words broadcast_word(const char* p) {
    float value;
    std::memcpy(&value, p, sizeof value);
    return splat(value);
  }
  static Vec dot(Words x, Words w, Vec acc) { return x * w + acc; }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }
  static Vec max_or_nan(Vec a, Vec b) {
    const Mask take_b = (b > a) | (b != b);
    return take_b ? b : a;
  }
  static Vec clamp_below(Vec v, Vec floor) {
    const Mask below = v < floor;
    return below ? floor : v;
  }
  static Mask first_lanes(int64_t n) {
    Mask mask;
    for (int64_t i = 0; i < kLanes; ++i) mask[i] = i < n ? -1 : 0;
    return mask;
  }
  static Vec keep(Vec v, Mask mask) { return mask ? v : Vec{}; }
  // A bit for every lane.
  static unsigned bits_of(Mask mask) {
    unsigned bits = 0;
    for (int i = 0; i < kLanes; ++i) bits |= unsigned(mask[i] != 0) << i;
    return bits;
  }
  static unsigned greater_or_nan(Vec v, Vec than) { return bits_of((v > than) | (v != v)); }
  static unsigned not_below_or_zero(Vec v) { return bits_of(~(v <= Vec{})); }
  static Vec keep_bits(Vec v, unsigned bits) {
    for (int i = 0; i < kLanes; ++i) v[i] = bits >> i & 1 ? v[i] : 0.0f;
    return v;
  }
  static void store_bf16(char* p, Vec v) {
    uint16_t out[kLanes];
    for (int i = 0; i < kLanes; ++i) out[i] = float_to_bf16(v[i]);
    std::memcpy(p, out, sizeof out);
  }
  static void store_f16(char* p, Vec v) {
    uint16_t out[kLanes];
    for (int i = 0; i < kLanes; ++i) out[i] = float_to_f16(v[i]);
    std::memcpy(p, out, sizeof out);
  }
  static Vec round_bf16(Vec v) {
    for (int i = 0; i < kLanes; ++i) v[i] = bf16_to_float(float_to_bf16(v[i]));
    return v;
  }
  static Vec round_f16(Vec v) {
    for (int i = 0; i < kLanes; ++i) v[i] = f16_to_float(float_to_f16(v[i]));
    return v;
  }
};

#include "conv3x3_rows.inl"
#include "weight_grad_outer.inl"

}  // namespace

void conv3x3_portable_f32(const Conv3x3Args& args, int64_t group, int64_t row_begin, int64_t row_end, float* scratch) {
  conv3x3_rows<Portable>(args, group, row_begin, row_end, scratch);
}

const WeightGradF32 kWeightGradPortable{"portable", Portable::kOuterRows, outer<Portable>, nullptr, nullptr, nullptr};

}  // namespace vgg_fast
