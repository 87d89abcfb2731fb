// The planner of the tensor-core kernels for ctypes.
#include "conv3x3_mma_cuda.h"

using namespace vgg_fast::cuda;

extern "C" {

__attribute__((visibility("default"))) const char* mma_unsupported_for(const MmaProblem* problem) {
  return mma_unsupported(*problem);
}

__attribute__((visibility("default"))) void plan_for(const MmaProblem* problem, int multiprocessors, int tile,
                                                     int split, MmaPlan* plan) {
  *plan = plan_mma(*problem, multiprocessors, tile, split);
}

__attribute__((visibility("default"))) void args_for(const MmaProblem* problem, const MmaPlan* plan, MmaArgs* args) {
  *args = mma_args(*problem, *plan);
}
}
