// From a Problem to launches.
#include "launch.h"

#include <stdlib.h>

#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <tuple>
#include <type_traits>

#include "entries.h"
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
  side.end = logits.data + (logits.offsets ? logits.extent : elements) * size_of(logits.dtype);
  side.outer_stride = logits.outer_stride;
  side.inner_stride = logits.inner_stride;
  side.column_stride = logits.column_stride;
  side.offsets = logits.offsets;
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
  if (p.temperature == 3.0) return LabelSum::cube;
  return p.temperature == 4.0 ? LabelSum::fourth : LabelSum::separate;
}

RowInputs row_inputs(const Problem& p, const Launch& launch) {
  RowInputs given{};
  given.rows = static_cast<int>(p.rows());
  given.vocab = static_cast<int>(p.vocab);
  given.labels = p.labels;
  given.ignore_index = p.ignore_index;
  given.row_weights = p.row_weights;
  given.grad_output = static_cast<const float*>(p.grad_output);
  given.grad_output_stride = p.grad_output_stride;
  given.denominator = launch.num_items;
  // Without labels all rows count; of no rows the mean is 0.
  double denominator = p.denominator;
  if (denominator == 0.0 && !p.labels) denominator = p.rows() > 0 ? p.rows() : 1.0;
  given.scale = denominator == 0.0 ? 0.0f : static_cast<float>(1.0 / denominator);
  given.backward = !p.statistics;
  given.label_errors = launch.label_errors;
  return given;
}

// The plan of the call and those of its rows.
int64_t head_bytes(int64_t rows) { return kWorkspaceHead + rows * int64_t{sizeof(RowPlan)}; }

bool has_closed_form(const Problem& problem) {
  return closed_form_of(problem.divergence) != ClosedForm::none;
}

void set_label_sum(Task& task, const Problem& p, LabelSum label_sum) {
  task.label_sum = label_sum;
  // Where the label's exponentials are powers of the student's, its factor must be just that power.
  task.label_factor = label_sum == LabelSum::separate
                          ? static_cast<float>(kLog2E)
                          : static_cast<float>(p.temperature) * task.student.factor;
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
  char* workspace = static_cast<char*>(launch.workspace);
  task.plan = reinterpret_cast<Plan*>(workspace);
  task.rows_planned = reinterpret_cast<const RowPlan*>(workspace + kWorkspaceHead);
  task.alpha = static_cast<float>(p.alpha);
  task.ce_weight = static_cast<float>(p.ce_weight());
  task.kd_scale = static_cast<float>(p.kd_scale());
  task.kd_slope = static_cast<float>(p.alpha * p.kd_scale() / p.temperature);
  const Term<double> unit = visit(p.divergence, [](const auto& functor) { return functor.unit(); });
  task.value_unit = static_cast<float>(unit.value);
  task.slope_unit = static_cast<float>(unit.slope);
  task.label_smoothing = p.labels ? static_cast<float>(p.label_smoothing) : 0.0f;
  task.z_loss = static_cast<float>(p.z_loss);
  set_label_sum(task, p, label_sum_of(p));
  task.inverse_temperature = static_cast<float>(1.0 / p.temperature);
  task.extras = p.extras;
  task.losses = p.reduce ? nullptr : static_cast<float*>(p.loss);
  task.statistics = static_cast<float*>(p.statistics);
  task.gradient = static_cast<char*>(p.gradient);
  task.gradient_columns = p.gradient_columns;
  task.gradient_stride = p.gradient_stride;
  return task;
}

// Whether the rows of this side are multiples of 16 bytes apart.
bool has_whole_steps(const Task& task, const Side& side) {
  const int64_t size = size_of(side.dtype);
  // Those that are named by offsets may be any of its tensor's, whatever the student has.
  return ((!side.offsets && task.outer == 1) || side.outer_stride * size % 16 == 0) &&
         ((!side.offsets && task.inner == 1) || side.inner_stride * size % 16 == 0);
}

// Whether every row of this side starts at a multiple of 16 bytes.
bool is_aligned(const Task& task, const Side& side) {
  return reinterpret_cast<intptr_t>(side.data) % 16 == 0 && has_whole_steps(task, side);
}

