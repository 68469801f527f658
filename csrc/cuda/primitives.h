// The instructions of sm_90a that the kernels use, one function each. No header of CUDA or of C++ is included, so that
// the sources also compile at run time (NVRTC), on machines that have neither.
#pragma once
#include "params.h"

#define DK_DEVICE __device__ __forceinline__
#define DK_UNROLL _Pragma("unroll")

namespace dk {

constexpr uint32_t kAllLanes = 0xffffffffu;

DK_DEVICE int thread_index() { return (int)threadIdx.x; }
DK_DEVICE int block_index() { return (int)blockIdx.x; }

template <class T>
DK_DEVICE T load_global(const T* address) {
  return __ldg(address);
}
template <class T>
DK_DEVICE void store_global(T* address, T value) {
  *address = value;
}

// ---- Registers of a warp

// Tell the compiler that all lanes hold the same value.
DK_DEVICE int uniform(int value) { return __shfl_sync(kAllLanes, value, 0); }
DK_DEVICE float shuffle_xor(float value, int lanes) { return __shfl_xor_sync(kAllLanes, value, lanes); }
DK_DEVICE uint32_t shuffle_xor(uint32_t value, int lanes) { return __shfl_xor_sync(kAllLanes, value, lanes); }
DK_DEVICE uint32_t ballot(bool flag) { return __ballot_sync(kAllLanes, flag); }
DK_DEVICE void sync_warp() { __syncwarp(); }

DK_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DK_DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
DK_DEVICE float minus_infinity() { return __uint_as_float(0xff800000u); }
DK_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
DK_DEVICE float log2_exact(float x) { return log2f(x); }

// Keep the compiler from computing what depends on the value ahead of a loop, in registers that the loop needs.
DK_DEVICE uint32_t computed_anew(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

// ---- Shared memory; addresses are those of the shared window

DK_DEVICE uint32_t shared_base() {
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  return (uint32_t)__cvta_generic_to_shared(dynamic_shared);
}
DK_DEVICE void store_shared(uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}
DK_DEVICE void store_shared(uint32_t address, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
// Store the lower half of a register.
DK_DEVICE void store_shared_half(uint32_t address, uint32_t value) {
  asm volatile("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\nst.shared.b16 [%0], low;\n}" ::"r"(address), "r"(value)
               : "memory");
}
DK_DEVICE void store_shared_floats(uint32_t address, float a, float b, float c, float d) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}
DK_DEVICE void store_shared_4(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
DK_DEVICE uint32_t load_shared(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}
DK_DEVICE void load_shared_2(uint32_t address, float& a, float& b) {
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(a), "=f"(b) : "r"(address) : "memory");
}
DK_DEVICE void load_shared_4(uint32_t address, uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
               : "r"(address)
               : "memory");
}
DK_DEVICE void load_shared_floats(uint32_t address, float& a, float& b, float& c, float& d) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(a), "=f"(b), "=f"(c), "=f"(d)
               : "r"(address)
               : "memory");
}

// Make what this thread stored to shared memory visible to the tensor cores and the copy engine.
DK_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- Barriers

DK_DEVICE void sync_block() { __syncthreads(); }
DK_DEVICE void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
DK_DEVICE void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Make initialised barriers visible to the copy engine.
DK_DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DK_DEVICE void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrive, and keep the phase open until that many bytes have been copied.
DK_DEVICE void barrier_arrive_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Wait until the phase of this parity is over.
DK_DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra over;\nbra again;\nover:\n}" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
}

// ---- The copy engine: a box of a tensor map to shared memory; coordinates innermost first

DK_DEVICE void copy_box(uint32_t target, const TensorMap& map, uint32_t barrier, int x, int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
      ::"r"(target), "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}
DK_DEVICE void copy_box(uint32_t target, const TensorMap& map, uint32_t barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
      ::"r"(target), "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z) : "memory");
}

// ---- Reductions: add shared memory to global memory, float32, asynchronously

DK_DEVICE void reduce_add(float* target, uint32_t source, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(target), "r"(source),
               "r"(bytes)
               : "memory");
}
DK_DEVICE void reduce_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Wait until this thread's reductions have read their shared memory.
DK_DEVICE void reduce_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
// Wait until they are done.
DK_DEVICE void reduce_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// ---- Registers per thread: one warpgroup gives some away, others take them

template <int kRegisters>
DK_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
DK_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- Asynchronous matrix products of a warpgroup: (64, 64) float32 += (64, 16) (16, 64)

// Order register and shared-memory accesses before the products that follow.
DK_DEVICE void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DK_DEVICE void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Wait until at most that many committed groups are unfinished.
template <int kUnfinished>
DK_DEVICE void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kUnfinished) : "memory");
}

#define DK_ACCUMULATORS                                                                          \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define DK_OUTPUTS(d)                                                                                                 \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),         \
      "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),          \
      "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),         \
      "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])

// The first operand from registers or from shared memory, the second from shared memory, as descriptors of operand.h
// say. kAccumulate: add to d instead of overwriting it. kTransposed: the rows of the second operand's memory run along
// the inner dimension of the product; kFirstTransposed: those of the first. product_of_8 adds a product of 8 columns.
#define DK_PRODUCTS(TYPE)                                                                                             \
  template <bool kAccumulate, bool kTransposed>                                                                       \
  static DK_DEVICE void product(float (&d)[32], const uint32_t* a, uint64_t b) {                                      \
    asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %37, 0;\n"                                       \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " " DK_ACCUMULATORS                      \
                 ", {%32, %33, %34, %35}, %36, accumulate, 1, 1, %38;\n}"                                             \
                 : DK_OUTPUTS(d)                                                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAccumulate), "n"(kTransposed));           \
  }                                                                                                                   \
  template <bool kAccumulate, bool kFirstTransposed = false, bool kTransposed = false>                                \
  static DK_DEVICE void product(float (&d)[32], uint64_t a, uint64_t b) {                                             \
    asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %34, 0;\n"                                       \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " " DK_ACCUMULATORS                      \
                 ", %32, %33, accumulate, 1, 1, %35, %36;\n}"                                                         \
                 : DK_OUTPUTS(d)                                                                                      \
                 : "l"(a), "l"(b), "n"(kAccumulate), "n"(kFirstTransposed), "n"(kTransposed));                        \
  }                                                                                                                   \
  static DK_DEVICE void product_of_8(float (&d)[4], const uint32_t* a, uint64_t b) {                                  \
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32." TYPE "." TYPE                                           \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, 1, 1, 1, 0;"                                               \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                               \
  }

// ---- Elements: two of them share a register, the one with the lower index in the lower half

// `kRoundsBias`: both bias terms are rounded, as eager code rounds them, and as every other kernel that forms a score
// does; in float16 they could overflow where the score does not.
struct BFloat16 {
  static constexpr bool kRoundsBias = true;
  static DK_DEVICE uint32_t pack(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
  }
  static DK_DEVICE void unpack(uint32_t pair, float& low, float& high) {
    low = __uint_as_float(pair << 16), high = __uint_as_float(pair & 0xffff0000u);
  }
  DK_PRODUCTS("bf16")
};

struct Float16 {
  static constexpr bool kRoundsBias = false;
  static DK_DEVICE uint32_t pack(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
  }
  static DK_DEVICE void unpack(uint32_t pair, float& low, float& high) {
    asm("{\n.reg .f16 a, b;\nmov.b32 {a, b}, %2;\ncvt.f32.f16 %0, a;\ncvt.f32.f16 %1, b;\n}"
        : "=f"(low), "=f"(high)
        : "r"(pair));
  }
  DK_PRODUCTS("f16")
};

}  // namespace dk
