// The row-resident kernels: a cluster of blocks owns a row, each block's slice of student and
// teacher lies in its shared memory, and global memory is read once. While one row is worked on the
// next ones arrive in the other stages.
//
// What a row costs beside its columns is latency: of barriers, of the exchange, of addresses. So
// between a block's message and the others' (the window of an exchange) single threads do what
// prepares the next rows or ends the last one, and nobody waits for them.
#pragma once

#include "cluster.cuh"
#include "kernel.h"
#include "policy.h"
#include "sweep.cuh"

namespace kd::cuda {

constexpr int kResidentWarps = kResidentThreads / 32;

// Whether the thread is one of the block's last warp: asked for again rather than kept in a
// register, as much else here.
KD_DEVICE bool is_last_warp() { return opaque(threadIdx.x) >= blockDim.x - 32; }

// Exchanges whose messages are kept, and rows whose plans are: what is read of one must be over
// before its place is taken, and barriers between make it so.
constexpr int kTurns = 4, kPlans = 8;

// Where the next bulk copies come from, and where they go.
struct CopyPlan {
  const char *student, *teacher;
  unsigned student_bytes, teacher_bytes;
  int student_offset, teacher_offset;  // in a stage
  int stage;
  int next;  // the position of the row after it among those that count
};

template <int kWords>
struct ResidentScratch {
  Mailbox<kWords, kMostClusterBlocks> blocks[kTurns];
  // Double, so that the next exchange may begin while slow warps still read the last one's.
  Mailbox<kWords, kResidentWarps> warps[2];
  Barrier arrived[kTurns];
  Barrier full[kMostStages];
  RowPlan plans[kPlans];
  int4 spans[kPlans];  // of this block's part of the row; a Span in 16 bytes
  RowPlan fetched;     // the producer's: the row after those in the stages
  CopyPlan copy;       // the producer's
  int claims[2];       // that goes with a row's exchange
  int counted;         // rows that count
};

static_assert(sizeof(ResidentScratch<20>) <= kResidentScratchBytes);

// The sums of all threads of the cluster, the same bits in each. A block's sums travel to every
// block of the cluster as a message, whose barrier counts their bytes.
//
// Within a block only the sender of an exchange waits for all warps' sums, and the producer, which
// learns that they have read the stage; the others arrive and go on, so that a warp which is late
// in one window holds nobody up before the next. Two warps send in turn: each has a row to catch
// up.
//
// A message overwrites the one of kTurns exchanges before. All warps of the receiver had used what
// they read of that one before they arrived at their block's next exchange; its message came behind
// that, and the sender of the overwriting one has waited for it and for later ones. The PTX manual
// wants more of a chain through other blocks than arrivals that release within the block, but
// cluster scope is a MEMBAR of the device in the machine code: it waits for the thread's stores of
// the gradient, and cost 2.5 % of a row on an H200. What it orders are reads whose values have gone
// into the very messages.
template <int kWords>
struct Exchange {
  ResidentScratch<kWords>& scratch;
  int cluster;
  unsigned turn = 0;

  KD_DEVICE int buffer() const { return turn % kTurns; }
  KD_DEVICE bool is_sender(unsigned of_turn) const {
    return opaque(threadIdx.x) / 32 == (blockDim.x > 32 ? opaque(of_turn) % 2 : 0);
  }

  KD_DEVICE void expect(int which) const { scratch.arrived[which].expect(cluster * 4u * kWords); }

  // By one thread, before anybody sends.
  KD_DEVICE void start() const {
    if (cluster == 1) return;
    for (int i = 0; i < kTurns; ++i) {
      scratch.arrived[i].initialise(cluster);
      expect(i);
    }
  }

  template <class Record, class Reduce>
  KD_DEVICE Record sum_of(const Mailbox<kWords, 16>& from, int count, const Record& empty,
                          const Reduce& reduce_lanes) const {
    // Both halves of the warp sum the same slots: one step of the butterfly less.
    const int slot = threadIdx.x % 16;
    Record r = slot < count ? from.template get<Record>(slot) : empty;
    reduce_lanes(r, Lanes<16>{});
    return r;
  }