// Whether vectors that start at 16-byte boundaries of the student's rows do so in the teacher's.
bool is_congruent(const Task& task) {
  const Side &s = task.student, &t = task.teacher;
  const int64_t s_size = size_of(s.dtype), t_size = size_of(t.dtype);
  const auto differs = [&](int64_t s_bytes, int64_t t_bytes) {
    return s_size == t_size ? (s_bytes - t_bytes) % 16 != 0
                            : s_bytes % 16 != 0 || t_bytes % 16 != 0;
  };
  if (differs(reinterpret_cast<intptr_t>(s.data), reinterpret_cast<intptr_t>(t.data))) return false;
  if (t.offsets) return has_whole_steps(task, s) && has_whole_steps(task, t);
  if (task.outer > 1 && differs(s.outer_stride * s_size, t.outer_stride * t_size)) return false;
  return task.inner == 1 || !differs(s.inner_stride * s_size, t.inner_stride * t_size);
}

RowShape shape_of(const Task& task) {
  return {task.rows(), task.vocab,
          static_cast<int>(size_of(task.student.dtype) + size_of(task.teacher.dtype)),
          is_aligned(task, task.student), is_congruent(task)};
}

void launch_stream(const Kernel& kernel, dim3 grid, int threads, Task& task, Split& split,
                   const Launch& launch) {
  void* arguments[] = {&task, const_cast<unsigned char*>(kernel.functor), &split};
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  check(cudaLaunchKernel(kernel.address, grid, threads, arguments, 0, stream), "cudaLaunchKernel",
        launch.device);
}

void stream_rows(const Problem& problem, Task& task, const Launch& launch) {
  const DeviceLimits& limits = limits_of(launch.device);
  const bool narrow = size_of(task.student.dtype) == 2 && size_of(task.teacher.dtype) == 2;
  const Kernel kernel = with_group(problem.divergence, [&](auto group) {
    return stream_kernel_of<group()>(problem.divergence, narrow ? 8 : 4);
  });
  const RowShape shape = shape_of(task);
  int blocks_per_processor = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_processor, kernel.address,
                                                      kStreamThreads, 0),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor", launch.device);
  const StreamPolicy policy = stream_policy(shape, limits, blocks_per_processor);
  Split split;
  split.parts = policy.parts;
  split.each = static_cast<int>(slice_columns(shape, policy.parts) / 8);
  const dim3 grid(static_cast<unsigned>(policy.blocks), static_cast<unsigned>(policy.parts));
  if (policy.parts == 1) return launch_stream(kernel, grid, kStreamThreads, task, split, launch);
  char* memory = static_cast<char*>(launch.workspace) + head_bytes(task.rows());
  split.observed = reinterpret_cast<Sums*>(memory);
  split.evaluated = reinterpret_cast<Evaluated*>(split.observed + task.rows() * policy.parts);
  for (const int step : {observe_step, evaluate_step, differentiate_step}) {
    if (step == evaluate_step && has_closed_form(problem)) continue;
    split.steps = step;
    launch_stream(kernel, grid, kStreamThreads, task, split, launch);
  }
}

// Why no row-resident kernel can run the problem; null: one can, if the row fits.
const char* why_not_resident(const Task& task, const DeviceLimits& limits) {
  if (limits.architecture < 90) return "the device has no clusters (sm_90)";
  if (task.student.column_stride != 1 || task.teacher.column_stride != 1) {
    return "a column stride is not 1";
  }
  return nullptr;
}

const char* why_not_registers(const Problem& problem, const Task& task) {
  if (!has_closed_form(problem)) return "the divergence is not a KL";
  if (!has_register_kernel(task.student.dtype, task.teacher.dtype)) {
    return "float16 beside another dtype";
  }
  if (!problem.student.is_plain() || !problem.teacher.is_plain())
    return "the logits are transformed";
  if (task.extras || task.label_smoothing != 0.0f) return "label smoothing or extra outputs";
  return task.is_single() ? "the vocabulary has one entry" : nullptr;
}

template <DType kCode>
using Code = std::integral_constant<DType, kCode>;

// Calls the visitor with two formats that have register kernels.
template <class Visitor>
Kernel with_formats(DType student, DType teacher, const Visitor& visitor) {
  constexpr Code<DType::float32> float32;
  constexpr Code<DType::bfloat16> bfloat16;
  constexpr Code<DType::float16> float16;
  if (student != teacher) {
    return student == float32 ? visitor(float32, bfloat16) : visitor(bfloat16, float32);
  }
  if (student == float32) return visitor(float32, float32);
  return student == bfloat16 ? visitor(bfloat16, bfloat16) : visitor(float16, float16);
}

