// Storage types as fp32 and back (one rounding, to nearest even), and the maximum as PyTorch's pool takes it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace vgg_fast::cuda {

__device__ inline float widen(float value) { return value; }
__device__ inline float widen(__half value) { return __half2float(value); }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ inline void narrow(float value, float& out) { out = value; }
__device__ inline void narrow(float value, __half& out) { out = __float2half_rn(value); }
__device__ inline void narrow(float value, __nv_bfloat16& out) { out = __float2bfloat16_rn(value); }

// Not fmaxf, which drops NaN. Ties keep the first value: the sign of zero comes out as PyTorch's.
__device__ inline float pool_max(float best, float value) { return value > best || value != value ? value : best; }

}  // namespace vgg_fast::cuda
