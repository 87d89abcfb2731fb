#include <algorithm>
#include <cmath>

#include "conv3x3_sm90.cuh"
#include "conv3x3_sm90_cuda.h"

namespace vgg_fast::cuda {
namespace {

using namespace sm90;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

const char* text_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

// The driver's function, looked up at run time: nothing here links libcuda.
using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
}

// A tensor of five dimensions and the box of it that is copied at once, innermost first; strides in bytes.
const char* encode(CUtensorMap& map, DType dtype, const void* data, const cuuint64_t (&sizes)[5],
                   const cuuint64_t (&strides)[4], const cuuint32_t (&box)[5], CUtensorMapSwizzle swizzle) {
  static const Encode function = find_encode();
  if (!function) return "this driver has no cuTensorMapEncodeTiled; CUDA 12.0 or later has";
  constexpr cuuint32_t kEach[5] = {1, 1, 1, 1, 1};
  const CUresult result =
      function(&map, dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 5,
               const_cast<void*>(data), sizes, strides, box, kEach, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
               CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refused a tensor; please report its sizes";
}

// [n][cin / 8][h][w][8] of x: a box is a halo as the kernel wants it.
const char* encode_pixels(CUtensorMap& map, const Conv3x3Args& a) {
  const cuuint64_t n = a.n, h = a.h, w = a.w, pixel = 2 * a.cin;
  return encode(map, a.dtype, a.x, {8, w, h, pixel / kCell, n}, {pixel, w * pixel, kCell, h * w * pixel},
                {8, kHalo, kHalo, kChunk / 8, 1}, CU_TENSOR_MAP_SWIZZLE_NONE);
}

// [cout / 32][4 b][4 t][2 e][tap, ci] of weights whose channel is 32 a + 8 t + 2 b + e.
const char* encode_weights(CUtensorMap& map, const Conv3x3Args& a) {
  const cuuint64_t row = 9 * 2 * a.cin, groups = a.cout / 32;
  return encode(map, a.dtype, a.weight, {row / 2, 2, 4, 4, groups}, {row, 8 * row, 2 * row, 32 * row},
                {kChunk, 2, 4, 4, kColumns / 32}, CU_TENSOR_MAP_SWIZZLE_128B);
}

int64_t tiles_of(const Conv3x3Args& a) {
  return ceil_div(a.n * ceil_div(a.h, kBlock) * ceil_div(a.w, kBlock), kBlocks) * (a.cout / kColumns);
}

template <typename T>
const char* launch_typed(const Conv3x3Args& a, void* tap, Queue queue) {
  const auto kernel = a.pool ? conv3x3_sm90_kernel<T, true> : conv3x3_sm90_kernel<T, false>;
  int multiprocessors = 0;
  if (const char* error = text_of(cudaSetDevice(queue.device))) return error;
  if (const char* error =
          text_of(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, queue.device)))
    return error;
  if (const char* error =
          text_of(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes)))
    return error;
  CUtensorMap x, weight;
  if (const char* error = encode_pixels(x, a)) return error;
  if (const char* error = encode_weights(weight, a)) return error;
  Problem p{};
  p.affine = a.affine;
  p.out = a.out;
  p.tap = tap;
  p.n = static_cast<int>(a.n);
  p.h = static_cast<int>(a.h);
  p.w = static_cast<int>(a.w);
  p.cin = static_cast<int>(a.cin);
  p.cout = static_cast<int>(a.cout);
  p.down = static_cast<int>(ceil_div(a.h, kBlock));
  p.across = static_cast<int>(ceil_div(a.w, kBlock));
  p.tiles = static_cast<int>(tiles_of(a));
  p.floor = a.relu ? 0.0f : -INFINITY;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min(p.tiles, multiprocessors)));
  config.blockDim = dim3(sm90::kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = static_cast<cudaStream_t>(queue.stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, x, weight, p);
  return text_of(error == cudaSuccess ? cudaGetLastError() : error);
}

}  // namespace

const char* conv3x3_sm90_unsupported(const Conv3x3Args& a, int sm) {
  if (sm != 90) return "its machine code is for compute capability 9.0 alone";
  if (a.dtype == DType::kFloat32) return "it multiplies fp16 and bf16 alone";
  if (a.cin % kChunk || a.cout % kColumns) return "cin must be a multiple of 64 and cout one of 128";
  for (const void* pointer : {a.x, a.weight, static_cast<const void*>(a.affine), static_cast<const void*>(a.out)})
    if (reinterpret_cast<uintptr_t>(pointer) % 16) return "a tensor is not aligned to 16 bytes";
  // The limits of a tensor map's strides (2^40 bytes), and of the numbers here.
  if (a.n * a.h * a.w >= INT32_MAX / 4 || a.h * a.w * a.cin >= int64_t{1} << 39) return "more than 2^29 pixels";
  return nullptr;
}

const char* launch_conv3x3_sm90(const Conv3x3Args& args, void* tap, Queue queue) {
  if (const char* reason = conv3x3_sm90_unsupported(args, 90)) return reason;
  if (tap && !args.pool) return "a tap without pool is the output";
  if (args.n == 0) return nullptr;
  return args.dtype == DType::kFloat16 ? launch_typed<__half>(args, tap, queue)
                                       : launch_typed<__nv_bfloat16>(args, tap, queue);
}

}  // namespace vgg_fast::cuda