Kernel register_kernel_for(const Problem& problem, const Task& task, int columns) {
  return with_formats(task.student.dtype, task.teacher.dtype, [&](auto student, auto teacher) {
    return visit(problem.divergence, [&](const auto& functor) {
      using Functor = std::decay_t<decltype(functor)>;
      Kernel kernel;
      if constexpr (Functor::kClosedForm != ClosedForm::none) {
        kernel = register_kernel_of<Functor, student(), teacher()>(task.label_sum, columns);
      }
      return kernel;
    });
  });
}

// How a register kernel with these columns per thread makes the exponentials at T = 1.
LabelSum label_sum_in_registers(const Task& task, int columns) {
  const bool is_rare = task.label_sum == LabelSum::cube || task.label_sum == LabelSum::fourth;
  const bool has_it = has_every_power(task.student.dtype, task.teacher.dtype, columns);
  return is_rare && !has_it ? LabelSum::separate : task.label_sum;
}

// A launch of a row-resident kernel.
struct Cluster {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};

  Cluster(const ResidentPolicy& policy, int stage_bytes, const Launch& launch) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = policy.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.gridDim = dim3(policy.cluster);
    config.blockDim = dim3(policy.threads);
    config.dynamicSmemBytes = policy.stages * stage_bytes;
    config.stream = static_cast<cudaStream_t>(launch.stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  Cluster(const Cluster&) = delete;
  Cluster& operator=(const Cluster&) = delete;
};

// The number of clusters that the device runs at once, asked once for each configuration; 0: none.
int active_clusters(const Kernel& kernel, const Cluster& cluster, const Launch& launch) {
  using Key = std::tuple<const void*, int, unsigned, unsigned, size_t>;
  static std::mutex mutex;
  static std::map<Key, int> known;
  const auto& config = cluster.config;
  const Key key{kernel.address, launch.device, config.gridDim.x, config.blockDim.x,
                config.dynamicSmemBytes};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  int count = 0;
  cudaError_t status =
      cudaFuncSetAttribute(kernel.address, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (status == cudaSuccess) {
    status = cudaOccupancyMaxActiveClusters(&count, kernel.address, &config);
  }
  // A size or a configuration that the device refuses is one that it does not run; what else may
  // go wrong says nothing about later calls.
  if (status == cudaErrorInvalidClusterSize || status == cudaErrorInvalidConfiguration) {
    cudaGetLastError();
    count = 0;
  } else {
    check(status, "cudaOccupancyMaxActiveClusters", launch.device);
  }
  return known[key] = count;
}

// The attribute is the kernel's, not the launch's: it only ever grows.
void allow_shared_memory(const Kernel& kernel, const DeviceLimits& limits, int reserved,
                         const Launch& launch) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> done;
  const std::lock_guard<std::mutex> lock(mutex);
  const std::pair<const void*, int> one{kernel.address, launch.device};
  if (done.count(one)) return;
  check(cudaFuncSetAttribute(kernel.address, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             limits.shared_bytes - reserved),
        "cudaFuncSetAttribute", launch.device);
  done.insert(one);
}

