// From a Problem to launches.
#include "launch.h"

#include <cmath>
#include <mutex>
#include <stdexcept>

#include "finish.cuh"
#include "kernel.h"
#include "policy.h"

namespace kd::cuda {
namespace {

void check(cudaError_t status, const char* call, int device) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // a later call must not report this error again
  throw std::runtime_error(std::string(call) + " failed on cuda:" + std::to_string(device) + ": " +
                           cudaGetErrorName(status) + " (" + cudaGetErrorString(status) + ")");
}

// The device of the tensors, for the duration of a call.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice", device);
    changed_ = previous_ != device;
    if (changed_) check(cudaSetDevice(device), "cudaSetDevice", device);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }

 private:
  int previous_ = 0;
  bool changed_ = false;
};

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute", device);
  return value;
}

constexpr int kMostDevices = 64;

const DeviceLimits& limits_of(int device) {
  static DeviceLimits limits[kMostDevices];
  static std::once_flag once[kMostDevices];
  if (device < 0 || device >= kMostDevices) {
    throw std::runtime_error("device " + std::to_string(device) + " is not one of the first " +
                             std::to_string(kMostDevices));
  }
  std::call_once(once[device], [&] {
    DeviceLimits& found = limits[device];
    found.processors = attribute(cudaDevAttrMultiProcessorCount, device);
    found.architecture = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                         attribute(cudaDevAttrComputeCapabilityMinor, device);
    found.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    found.cache_bytes = attribute(cudaDevAttrL2CacheSize, device);
  });
  return limits[device];
}

Side make_side(const Problem& p, const Logits& logits) {
  Side side{};
  side.data = logits.data;
  const auto last = [](int64_t count, int64_t stride) { return (count - 1) * stride; };
  const int64_t elements = last(p.outer, logits.outer_stride) + last(p.inner, logits.inner_stride) +
                           last(p.vocab, logits.column_stride) + 1;
  side.begin = logits.data;
  side.end = logits.data + elements * size_of(logits.dtype);
  side.outer_stride = logits.outer_stride;
  side.inner_stride = logits.inner_stride;
  side.column_stride = logits.column_stride;
  side.dtype = logits.dtype;
  side.factor = static_cast<float>(kLog2E / p.temperature);
  side.scale = static_cast<float>(logits.scale);
  side.softcap = static_cast<float>(logits.softcap);
  return side;
}

LabelSum label_sum_of(const Problem& p) {
  const bool labelled = p.ce_weight() != 0.0 || (p.labels && p.extras);
  if (!labelled && p.z_loss == 0.0 && !p.extras) return LabelSum::none;
  if (p.temperature == 1.0) return LabelSum::student;
  if (p.temperature == 2.0) return LabelSum::square;
  return p.temperature == 4.0 ? LabelSum::fourth : LabelSum::separate;
}

Task make_task(const Problem& p, const Launch& launch) {
  Task task{};
  task.student = make_side(p, p.student);
  task.teacher = make_side(p, p.teacher);
  // A teacher without weight is not read: the student stands in for it, and cancels.
  if (p.alpha == 0.0 && !p.extras) task.teacher = task.student;
  task.outer = p.outer;
  task.inner = p.inner;
  task.vocab = static_cast<int>(p.vocab);
  task.labels = p.labels;
  task.ignore_index = p.ignore_index;
  task.row_weights = p.row_weights;
  task.grad_output = static_cast<const float*>(p.grad_output);
  task.grad_output_stride = p.grad_output_stride;
  task.denominator = launch.num_items;
  task.scale = static_cast<float>(1.0 / (p.denominator != 0.0 ? p.denominator : p.rows()));
  task.alpha = static_cast<float>(p.alpha);
  task.ce_weight = static_cast<float>(p.ce_weight());
  task.kd_scale = static_cast<float>(p.kd_scale());
  task.kd_slope = static_cast<float>(p.alpha * p.kd_scale() / p.temperature);
  task.label_smoothing = p.labels ? static_cast<float>(p.label_smoothing) : 0.0f;
  task.z_loss = static_cast<float>(p.z_loss);
  task.label_sum = label_sum_of(p);
  // Where the label's exponentials are powers of the student's, its factor must be just that power.
  task.label_factor = task.label_sum == LabelSum::separate
                          ? static_cast<float>(kLog2E)
                          : static_cast<float>(p.temperature) * task.student.factor;
  task.extras = p.extras;
  task.losses = p.reduce ? nullptr : static_cast<float*>(p.loss);
  task.statistics = static_cast<float*>(p.statistics);
  task.label_error = launch.label_error;
  task.gradient = static_cast<char*>(p.gradient);
  task.gradient_columns = p.gradient_columns;
  return task;
}

void launch_kernel(const Kernel& kernel, dim3 grid, int threads, Task& task, Split& split,
                   const Launch& launch) {
  void* arguments[] = {&task, const_cast<unsigned char*>(kernel.functor), &split};
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  check(cudaLaunchKernel(kernel.address, grid, threads, arguments, 0, stream), "cudaLaunchKernel",
        launch.device);
}

