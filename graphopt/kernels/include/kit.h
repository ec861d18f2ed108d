// The kit that kernels are written against: a few types, the shape of a kernel, and the instructions that C++ has no
// words for (asynchronous copies, ldmatrix, mma, loads past the first cache, acquire and release). On a GPU they are
// inline PTX, for sm_80 and later, and no other header is needed; so NVRTC compiles a kernel with nothing installed
// beside it. With GRAPHOPT_EMULATED the same names come from emulator.h, and the same source runs, checked, on the CPU.
//
// Two things that a kernel must keep to, so that both read it alike:
//   * pointers to global memory are GLOBAL(type), to shared memory SHARED_POINTER(type), in helper functions too;
//   * what is read through them goes into a variable with a type: `half v = x[i]`, not `auto v = x[i]`.
// Kernels are compiled with macros like T and WARPS set: the kit uses no short names in capitals.
#pragma once

typedef signed char int8;
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// 16-bit floats are storage: arithmetic is done in float.
struct half {
    u16 bits;
};
struct bfloat16 {
    u16 bits;
};
// 16 bytes, the widest that one thread loads at once.
struct alignas(16) u32x4 {
    u32 word[4];
};

#ifdef GRAPHOPT_EMULATED
#include "emulator.h"
#else

// ---- the shape of a kernel: KERNEL(128) void name(GLOBAL(const half) x, int rows, GLOBAL(half) y) { ... }
#define KERNEL(most_threads) extern "C" __global__ __launch_bounds__(most_threads)
#define DEVICE __device__ __forceinline__
#define GLOBAL(...) __VA_ARGS__* __restrict__
#define SHARED_POINTER(...) __VA_ARGS__*
// An array shared by the threads of a block; nothing is in it when the block starts.
#define SHARED(type, name, count) __shared__ alignas(16) type name[count]
// The block's dynamic shared memory (`shared` bytes of the Kernel) as an array of `type`; once in a kernel.
#define SHARED_DYNAMIC(type, name)                \
    extern __shared__ u32x4 kit_dynamic_shared[]; \
    type* name = reinterpret_cast<type*>(kit_dynamic_shared)
// Memory of the loaded module: zero at first, kept from launch to launch; at the source's top level.
#define DEVICE_STATE(type, name, count) __device__ alignas(16) type name[count]

// ---- where this thread is
DEVICE int thread() { return int(threadIdx.x); }
DEVICE int threads() { return int(blockDim.x); }
DEVICE int lane() { return int(threadIdx.x & 31); }
DEVICE int warp() { return int(threadIdx.x >> 5); }
DEVICE int block_x() { return int(blockIdx.x); }
DEVICE int block_y() { return int(blockIdx.y); }
DEVICE int block_z() { return int(blockIdx.z); }
DEVICE int blocks_x() { return int(gridDim.x); }
DEVICE int blocks_y() { return int(gridDim.y); }
DEVICE int blocks_z() { return int(gridDim.z); }

// ---- barriers: every thread of the block, or of the warp, comes to the same one
DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }

// ---- conversions: to nearest, ties to even; beyond the largest a 16-bit float is infinite, int8 saturates
DEVICE float to_float(half value) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
}
DEVICE float to_float(bfloat16 value) {
    float result;
    asm("mov.b32 %0, %1;" : "=f"(result) : "r"(u32(value.bits) << 16));
    return result;
}
DEVICE float to_float(float value) { return value; }
DEVICE float to_float(int8 value) { return float(value); }
DEVICE float to_float(int value) { return float(value); }

template <class Type>
DEVICE Type from_float(float value);
template <>
DEVICE half from_float<half>(float value) {
    half result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
}
template <>
DEVICE bfloat16 from_float<bfloat16>(float value) {
    bfloat16 result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
}
template <>
DEVICE float from_float<float>(float value) {
    return value;
}
template <>
DEVICE int8 from_float<int8>(float value) {
    int result;
    asm("cvt.rni.sat.s8.f32 %0, %1;" : "=r"(result) : "f"(value));
    return int8(result);
}

// Two 16-bit values in one word: the lower address is in the lower half.
template <class Type>
DEVICE Type low(u32 word) {
    return Type{u16(word & 0xffffu)};
}
template <class Type>
DEVICE Type high(u32 word) {
    return Type{u16(word >> 16)};
}
template <class Type>
DEVICE u32 pack(Type lower, Type upper) {
    return u32(lower.bits) | u32(upper.bits) << 16;
}

