// The host side of conv3x3_sm90 for ctypes.
#include "conv3x3_sm90_cuda.h"

using namespace vgg_fast::cuda;

extern "C" {

void plan_sm90_for(const Sm90Problem* problem, int multiprocessors, Sm90Plan* plan) {
  *plan = plan_sm90(*problem, multiprocessors);
}

const char* sm90_unsupported_for(const Sm90Problem* problem, int sm) { return sm90_unsupported(*problem, sm); }

const char* launch_sm90(const Sm90Args* args, const Sm90Problem* problem, int multiprocessors, int device,
                        void* stream) {
  return launch_conv3x3_sm90(*args, *problem, multiprocessors, Queue{device, stream});
}
}
