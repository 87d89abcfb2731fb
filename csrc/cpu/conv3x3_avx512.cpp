// fp32 with AVX-512: 14 pixels x 32 channels are 28 of the 32 registers, and 14 divides every width of a 224 VGG.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <type_traits>

#include "weight_grad.h"
#include "winograd.h"

#define VGG_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))

namespace vgg_fast {
namespace {

#include "isa_avx512.inl"

struct Avx512F32 : Avx512 {
  static constexpr int kPixels = 14;
  using Words = __m512;
  VGG_TARGET static Words load_words(const uint32_t* p) { return _mm512_loadu_ps(p); }
  VGG_TARGET static Words broadcast_word(const char* p) { return _mm512_set1_ps(*reinterpret_cast<const float*>(p)); }
  VGG_TARGET static Vec dot(Words x, Words w, Vec acc) { return _mm512_fmadd_ps(x, w, acc); }
};

#include "conv3x3_rows.inl"
#include "weight_grad_outer.inl"
#include "winograd_f32.inl"
#include "winograd_weight_grad.inl"

}  // namespace

VGG_TARGET void conv3x3_avx512_f32(const Conv3x3Args& args, int64_t group, int64_t row_begin, int64_t row_end,
                                   float* scratch) {
  conv3x3_rows<Avx512F32>(args, group, row_begin, row_end, scratch);
}

// What F(4x4) does not pay for, or a row of another layout needs: the direct kernel.
VGG_TARGET void conv3x3_avx512_winograd_f32(const Conv3x3Args& args, int64_t group, int64_t row_begin, int64_t row_end,
                                            float* scratch) {
  conv3x3_rows<Avx512F32>(args, group, row_begin, row_end, scratch);
}

VGG_TARGET void winograd_prepare_avx512_winograd_f32(const Conv3x3Args* images, const WinogradPlan& plan, int64_t unit,
                                                     float* shared) {
  winograd_prepare_unit<Avx512F32>(images, plan, unit, shared);
}

VGG_TARGET void winograd_run_avx512_winograd_f32(const Conv3x3Args* images, const WinogradPlan& plan, int64_t unit,
                                                 const float* shared, float* scratch) {
  winograd_run_unit<Avx512F32>(images, plan, unit, shared, scratch);
}

const WeightGradF32 kWeightGradAvx512{"avx512",
                                      Avx512F32::kOuterRows,
                                      outer<Avx512F32>,
                                      weight_grad_transform_x<Avx512F32>,
                                      weight_grad_transform_dy<Avx512F32>,
                                      weight_grad_transform_back<Avx512F32>};

}  // namespace vgg_fast
#endif
