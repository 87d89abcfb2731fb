// bf16 pairs with AVX512_BF16 (vdpbf16ps), in the register block of the fp32 kernel.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "../conv3x3.h"

#define VGG_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

namespace vgg_fast {
namespace {

#include "isa_avx512.inl"

struct Avx512Bf16 : Avx512 {
  static constexpr int kPixels = 14;
  using Words = __m512i;
  VGG_TARGET static Words load_words(const uint32_t* p) { return _mm512_loadu_si512(p); }
  VGG_TARGET static Words broadcast_word(const char* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return _mm512_set1_epi32(pair);
  }
  VGG_TARGET static Vec dot(Words x, Words w, Vec acc) { return _mm512_dpbf16_ps(acc, (__m512bh)x, (__m512bh)w); }
};

#include "conv3x3_rows.inl"

}  // namespace

VGG_TARGET void conv3x3_avx512_bf16(const Conv3x3Args& args, int64_t group, int64_t row_begin, int64_t row_end,
                                    float* scratch) {
  conv3x3_rows<Avx512Bf16>(args, group, row_begin, row_end, scratch);
}

}  // namespace vgg_fast
#endif