// False: the rows do not fit, or no cluster of the size that they need can be scheduled.
// `kernel_of` has a kernel for each number of columns per thread, or one for all.
template <class KernelOf>
bool resident_rows(const KernelOf& kernel_of, bool has_wide, Task& task, const Launch& launch,
                   int forced_cluster) {
  const DeviceLimits& limits = limits_of(launch.device);
  const int s_size = static_cast<int>(size_of(task.student.dtype));
  const RowShape shape = shape_of(task);
  const int reserved = kResidentScratchBytes;
  for (int largest = kMostClusterBlocks; largest >= 1; largest /= 2) {
    ResidentPolicy policy;
    if (forced_cluster) {
      policy = resident_policy(shape, limits, forced_cluster, kColumnsPerThread, reserved);
      if (!policy.cluster && has_wide) {
        policy = resident_policy(shape, limits, forced_cluster, kWideColumnsPerThread, reserved);
      }
    } else {
      policy = best_resident_policy(shape, limits, largest, has_wide, reserved);
    }
    if (!policy.cluster) return false;
    const Kernel kernel = kernel_of(policy.columns_per_thread);
    allow_shared_memory(kernel, limits, reserved, launch);
    const int bytes = static_cast<int>(stage_bytes(shape, policy.stage_columns));
    Cluster cluster(policy, bytes, launch);
    const int64_t active = active_clusters(kernel, cluster, launch);
    if (active == 0) {
      if (forced_cluster) return false;
      continue;
    }
    const int64_t clusters = active < task.rows() ? active : task.rows();
    Stages stages{policy.stages,
                  static_cast<int>(policy.stage_columns) * s_size,
                  bytes,
                  policy.cluster,
                  static_cast<int>(clusters),
                  static_cast<int>(policy.slice_columns) / 8,
                  shape.congruent,
                  shape.congruent && shape.aligned && task.vocab % 8 == 0};
    cluster.config.gridDim.x = static_cast<unsigned>(clusters * policy.cluster);
    void* arguments[] = {&task, const_cast<unsigned char*>(kernel.functor), &stages};
    check(cudaLaunchKernelExC(&cluster.config, kernel.address, arguments), "cudaLaunchKernelExC",
          launch.device);
    return true;
  }
  return false;
}

// Whether D at a column outside of the entries is its own, and not a share of the category's: where
// each has a probability, or where D at p = 0 is not linear in q.
bool has_columns_of_their_own(const Problem& problem) {
  const Tail tail = problem.sparse.tail;
  return tail == Tail::uniform ||
         (tail == Tail::renormalize && problem.divergence.kind == DivergenceKind::alpha_beta);
}

// A block owns a row: its entries are known to no other.
void entries_rows(const Problem& problem, Task& task, const Launch& launch) {
  const DeviceLimits& limits = limits_of(launch.device);
  const int64_t bytes = entries_bytes(task.vocab, problem.sparse.count);
  if (bytes > kEntriesBytes) {
    throw std::invalid_argument("a row's columns and entries take " + std::to_string(bytes) +
                                " bytes of shared memory, of " + std::to_string(kEntriesBytes));
  }
  const Kernel kernel = with_group(problem.divergence, [&](auto group) {
    return entries_kernel_of<group()>(problem.divergence, task.student.dtype);
  });
  allow_shared_memory(kernel, limits, kEntriesScratchBytes, launch);
  int blocks_per_processor = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_processor, kernel.address,
                                                      kEntriesThreads, bytes),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor", launch.device);
  const RowShape shape{task.rows(), task.vocab, static_cast<int>(size_of(task.student.dtype)),
                       is_aligned(task, task.student), true};
  EntriesJob job{problem.sparse, static_cast<int>(slice_columns(shape, 1) / 8),
                 static_cast<int>(mask_words(task.vocab)), has_columns_of_their_own(problem)};
  const dim3 grid(static_cast<unsigned>(stream_policy(shape, limits, blocks_per_processor).blocks));
  void* arguments[] = {&task, const_cast<unsigned char*>(kernel.functor), &job};
  check(cudaLaunchKernel(kernel.address, grid, kEntriesThreads, arguments, bytes,
                         static_cast<cudaStream_t>(launch.stream)),
        "cudaLaunchKernel", launch.device);
}

// KDKERNELS_CUDA_KERNEL and KDKERNELS_CUDA_CLUSTER name what the tests and measurements want.
struct Forced {
  std::string kernel;
  int cluster = 0;

  Forced() {
    if (const char* name = getenv("KDKERNELS_CUDA_KERNEL")) kernel = name;
    if (!kernel.empty() && kernel != "stream" && kernel != "shared" && kernel != "registers") {
      throw std::invalid_argument("KDKERNELS_CUDA_KERNEL='" + kernel +
                                  "' is not one of stream, shared, registers");
    }
    const char* given = getenv("KDKERNELS_CUDA_CLUSTER");
    const std::string blocks = given ? given : "";
    bool known = blocks.empty();
    for (const int possible : {0, 1, 2, 4, 8, 16}) {
      if (blocks != std::to_string(possible)) continue;
      cluster = possible;
      known = true;
    }
    if (!known) {
      throw std::invalid_argument("KDKERNELS_CUDA_CLUSTER='" + blocks +
                                  "' is not one of 0 (chosen here), 1, 2, 4, 8, 16");
    }
  }
  bool allows(const char* name) const { return kernel.empty() || kernel == name; }
  void refuse(const char* reason) const {
    if (kernel.empty() && !cluster) return;
    throw std::invalid_argument("KDKERNELS_CUDA_KERNEL='" + kernel +
                                "' and KDKERNELS_CUDA_CLUSTER=" + std::to_string(cluster) +
                                " cannot run this problem: " + reason);
  }
};

