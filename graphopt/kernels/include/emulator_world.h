// The emulator's machinery, first part: what a launch is made of, how it fails, and the fibers that threads run on.
//
// A launch runs a few blocks at a time ("resident"), as a GPU does, and switches between their threads wherever these
// may notice each other: barriers, collectives of a warp, atomics, pauses. Which runs next is drawn from the seed.
#pragma once

#include <csetjmp>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <deque>
#include <random>
#include <sys/mman.h>
#include <ucontext.h>
#include <unordered_map>
#include <vector>

#define KIT_MACHINERY
#include "kit.h"

#define KIT_EXPORTED extern "C" __attribute__((visibility("default")))

namespace emulated {

constexpr int kWarp = 32;
constexpr u32 kSharedLimit = 48 * 1024;
constexpr u32 kMostThreads = 1024;
constexpr size_t kStack = 256 * 1024, kGuard = 64 * 1024;
constexpr u64 kIdlePicks = 100000;  // of a warp, one after the other, in which nobody did more than wait
constexpr u8 kPoison = 0xff;        // not a number in every float type

// ---- who knows what

// Block s is scope s << 12, its warp w s << 12 | 1 + w, its thread t s << 12 | 64 + t.
typedef std::unordered_map<u64, u32> Knowledge;  // scope -> writes in it before this time are known

inline void join(Knowledge& into, const Knowledge& other) {
    for (const auto& [scope, time] : other) {
        u32& known = into[scope];
        if (known < time) known = time;
    }
}

// Who wrote a granule of global memory last.
struct Written {
    u32 who;  // serial of the block << 10 | thread, plus 1; 0: nobody
    u32 time;
    bool atomic;
};
// Who wrote and who read a granule of shared memory last.
enum Readers : u8 { kNobody, kOneThread, kOneWarp, kSeveralWarps };
struct Touched {
    u32 time, read_time;
    u16 writer, reader, copying;  // threads; copying: 1 + the thread whose async_copy is under way
    bool written;
    Readers readers;
};

struct Copy {
    const Array* array;
    i64 offset;
    const u8* from;
    int valid;
};

enum State : u8 { kRunnable, kAtBlock, kAtWarp, kDone };
enum Kind : u8 { kSyncBlock, kSyncWarp, kShuffle, kLoad, kLoadTransposed, kMmaHalf, kMmaBrain, kMmaInt };
constexpr const char* kKindNames[] = {
    "sync_block", "sync_warp", "shuffle_xor", "load_matrix_x4", "load_matrix_x4_transposed", "mma", "mma", "mma_s8"};

struct Block;
struct Warp;
struct Thread {
    jmp_buf context;
    ucontext_t start;
    bool alive = false;  // its fiber has begun
    Block* block = nullptr;
    Warp* warp = nullptr;
    int number = 0;
    State state = kDone;
    // what it waits with
    Kind kind = kSyncBlock;
    Line line{};
    void* out = nullptr;
    const void* a = nullptr;
    const void* b = nullptr;
    u32 value = 0;
    int mask = 0;
    const Array* array = nullptr;
    i64 offset = 0;
    // what it knows beyond its warp; what it read by relaxed atomics; what its last fence lets relaxed atomics tell
    Knowledge known, heard, fenced;
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
};
struct Warp {
    Block* block;
    Thread* threads;
    int runnable, at_block, at_warp, done;
    u32 sync_time;
    Knowledge known;
};
struct Launch;
struct Block {
    Launch* launch = nullptr;
    size_t slot = 0;
    u32 serial = 0;
    Here here;
    int at_block = 0, done = 0;
    u32 barrier_time = 0;
    Knowledge known;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<u8> memory;
    std::vector<Touched> shadow;
    std::deque<Array> arrays;  // by Site::number; stay where they are
    Array dynamic;
    bool has_dynamic = false;
    u32 used = 0;
    bool running = false;
};

}  // namespace emulated

// As emulate.py describes a launch; the layout is shared with it.
struct emulated_parameter {
    void* data;  // of the tensor, or of the int
    u64 bytes;   // 0 for a scalar
    u64 address;
    const char* name;
    u32 granule;
    u32 kind;  // 0 input, 1 scalar, 2 output
};
struct emulated_description {
    u32 grid[3];
    u32 threads;
    u32 dynamic_shared;
    u32 count;
    const emulated_parameter* parameters;
};
// What went wrong.
struct emulated_failure {
    char what[512];
    int launch;  // -1: of no thread
    int block[3];
    int thread;
    u32 line;  // 0: of no line
    char file[128];
};

