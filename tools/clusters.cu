// How many clusters of each shape that the launcher uses a device runs at once, and on how many of
// its multiprocessors: a GPC holds only whole clusters, and devices differ in what is left of
// theirs. One JSON object a line. make gpu-day compiles and runs it.
#include <cstdio>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

#include <cuda_runtime.h>

namespace {

struct Shape {
  int blocks;  // of a cluster, each on a multiprocessor of its own
  int threads;
  int bytes;  // dynamic shared memory of a block
};

// As policy.h lays out rows of 32000 to 262144 elements, and sizes between, which it does not use.
constexpr Shape kShapes[] = {
    {1, 512, 192480},  {2, 512, 192096},  {4, 416, 150816},  {8, 512, 192480},  {8, 512, 128320},
    {9, 512, 192000},  {10, 512, 192000}, {12, 512, 192000}, {14, 512, 192000}, {16, 256, 96288},
    {16, 256, 128384}, {16, 320, 114048}, {16, 512, 128064}, {16, 512, 192096}, {16, 544, 196608},
};
constexpr long long kCycles = 2000000;  // long enough that all clusters are there at once

__global__ void where(int* multiprocessor) {
  extern __shared__ char memory[];
  if (threadIdx.x == 0) {
    unsigned id;
    asm volatile("mov.u32 %0, %%smid;" : "=r"(id));
    multiprocessor[blockIdx.x] = static_cast<int>(id);
    memory[0] = 1;
  }
  const long long start = clock64();
  while (clock64() - start < kCycles) {
  }
}

cudaLaunchConfig_t configuration(const Shape& shape, int clusters, cudaLaunchAttribute* cluster) {
  cluster->id = cudaLaunchAttributeClusterDimension;
  cluster->val.clusterDim.x = shape.blocks;
  cluster->val.clusterDim.y = cluster->val.clusterDim.z = 1;
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(clusters * shape.blocks);
  launch.blockDim = dim3(shape.threads);
  launch.dynamicSmemBytes = shape.bytes;
  launch.attrs = cluster;
  launch.numAttrs = 1;
  return launch;
}

// The multiprocessors that so many clusters take at once.
std::pair<cudaError_t, size_t> taken(const Shape& shape, int clusters) {
  const int blocks = clusters * shape.blocks;
  cudaLaunchAttribute cluster;
  const cudaLaunchConfig_t launch = configuration(shape, clusters, &cluster);
  std::vector<int> found(blocks);
  int* device = nullptr;
  cudaError_t error = cudaMalloc(&device, blocks * sizeof(int));
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&launch, where, device);
  if (error == cudaSuccess)
    error = cudaMemcpy(found.data(), device, blocks * sizeof(int), cudaMemcpyDeviceToHost);
  cudaFree(device);
  return {error, std::set<int>(found.begin(), found.end()).size()};
}

}  // namespace

int main() {
  cudaDeviceProp device;
  if (const cudaError_t error = cudaGetDeviceProperties(&device, 0)) {
    fprintf(stderr, "%s\n", cudaGetErrorString(error));
    return 1;
  }
  printf("{\"device\": \"%s\", \"multiprocessors\": %d, \"shared_bytes\": %zu}\n", device.name,
         device.multiProcessorCount, device.sharedMemPerBlockOptin);
  cudaFuncSetAttribute(where, cudaFuncAttributeMaxDynamicSharedMemorySize, 227328);
  cudaFuncSetAttribute(where, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  for (const Shape& shape : kShapes) {
    cudaLaunchAttribute cluster;
    const cudaLaunchConfig_t one = configuration(shape, 1, &cluster);
    int clusters = 0;
    cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, where, &one);
    size_t multiprocessors = 0;
    if (error == cudaSuccess && clusters > 0)
      std::tie(error, multiprocessors) = taken(shape, clusters);
    printf(
        "{\"blocks\": %d, \"threads\": %d, \"bytes\": %d, \"clusters\": %d, "
        "\"multiprocessors\": %zu, \"error\": \"%s\"}\n",
        shape.blocks, shape.threads, shape.bytes, clusters, multiprocessors,
        error == cudaSuccess ? "" : cudaGetErrorName(error));
    cudaGetLastError();  // of a shape that cannot be, which must not reach the next
  }
}