  // This block's message; scratch.claims[claim] goes with it, of which only the first block has
  // one.
  template <class Record, class Reduce>
  KD_DEVICE void begin(Record mine, int claim, const Record& empty, const Reduce& reduce_lanes) {
    const int lane = threadIdx.x % 32;
    reduce_lanes(mine, Lanes<32>{});
    auto& slots = scratch.warps[turn % 2];
    if (lane == 0) slots.put(threadIdx.x / 32, mine);
    if (cluster == 1) return __syncthreads();
    const bool sends = is_sender(turn);
    if (!sends && !is_last_warp()) return arrive_at_block();
    wait_for_block();
    if (!sends) return;
    const Record block = sum_of(slots, blockDim.x / 32, empty, reduce_lanes);
    if (lane < cluster) {
      scratch.blocks[buffer()].send(cluster_rank(), block, scratch.claims[claim],
                                    scratch.arrived[buffer()], lane);
    }
  }

  template <class Record, class Reduce>
  KD_DEVICE Record end(const Record& empty, const Reduce& reduce_lanes) {
    Record sum;
    if (cluster == 1) {
      sum = sum_of(scratch.warps[turn % 2], blockDim.x / 32, empty, reduce_lanes);
    } else {
      scratch.arrived[buffer()].wait_for_cluster(turn / kTurns & 1);
      if (threadIdx.x == 0) expect(buffer());
      sum = sum_of(scratch.blocks[buffer()], cluster, empty, reduce_lanes);
    }
    ++turn;
    return sum;
  }

  // What the first block's claim was in the exchange before, which was this row's.
  KD_DEVICE int received(int claim) const {
    return cluster == 1 ? scratch.claims[claim] : scratch.blocks[(turn - 1) % kTurns].extra(0);
  }

  KD_DEVICE Evaluated sum(const Evaluated& mine) {
    const auto reduce = [](Evaluated& e, auto lanes) { warp_reduce(e, lanes); };
    begin(mine, 0, Evaluated{}, reduce);
    return end(Evaluated{}, reduce);
  }
};

// The bytes of a slice that a bulk copy fetches: the pieces of 16 bytes that hold some of the row
// and lie inside the tensor.
struct Clip {
  const char* slice;
  const char* past;  // of the slice's last piece
  const char *from, *to;

  KD_DEVICE Clip(const Task& task, const Side& side, int row, const Span& span) {
    const int64_t size = size_of(side.dtype);
    const char* start = task.row_of(side, row);
    const char* end = start + task.vocab * size;
    const char* lowest = start - (reinterpret_cast<uintptr_t>(start) & 15);
    const char* highest = end + (-reinterpret_cast<uintptr_t>(end) & 15);
    if (lowest < side.begin) lowest += 16;
    if (highest > side.end) highest -= 16;
    slice = start + span.first * size;
    past = start + span.past * size;
    past += -reinterpret_cast<uintptr_t>(past) & 15;
    from = slice - skew();
    if (from < lowest) from = lowest;
    to = past > highest ? highest : past;
    if (to < from) to = from;
  }

  // How far into 16 bytes the slice starts, there as in shared memory: 0 if rows are congruent.
  KD_DEVICE int skew() const { return static_cast<int>(reinterpret_cast<uintptr_t>(slice) & 15); }
  KD_DEVICE unsigned bytes() const { return static_cast<unsigned>(to - from); }
  KD_DEVICE int offset() const { return static_cast<int>(from - slice) + skew(); }
};

// Rows on their way to shared memory. One thread of each block, the producer, asks for them.
//
// Which rows: the first ones of a cluster are fixed, so that nothing has to be waited for; each
// later one is claimed from a counter by the first block's first thread and goes with an exchange's
// message. So a cluster that starts late, or not at all before the others have ended, takes fewer.
// A claim is made two exchanges before its copies: one until its message, in which the counter
// answers, and one in which the row's plan is read.
template <int kWords>
struct Pipeline {
  const Task& task;
  const Stages& stages;
  ResidentScratch<kWords>& scratch;
  char* memory;
  // In one register: the kernels have none to spare.
  unsigned stage : 8;
  unsigned parity : 1;
  unsigned looked : 1;  // whether the row's largest logits are known: see register_kernel
  unsigned taken : 4;   // rows so far, modulo 16: more than plans, and what blocks take turns in
  unsigned begun : 1;   // whether there was one

  KD_DEVICE char* student_slice() const { return memory + stage * stages.bytes; }
  KD_DEVICE char* teacher_slice() const { return student_slice() + stages.teacher_offset; }

  // Of the last warp, which has the fewest columns.
  KD_DEVICE bool is_producer() const { return is_last_warp() && opaque(threadIdx.x) % 32 == 0; }
  // Asked for again rather than kept in a register, as much else here.
  KD_DEVICE int rank() const { return cluster_rank(); }
  KD_DEVICE bool is_claimant() const { return rank() == 0 && threadIdx.x == 0; }

