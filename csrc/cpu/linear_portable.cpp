// Fully connected layers in fp32 on any CPU: the compiler splits a 16-lane vector into what the baseline has.
#include <algorithm>
#include <cstring>

#include "../linear.h"
#include "convert.h"

#define VGG_TARGET

namespace vgg_fast {
namespace {

struct Portable {
  static constexpr int kLanes = 16, kRows = 2, kImages = 2;
  typedef float Vec __attribute__((vector_size(64), aligned(4), may_alias));

  static Vec zero() { return Vec{}; }
  static Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
  static void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
  static Vec add(Vec a, Vec b) { return a + b; }
  static void in_register(Vec&) {}
  static Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }
  static float sum(Vec v) {
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) v[lane] += v[lane + half];
    }
    return v[0];
  }
  template <WeightFormat kFormat>
  static Vec weights(const char* p) {
    Vec v;
    if constexpr (kFormat == WeightFormat::f32) {
      std::memcpy(&v, p, sizeof v);
    } else {
      uint16_t halves[kLanes];
      std::memcpy(halves, p, sizeof halves);
      for (int i = 0; i < kLanes; ++i) {
        v[i] = kFormat == WeightFormat::bf16 ? bf16_to_float(halves[i]) : f16_to_float(halves[i]);
      }
    }
    return v;
  }
};

#include "linear_rows.inl"

}  // namespace

void linear_portable_f32(const LinearArgs& args, int64_t begin, int64_t end, char* scratch) {
  linear_any_type<Portable>(args, begin, end, scratch);
}

}  // namespace vgg_fast
