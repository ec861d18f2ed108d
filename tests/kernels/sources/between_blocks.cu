// Blocks that wait for blocks, without being sure to run at the same time: whoever comes first takes the first ticket,
// and the first tickets are the producers'. Producers write middle = 2 x; consumers wait for all of middle, and write
// y, each row the sum of middle.
//
// The faults: what is left out, or done otherwise.
#include "kit.h"

enum Fault {
    RIGHT,
    BY_FENCE,          // right too: a fence, and a relaxed atomic
    BY_COPY,           // right too: asynchronous copies, which go past the first cache
    NO_BARRIER,        // tells before all threads of the block have written
    NO_FENCE,          // a relaxed atomic alone orders nothing
    NO_WAIT,           // reads before the producers say that they are done
    NO_BARRIER_AFTER,  // one thread waited, the others did not
    PLAIN_LOAD,        // through the first cache, which may hold what was there before
    PLAIN_FLAG,        // waits by plain loads
    BY_BLOCK_NUMBER,   // assumes that blocks start in their order
    CONSUMERS_FIRST,   // waits for blocks that start when it ends
};

DEVICE_STATE(u32, tickets, 1);
DEVICE_STATE(u32, done, 1);
DEVICE_STATE(u32, left, 1);

KERNEL(64)
void pipeline(GLOBAL(const float) x, int fault, int producers, GLOBAL(float) middle, GLOBAL(float) y) {
    SHARED(int, ticket, 1);
    SHARED(float, copied, 64);
    const u32 blocks = u32(blocks_x());
    if (thread() == 0) {
        ticket[0] = int(atomic_add_relaxed(&tickets[0], 1u));
        if (fault == BY_BLOCK_NUMBER) ticket[0] = block_x();
        if (fault == CONSUMERS_FIRST) ticket[0] = int(blocks) - 1 - ticket[0];
    }
    sync_block();
    const int mine = ticket[0];
    if (mine < producers) {
        const int i = mine * 64 + thread();
        middle[i] = 2.0f * x[i];
        if (fault != NO_BARRIER) sync_block();
        if (thread() == 0) {
            if (fault == BY_FENCE) fence();
            if (fault == BY_FENCE || fault == NO_FENCE)
                atomic_add_relaxed(&done[0], 1u);
            else
                atomic_add(&done[0], 1u);
        }
    } else {
        if (thread() == 0 && fault != NO_WAIT) {
            if (fault == PLAIN_FLAG)
                while (u32(done[0]) < u32(producers)) pause();
            else
                while (load_acquire(&done[0]) < u32(producers)) pause();
        }
        if (fault != NO_BARRIER_AFTER) sync_block();
        float sum = 0;
        for (int i = 0; i < producers * 64; ++i) {
            if (fault == PLAIN_LOAD)
                sum += middle[i];
            else if (fault == BY_COPY) {
                if (i % 64 == 0) {
                    sync_block();
                    if (thread() < 16) async_copy(copied + thread() * 4, middle + i + thread() * 4);
                    async_commit();
                    async_wait<0>();
                    sync_block();
                }
                sum += copied[i % 64];
            } else
                sum += load_through_l2(middle + i);
        }
        y[(mine - producers) * 64 + thread()] = sum;
    }
    // The last one to leave makes the module's memory ready for the next launch.
    sync_block();
    if (thread() == 0 && atomic_add(&left[0], 1u) + 1 == blocks) {
        store_release(&tickets[0], 0u);
        store_release(&done[0], 0u);
        store_release(&left[0], 0u);
    }
}

// The same for launches at the same time: counters by output, in a table whose rows are claimed and never given up.
DEVICE_STATE(u64, keys, 4);
DEVICE_STATE(u32, counters, 12);

KERNEL(64)
void together(GLOBAL(const float) x, int producers, GLOBAL(float) middle, GLOBAL(float) y) {
    SHARED(int, ticket, 1);
    SHARED(int, row, 1);
    const u32 blocks = u32(blocks_x());
    if (thread() == 0) {
        const u64 key = address_of(y);
        int at = 0;
        for (; at < 4; ++at) {
            const u64 was = atomic_cas(&keys[at], u64(0), key);
            if (was == 0 || was == key) break;
        }
        row[0] = at;
        ticket[0] = int(atomic_add(counters + at * 3, 1u));
    }
    sync_block();
    const int mine = ticket[0];
    GLOBAL(u32) counter = counters + row[0] * 3;
    if (mine < producers) {
        const int i = mine * 64 + thread();
        middle[i] = 2.0f * x[i];
        sync_block();
        if (thread() == 0) atomic_add(counter + 1, 1u);
    } else {
        if (thread() == 0)
            while (load_acquire(counter + 1) < u32(producers)) pause();
        sync_block();
        float sum = 0;
        for (int i = 0; i < producers * 64; ++i) sum += load_through_l2(middle + i);
        y[(mine - producers) * 64 + thread()] = sum;
    }
    sync_block();
    if (thread() == 0 && atomic_add(counter + 2, 1u) + 1 == blocks)
        for (int i = 0; i < 3; ++i) store_release(counter + i, 0u);
}
