// One small kernel for each group of the kit's primitives, so that each can be compared with numpy.
#include "kit.h"

// 128 elements a block.
KERNEL(128)
void halves_to_floats(GLOBAL(const half) x, GLOBAL(const bfloat16) z, GLOBAL(float) from_half,
                      GLOBAL(float) from_bfloat16) {
    const int i = block_x() * 128 + thread();
    from_half[i] = to_float(x[i]);
    from_bfloat16[i] = to_float(z[i]);
}

KERNEL(128)
void floats_to_less(GLOBAL(const float) x, int count, GLOBAL(half) halves, GLOBAL(bfloat16) bfloats,
                    GLOBAL(int8) bytes) {
    const int i = block_x() * 128 + thread();
    if (i < count) {
        halves[i] = from_float<half>(x[i]);
        bfloats[i] = from_float<bfloat16>(x[i]);
        bytes[i] = from_float<int8>(x[i]);
    }
}

// One warp: fragments as they lie in the registers of each lane (4, 2, 4 words), c = a b + c0.
KERNEL(32)
void fragments(GLOBAL(const int) a, GLOBAL(const int) b, GLOBAL(const float) c0, int brain, GLOBAL(float) c) {
    u32 fa[4], fb[2];
    float fc[4];
    for (int i = 0; i < 4; ++i) {
        fa[i] = u32(a[lane() * 4 + i]);
        fc[i] = c0[lane() * 4 + i];
    }
    for (int i = 0; i < 2; ++i) fb[i] = u32(b[lane() * 2 + i]);
    if (brain)
        mma(fc, fa, fb, bfloat16{});
    else
        mma(fc, fa, fb, half{});
    for (int i = 0; i < 4; ++i) c[lane() * 4 + i] = fc[i];
}

KERNEL(32)
void fragments_s8(GLOBAL(const int) a, GLOBAL(const int) b, GLOBAL(const int) c0, GLOBAL(int) c) {
    u32 fa[4], fb[2];
    int fc[4];
    for (int i = 0; i < 4; ++i) {
        fa[i] = u32(a[lane() * 4 + i]);
        fc[i] = c0[lane() * 4 + i];
    }
    for (int i = 0; i < 2; ++i) fb[i] = u32(b[lane() * 2 + i]);
    mma_s8(fc, fa, fb);
    for (int i = 0; i < 4; ++i) c[lane() * 4 + i] = fc[i];
}

// One warp: y (16, 8) = x (16, 16) w^T, w (8, 16); and again from w^T (16, 8), whose fragments load transposed.
KERNEL(32)
void tiny_product(GLOBAL(const half) x, GLOBAL(const half) w, GLOBAL(const half) transposed, GLOBAL(float) y,
                  GLOBAL(float) again) {
    SHARED(half, xs, 256);
    SHARED(half, ws, 256);
    SHARED(half, ts, 128);
    async_copy(xs + lane() * 8, x + lane() * 8);
    // Rows 8 to 15 of w are none: zeros, by copies of no bytes.
    async_copy(ws + lane() * 8, w + (lane() < 16 ? lane() * 8 : 0), lane() < 16 ? 16 : 0);
    if (lane() < 16) store16(ts + lane() * 8, load16(transposed + lane() * 8));
    async_commit();
    async_wait<0>();
    sync_warp();
    u32 a[4], both[4];
    load_matrix_x4(a, xs + (lane() & 15) * 16 + (lane() >> 4) * 8);
    load_matrix_x4(both, ws + (lane() & 7) * 16 + (lane() >> 3 & 1) * 8);
    u32 b[2] = {both[0], both[1]};
    float c[4] = {0, 0, 0, 0}, d[4] = {0, 0, 0, 0};
    mma(c, a, b, half{});
    load_matrix_x4_transposed(both, ts + (lane() & 15) * 8);
    b[0] = both[0];
    b[1] = both[1];
    mma(d, a, b, half{});
    for (int i = 0; i < 4; ++i) {
        const int at = (lane() / 4 + i / 2 * 8) * 8 + lane() % 4 * 2 + i % 2;
        y[at] = c[i];
        again[at] = d[i];
    }
}

// One warp: sums of 32 by shuffles; the valid bytes of a copy; words of two halves; views.
KERNEL(32)
void small_things(GLOBAL(const half) x, int valid, GLOBAL(float) sum, GLOBAL(half) copied, GLOBAL(half) swapped) {
    float value = to_float(x[lane()]);
    for (int mask = 16; mask; mask >>= 1) value += shuffle_xor(value, mask);
    sum[lane()] = value;
    SHARED(half, row, 8);
    if (lane() == 0) {
        async_copy(row, x, valid);
        async_commit();
        async_wait<0>();
    }
    sync_warp();
    if (lane() < 8) copied[lane()] = row[lane()];
    const u32 word = view<const u32>(x)[lane()];
    view<u32>(swapped)[lane()] = pack(high<half>(word), low<half>(word));
}

// Adds to the module's memory; the last block tells what it came to.
DEVICE_STATE(u32, arrived, 1);
DEVICE_STATE(int, launches, 1);

KERNEL(32)
void remembers(GLOBAL(const half) x, GLOBAL(int) y) {
    if (thread() == 0) {
        const u32 before = atomic_add(&arrived[0], 1u);
        if (before + 1 == u32(blocks_x())) {
            launches[0] += 1;
            y[0] = launches[0];
            store_release(&arrived[0], 0u);
        }
    }
}
