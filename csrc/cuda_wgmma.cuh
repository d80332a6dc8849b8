// Warpgroup matrix products of sm_90a: 64 x 256 += 64 x 16 times 16 x 256, operands in shared memory. Names in quotes
// are sections of the PTX ISA, under "Asynchronous Warpgroup Level Matrix Instructions".
#pragma once

#include <cstdint>

namespace rocr::sm90 {

// Orders earlier writes of this warpgroup to the accumulator before later products ("wgmma.fence").
__device__ inline void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `pending` of the committed groups of products are not complete.
template <int pending>
__device__ inline void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

#define ROCR_D8(i)                                                                                            \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define ROCR_D32(i) ROCR_D8(i), ROCR_D8(i + 8), ROCR_D8(i + 16), ROCR_D8(i + 24)

// The 128 registers of the accumulator, in the order of "Matrix Fragments for wgmma.mma_async.m64nNk16".
#define ROCR_ACCUMULATOR \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// Operands: accumulator, descriptors of A and B, whether to add to the accumulator or to overwrite it, signs of A and
// B, and 1 for each operand that is MN-major.
#define ROCR_MULTIPLY(type)                                                                                   \
  asm volatile(                                                                                               \
      "{ .reg .pred add; setp.ne.b32 add, %130, 0;\n"                                                         \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {" ROCR_ACCUMULATOR                      \
      "}, %128, %129, add, 1, 1, 1, 1; }"                                                                     \
      : ROCR_D32(0), ROCR_D32(32), ROCR_D32(64), ROCR_D32(96)                                                 \
      : "l"(left), "l"(right), "r"(static_cast<int>(add)))

template <bool bfloat16>
__device__ inline void multiply(float (&d)[128], std::uint64_t left, std::uint64_t right, bool add) {
  if constexpr (bfloat16) {
    ROCR_MULTIPLY("bf16");
  } else {
    ROCR_MULTIPLY("f16");
  }
}

#undef ROCR_MULTIPLY
#undef ROCR_ACCUMULATOR
#undef ROCR_D32
#undef ROCR_D8

}  // namespace rocr::sm90