// ---- wide and special accesses to memory
// The same memory as elements of another type.
template <class Other, class Type>
DEVICE Other* view(Type* pointer) {
    return reinterpret_cast<Other*>(pointer);
}
template <class Other, class Type>
DEVICE const Other* view(const Type* pointer) {
    return reinterpret_cast<const Other*>(pointer);
}
// 16 bytes at an address that is a multiple of 16; from and to global or shared memory.
template <class Type>
DEVICE u32x4 load16(const Type* pointer) {
    return *reinterpret_cast<const u32x4*>(pointer);
}
template <class Type>
DEVICE void store16(Type* pointer, u32x4 value) {
    *reinterpret_cast<u32x4*>(pointer) = value;
}
// Global memory that other blocks of this launch write: read past the first cache, after a load_acquire that says that
// it is there.
template <class Type>
DEVICE Type load_through_l2(const Type* pointer) {
    static_assert(sizeof(Type) == 2 || sizeof(Type) == 4, "load_through_l2 reads 2 or 4 bytes");
    Type result;
    if constexpr (sizeof(Type) == 2) {
        u16 bits;
        asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(bits) : "l"(pointer) : "memory");
        result = *reinterpret_cast<Type*>(&bits);
    } else {
        u32 bits;
        asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(bits) : "l"(pointer) : "memory");
        result = *reinterpret_cast<Type*>(&bits);
    }
    return result;
}
template <class Type>
DEVICE u32x4 load16_through_l2(const Type* pointer) {
    u32x4 result;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(result.word[0]), "=r"(result.word[1]), "=r"(result.word[2]), "=r"(result.word[3])
                 : "l"(pointer)
                 : "memory");
    return result;
}
// Asks for the line of this address; waits for nothing.
template <class Type>
DEVICE void prefetch_l2(const Type* pointer) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(pointer));
}
// The address as a number, to tell buffers apart by.
template <class Type>
DEVICE u64 address_of(const Type* pointer) {
    return reinterpret_cast<u64>(pointer);
}

// ---- asynchronous copies to shared memory, 16 bytes each: the first `valid_bytes` (0 to 16) from global memory, zeros
// behind them. They are there, for this thread, once async_wait<n> says that all but the last n groups are; for the
// others after a barrier. They go past the first cache.
template <class Type, class Source>
DEVICE void async_copy(Type* shared, const Source* global, int valid_bytes = 16) {
    const u32 address = u32(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(valid_bytes)
                 : "memory");
}
DEVICE void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int groups>
DEVICE void async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

// ---- by all 32 threads of a warp together
template <class Type>
DEVICE Type shuffle_xor(Type value, int mask) {
    static_assert(sizeof(Type) == 4, "shuffle_xor moves 4 bytes");
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
// Four 8 x 8 matrices of 16-bit elements (or 8 x 16 of 8-bit ones). Lane i points at row i % 8 of matrix i / 8, 16
// bytes of shared memory. Register m holds two neighbours of matrix m: row lane / 4, columns 2 * (lane % 4) and the
// next; transposed: column lane / 4, rows 2 * (lane % 4) and the next.
template <class Type>
DEVICE void load_matrix_x4(u32 (&r)[4], const Type* shared) {
    const u32 address = u32(__cvta_generic_to_shared(shared));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
template <class Type>
DEVICE void load_matrix_x4_transposed(u32 (&r)[4], const Type* shared) {
    const u32 address = u32(__cvta_generic_to_shared(shared));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
// c (16 x 8) += a (16 x 16, row by row) b (16 x 8, column by column). With g = lane / 4 and t = lane % 4:
//   a[0] row g, columns 2t 2t+1; a[1] row g+8; a[2], a[3] the same, columns + 8;   b[0] rows 2t 2t+1 of column g, b[1]
//   + 8; c[0] c[1] row g, columns 2t 2t+1; c[2] c[3] row g + 8.
DEVICE void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], half) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], bfloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// c (16 x 8) += a (16 x 32) b (32 x 8) of int8: as above with 4t to 4t+3 for 2t 2t+1, and 16 for 8 along the sum.
DEVICE void mma_s8(int (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- between blocks: atomics acquire and release, at the scope of the GPU; the relaxed one orders nothing by itself
DEVICE u32 atomic_add(u32* pointer, u32 value) {
    u32 old;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(pointer), "r"(value) : "memory");
    return old;
}
DEVICE u32 atomic_add_relaxed(u32* pointer, u32 value) {
    u32 old;
    asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(pointer), "r"(value) : "memory");
    return old;
}
DEVICE u32 atomic_cas(u32* pointer, u32 expected, u32 wanted) {
    u32 old;
    asm volatile("atom.acq_rel.gpu.global.cas.b32 %0, [%1], %2, %3;"
                 : "=r"(old)
                 : "l"(pointer), "r"(expected), "r"(wanted)
                 : "memory");
    return old;
}
DEVICE u64 atomic_cas(u64* pointer, u64 expected, u64 wanted) {
    u64 old;
    asm volatile("atom.acq_rel.gpu.global.cas.b64 %0, [%1], %2, %3;"
                 : "=l"(old)
                 : "l"(pointer), "l"(expected), "l"(wanted)
                 : "memory");
    return old;
}
DEVICE u32 load_acquire(const u32* pointer) {
    u32 value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(pointer) : "memory");
    return value;
}
DEVICE u64 load_acquire(const u64* pointer) {
    u64 value;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(pointer) : "memory");
    return value;
}
DEVICE void store_release(u32* pointer, u32 value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(pointer), "r"(value) : "memory");
}
DEVICE void store_release(u64* pointer, u64 value) {
    asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(pointer), "l"(value) : "memory");
}
// What this thread wrote before is there before what it writes after, for all threads of the GPU.
DEVICE void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
// A moment's rest in a loop that waits.
DEVICE void pause() { asm volatile("nanosleep.u32 64;" ::: "memory"); }

#endif
