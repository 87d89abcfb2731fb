// The passes of batch_norm.h on any CPU: the compiler splits a vector into what the baseline instruction set has.
#include "batch_norm.h"

#define VGG_TARGET

namespace vgg_fast {
namespace {

#include "batch_norm.inl"
#include "transpose.inl"

}  // namespace

const Passes kPassesPortable{"portable",
                             "",
                             pass_value_unit,
                             pass_moments_unit,
                             pass_gradient_either,
                             pass_gated_unit,
                             pass_gradient_sums_unit,
                             transpose,
                             pack_taps};

}  // namespace vgg_fast
