// Instructions of sm_90a without a function in CUDA C++. Names in quotes are sections of the PTX ISA.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace rocr::sm90 {

// wgmma, mbarriers and bulk copies take 32-bit addresses within the shared window.
__device__ inline std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// The dynamic shared memory of a block, at the same address in every block of a cluster.
__device__ inline void* dynamic_shared() {
  extern __shared__ std::uint8_t bytes[];
  return bytes;
}

__device__ inline std::uint32_t rank_in_cluster() {
  std::uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Every thread of the cluster arrives and waits ("barrier.cluster"). Not .aligned, because the threads of a warp may
// come from two branches.
__device__ inline void synchronize_cluster() {
  asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::: "memory");
}

// Barriers ("mbarrier"): a phase ends after all arrivals, and after all announced bytes have been copied.

__device__ inline void init_barrier(std::uint32_t barrier, std::uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialized barriers visible to the copy engine and, with synchronize_cluster, to the other block.
__device__ inline void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void arrive_expecting(std::uint32_t barrier, std::uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives at the barrier at this address in block `rank` of the cluster ("mapa"). The scope is the default one: the
// consumers write nothing that another block reads, and a scope of the whole cluster costs a memory fence at each call.
__device__ inline void arrive_at_rank(std::uint32_t barrier, std::uint32_t rank) {
  asm volatile(
      "{ .reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// Waits until the phase of this parity has ended. A new barrier is in phase 0, so a wait for parity 1 returns at once.
__device__ inline void wait_for(std::uint32_t barrier, std::uint32_t parity) {
  asm volatile(
      "{ .reg .pred done;\n"
      "retry: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra retry; }" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Copies a box of the tensor to shared memory ("cp.async.bulk.tensor"). Elements outside are 0, and their bytes count.
__device__ inline void load_box(std::uint32_t target, const CUtensorMap& map, int column, int row,
                                std::uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%2, %3}], [%4];" ::"r"(target),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// Copies the box to all blocks of `mask`, at the same address in each. The barrier of each block counts its bytes.
__device__ inline void load_box_everywhere(std::uint32_t target, const CUtensorMap& map, int column, int row,
                                           std::uint32_t barrier, std::uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%2, %3}], [%4], %5;" ::"r"(target),
      "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(mask)
      : "memory");
}

// Set the registers of each thread of this warpgroup ("setmaxnreg"). Every warp of the warpgroup makes one call.
template <int registers>
__device__ inline void decrease_registers_to() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

template <int registers>
__device__ inline void increase_registers_to() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

// Adds two neighbouring floats in memory without waiting ("red"). Adds of one thread to one address keep their order
// ("Coherence"), so the result of a sum is deterministic.
__device__ inline void add_in_memory(float* target, float first, float second) {
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(target)), "f"(first),
               "f"(second)
               : "memory");
}

__device__ inline void add_in_memory(float* target, float value) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(__cvta_generic_to_global(target)), "f"(value)
               : "memory");
}

}  // namespace rocr::sm90