void run_rows(const Problem& problem, Task& task, const Launch& launch) {
  const Forced forced;
  if (problem.sparse.ids) {
    forced.refuse("the teacher is sparse");
    return entries_rows(problem, task, launch);
  }
  if (forced.kernel == "stream") {
    if (forced.cluster) forced.refuse("that kernel has no clusters");
    return stream_rows(problem, task, launch);
  }
  const char* reason = why_not_resident(task, limits_of(launch.device));
  if (!reason) {
    const char* not_registers = why_not_registers(problem, task);
    if (!not_registers && forced.allows("registers")) {
      Task adapted = task;
      const auto kernel = [&](int columns) {
        set_label_sum(adapted, problem, label_sum_in_registers(task, columns));
        return register_kernel_for(problem, adapted, columns);
      };
      const bool has_wide = has_wide_form(task.student.dtype, task.teacher.dtype);
      if (resident_rows(kernel, has_wide, adapted, launch, forced.cluster)) {
        return;
      }
      reason = "the row does not fit";
    } else if (forced.allows("shared")) {
      const auto kernel = [&](int) {
        return with_group(problem.divergence, [&](auto group) {
          return resident_kernel_of<group()>(problem.divergence);
        });
      };
      if (resident_rows(kernel, false, task, launch, forced.cluster)) return;
      reason = "the row does not fit";
    } else {
      reason = not_registers;
    }
  }
  forced.refuse(reason);
  stream_rows(problem, task, launch);
}

}  // namespace

int64_t workspace_bytes(int64_t rows) {
  constexpr int64_t slot = sizeof(Sums) + sizeof(Evaluated);
  constexpr int64_t statistics = 10 * sizeof(float);
  static_assert(sizeof(RowPlan) + kMostParts * slot + statistics <= 1024);
  const int64_t slots = rows <= kSplitRows ? rows * kMostParts : 0;
  return head_bytes(rows) + slots * slot;
}

void run(const Problem& problem, const Launch& launch) {
  const DeviceGuard guard(launch.device);
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  const int64_t rows = problem.rows();
  if (rows > INT32_MAX) throw std::invalid_argument("more than 2^31 - 1 rows");
  Task task = make_task(problem, launch);
  const RowInputs inputs = row_inputs(problem, launch);
  if (rows > 0) {
    plan_kernel<<<1, kFinishThreads, 0, stream>>>(inputs, task.plan,
                                                  const_cast<RowPlan*>(task.rows_planned));
    check(cudaGetLastError(), "plan_kernel", launch.device);
    run_rows(problem, task, launch);
  }
  if (problem.reduce && problem.loss) {
    const bool counted = rows > 0 && !inputs.denominator && inputs.scale == 0.0f;
    const float* denominator = counted ? &task.plan->denominator : inputs.denominator;
    sum_kernel<<<1, kFinishThreads, 0, stream>>>(task.statistics, rows, denominator, inputs.scale,
                                                 static_cast<float*>(problem.loss));
    check(cudaGetLastError(), "sum_kernel", launch.device);
  }
}

void scale(const void* from, void* to, DType dtype, int64_t rows, int64_t columns,
           int64_t row_stride, const float* factor, int64_t factor_stride, const Launch& launch) {
  if (rows == 0 || columns == 0) return;
  const DeviceGuard guard(launch.device);
  Scaling job{static_cast<const char*>(from),
              static_cast<char*>(to),
              dtype,
              rows,
              columns,
              row_stride,
              factor,
              factor_stride};
  // One factor, and nothing between rows: the whole gradient is one row.
  if (factor_stride == 0 && row_stride == columns) job.columns *= job.rows, job.rows = 1;
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
  const cudaError_t built = cudaFuncGetAttributes(&attributes, (const void*)sum_kernel);
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
