#include "block1.cuh"
#include "launch.cuh"

namespace vgg_fast::cuda {
namespace {

template <typename T>
const char* launch_typed(const Block1Args& args, const MmaPlan& plan, Queue queue) {
  if (plan.shared_bytes != Block1<T>::kSharedBytes) return "the plan is not that of block1";
  cudaError_t error = cudaSetDevice(queue.device);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(block1_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return launch_blocks(block1_kernel<T>, plan.rows, Block1<T>::kThreads, plan.shared_bytes, args, queue);
}

}  // namespace

const char* launch_block1(const Block1Args& args, DType dtype, const MmaPlan& plan, Queue queue) {
  if (dtype == DType::kFloat16) return launch_typed<__half>(args, plan, queue);
  if (dtype == DType::kBFloat16) return launch_typed<__nv_bfloat16>(args, plan, queue);
  return "block1 is for 16-bit types";
}

}  // namespace vgg_fast::cuda
