// Clusters, their distributed shared memory, and bulk copies onto barriers: sm_90 and later.
#pragma once

#include "device.cuh"

namespace kd::cuda {

KD_DEVICE unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

KD_DEVICE int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Everything that any thread of the cluster wrote before is visible to every thread after.
KD_DEVICE void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}

// 16-byte words of `from` to the same place in another block's shared memory.
template <class Record>
KD_DEVICE void store_remote(Record* place, int rank, const Record& from) {
  static_assert(sizeof(Record) % 8 == 0);
  unsigned to;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(shared_address(place)), "r"(rank));
  const unsigned* words = reinterpret_cast<const unsigned*>(&from);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Record) / 4); i += 2) {
    asm volatile("st.shared::cluster.v2.u32 [%0], {%1, %2};" ::"r"(to + 4 * i), "r"(words[i]),
                 "r"(words[i + 1])
                 : "memory");
  }
}

struct Barrier {
  uint64_t state;

  KD_DEVICE void initialise() {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&state)) : "memory");
  }
  KD_DEVICE void expect(unsigned bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&state)),
        "r"(bytes)
        : "memory");
  }
  KD_DEVICE void wait(unsigned parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(shared_address(&state)),
        "r"(parity)
        : "memory");
  }
};

// After the initialisation of barriers, before the first copy names them.
KD_DEVICE void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Orders this thread's ordinary accesses to shared memory before later bulk copies into it.
KD_DEVICE void fence_bulk_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Both addresses and the size are multiples of 16. The data are read once: evict_first.
KD_DEVICE void bulk_copy(char* to, const char* from, unsigned bytes, Barrier& barrier,
                         uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(&barrier.state)), "l"(policy)
      : "memory");
}

}  // namespace kd::cuda