  // The counter's answer, which is not waited for.
  KD_DEVICE int claim() const { return is_claimant() ? atomicAdd(&task.plan->next, 1) : 0; }
  // In two places in turn: one is read while the next row's is written.
  KD_DEVICE void keep_claim(int slot, int answer) const {
    if (is_claimant()) scratch.claims[slot] = (stages.count + 1) * stages.clusters + answer;
  }

  // By the producer: reads the plan of the row at this position among those that count.
  KD_DEVICE void fetch(int position) {
    if (position < scratch.counted) {
      copy_ahead(&scratch.fetched, task.rows_planned + position);
    } else {
      scratch.fetched = {-1, kIgnored, 0.0f, 0.0f};
    }
  }

  // By the producer: the addresses of the fetched row's copies.
  KD_DEVICE void prepare() {
    wait_for_copies();
    const RowPlan plan = load_plan(&scratch.fetched);
    const int place = (taken + stages.count) % kPlans;
    scratch.plans[place] = plan;
    CopyPlan& copy = scratch.copy;
    copy.stage = stage;
    if (plan.row < 0) {
      copy.student_bytes = copy.teacher_bytes = 0;
    } else if (stages.aligned) {
      const int first = scratch.spans[0].y;
      copy.student = task.row_of(task.student, plan.row) + first * size_of(task.student.dtype);
      copy.teacher = task.row_of(task.teacher, plan.row) + first * size_of(task.teacher.dtype);
    } else {
      plan_copy(plan.row, place);
    }
  }

  // By the producer: this block's part of a row, and the copies of it.
  KD_DEVICE void plan_copy(int row, int place) {
    const char* start = task.row_of(task.student, row);
    const Span columns = span_of(start, task.student.dtype, task.vocab, rank(), stages.each);
    scratch.spans[place] = make_int4(columns.origin, columns.first, columns.past, 0);
    // One model after the other, for fewer registers.
    CopyPlan& copy = scratch.copy;
    const Clip student(task, task.student, row, columns);
    copy.student = student.from;
    copy.student_bytes = student.bytes();
    copy.student_offset = student.offset();
    const Clip teacher(task, task.teacher, opaque(row), columns);
    copy.teacher = teacher.from;
    copy.teacher_bytes = teacher.bytes();
    copy.teacher_offset = stages.teacher_offset + teacher.offset();
  }

  // By the producer: the prepared copies, into a stage that is free; then the next row's plan.
  KD_DEVICE void request() {
    const CopyPlan copy = scratch.copy;
    // What was mended of the row before, behind a barrier of the block, comes before the copies.
    if (!stages.aligned) fence_bulk_copies();
    char* to = memory + copy.stage * stages.bytes;
    Barrier& full = scratch.full[copy.stage];
    const uint64_t policy = cache_policy(Keep::no);
    full.expect(copy.student_bytes + copy.teacher_bytes);
    if (copy.student_bytes) {
      bulk_copy(to + copy.student_offset, copy.student, copy.student_bytes, full, policy);
    }
    if (copy.teacher_bytes) {
      bulk_copy(to + copy.teacher_offset, copy.teacher, copy.teacher_bytes, full, policy);
    }
    fetch(copy.next);
  }

  // Before everything: sets the barriers up and requests the first rows.
  KD_DEVICE void start(const Exchange<kWords>& exchange) {
    if (is_producer()) {
      for (int i = 0; i < stages.count; ++i) scratch.full[i].initialise();
      exchange.start();
      publish_barriers();
      const int first = blockIdx.x / stages.cluster;
      scratch.copy = CopyPlan{};
      // Aligned rows lie alike: their copies differ in where they come from alone.
      if (stages.aligned) {
        plan_copy(0, 0);
        for (int place = 1; place < kPlans; ++place) scratch.spans[place] = scratch.spans[0];
      }
      scratch.counted = task.plan->counted;
      scratch.claims[0] = scratch.claims[1] = 0;
      fetch(first);
      taken -= stages.count;
      for (int i = 0; i < stages.count; ++i, ++taken) {
        stage = i;
        prepare();
        scratch.copy.next = first + (i + 1) * stages.clusters;
        request();
      }
      stage = 0;
    }
    __syncthreads();
    // Everybody's barriers exist before anybody sends.
    if (stages.cluster > 1) cluster_barrier();
  }

