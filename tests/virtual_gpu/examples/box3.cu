// A moving sum of three along rows of 128 values, one block for all rows. It holds a race: see docs/virtual-gpu.md.
extern "C" __global__ void __launch_bounds__(128) box3(const float* x, float* out, int rows) {
  __shared__ float line[130];
  const int i = threadIdx.x;
  for (int row = 0; row < rows; ++row) {
    if (i == 0) line[0] = line[129] = 0.0f;
    line[i + 1] = x[row * 128 + i];
    __syncthreads();
    out[row * 128 + i] = line[i] + line[i + 1] + line[i + 2];
  }
}
