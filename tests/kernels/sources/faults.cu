// A kernel with every fault that the emulator finds, one a time; and next to each what is right.
#include "kit.h"

enum Fault {
    RIGHT,
    WARP_SYNC_WITHIN_WARPS,
    READS_BEFORE_BARRIER,
    WRITES_WHAT_IS_READ,
    WARP_SYNC_FOR_BARRIER,
    TWO_WRITERS_SHARED,
    UNINITIALISED_SHARED,
    HALF_OF_A_BLOCK_AT_BARRIER,
    TWO_BARRIERS,
    RETURNED_BEFORE_BARRIER,
    HALF_OF_A_WARP_SHUFFLES,
    TWO_SHUFFLES,
    TWO_MASKS,
    READ_PAST_END,
    READ_BEFORE_START,
    WRITE_PAST_END,
    SHARED_READ_PAST_END,
    SHARED_WRITE_BEFORE_START,
    LOAD16_PAST_END,
    STORE16_PAST_END,
    COPY_PAST_END,
    COPY_PAST_SHARED,
    MATRIX_PAST_END,
    PREFETCH_PAST_END,
    THROUGH_L2_PAST_END,
    MISALIGNED_LOAD16,
    MISALIGNED_STORE16,
    MISALIGNED_VIEW,
    MISALIGNED_COPY,
    MISALIGNED_COPY_TO,
    MISALIGNED_MATRIX,
    COPY_OF_17_BYTES,
    COPY_NOT_WAITED_FOR,
    COPY_NOT_COMMITTED,
    COPY_WAITED_FOR_TOO_FEW,
    COPY_READ_BY_OTHERS,
    COPY_OVER_WHAT_IS_READ,
    OUTPUT_NOT_WRITTEN,
    OUTPUT_READ_FIRST,
    TWO_WRITERS_IN_BLOCK,
    TWO_WRITERS,
    SUM_OVERFLOWS,
    PRODUCT_OVERFLOWS,
    DIVISION_BY_ZERO,
    SHIFT_TOO_FAR,
    LOCAL_ARRAY_PAST_END,
    FLOAT_TOO_LARGE,
    NEVER_COMES,
    ENDLESS_WITH_BARRIERS,
    ENDLESS_WITH_READS,
    ENDLESS_WITH_NOTHING,
    TOO_MUCH_SHARED,
};