  KD_DEVICE RowPlan plan() const { return load_plan(&scratch.plans[taken % kPlans]); }
  KD_DEVICE Span span() const {
    const int4 w = scratch.spans[taken % kPlans];
    return {w.x, w.y, w.z};
  }

  KD_DEVICE void wait() { scratch.full[stage].wait(parity); }
  // Whether the row has arrived, for all threads of the warp alike.
  KD_DEVICE bool has_arrived() {
    return __all_sync(kWholeWarp, scratch.full[stage].is_over(parity));
  }

  KD_DEVICE void advance() {
    ++taken;
    begun = 1;
    if (++stage < stages.count) return;
    stage = 0;
    parity ^= 1;
  }
};

// A slice of a row in shared memory.
struct Slice {
  const Task& task;
  const Side& side;
  char* memory;
  int row;
  const Span& span;

  KD_DEVICE char* at(int column) const {
    return memory + (column - span.first) * static_cast<int>(size_of(side.dtype));
  }
  KD_DEVICE float load_one_at(int column) const { return load_one(at(column), side.dtype); }

  // Of 32 columns from here on, a lane each, those that lie outside the row or the slice become
  // -inf, as far as the slice's pieces of 16 bytes reach; those of the row that no bulk copy may
  // fetch, at the tensor's two ends, are fetched here.
  KD_DEVICE void mend(int first) const {
    const int column = first + static_cast<int>(threadIdx.x % 32);
    const Clip clip(task, side, row, span);
    const int place = (column - span.first) * static_cast<int>(size_of(side.dtype));
    const char* in_tensor = clip.slice + place;
    if (place < -clip.skew() || in_tensor >= clip.past) return;
    if (column < max(span.first, 0) || column >= min(span.past, task.vocab)) {
      store_one(memory + place, side.dtype, -INFINITY);
    } else if (in_tensor < clip.from || in_tensor >= clip.to) {
      store_one(memory + place, side.dtype, load_one(in_tensor, side.dtype));
    }
  }
};

// Mends what has to be of the columns [from, to), whole units, of both slices of congruent rows,
// for the calling warp.
KD_DEVICE void mend(const Slice& student, const Slice& teacher, int from, int to) {
  const int vocab = student.task.vocab;
  if (from >= to || (from >= 0 && to <= vocab)) return;
  if (from < 0) student.mend(from), teacher.mend(from);
  if (to > vocab) student.mend(to - 32), teacher.mend(to - 32);
  __syncwarp();
}

// For the block, of rows that are not congruent: mends the row that has arrived, and moves the
// teacher's slice from where it lies, `skew` bytes further, to where its vectors are aligned like
// the student's.
template <int kWords>
KD_DEVICE void align(const Pipeline<kWords>& pipeline) {
  const Task& task = pipeline.task;
  const int row = pipeline.plan().row;
  if (row < 0) return;
  const Span span = pipeline.span();
  const int skew = Clip(task, task.teacher, row, span).skew();
  const Slice teacher{task, task.teacher, pipeline.teacher_slice(), row, span};
  if (threadIdx.x < 32) {
    const Slice student{task, task.student, pipeline.student_slice(), row, span};
    const Slice arrived{task, task.teacher, teacher.memory + skew, row, span};
    student.mend(span.first - 8), arrived.mend(span.first - 8);
    __syncwarp();
    student.mend(span.past - 24), arrived.mend(span.past - 24);
  }
  __syncthreads();
  if (skew == 0) return;
  constexpr int kPieces = 4;  // of 16 bytes, of a thread at once
  char* const end = teacher.at(span.past);
  const int step = 16 * static_cast<int>(blockDim.x);
#pragma unroll 1
  for (char* begin = teacher.memory; begin < end; begin += kPieces * step) {
    char* const mine = begin + 16 * threadIdx.x;
    Words<4> pieces[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if (mine + i * step < end) pieces[i] = load_shifted(mine + i * step, skew);
    }
    // Those who read what is written here have, and of what is written nobody reads later.
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if (mine + i * step < end) {
        *reinterpret_cast<uint4*>(mine + i * step) =
            make_uint4(pieces[i].at[0], pieces[i].at[1], pieces[i].at[2], pieces[i].at[3]);
      }
    }
  }
  __syncthreads();
}

