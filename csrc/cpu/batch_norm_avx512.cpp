// The passes of batch_norm.h with AVX-512.
#if defined(__x86_64__)
#include "batch_norm.h"

#define VGG_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))

namespace vgg_fast {
namespace {

#include "batch_norm.inl"
#include "transpose.inl"

}  // namespace

const Passes kPassesAvx512{"avx512",
                           "avx512f avx512bw avx512vl avx512dq",
                           pass_value_unit,
                           pass_moments_unit,
                           pass_gradient_either,
                           pass_gated_unit,
                           pass_gradient_sums_unit,
                           transpose,
                           pack_taps};

}  // namespace vgg_fast
#endif