void stream_rows(const Problem& problem, Task& task, const Launch& launch) {
  const DeviceLimits& limits = limits_of(launch.device);
  const bool narrow = size_of(task.student.dtype) == 2 && size_of(task.teacher.dtype) == 2;
  const Kernel kernel = visit(problem.divergence, [&](const auto& functor) {
    return stream_kernel_of(functor, narrow ? 8 : 4);
  });
  int blocks_per_processor = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_processor, kernel.address,
                                                      kStreamThreads, 0),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor", launch.device);
  const StreamPolicy policy = stream_policy(
      {task.rows(), task.vocab,
       static_cast<int>(size_of(task.student.dtype) + size_of(task.teacher.dtype))},
      limits, blocks_per_processor);
  Split split;
  split.parts = policy.parts;
  const dim3 grid(static_cast<unsigned>(policy.blocks), static_cast<unsigned>(policy.parts));
  if (policy.parts == 1) return launch_kernel(kernel, grid, kStreamThreads, task, split, launch);
  char* memory = static_cast<char*>(launch.workspace) + kWorkspaceHead;
  split.observed = reinterpret_cast<Sums*>(memory);
  split.evaluated = reinterpret_cast<Evaluated*>(split.observed + task.rows() * policy.parts);
  const DivergenceKind kind = problem.divergence.kind;
  const bool closed = kind == DivergenceKind::forward_kl || kind == DivergenceKind::reverse_kl;
  for (const int step : {observe_step, evaluate_step, differentiate_step}) {
    if (step == evaluate_step && closed) continue;
    split.steps = step;
    launch_kernel(kernel, grid, kStreamThreads, task, split, launch);
  }
}

}  // namespace

int64_t workspace_bytes(int64_t rows) {
  const int64_t slots = rows <= kSplitRows ? rows * kMostParts : 0;
  return kWorkspaceHead + slots * static_cast<int64_t>(sizeof(Sums) + sizeof(Evaluated));
}

void run(const Problem& problem, const Launch& launch) {
  const DeviceGuard guard(launch.device);
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  const int64_t rows = problem.rows();
  Task task = make_task(problem, launch);
  float* denominator = static_cast<float*>(launch.workspace);
  if (!launch.num_items && problem.denominator == 0.0 && problem.labels) {
    count_kernel<<<1, kFinishThreads, 0, stream>>>(problem.labels, problem.ignore_index, rows,
                                                   denominator);
    check(cudaGetLastError(), "count_kernel", launch.device);
    task.denominator = denominator;
  }
  if (rows > 0) stream_rows(problem, task, launch);
  if (problem.reduce && problem.loss) {
    sum_kernel<<<1, kFinishThreads, 0, stream>>>(task.statistics, rows, task.denominator,
                                                 task.scale, static_cast<float*>(problem.loss));
    check(cudaGetLastError(), "sum_kernel", launch.device);
  }
}

void scale(const void* from, void* to, DType dtype, int64_t rows, int64_t columns,
           const float* factor, int64_t factor_stride, const Launch& launch) {
  if (rows == 0 || columns == 0) return;
  const DeviceGuard guard(launch.device);
  Scaling job{static_cast<const char*>(from), static_cast<char*>(to), dtype, rows, columns, factor,
              factor_stride};
  // One factor: the whole gradient is one row.
  if (factor_stride == 0) job.columns *= job.rows, job.rows = 1;
  const int64_t vectors = (job.columns * size_of(dtype) + 15) / 16 / 512 + 1;
  const int64_t wide = 8 * limits_of(launch.device).processors;
  const dim3 grid(static_cast<unsigned>(vectors < wide ? vectors : wide),
                  static_cast<unsigned>(job.rows < 65535 ? job.rows : 65535));
  scale_kernel<<<grid, 512, 0, static_cast<cudaStream_t>(launch.stream)>>>(job);
  check(cudaGetLastError(), "scale_kernel", launch.device);
}

std::string why_not(int device) {
  int driver = 0, runtime = 0, devices = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  const auto version = [](int v) {
    return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10);
  };
  if (driver == 0) return "there is no CUDA driver";
  // Within a major version the runtime runs on every driver.
  if (driver / 1000 < runtime / 1000) {
    return "the driver supports CUDA " + version(driver) + " but the kernels were built with " +
           version(runtime);
  }
  const cudaError_t status = cudaGetDeviceCount(&devices);
  if (status != cudaSuccess) {
    cudaGetLastError();
    return std::string("CUDA does not start: ") + cudaGetErrorString(status);
  }
  if (device >= devices) return "there is no device cuda:" + std::to_string(device);
  const DeviceGuard guard(device);
  cudaFuncAttributes attributes;
  const cudaError_t built = cudaFuncGetAttributes(&attributes, (const void*)count_kernel);
  if (built == cudaSuccess) return "";
  cudaGetLastError();
  return "the kernels were built for " KDKERNELS_CUDA_ARCHS ", cuda:" + std::to_string(device) +
         " is sm_" + std::to_string(limits_of(device).architecture) + " (" +
         cudaGetErrorString(built) + ")";
}

std::string description() {
  return "CUDA " + std::to_string(CUDART_VERSION / 1000) + "." +
         std::to_string(CUDART_VERSION % 1000 / 10) + " for " KDKERNELS_CUDA_ARCHS;
}

}  // namespace kd::cuda
