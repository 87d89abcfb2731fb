// Stands in for the CUDA runtime and driver where a launcher is to be tested without a GPU: kernels are not run but
// written down, with what they were launched with and with every tensor map that was made before.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstring>
#include <map>
#include <string>
#include <vector>

extern "C" {

struct RecordedMap {
  uint64_t address, sizes[5], strides[4];
  uint32_t box[5], steps[5];
  int type, rank, interleave, swizzle, fill;
};

struct RecordedLaunch {
  unsigned grid[3], block[3];
  uint64_t shared_bytes, allowed_shared_bytes, stream;
  int device, maps;
  char kernel[256];
};

static RecordedLaunch recorded;
static std::vector<RecordedMap> maps;
static std::vector<std::vector<unsigned char>> arguments;

static std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> by_function;
  return by_function;
}

const RecordedLaunch* recorded_launch() { return &recorded; }
const RecordedMap* recorded_map(int i) { return &maps[i]; }

// How many arguments the next kernel takes, and their sizes: the caller knows them from the PTX.
void record_arguments(int count, const int* sizes) {
  arguments.clear();
  for (int i = 0; i < count; ++i) arguments.emplace_back(sizes[i]);
}

const unsigned char* recorded_argument(int i) { return arguments[i].data(); }

static CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                       const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                       const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  RecordedMap made{};
  made.address = reinterpret_cast<uint64_t>(address);
  std::memcpy(made.sizes, sizes, rank * 8);
  std::memcpy(made.strides, strides, (rank - 1) * 8);
  std::memcpy(made.box, box, rank * 4);
  std::memcpy(made.steps, steps, rank * 4);
  made.type = type;
  made.rank = static_cast<int>(rank);
  made.interleave = interleave;
  made.swizzle = swizzle;
  made.fill = fill;
  std::memset(map, 0, sizeof *map);
  map->opaque[0] = maps.size();  // which it is, for those who look at the kernel's arguments
  maps.push_back(made);
  return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  const bool known = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(&encode) : nullptr;
  *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  recorded = {};
  maps.clear();
  recorded.device = device;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) recorded.allowed_shared_bytes = value;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** args) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const unsigned grids[3] = {grid.x, grid.y, grid.z}, blocks[3] = {block.x, block.y, block.z};
  std::memcpy(recorded.grid, grids, sizeof grids);
  std::memcpy(recorded.block, blocks, sizeof blocks);
  recorded.shared_bytes = config->dynamicSmemBytes;
  recorded.stream = reinterpret_cast<uint64_t>(config->stream);
  recorded.maps = static_cast<int>(maps.size());
  std::strncpy(recorded.kernel, names()[function].c_str(), sizeof recorded.kernel - 1);
  for (size_t i = 0; i < arguments.size(); ++i) std::memcpy(arguments[i].data(), args[i], arguments[i].size());
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error"; }

// What nvcc's code calls when the library is loaded, and in the stubs of kernels.
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, void*, void*, void*, void*,
                            int*) {
  names()[function] = name;
}
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorNotSupported; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }
}
