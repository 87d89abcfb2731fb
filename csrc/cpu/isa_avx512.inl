// What the AVX-512 files share. Include inside an anonymous namespace after defining VGG_TARGET.

struct Avx512 {
  static constexpr int kLanes = 16, kGroup = 32, kOuterRows = 8;
  using Vec = __m512;
  using Mask = __mmask16;

  VGG_TARGET static Vec zero() { return _mm512_setzero_ps(); }
  VGG_TARGET static Vec splat(float value) { return _mm512_set1_ps(value); }
  VGG_TARGET static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  VGG_TARGET static void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
  VGG_TARGET static Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  // maxps returns its second operand when one is a NaN: a NaN in the first has to be put back.
  VGG_TARGET static Vec max_or_nan(Vec a, Vec b) {
    return _mm512_mask_mov_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
  }
  // ... and also when both are zeros, so that the ReLU of -0.0 is -0.0, as PyTorch has it.
  VGG_TARGET static Vec clamp_below(Vec v, Vec floor) { return _mm512_max_ps(floor, v); }
  // Magnitudes compared as integers: an infinity is larger than any number, a NaN larger still.
  VGG_TARGET static Vec larger_magnitude(Vec so_far, Vec v) {
    const __m512i bits = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
    // maskz: the form without a mask passes an uninitialised register, which gcc 12 warns about in its own header.
    return _mm512_castsi512_ps(_mm512_maskz_max_epi32(0xffff, _mm512_castps_si512(so_far), bits));
  }
  VGG_TARGET static bool exceeds(Vec v, float limit) {  // also where v is NaN
    return _mm512_cmp_ps_mask(v, splat(limit), _CMP_NLE_UQ) != 0;
  }
  VGG_TARGET static Mask first_lanes(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : Mask((1u << n) - 1); }
  VGG_TARGET static Vec keep(Vec v, Mask mask) { return _mm512_maskz_mov_ps(mask, v); }
  // A bit for every lane.
  VGG_TARGET static unsigned greater_or_nan(Vec v, Vec than) {
    return _mm512_cmp_ps_mask(v, than, _CMP_GT_OQ) | _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  }
  VGG_TARGET static unsigned not_below_or_zero(Vec v) { return _mm512_cmp_ps_mask(v, zero(), _CMP_NLE_UQ); }
  VGG_TARGET static Vec keep_bits(Vec v, unsigned bits) { return keep(v, Mask(bits)); }
  VGG_TARGET static __m512i bf16_bits(Vec v) {  // the rounded value's bits, in the upper halves
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __m512i chosen = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet);
    return _mm512_and_si512(chosen, _mm512_set1_epi32(int(0xffff0000u)));
  }
  VGG_TARGET static void store_bf16(char* p, Vec v) {
    const __m256i packed = _mm512_cvtepi32_epi16(_mm512_srli_epi32(bf16_bits(v), 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed);
  }
  VGG_TARGET static void store_f16(char* p, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  // v as a sum of bf16 values, kParts planes `stride` bytes apart. What is not finite is all in the first part.
  template <int kParts>
  VGG_TARGET static void store_parts(char* p, int64_t stride, Vec v) {
    const __m512 zero = _mm512_setzero_ps();
    for (int part = 0; part < kParts; ++part, p += stride) {
      const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_sub_ps(v, v), zero, _CMP_EQ_OQ);
      __m512i bits = bf16_bits(v);
      // A finite value that rounds up to infinity is cut off instead: the next part has the rest.
      const __mmask16 overflow = _mm512_mask_cmpeq_epi32_mask(
          finite, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)), _mm512_set1_epi32(0x7f800000));
      bits = _mm512_mask_and_epi32(bits, overflow, _mm512_castps_si512(v), _mm512_set1_epi32(int(0xffff0000u)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
      v = _mm512_maskz_sub_ps(finite, v, _mm512_castsi512_ps(bits));
    }
  }
  VGG_TARGET static Vec round_bf16(Vec v) { return _mm512_castsi512_ps(bf16_bits(v)); }
  VGG_TARGET static Vec round_f16(Vec v) { return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
};