namespace emulated {

struct Launch {
    const emulated_description* description;
    std::vector<Argument> arguments;
    std::vector<std::vector<Written>> shadows;
    std::vector<u32> queue;  // blocks that have not started, the next one last
    u32 unfinished;
};

// ---- the world: one launch at a time of a library
struct Place {
    u32 size, count;
    const char* name;
};
constexpr int kMostStates = 64;
static Buffer* states[kMostStates];
static int state_count;
static std::vector<Place> sites;
static std::deque<Block> slots;
static std::deque<Launch> launches;
static std::vector<std::vector<Written>> state_shadows;
static std::unordered_map<u64, Knowledge> told;  // by address: what releases left there
static std::mt19937 draw;
static u32 now, serials;
static Thread* current;
static jmp_buf scheduler, failure_point;
static char* stacks;
static size_t stack_count;
static std::vector<Warp*> resident_warps;
static emulated_failure* failure;
static u64 progress, switches, most_switches;

static u64 blocks_run, most_blocks_run;  // basic blocks of the kernel's code

Here here;

// ---- failing

static void say(Line line, const char* format, va_list values) {
    vsnprintf(failure->what, sizeof failure->what, format, values);
    snprintf(failure->file, sizeof failure->file, "%s", line.file ? line.file : "");
    failure->line = line.number;
    failure->launch = -1;
    if (current) {
        failure->launch = 0;
        for (size_t i = 0; i < launches.size(); ++i)
            if (&launches[i] == current->block->launch) failure->launch = int(i);
        for (int i = 0; i < 3; ++i) failure->block[i] = current->block->here.block[i];
        failure->thread = current->number;
    }
}
[[noreturn]] void fail(Line line, const char* format, ...) {
    va_list values;
    va_start(values, format);
    say(line, format, values);
    va_end(values);
    _longjmp(failure_point, 1);
}
[[noreturn]] void fail_outside(const char* verb, const char* name, i64 offset, u32 size, u64 bytes, u32 granule,
                               Line line) {
    if (size <= granule && offset % i64(granule) == 0)
        fail(line, "%s element %lld of %s, which has %llu", verb, offset / i64(granule), name, bytes / granule);
    fail(line, "%s bytes %lld to %lld of %s, which has %llu", verb, offset, offset + i64(size) - 1, name, bytes);
}
[[noreturn]] void fail_misaligned(const char* name, i64 offset, u32 alignment, Line line) {
    fail(line, "misaligned: byte %lld of %s is no multiple of %u", offset, name, alignment);
}

// ---- fibers

// Leaves the running fiber for the scheduler, until it is this fiber's turn again.
__attribute__((noinline)) static void leave() {
    if (!_setjmp(current->context)) _longjmp(scheduler, 1);
}
// A fiber runs threads for ever, one a block.
static void fiber() {
    for (;;) {
        run_thread(current->block->launch->arguments.data());
        Thread& me = *current;
        me.state = kDone;
        --me.warp->runnable;
        ++me.warp->done;
        ++me.block->done;
        ++progress;
        leave();
    }
}
__attribute__((noinline)) static void enter(Thread* thread) {
    if (!_setjmp(scheduler)) {
        if (thread->alive) _longjmp(thread->context, 1);
        thread->alive = true;
        setcontext(&thread->start);
    }
}
// The stacks of a launch, in one piece of memory; given back after it, since a process may load many kernels.
static void allocate_stacks(size_t count) {
    void* memory =
        mmap(nullptr, count * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail({}, "no memory for the stacks of %zu threads", count);
    stacks = static_cast<char*>(memory);
    stack_count = count;
    // A stack that runs over meets its guard, not the stack of another thread.
    for (size_t i = 0; i < count; ++i) mprotect(stacks + i * kStack, kGuard, PROT_NONE);
}
static void free_all() {
    if (stacks) munmap(stacks, stack_count * kStack);
    stacks = nullptr;
    slots.clear();
    told.clear();
    launches.clear();
    state_shadows.clear();
}
static void prepare(Thread& thread) {
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = stacks + size_t(&thread - thread.block->threads.data()) * kStack +
                                  thread.block->slot * thread.block->threads.size() * kStack;
    thread.start.uc_stack.ss_size = kStack;
    thread.start.uc_link = nullptr;
    makecontext(&thread.start, fiber, 0);
}
static void run(Thread* thread) {
    if (++switches > most_switches) {
        current = thread;
        fail(thread->line, "no end in sight after %llu switches between threads", most_switches);
    }
    current = thread;
    here = thread->block->here;
    here.thread = thread->number;
    enter(thread);
    current = nullptr;
}
static void wait(State state, Kind kind, Line line) {
    Thread& me = *current;
    me.state = state;
    me.kind = kind;
    me.line = line;
    --me.warp->runnable;
    if (state == kAtBlock) {
        ++me.warp->at_block;
        ++me.block->at_block;
    } else {
        ++me.warp->at_warp;
    }
    leave();
}

}  // namespace emulated
