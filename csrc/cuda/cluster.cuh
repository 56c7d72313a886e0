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

// Once, at the start. Not between rows: the release makes it wait for every store to global memory
// that is still under way (a MEMBAR of the device in the machine code), the gradient's among them.
KD_DEVICE void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}

// A barrier of the block beside that of __syncthreads(): the warps that arrive do not wait for the
// others, of which some wait.
constexpr int kPartialBarrier = 1;
KD_DEVICE void arrive_at_block() {
  asm volatile("barrier.cta.arrive %0, %1;" ::"n"(kPartialBarrier), "r"(blockDim.x) : "memory");
}
KD_DEVICE void wait_for_block() {
  asm volatile("barrier.cta.sync %0, %1;" ::"n"(kPartialBarrier), "r"(blockDim.x) : "memory");
}

struct Barrier {
  uint64_t state;

  // `senders`: how many blocks arrive, besides this one's `expect`.
  KD_DEVICE void initialise(int senders = 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&state)),
                 "r"(senders + 1)
                 : "memory");
  }
  KD_DEVICE void expect(unsigned bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&state)),
        "r"(bytes)
        : "memory");
  }
  // For this block's own bulk copies.
  KD_DEVICE void wait(unsigned parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(shared_address(&state)),
        "r"(parity)
        : "memory");
  }
  // Whether a wait would return at once.
  KD_DEVICE bool is_over(unsigned parity) {
    unsigned over;
    asm volatile(
        "{\n.reg .pred done;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n}"
        : "=r"(over)
        : "r"(shared_address(&state)), "r"(parity)
        : "memory");
    return over != 0;
  }
  // For what other blocks sent.
  KD_DEVICE void wait_for_cluster(unsigned parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(shared_address(&state)),
        "r"(parity)
        : "memory");
  }
};

KD_DEVICE unsigned remote_address(const void* place, int rank) {
  unsigned address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(shared_address(place)), "r"(rank));
  return address;
}

// A record as words, padded with zeros.
template <int kWords>
struct Message {
  unsigned at[kWords];

  template <class Record>
  static KD_DEVICE Message of(const Record& record) {
    static_assert(sizeof(Record) <= sizeof(Message));
    Message m{};
    memcpy(m.at, &record, sizeof(Record));
    return m;
  }
};

// One message a slot. Pieces of 16 bytes lie apart: lanes that read neighbouring slots then read
// neighbouring pieces, and no two of them want the same bank.
template <int kWords, int kSlots>
struct Mailbox {
  uint4 pieces[kWords / 4][kSlots];

  template <class Record>
  KD_DEVICE void put(int slot, const Record& record) {
    const auto m = Message<kWords>::of(record);
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      pieces[i / 4][slot] = make_uint4(m.at[i], m.at[i + 1], m.at[i + 2], m.at[i + 3]);
    }
  }

  template <class Record>
  KD_DEVICE Record get(int slot) const {
    Message<kWords> m;
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const uint4 piece = pieces[i / 4][slot];
      m.at[i] = piece.x, m.at[i + 1] = piece.y, m.at[i + 2] = piece.z, m.at[i + 3] = piece.w;
    }
    Record record;
    memcpy(&record, m.at, sizeof(Record));
    return record;
  }

  // To the same slot of another block, whose barrier counts the bytes and this arrival; `extra`
  // takes the last word. The arrival releases within the block alone: see Exchange.
  template <class Record>
  KD_DEVICE void send(int slot, const Record& record, int extra, Barrier& barrier, int rank) const {
    auto m = Message<kWords>::of(record);
    m.at[kWords - 1] = static_cast<unsigned>(extra);
    const unsigned on = remote_address(&barrier.state, rank);
    const unsigned to = remote_address(&pieces[0][slot], rank);
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      asm volatile(
          "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 "
          "[%0], {%1, %2, %3, %4}, [%5];" ::"r"(to + 4 * kSlots * i),
          "r"(m.at[i]), "r"(m.at[i + 1]), "r"(m.at[i + 2]), "r"(m.at[i + 3]), "r"(on)
          : "memory");
    }
    asm volatile("mbarrier.arrive.release.cta.shared::cluster.b64 _, [%0];" ::"r"(on) : "memory");
  }

  KD_DEVICE int extra(int slot) const { return static_cast<int>(pieces[kWords / 4 - 1][slot].w); }
};

// After the initialisation of barriers, before the first copy names them.
KD_DEVICE void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Both addresses and the size are multiples of 16. The data are read once: evict_first.
KD_DEVICE void bulk_copy(char* to, const char* from, unsigned bytes, Barrier& barrier,
                         uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(&barrier.state)), "l"(policy)
      : "memory");
}

// Orders ordinary accesses to shared memory, the thread's own and those that a barrier has brought
// before it, before its later bulk copies into it. It also waits for the thread's stores to global
// memory.
KD_DEVICE void fence_bulk_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// 16 bytes to shared memory, without a register; the same thread waits for it.
KD_DEVICE void copy_ahead(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
               : "memory");
}

KD_DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace kd::cuda
