// The emulator's machinery, third part: what the threads of a warp do together.
#pragma once

#include "emulator_memory.h"

namespace emulated {

// ---- by all of a warp, or of a block

void sync_block(Line line) { wait(kAtBlock, kSyncBlock, line); }
void sync_warp(Line line) { wait(kAtWarp, kSyncWarp, line); }
u32 shuffle_xor(u32 value, int mask, Line line) {
    if (mask < 0 || mask >= kWarp) fail(line, "shuffle_xor by %d: a warp has %d lanes", mask, kWarp);
    u32 result = 0;
    current->value = value;
    current->mask = mask;
    current->out = &result;
    wait(kAtWarp, kShuffle, line);
    return result;
}
void load_matrix(u32* r, const Array* array, i64 offset, bool transposed, Line line) {
    current->out = r;
    current->array = array;
    current->offset = offset;
    wait(kAtWarp, transposed ? kLoadTransposed : kLoad, line);
}
void mma(float* c, const u32* a, const u32* b, bool brain, Line line) {
    current->out = c;
    current->a = a;
    current->b = b;
    wait(kAtWarp, brain ? kMmaBrain : kMmaHalf, line);
}
void mma_s8(int* c, const u32* a, const u32* b, Line line) {
    current->out = c;
    current->a = a;
    current->b = b;
    wait(kAtWarp, kMmaInt, line);
}

static void do_load(Thread* lanes, bool transposed) {
    u16 rows[32][8];
    for (int i = 0; i < kWarp; ++i) {
        current = &lanes[i];
        const Array* array = current->array;
        check(array, current->offset, 16, 16, "reads", current->line);
        shared_read(array, current->offset, 16, current->line);
        memcpy(rows[i], array->data + current->offset, 16);
    }
    current = nullptr;
    for (int i = 0; i < kWarp; ++i) {
        u32* r = static_cast<u32*>(lanes[i].out);
        for (int m = 0; m < 4; ++m) {
            const u16(*matrix)[8] = rows + 8 * m;
            const int major = i / 4, minor = i % 4 * 2;
            const u16 first = transposed ? matrix[minor][major] : matrix[major][minor];
            const u16 second = transposed ? matrix[minor + 1][major] : matrix[major][minor + 1];
            r[m] = u32(first) | u32(second) << 16;
        }
    }
}
// Products of 16-bit floats are exact in double; their sum is rounded once, to float.
template <class Type>
static void do_mma(Thread* lanes) {
    double a[16][16], b[16][8];
    for (int i = 0; i < kWarp; ++i) {
        const u32* ra = static_cast<const u32*>(lanes[i].a);
        const u32* rb = static_cast<const u32*>(lanes[i].b);
        const int g = i / 4, t = i % 4 * 2;
        for (int n = 0; n < 4; ++n) {
            const int row = g + n % 2 * 8, column = t + n / 2 * 8;
            a[row][column] = double(to_float(low<Type>(ra[n])));
            a[row][column + 1] = double(to_float(high<Type>(ra[n])));
        }
        for (int n = 0; n < 2; ++n) {
            b[t + n * 8][g] = double(to_float(low<Type>(rb[n])));
            b[t + n * 8 + 1][g] = double(to_float(high<Type>(rb[n])));
        }
    }
    double sums[16][8] = {};
    for (int m = 0; m < 16; ++m)
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < 8; ++n) sums[m][n] += a[m][k] * b[k][n];
    for (int i = 0; i < kWarp; ++i) {
        float* c = static_cast<float*>(lanes[i].out);
        for (int n = 0; n < 4; ++n) c[n] = float(double(c[n]) + sums[i / 4 + n / 2 * 8][i % 4 * 2 + n % 2]);
    }
}
static void do_mma_s8(Thread* lanes) {
    int a[16][32], b[32][8];
    for (int i = 0; i < kWarp; ++i) {
        const u32* ra = static_cast<const u32*>(lanes[i].a);
        const u32* rb = static_cast<const u32*>(lanes[i].b);
        const int g = i / 4, t = i % 4 * 4;
        for (int byte = 0; byte < 4; ++byte) {
            for (int n = 0; n < 4; ++n) a[g + n % 2 * 8][t + n / 2 * 16 + byte] = int8(ra[n] >> (8 * byte));
            for (int n = 0; n < 2; ++n) b[t + n * 16 + byte][g] = int8(rb[n] >> (8 * byte));
        }
    }
    for (int i = 0; i < kWarp; ++i) {
        int* c = static_cast<int*>(lanes[i].out);
        for (int n = 0; n < 4; ++n) {
            u32 sum = u32(c[n]);
            for (int k = 0; k < 32; ++k) sum += u32(a[i / 4 + n / 2 * 8][k] * b[k][i % 4 * 2 + n % 2]);
            c[n] = int(sum);
        }
    }
}
static void do_collective(Warp& warp) {
    Thread* lanes = warp.threads;
    switch (lanes[0].kind) {
        case kSyncWarp:
            warp.sync_time = ++now;
            for (int i = 0; i < kWarp; ++i)
                if (!lanes[i].known.empty()) {
                    join(warp.known, lanes[i].known);
                    lanes[i].known.clear();
                }
            break;
        case kShuffle:
            for (int i = 0; i < kWarp; ++i) *static_cast<u32*>(lanes[i].out) = lanes[i ^ lanes[i].mask].value;
            break;
        case kLoad:
        case kLoadTransposed:
            do_load(lanes, lanes[0].kind == kLoadTransposed);
            break;
        case kMmaHalf:
            do_mma<half>(lanes);
            break;
        case kMmaBrain:
            do_mma<bfloat16>(lanes);
            break;
        case kMmaInt:
            do_mma_s8(lanes);
            break;
        case kSyncBlock:
            break;
    }
}

}  // namespace emulated
