// fp32 with AVX2 and FMA: 6 pixels x 16 channels are 12 of the 16 registers, two hold weights, one an input.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <type_traits>

#include "weight_grad.h"
#include "winograd.h"

#define VGG_TARGET __attribute__((target("avx2,fma,f16c")))

namespace vgg_fast {
namespace {

struct Avx2 {
  static constexpr int kLanes = 8, kGroup = 16, kPixels = 6, kOuterRows = 4;
  using Vec = __m256;
  using Words = __m256;
  using Mask = __m256;

  VGG_TARGET static Vec zero() { return _mm256_setzero_ps(); }
  VGG_TARGET static Vec splat(float value) { return _mm256_set1_ps(value); }
  VGG_TARGET static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  VGG_TARGET static void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
  VGG_TARGET static Words load_words(const uint32_t* p) { return load(reinterpret_cast<const float*>(p)); }
  VGG_TARGET static Words broadcast_word(const char* p) {
    return _mm256_broadcast_ss(reinterpret_cast<const float*>(p));
  }
  VGG_TARGET static Vec dot(Words x, Words w, Vec acc) { return _mm256_fmadd_ps(x, w, acc); }
  VGG_TARGET static Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  // maxps returns its second operand when one is a NaN: a NaN in the first has to be put back.
  VGG_TARGET static Vec max_or_nan(Vec a, Vec b) {
    return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  }
  // ... and also when both are zeros, so that the ReLU of -0.0 is -0.0, as PyTorch has it.
  VGG_TARGET static Vec clamp_below(Vec v, Vec floor) { return _mm256_max_ps(floor, v); }
  // Magnitudes compared as integers: an infinity is larger than any number, a NaN larger still.
  VGG_TARGET static Vec larger_magnitude(Vec so_far, Vec v) {
    const __m256i bits = _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff));
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(so_far), bits));
  }
  VGG_TARGET static bool exceeds(Vec v, float limit) {  // also where v is NaN
    return _mm256_movemask_ps(_mm256_cmp_ps(v, splat(limit), _CMP_NLE_UQ)) != 0;
  }
  VGG_TARGET static Mask first_lanes(int64_t n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n > 8 ? 8 : n < 0 ? 0 : int(n)), lane));
  }
  VGG_TARGET static Vec keep(Vec v, Mask mask) { return _mm256_and_ps(v, mask); }
  // A bit for every lane.
  VGG_TARGET static unsigned greater_or_nan(Vec v, Vec than) {
    return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(v, than, _CMP_GT_OQ), _mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
  }
  VGG_TARGET static unsigned not_below_or_zero(Vec v) {
    return _mm256_movemask_ps(_mm256_cmp_ps(v, zero(), _CMP_NLE_UQ));
  }
  VGG_TARGET static Vec keep_bits(Vec v, unsigned bits) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(int(bits)), bit);
    return keep(v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, bit)));
  }
  VGG_TARGET static __m256i bf16_bits(Vec v) {  // the rounded value's bits, in the upper halves
    const __m256i bits = _mm256_castps_si256(v), one = _mm256_set1_epi32(1);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    const __m256 chosen = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan);
    return _mm256_and_si256(_mm256_castps_si256(chosen), _mm256_set1_epi32(int(0xffff0000u)));
  }
  VGG_TARGET static void store_bf16(char* p, Vec v) {
    const __m256i low = _mm256_srli_epi32(bf16_bits(v), 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
  }
  VGG_TARGET static void store_f16(char* p, Vec v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  VGG_TARGET static Vec round_bf16(Vec v) { return _mm256_castsi256_ps(bf16_bits(v)); }
  VGG_TARGET static Vec round_f16(Vec v) { return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
};

#include "conv3x3_rows.inl"
#include "weight_grad_outer.inl"
#include "winograd_f32.inl"
#include "winograd_weight_grad.inl"

}  // namespace

VGG_TARGET void conv3x3_avx2_f32(const Conv3x3Args& args, int64_t group, int64_t row_begin, int64_t row_end,
                                 float* scratch) {
  conv3x3_rows<Avx2>(args, group, row_begin, row_end, scratch);
}

// What F(4x4) does not pay for, or a row of another layout needs: the direct kernel.
VGG_TARGET void conv3x3_avx2_winograd_f32(const Conv3x3Args& args, int64_t group, int64_t row_begin, int64_t row_end,
                                          float* scratch) {
  conv3x3_rows<Avx2>(args, group, row_begin, row_end, scratch);
}

VGG_TARGET void winograd_prepare_avx2_winograd_f32(const Conv3x3Args* images, const WinogradPlan& plan, int64_t unit,
                                                   float* shared) {
  winograd_prepare_unit<Avx2>(images, plan, unit, shared);
}

VGG_TARGET void winograd_run_avx2_winograd_f32(const Conv3x3Args* images, const WinogradPlan& plan, int64_t unit,
                                               const float* shared, float* scratch) {
  winograd_run_unit<Avx2>(images, plan, unit, shared, scratch);
}

const WeightGradF32 kWeightGradAvx2{"avx2",
                                    Avx2::kOuterRows,
                                    outer<Avx2>,
                                    weight_grad_transform_x<Avx2>,
                                    weight_grad_transform_dy<Avx2>,
                                    weight_grad_transform_back<Avx2>};

}  // namespace vgg_fast
#endif
