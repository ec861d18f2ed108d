// The emulator's machinery: its parts, the schedule, and what Python calls. Compiled once, and linked to each kernel.
#pragma once

#include "emulator_warps.h"

namespace emulated {

// ---- the schedule

static bool same(Line a, Line b) { return a.number == b.number && (a.file == b.file || !strcmp(a.file, b.file)); }

[[noreturn]] static void fail_diverged(Thread& one, Thread& other) {
    current = &one;
    const char* name = kKindNames[one.kind];
    if (other.state == kDone) fail(one.line, "divergent: waits at %s, but thread %d has returned", name, other.number);
    if (one.kind == other.kind && one.kind == kShuffle && same(one.line, other.line))
        fail(one.line, "divergent: shuffle_xor by %d, but thread %d by %d", one.mask, other.number, other.mask);
    fail(one.line, "divergent: waits at %s, but thread %d at %s of line %u", name, other.number, kKindNames[other.kind],
         other.line.number);
}
// Nobody of the warp can run: does what all of it wait for, if it is that.
static void settle_warp(Warp& warp) {
    Thread* lanes = warp.threads;
    if (warp.at_warp) {
        Thread* waiting = lanes;
        while (waiting->state != kAtWarp) ++waiting;
        for (int i = 0; i < kWarp; ++i)
            if (lanes[i].state != kAtWarp || lanes[i].kind != waiting->kind || !same(lanes[i].line, waiting->line) ||
                (waiting->kind == kShuffle && lanes[i].mask != waiting->mask))
                fail_diverged(*waiting, lanes[i]);
        do_collective(warp);
        for (int i = 0; i < kWarp; ++i) lanes[i].state = kRunnable;
        warp.at_warp = 0;
        warp.runnable = kWarp;
        ++progress;
        return;
    }
    Block& block = *warp.block;
    const int count = int(block.here.threads);
    if (block.at_block + block.done < count || block.done == count) return;
    for (int i = 0; i < count; ++i) {
        Thread& first = block.threads[0];
        Thread& thread = block.threads[size_t(i)];
        if (thread.state != first.state || (first.state == kAtBlock && !same(thread.line, first.line)))
            fail_diverged(first.state == kAtBlock ? first : thread, first.state == kAtBlock ? thread : first);
    }
    block.barrier_time = ++now;
    for (Warp& one : block.warps) {
        if (!one.known.empty()) join(block.known, one.known);
        one.known.clear();
        for (int i = 0; i < kWarp; ++i) {
            Thread& thread = one.threads[i];
            if (!thread.known.empty()) join(block.known, thread.known);
            thread.known.clear();
            thread.state = kRunnable;
        }
        one.at_block = 0;
        one.runnable = kWarp;
    }
    block.at_block = 0;
    ++progress;
}
static void run_warp(Warp& warp) {
    for (;;) {
        const u32 drawn = draw();
        const int first = int(drawn & 31), step = int(drawn >> 5 & 31) | 1;  // some order of all lanes
        bool waited = false;
        for (int i = 0; i < kWarp; ++i) {
            Thread& thread = warp.threads[(first + i * step) & 31];
            if (thread.state != kRunnable) continue;
            run(&thread);
            waited |= thread.state == kRunnable;
        }
        if (!warp.runnable) settle_warp(warp);
        if (!warp.runnable || waited || !(drawn >> 10 & 7)) return;
    }
}
static void start(Block& block, Launch& launch, u32 number) {
    const emulated_description& described = *launch.description;
    const u32 count = described.threads;
    block.launch = &launch;
    block.serial = serials++;
    if (serials >= 1u << 22) fail({}, "more than %u blocks in one launch", 1u << 22);
    const u32 x = described.grid[0], y = described.grid[1];
    block.here = {0,
                  int(count),
                  {int(number % x), int(number / x % y), int(number / x / y)},
                  {int(x), int(y), int(described.grid[2])}};
    block.at_block = block.done = 0;
    block.barrier_time = 0;
    block.known.clear();
    block.arrays.clear();
    block.has_dynamic = false;
    block.used = 0;
    block.memory.resize(kSharedLimit);
    block.shadow.resize(kSharedLimit);
    const bool fresh = block.threads.empty();
    if (fresh) block.threads = std::vector<Thread>(count);
    block.warps.resize(count / kWarp);
    for (u32 i = 0; i < count / kWarp; ++i) block.warps[i] = {&block, &block.threads[i * kWarp], kWarp, 0, 0, 0, 0, {}};
    for (u32 i = 0; i < count; ++i) {
        Thread& thread = block.threads[i];
        thread.block = &block;
        thread.warp = &block.warps[i / kWarp];
        thread.number = int(i);
        thread.line = {};
        thread.known.clear();
        thread.heard.clear();
        thread.fenced.clear();
        thread.open.clear();
        thread.groups.clear();
        if (fresh) prepare(thread);
        thread.state = kRunnable;
    }
    block.running = true;
}
static Launch* some_pending() {
    const size_t count = launches.size(), first = draw() % count;
    for (size_t i = 0; i < count; ++i)
        if (!launches[(first + i) % count].queue.empty()) return &launches[(first + i) % count];
    return nullptr;
}
static void schedule() {
    u64 seen = progress, idle = 0;
    for (;;) {
        std::vector<Warp*>& warps = resident_warps;
        warps.clear();
        for (Block& block : slots) {
            if (block.running && block.done == int(block.threads.size())) {
                block.running = false;
                --block.launch->unfinished;
            }
            if (!block.running)
                if (Launch* launch = some_pending()) {
                    const u32 number = launch->queue.back();
                    launch->queue.pop_back();
                    start(block, *launch, number);
                }
            if (block.running)
                for (Warp& warp : block.warps) warps.push_back(&warp);
        }
        if (warps.empty()) return;
        bool ended = false;
        while (!ended) {
            const size_t count = warps.size();
            size_t at = draw() % count, tried = 0;
            while (!warps[at]->runnable && tried < count) {
                at = at + 1 == count ? 0 : at + 1;
                ++tried;
            }
            if (tried == count) fail({}, "nothing can run");
            Warp& warp = *warps[at];
            run_warp(warp);
            ended = warp.block->done == warp.block->here.threads;
            if (progress != seen) {
                seen = progress;
                idle = 0;
            } else if (++idle > kIdlePicks) {
                current = warp.threads;
                while (current->state != kRunnable) ++current;
                fail(current->line,
                     "deadlock: all threads of the %zu blocks that run wait for others, and nothing changes",
                     slots.size());
            }
        }
    }
}

static void set_up(u32 count, const emulated_description* descriptions, u32 seed, u32 resident) {
    draw.seed(seed);
    now = 1;
    serials = 0;
    progress = switches = blocks_run = 0;
    current = nullptr;
    state_shadows.assign(size_t(state_count), {});
    u64 address = 0x7f0000000000ull;
    for (int i = 0; i < state_count; ++i) {
        state_shadows[size_t(i)].assign(size_t(states[i]->bytes / states[i]->granule), Written{0, 0, false});
        states[i]->shadow = state_shadows[size_t(i)].data();
        states[i]->address = address;
        address += 1ull << 28;
    }
    u64 blocks = 0;
    for (u32 n = 0; n < count; ++n) {
        const emulated_description& described = descriptions[n];
        launches.push_back(Launch{&described, {}, {}, {}, 0});
        Launch& launch = launches.back();
        if (!described.threads || described.threads % kWarp || described.threads > kMostThreads)
            fail({}, "%u threads: a multiple of %d up to %u", described.threads, kWarp, kMostThreads);
        launch.shadows.resize(described.count);
        for (u32 i = 0; i < described.count; ++i) {
            const emulated_parameter& parameter = described.parameters[i];
            Argument argument{{static_cast<u8*>(parameter.data), parameter.bytes, parameter.address, parameter.name,
                               parameter.granule, false, nullptr},
                              0};
            if (parameter.kind == 1) memcpy(&argument.scalar, parameter.data, 4);
            if (parameter.kind == 2) {
                memset(parameter.data, kPoison, size_t(parameter.bytes));
                launch.shadows[i].assign(size_t(parameter.bytes / parameter.granule) + 1, Written{0, 0, false});
                argument.buffer.shadow = launch.shadows[i].data();
            }
            launch.arguments.push_back(argument);
        }
        const u64 size = u64(described.grid[0]) * described.grid[1] * described.grid[2];
        if (!size || described.grid[1] > 65535 || described.grid[2] > 65535 || size >= 1u << 22)
            fail({}, "a grid of %u x %u x %u blocks", described.grid[0], described.grid[1], described.grid[2]);
        blocks += size;
        launch.unfinished = u32(size);
        for (u32 i = u32(size); i-- > 0;) launch.queue.push_back(i);
        if (seed && draw() % 4)
            for (size_t i = launch.queue.size(); i > 1; --i) std::swap(launch.queue[i - 1], launch.queue[draw() % i]);
    }
    if (!resident) {
        const u32 choices[] = {1, 2, 3, 4, 6, 8};
        resident = choices[draw() % 6];
    }
    if (resident > blocks) resident = u32(blocks);
    for (u32 i = 0; i < resident; ++i) {
        slots.emplace_back();
        slots.back().slot = i;
    }
    allocate_stacks(size_t(resident) * descriptions[0].threads);
}
static void check_outputs() {
    for (size_t n = 0; n < launches.size(); ++n)
        for (u32 i = 0; i < launches[n].description->count; ++i) {
            const Buffer& buffer = launches[n].arguments[i].buffer;
            if (!buffer.shadow) continue;
            const u64 count = buffer.bytes / buffer.granule;
            u64 missing = 0, first = 0;
            for (u64 at = count; at-- > 0;)
                if (!shadow_of(&buffer)[at].who) {
                    ++missing;
                    first = at;
                }
            if (missing)
                fail({}, "%llu of the %llu elements of the output %s were never written, the first is element %llu",
                     missing, count, buffer.name, first);
        }
}

void register_state(Buffer& buffer) {
    if (state_count < kMostStates) states[state_count++] = &buffer;
}

}  // namespace emulated

