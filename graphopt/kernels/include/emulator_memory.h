// The emulator's machinery, second part: memory, and which thread knows of which write.
//
// What orders what. The emulator runs one thread at a time, so a clock that ticks at each event that orders something
// gives every write a time. A thread knows of a write when it is its own; or of its warp, before the last sync_warp; or
// of its block, before the last sync_block; or when it was told: a release (atomic, store_release, fence) leaves what
// the thread knows at that address, and an acquire takes it. An access that meets a write that it does not know of is a
// race, whatever value it would have read.
//
// Not looked for: a write to global memory that another block's earlier read of the same place is not ordered before.
#pragma once

#include "emulator_world.h"

namespace emulated {

// ---- what is known

static u64 scope(u32 serial) { return u64(serial) << 12; }

static bool ordered(u32 who, u32 time) {
    const u32 serial = (who - 1) >> 10, number = (who - 1) & 1023;
    const Thread& me = *current;
    const Block& block = *me.block;
    if (serial == block.serial) {
        if (int(number) == me.number || time < block.barrier_time) return true;
        if (int(number) / kWarp == me.number / kWarp && time < me.warp->sync_time) return true;
    }
    const u64 scopes[] = {scope(serial), scope(serial) | (1 + number / kWarp), scope(serial) | (64 + number)};
    const Knowledge* all[] = {&block.known, &me.warp->known, &me.known};
    for (const Knowledge* known : all) {
        if (known->empty()) continue;
        for (u64 one : scopes) {
            const auto found = known->find(one);
            if (found != known->end() && time < found->second) return true;
        }
    }
    return false;
}
// What this thread can tell others of: all it knows, up to now.
static Knowledge all_known() {
    const Thread& me = *current;
    Knowledge all = me.block->known;
    join(all, me.warp->known);
    join(all, me.known);
    const u64 base = scope(me.block->serial);
    Knowledge own{{base, me.block->barrier_time},
                  {base | u64(1 + me.number / kWarp), me.warp->sync_time},
                  {base | u64(64 + me.number), ++now}};
    join(all, own);
    return all;
}
static u32 me_written() { return (current->block->serial << 10 | u32(current->number)) + 1; }

static void fail_race(Line line, const char* verb, const char* name, u64 granule, u32 who, bool elsewhere) {
    const u32 serial = (who - 1) >> 10, number = (who - 1) & 1023;
    if (elsewhere) {
        for (const Block& block : slots)
            if (block.running && block.serial == serial)
                fail(line,
                     "race: %s element %llu of %s, which thread %u of block (%d, %d, %d) wrote, and nothing orders the "
                     "two",
                     verb, granule, name, number, block.here.block[0], block.here.block[1], block.here.block[2]);
        fail(line,
             "race: %s element %llu of %s, which thread %u of a block that has ended wrote, and nothing orders the two",
             verb, granule, name, number);
    }
    fail(line, "race: %s element %llu of %s, which thread %u of the same block wrote, with no barrier between", verb,
         granule, name, number);
}

// ---- global memory

static Written* shadow_of(const Buffer* buffer) { return static_cast<Written*>(buffer->shadow); }

void global_read(const Buffer* buffer, i64 offset, u32 size, bool through_l2, Line line) {
    const Written* shadow = shadow_of(buffer);
    const u32 me = me_written();
    for (u64 i = u64(offset) / buffer->granule; i <= (u64(offset) + size - 1) / buffer->granule; ++i) {
        const Written& last = shadow[i];
        if (last.who == me) continue;
        if (!last.who) {
            if (buffer->state) continue;
            fail(line, "reads element %llu of the output %s before anything wrote it", i, buffer->name);
        }
        const bool elsewhere = (last.who - 1) >> 10 != current->block->serial;
        if (!ordered(last.who, last.time)) fail_race(line, "reads", buffer->name, i, last.who, elsewhere);
        if (elsewhere && !through_l2)
            fail(line, "a plain load of element %llu of %s, which another block wrote, may be stale: load_through_l2",
                 i, buffer->name);
    }
}
static void mark(const Buffer* buffer, i64 offset, u32 size, bool atomic, Line line) {
    Written* shadow = shadow_of(buffer);
    const u32 me = me_written();
    for (u64 i = u64(offset) / buffer->granule; i <= (u64(offset) + size - 1) / buffer->granule; ++i) {
        Written& last = shadow[i];
        if (last.who && last.who != me && !(atomic && last.atomic) && !ordered(last.who, last.time))
            fail_race(line, atomic ? "an atomic on" : "writes", buffer->name, i, last.who,
                      (last.who - 1) >> 10 != current->block->serial);
        if (atomic && !last.who && !buffer->state)
            fail(line, "an atomic on element %llu of the output %s before anything wrote it", i, buffer->name);
        last = {me, now, atomic};
    }
}
void global_write(const Buffer* buffer, i64 offset, u32 size, Line line) {
    if (!buffer->shadow) fail(line, "writes to %s, an input", buffer->name);
    mark(buffer, offset, size, false, line);
}

// ---- between blocks

// Others may run before an atomic, or may not.
static void maybe_leave() {
    if (draw() & 1) leave();
}
static u64 load(const Buffer* buffer, i64 offset, u32 size) {
    u64 value = 0;
    memcpy(&value, buffer->data + offset, size);
    return value;
}
static void store(const Buffer* buffer, i64 offset, u32 size, u64 value) {
    if (load(buffer, offset, size) != value) ++progress;
    memcpy(buffer->data + offset, &value, size);
}
static void acquire(u64 address) {
    const auto found = told.find(address);
    if (found != told.end()) join(current->known, found->second);
}
u64 atomic_add(const Buffer* buffer, i64 offset, u32 size, u64 value, bool relaxed, Line line) {
    current->line = line;
    maybe_leave();
    check(buffer, offset, size, size, "an atomic on", line);
    mark(buffer, offset, size, true, line);
    const u64 address = buffer->address + u64(offset);
    if (relaxed) {
        const auto found = told.find(address);
        if (found != told.end()) join(current->heard, found->second);
        if (!current->fenced.empty()) join(told[address], current->fenced);
    } else {
        acquire(address);
        join(told[address], all_known());
    }
    const u64 old = load(buffer, offset, size);
    store(buffer, offset, size, old + value);
    if (!value) leave();
    return old;
}
u64 atomic_cas(const Buffer* buffer, i64 offset, u32 size, u64 expected, u64 wanted, Line line) {
    current->line = line;
    maybe_leave();
    check(buffer, offset, size, size, "an atomic on", line);
    mark(buffer, offset, size, true, line);
    const u64 address = buffer->address + u64(offset);
    acquire(address);
    const u64 old = load(buffer, offset, size);
    if (old == expected) {
        join(told[address], all_known());
        store(buffer, offset, size, wanted);
    } else {
        leave();  // it may be in a loop that waits for the value
    }
    return old;
}
u64 load_acquire(const Buffer* buffer, i64 offset, u32 size, Line line) {
    current->line = line;
    leave();
    check(buffer, offset, size, size, "reads", line);
    if (buffer->shadow) {
        const Written& last = shadow_of(buffer)[u64(offset) / buffer->granule];
        if (!last.who && !buffer->state)
            fail(line, "reads element %llu of the output %s before anything wrote it", u64(offset) / buffer->granule,
                 buffer->name);
        if (last.who && !last.atomic && !ordered(last.who, last.time))
            fail_race(line, "load_acquire of", buffer->name, u64(offset) / buffer->granule, last.who,
                      (last.who - 1) >> 10 != current->block->serial);
    }
    acquire(buffer->address + u64(offset));
    return load(buffer, offset, size);
}
void store_release(const Buffer* buffer, i64 offset, u32 size, u64 value, Line line) {
    current->line = line;
    maybe_leave();
    check(buffer, offset, size, size, "writes", line);
    if (!buffer->shadow) fail(line, "writes to %s, an input", buffer->name);
    Written& last = shadow_of(buffer)[u64(offset) / buffer->granule];
    if (!last.who) last = {me_written(), now, true};
    mark(buffer, offset, size, true, line);
    told[buffer->address + u64(offset)] =
        all_known();  // a store, unlike an atomic, hands on nothing of others before it
    store(buffer, offset, size, value);
}
void fence() {
    join(current->known, current->heard);
    current->heard.clear();
    current->fenced = all_known();
}
void pause(Line line) {
    current->line = line;
    leave();
}

// ---- shared memory

static Touched* shadow_of(const Array* array) { return static_cast<Touched*>(array->shadow); }
static u32 local(u16 number) { return (current->block->serial << 10 | number) + 1; }

static bool readers_ordered(const Touched& last) {
    switch (last.readers) {
        case kNobody:
            return true;
        case kOneThread:
            return ordered(local(last.reader), last.read_time);
        case kOneWarp:
            if (last.reader / kWarp == current->number / kWarp && last.read_time < current->warp->sync_time)
                return true;
            return last.read_time < current->block->barrier_time;
        case kSeveralWarps:
            break;
    }
    return last.read_time < current->block->barrier_time;
}
static void fail_copying(Line line, const char* verb, const Array* array, u64 granule) {
    fail(line, "%s element %llu of %s, which an async_copy that was not waited for may still write", verb, granule,
         array->name);
}
void shared_read(const Array* array, i64 offset, u32 size, Line line) {
    const u16 me = u16(current->number);
    for (u64 i = u64(offset) / array->granule; i <= (u64(offset) + size - 1) / array->granule; ++i) {
        Touched& last = shadow_of(array)[i];
        if (last.copying) fail_copying(line, "reads", array, i);
        if (!last.written) fail(line, "reads element %llu of shared %s, which nothing wrote", i, array->name);
        if (last.writer != me && !ordered(local(last.writer), last.time))
            fail_race(line, "reads", array->name, i, local(last.writer), false);
        if (last.readers == kNobody || (last.readers == kOneThread && last.reader == me) || readers_ordered(last)) {
            last.readers = kOneThread;
            last.reader = me;
        } else if (last.readers != kSeveralWarps) {
            last.readers = last.reader / kWarp == me / kWarp ? kOneWarp : kSeveralWarps;
        }
        last.read_time = now;
    }
}
static void check_shared_write(const Array* array, u64 granule, const char* verb, Line line) {
    const Touched& last = shadow_of(array)[granule];
    const u16 me = u16(current->number);
    if (last.copying) fail_copying(line, verb, array, granule);
    if (last.written && last.writer != me && !ordered(local(last.writer), last.time))
        fail_race(line, verb, array->name, granule, local(last.writer), false);
    if (!readers_ordered(last))
        fail(line, "race: %s element %llu of %s, which thread %u%s may still read, with no barrier between", verb,
             granule, array->name, u32(last.reader), last.readers == kOneThread ? "" : " (and others)");
}
void shared_write(const Array* array, i64 offset, u32 size, Line line) {
    for (u64 i = u64(offset) / array->granule; i <= (u64(offset) + size - 1) / array->granule; ++i) {
        check_shared_write(array, i, "writes", line);
        Touched& last = shadow_of(array)[i];
        last.written = true;
        last.writer = u16(current->number);
        last.time = now;
        last.readers = kNobody;
    }
}

static Array carve(Block& block, u32 bytes, u32 count, u32 granule, const char* name, Line line) {
    const u32 size = (bytes + 15) & ~15u;
    if (u64(block.used) + size > kSharedLimit)
        fail(line, "%s: more than %u bytes of shared memory", name, kSharedLimit);
    Array array{block.memory.data() + block.used, block.shadow.data() + block.used, bytes, granule, name};
    memset(array.data, kPoison, bytes);
    memset(array.shadow, 0, sizeof(Touched) * count);
    block.used += size;
    return array;
}
const Array* shared_array(Site& site, Line line) {
    if (site.number < 0) {
        site.number = int(sites.size());
        sites.push_back({site.size, site.count, site.name});
    }
    Block& block = *current->block;
    while (int(block.arrays.size()) <= site.number) {
        const Place& place = sites[block.arrays.size()];
        if (u64(place.size) * place.count > kSharedLimit)
            fail(line, "%s: more than %u bytes of shared memory", place.name, kSharedLimit);
        block.arrays.push_back(carve(block, place.size * place.count, place.count, place.size, place.name, line));
    }
    return &block.arrays[size_t(site.number)];
}
const Array* shared_dynamic(u32 granule) {
    Block& block = *current->block;
    if (!block.has_dynamic) {
        const u32 bytes = block.launch->description->dynamic_shared;
        block.dynamic = carve(block, bytes, (bytes + granule - 1) / granule, granule, "the dynamic shared memory", {});
        block.has_dynamic = true;
    }
    return &block.dynamic;
}

// ---- asynchronous copies: nothing is there until it is waited for

void async_copy(const Array* shared, i64 offset, const Buffer* global, i64 from, int valid, Line line) {
    if (valid < 0 || valid > 16) fail(line, "async_copy of %d bytes: 0 to 16 can be valid", valid);
    check(shared, offset, 16, 16, "writes", line);
    if (u64(from) & 15) fail_misaligned(global->name, from, 16, line);
    if (valid) {
        check(global, from, u32(valid), 1, "reads", line);
        if (global->shadow) global_read(global, from, u32(valid), true, line);
    }
    for (u64 i = u64(offset) / shared->granule; i <= u64(offset + 15) / shared->granule; ++i) {
        check_shared_write(shared, i, "async_copy writes", line);
        shadow_of(shared)[i].copying = u16(current->number + 1);
    }
    memset(shared->data + offset, kPoison, 16);
    current->open.push_back({shared, offset, global->data + from, valid});
}
void async_commit() {
    current->groups.push_back(std::move(current->open));
    current->open.clear();
}
void async_wait(u32 groups) {
    while (current->groups.size() > groups) {
        for (const Copy& copy : current->groups.front()) {
            memset(copy.array->data + copy.offset, 0, 16);
            memcpy(copy.array->data + copy.offset, copy.from, size_t(copy.valid));
            for (u64 i = u64(copy.offset) / copy.array->granule; i <= u64(copy.offset + 15) / copy.array->granule;
                 ++i) {
                Touched& last = shadow_of(copy.array)[i];
                last.copying = 0;
                last.written = true;
                last.writer = u16(current->number);
                last.time = now;
                last.readers = kNobody;
            }
        }
        current->groups.pop_front();
    }
}

}  // namespace emulated