// As Sweep reads it.
template <int kWidth>
struct SharedRow : Slice {
  KD_DEVICE Vector<kWidth> load(int first) const {
    return widen<kWidth>(side.dtype, [&](auto words) {
      return load_words<sizeof(words) / sizeof(unsigned)>(at(first));
    });
  }
};

// Rows that do not count, each by one block.
template <int kWidth>
KD_DEVICE void dismiss_rows(const Task& task, int counted) {
  for (int64_t i = counted + static_cast<int64_t>(blockIdx.x); i < task.rows(); i += gridDim.x) {
    const RowPlan plan = load_plan(task.rows_planned + i);
    const char* start = task.row_of(task.student, plan.row);
    const Span all = span_of(start, task.student.dtype, task.vocab, 0, (task.vocab + 14) / 8);
    dismiss_row<kWidth>(task, plan, all, true);
  }
}

template <bool kPlain = false>
KD_DEVICE void write_outcome(const Task& task, const RowPlan& plan, const Totals& totals) {
  if (totals.spoils_row(task) && totals.student_is_bad) {
    write_constant(task, plan.row, NAN);
  } else {
    write_statistics<kPlain>(task, plan, totals);
  }
}

// Every divergence and option: the sweeps run over shared memory.
template <class Functor>
__global__ void __launch_bounds__(kResidentThreads, 1)
    resident_kernel(const __grid_constant__ Task task, const __grid_constant__ Functor functor,
                    const __grid_constant__ Stages stages) {
#if __CUDA_ARCH__ >= 900
  // The last word of a message is the claim's, of which only the pilot would be the other user.
  constexpr int kWidth = 4, kWords = sizeof(Sums) / 4 + (student_weighs<Functor> ? 4 : 0);
  extern __shared__ __align__(128) char memory[];
  __shared__ ResidentScratch<kWords> scratch;
  Pipeline<kWords> pipeline{task, stages, scratch, memory};
  Exchange<kWords> exchange{scratch, stages.cluster};
  pipeline.start(exchange);
  dismiss_rows<kWidth>(task, scratch.counted);
  pipeline.keep_claim(0, pipeline.claim());
  const auto reduce = [&](Sums& s, auto lanes) { warp_reduce<Functor>(task, s, lanes); };
  for (;; pipeline.advance()) {
    pipeline.wait();
    if (!stages.congruent) align(pipeline);
    const RowPlan plan = pipeline.plan();
    if (plan.row < 0) break;
    using Row = SharedRow<kWidth>;
    const Span span = pipeline.span();
    const Row student{{task, task.student, pipeline.student_slice(), plan.row, span}};
    const Row teacher{{task, task.teacher, pipeline.teacher_slice(), plan.row, span}};
    if (stages.congruent && !stages.aligned) {
      if (threadIdx.x < 32) mend(student, teacher, span.first, span.past);
      __syncthreads();
    }
    const Sweep<Functor, kWidth, Row> sweep{task, functor, span, student, teacher};
    Sums sums = sweep.observe();
    sums.label_logit = label_logit(task, plan, span, student);
    const int parity = pipeline.taken % 2;
    exchange.begin(sums, parity, nothing(), reduce);
    const int answer = pipeline.claim();
    if (pipeline.is_producer()) pipeline.prepare();
    Totals totals(task, exchange.end(nothing(), reduce));
    if (pipeline.is_producer()) scratch.copy.next = exchange.received(parity);
    pipeline.keep_claim(1 - parity, answer);
    const bool spoiled = totals.spoils_row(task);
    const bool closed = totals.close<Functor>(task);
    if ((task.alpha != 0.0f || task.extras) && !closed && !spoiled) {
      totals.take(task, exchange.sum(sweep.evaluate(totals)));
    }
    if (pipeline.is_claimant()) write_outcome(task, plan, totals);
    if (task.gradient) {
      if (spoiled) {
        fill_gradient<kWidth>(task, plan.row, span, NAN);
      } else {
        sweep.differentiate(plan, totals);
      }
      if (pipeline.rank() == 0) clear_beyond_vocabulary(task, plan.row);
    }
    __syncthreads();
    if (pipeline.is_producer()) pipeline.request();
  }
#endif
}

template <KernelGroup kGroup>
Kernel resident_kernel_of(const Divergence& divergence) {
  return visit_group<kGroup>(divergence, [](const auto& given) {
    const auto functor = general(given);
    using Functor = std::remove_const_t<decltype(functor)>;
    return make_kernel((const void*)resident_kernel<Functor>, functor);
  });
}

}  // namespace kd::cuda
