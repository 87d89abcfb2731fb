// Fully connected layers in fp32 with AVX2 and FMA: 4 rows x 3 images are 12 of the 16 registers.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "../linear.h"
#include "convert.h"

#define VGG_TARGET __attribute__((target("avx2,fma,f16c")))

namespace vgg_fast {
namespace {

struct Avx2 {
  static constexpr int kLanes = 8, kRows = 4, kImages = 3;
  using Vec = __m256;

  VGG_TARGET static Vec zero() { return _mm256_setzero_ps(); }
  VGG_TARGET static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  VGG_TARGET static void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
  VGG_TARGET static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  VGG_TARGET static void in_register(Vec& v) { asm("" : "+x"(v)); }
  VGG_TARGET static Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  VGG_TARGET static float sum(Vec v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
  }
  template <WeightFormat kFormat>
  VGG_TARGET static Vec weights(const char* p) {
    if constexpr (kFormat == WeightFormat::f32) {
      return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
    } else {
      const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
      if constexpr (kFormat == WeightFormat::f16) return _mm256_cvtph_ps(halves);
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
    }
  }
};

#include "linear_rows.inl"

}  // namespace

VGG_TARGET void linear_avx2_f32(const LinearArgs& args, int64_t begin, int64_t end, char* scratch) {
  linear_any_type<Avx2>(args, begin, end, scratch);
}

}  // namespace vgg_fast
#endif
