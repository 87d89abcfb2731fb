// The passes of batch_norm.h with AVX2.
#if defined(__x86_64__)
#include "batch_norm.h"

#define VGG_TARGET __attribute__((target("avx2,fma,f16c")))

namespace vgg_fast {
namespace {

#include "batch_norm.inl"
#include "transpose.inl"

}  // namespace

const Passes kPassesAvx2{
    "avx2",          "avx2 fma f16c",         pass_value_unit, pass_moments_unit, pass_gradient_either,
    pass_gated_unit, pass_gradient_sums_unit, transpose,       pack_taps};

}  // namespace vgg_fast
#endif
