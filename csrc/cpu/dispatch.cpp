// Which instruction set runs: the fastest, forcible by name.
#include <stdlib.h>
#include <string.h>

#include <stdexcept>
#include <string>

#include "kernel.h"

namespace kd {
namespace {

#if defined(KDKERNELS_X86)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

const InstructionSet kInstructionSets[] = {
    {"baseline", run_row_baseline, true},
#if defined(KDKERNELS_X86)
    {"avx2", run_row_avx2, has_avx2()},
    {"avx512", run_row_avx512, has_avx512()},
#endif
};

std::string refusal_of(const char* forced) {
  std::string possible;
  for (const InstructionSet& candidate : kInstructionSets) {
    if (!candidate.runs_here) continue;
    possible += (possible.empty() ? "" : ", ") + std::string(candidate.name);
  }
  return "KDKERNELS_CPU_ISA='" + std::string(forced) +
         "' is not an instruction set that can run here; possible: " + possible;
}

}  // namespace

InstructionSets instruction_sets() {
  return {kInstructionSets, sizeof(kInstructionSets) / sizeof(kInstructionSets[0])};
}

const InstructionSet& instruction_set() {
  const InstructionSet* best = &kInstructionSets[0];
  const char* forced = getenv("KDKERNELS_CPU_ISA");
  for (const InstructionSet& candidate : kInstructionSets) {
    if (!candidate.runs_here) continue;
    if (forced && strcmp(forced, candidate.name) == 0) return candidate;
    best = &candidate;
  }
  if (forced && *forced) throw std::invalid_argument(refusal_of(forced));
  return *best;
}

}  // namespace kd