// 2 blocks of 64; x and y have 128 elements. `one` is 1, so that the compiler does not see the faults.
KERNEL(64)
void faults(GLOBAL(const half) x, int fault, int one, GLOBAL(half) y, GLOBAL(int) counts) {
    SHARED(half, tile, 64);
    SHARED(half, rows, 512);
    const int i = block_x() * 64 + thread();
    half value = x[i];

    switch (fault) {
        case RIGHT:
            for (int k = 0; k < 3; ++k) {
                tile[thread()] = value;
                sync_block();
                value = tile[63 - thread()];
                sync_block();
            }
            break;
        case WARP_SYNC_WITHIN_WARPS:
            for (int k = 0; k < 3; ++k) {
                tile[thread()] = value;
                sync_warp();
                value = tile[thread() ^ 31];
                sync_warp();
            }
            break;
        case READS_BEFORE_BARRIER:
            tile[thread()] = value;
            value = tile[thread() ^ 1];
            sync_block();
            break;
        case WRITES_WHAT_IS_READ:
            for (int k = 0; k < 3; ++k) {
                tile[thread()] = value;
                sync_block();
                value = tile[63 - thread()];
            }
            break;
        case WARP_SYNC_FOR_BARRIER:
            tile[thread()] = value;
            sync_warp();
            value = tile[63 - thread()];
            break;
        case TWO_WRITERS_SHARED:
            tile[thread() / 2] = value;
            break;
        case UNINITIALISED_SHARED:
            if (thread() < 63) tile[thread()] = value;
            sync_block();
            value = tile[thread()];
            break;
        case HALF_OF_A_BLOCK_AT_BARRIER:
            if (thread() < 32) sync_block();
            break;
        case TWO_BARRIERS:
            if (thread() < 32)
                sync_block();
            else
                sync_block();
            break;
        case RETURNED_BEFORE_BARRIER:
            y[i] = value;
            counts[i] = 0;
            if (thread() == 63) return;
            sync_block();
            break;
        case HALF_OF_A_WARP_SHUFFLES:
            if (lane() < 16) value = half{u16(shuffle_xor(int(value.bits), 1))};
            break;
        case TWO_SHUFFLES:
            if (lane() < 16)
                value = half{u16(shuffle_xor(int(value.bits), 1))};
            else
                value = half{u16(shuffle_xor(int(value.bits), 1))};
            break;
        case TWO_MASKS:
            value = half{u16(shuffle_xor(int(value.bits), lane() < 16 ? 1 : 2))};
            break;
        case READ_PAST_END:
            value = x[i + one];
            break;
        case READ_BEFORE_START:
            value = (x - one)[i];
            break;
        case WRITE_PAST_END:
            y[i + one] = value;
            break;
        case SHARED_READ_PAST_END:
            tile[thread()] = value;
            sync_block();
            value = tile[thread() + one];
            break;
        case SHARED_WRITE_BEFORE_START:
            tile[thread() - one] = value;
            break;
        case LOAD16_PAST_END:
            value = low<half>(load16(x + (120 + 8 * one)).word[0]);
            break;
        case STORE16_PAST_END:
            if (thread() == 0) store16(y + (120 + 8 * one), u32x4{{0, 0, 0, 0}});
            break;
        case COPY_PAST_END:
            if (thread() == 0) async_copy(rows, x + 120, 15 + one);  // in bounds: 16 bytes are left
            if (thread() == 1) async_copy(rows + 8, x + 128, one);
            async_commit();
            async_wait<0>();
            break;
        case COPY_PAST_SHARED:
            if (thread() == 0) async_copy(tile + 64 * one, x, 16);
            break;
        case MATRIX_PAST_END: {
            store16(rows + thread() * 8, load16(x));
            sync_block();
            u32 r[4];
            load_matrix_x4(r, rows + (lane() + 32 * one + 1) * 8);
            break;
        }
        case PREFETCH_PAST_END:
            prefetch_l2(x + i + one);
            break;
        case THROUGH_L2_PAST_END:
            value = load_through_l2(x + i + one);
            break;
        case MISALIGNED_LOAD16:
            value = low<half>(load16(x + one).word[0]);
            break;
        case MISALIGNED_STORE16:
            if (thread() == 0) store16(y + one, u32x4{{0, 0, 0, 0}});
            break;
        case MISALIGNED_VIEW:
            value = low<half>(view<const u32>(x + one)[0]);
            break;
        case MISALIGNED_COPY:
            if (thread() == 0) async_copy(rows, x + one, 8);
            break;
        case MISALIGNED_COPY_TO:
            if (thread() == 0) async_copy(rows + one, x, 8);
            break;
        case MISALIGNED_MATRIX: {
            store16(rows + thread() * 8, load16(x));
            sync_block();
            u32 r[4];
            load_matrix_x4(r, rows + (lane() * 8 + one));
            break;
        }
        case COPY_OF_17_BYTES:
            if (thread() == 0) async_copy(rows, x, 16 + one);
            break;
        case COPY_NOT_WAITED_FOR:
            async_copy(rows + thread() * 8, x + thread() / 8 * 8);
            async_commit();
            value = rows[thread() * 8];
            break;
        case COPY_NOT_COMMITTED:
            async_copy(rows + thread() * 8, x + thread() / 8 * 8);
            async_wait<0>();
            value = rows[thread() * 8];
            break;
        case COPY_WAITED_FOR_TOO_FEW:
            async_copy(rows + thread() * 8, x + thread() / 8 * 8);
            async_commit();
            async_wait<1>();
            value = rows[thread() * 8];
            break;
        case COPY_READ_BY_OTHERS:
            async_copy(rows + thread() * 8, x + thread() / 8 * 8);
            async_commit();
            async_wait<0>();
            value = rows[(thread() ^ 1) * 8];
            sync_block();
            break;
        case COPY_OVER_WHAT_IS_READ:
            for (int k = 0; k < 2; ++k) {
                async_copy(rows + thread() * 8, x + thread() / 8 * 8);
                async_commit();
                async_wait<0>();
                sync_block();
                value = rows[(63 - thread()) * 8];
            }
            break;
        case OUTPUT_NOT_WRITTEN:
            counts[i] = 0;
            if (i != 77) y[i] = value;
            return;
        case OUTPUT_READ_FIRST:
            value = y[i];
            break;
        case TWO_WRITERS_IN_BLOCK:
            counts[i / 2] = 0;
            break;
        case TWO_WRITERS:
            counts[thread()] = 0;
            break;
        case SUM_OVERFLOWS:
            counts[i] = 2147483647 + one * thread();
            break;
        case PRODUCT_OVERFLOWS:
            counts[i] = 65536 * one * (32768 + thread());
            break;
        case DIVISION_BY_ZERO:
            counts[i] = 5 / (one - 1);
            break;
        case SHIFT_TOO_FAR:
            counts[i] = one << (31 + one);
            break;
        case LOCAL_ARRAY_PAST_END: {
            int local[4] = {0, 0, 0, 0};
            for (int k = 0; k < 4 + one; ++k) local[k] = k * i;
            counts[i] = local[one] + local[one + 1];
            break;
        }
        case FLOAT_TOO_LARGE:
            counts[i] = int(3e9f * float(one));
            break;
        case ENDLESS_WITH_BARRIERS:
            while (one) sync_block();
            break;
        case ENDLESS_WITH_READS: {
            float sum = 1;
            while (sum != 0) sum = to_float(x[i]) + float(one) + 1e9f;
            value = from_float<half>(sum);
            break;
        }
        case ENDLESS_WITH_NOTHING:
            while (fault != 999) fault ^= one;
            break;
        case NEVER_COMES:
            if (thread() == 0) {
                counts[i] = 0;
                store_release(view<u32>(counts) + i, 0u);
                while (load_acquire(view<u32>(counts) + i) == 0u) pause();
            }
            break;
        case TOO_MUCH_SHARED: {
            SHARED(half, huge, 24576);
            huge[thread()] = value;
            break;
        }
    }
    y[i] = value;
    counts[i] = fault;
}
