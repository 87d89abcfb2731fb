// Fully connected layers in fp32 with AVX-512: 8 rows x 3 images are 24 of the 32 registers, and 8 rows alone are as
// many streams and independent sums as batch 1 needs.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "../linear.h"
#include "convert.h"

#define VGG_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))

namespace vgg_fast {
namespace {

struct Avx512 {
  static constexpr int kLanes = 16, kRows = 8, kImages = 3;
  using Vec = __m512;

  VGG_TARGET static Vec zero() { return _mm512_setzero_ps(); }
  VGG_TARGET static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  VGG_TARGET static void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
  VGG_TARGET static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  VGG_TARGET static void in_register(Vec& v) { asm("" : "+v"(v)); }
  VGG_TARGET static Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  VGG_TARGET static float sum(Vec v) { return _mm512_reduce_add_ps(v); }
  template <WeightFormat kFormat>
  VGG_TARGET static Vec weights(const char* p) {
    if constexpr (kFormat == WeightFormat::f32) {
      return _mm512_loadu_ps(p);
    } else if constexpr (kFormat == WeightFormat::f24) {
      // Each quarter gets its 12 bytes, then bytes 3i to 3i + 2 of them become the upper three of lane i.
      const __m512i quarters = _mm512_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11);
      const __m512i upper = _mm512_set4_epi32(0x0b0a0980, 0x08070680, 0x05040380, 0x02010080);
      const __m512i dense = _mm512_maskz_loadu_epi32(0x0fff, p);
      return _mm512_castsi512_ps(_mm512_shuffle_epi8(_mm512_permutexvar_epi32(quarters, dense), upper));
    } else {
      const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
      if constexpr (kFormat == WeightFormat::f16) return _mm512_cvtph_ps(halves);
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
  }
};

#include "linear_rows.inl"

}  // namespace

VGG_TARGET void linear_avx512_f32(const LinearArgs& args, int64_t begin, int64_t end, char* scratch) {
  linear_any_type<Avx512>(args, begin, end, scratch);
}

VGG_TARGET void linear_avx512_f24(const LinearArgs& args, int64_t begin, int64_t end, char* scratch) {
  linear_rows<Avx512, WeightFormat::f24>(args, begin, end, scratch);
}

}  // namespace vgg_fast
#endif