// Runs launches, at the same time where there are several. 0, or 1 and what went wrong.
KIT_EXPORTED int emulated_launches(u32 count, const emulated_description* descriptions, u32 seed, u32 resident,
                                   u64 steps, emulated_failure* failed) {
    using namespace emulated;
    failure = failed;
    most_switches = steps;
    most_blocks_run = steps * 50;
    if (_setjmp(failure_point)) {  // fibers in the midst of a block are given up
        current = nullptr;
        free_all();
        return 1;
    }
    set_up(count, descriptions, seed, resident);
    schedule();
    check_outputs();
    free_all();
    return 0;
}
// The memory of the module: how many pieces, and each.
KIT_EXPORTED u32 emulated_states() { return u32(emulated::state_count); }
KIT_EXPORTED void* emulated_state(u32 index, const char** name, u64* bytes) {
    *name = emulated::states[index]->name;
    *bytes = emulated::states[index]->bytes;
    return emulated::states[index]->data;
}

// ---- what the compiler puts into the kernel's code (-fsanitize)

// At the start of each basic block: a loop that does not end, whatever is in it, does not hang the process.
extern "C" void __sanitizer_cov_trace_pc() {
    using namespace emulated;
    if (current && ++blocks_run > most_blocks_run)
        fail(current->line, "no end in sight after %llu steps of all threads", most_blocks_run);
}

// Checks; each is given the place in the source first.
namespace emulated {
struct SourceLocation {
    const char* file;
    u32 line, column;
};
}  // namespace emulated
#define KIT_HANDLER(name, message)                                                                      \
    extern "C" [[noreturn]] void __ubsan_handle_##name##_abort(const emulated::SourceLocation* place) { \
        emulated::fail({place->file, place->line}, message);                                            \
    }
KIT_HANDLER(out_of_bounds, "an index outside of its array")
KIT_HANDLER(add_overflow, "an integer sum overflows")
KIT_HANDLER(sub_overflow, "an integer difference overflows")
KIT_HANDLER(mul_overflow, "an integer product overflows")
KIT_HANDLER(negate_overflow, "an integer's negative overflows")
KIT_HANDLER(divrem_overflow, "an integer division by zero, or one that overflows")
KIT_HANDLER(shift_out_of_bounds, "a shift by more bits than there are, or of a negative number")
KIT_HANDLER(float_cast_overflow, "a float does not fit the integer it is converted to")
