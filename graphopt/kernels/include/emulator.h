// The kit on the CPU: the names of kit.h, for a kernel compiled as host C++. Every thread of a block is a fiber; what a
// kernel reads and writes goes through classes that know the memory behind them, so that an access outside of it, an
// access that races with another thread's, and a value that nothing wrote are errors with a line, not a wrong number.
// kit.h includes this header behind its types; the machinery is emulator_core.h. No header of the system is included, so
// that a kernel compiles fast.
#pragma once

// The line of the source that calls: a default argument is evaluated where the call stands.
#define KIT_LINE emulated::Line::here()

namespace emulated {

typedef long long i64;
struct Line {
    const char* file;
    u32 number;  // 0: unknown
    static constexpr Line here(const char* file = __builtin_FILE(), u32 number = __builtin_LINE()) {
        return {file, number};
    }
};

// Ends the launch: the message, with the block, the thread and the line, is what the caller of the launch is told.
[[noreturn]] void fail(Line line, const char* format, ...);
[[noreturn]] void fail_outside(const char* verb, const char* name, i64 offset, u32 size, u64 bytes, u32 granule,
                               Line line);
[[noreturn]] void fail_misaligned(const char* name, i64 offset, u32 alignment, Line line);

// What a running thread knows of itself.
struct Here {
    int thread, threads;
    int block[3];
    int blocks[3];
};
extern Here here;

// A tensor, or memory of the module. `shadow` says who wrote each granule (an element); inputs have none.
struct Buffer {
    u8* data;
    u64 bytes;
    u64 address;
    const char* name;
    u32 granule;
    bool state;
    void* shadow;
};
// An array in shared memory of the block that runs.
struct Array {
    u8* data;
    void* shadow;
    u32 bytes;
    u32 granule;
    const char* name;
};

void global_read(const Buffer* buffer, i64 offset, u32 size, bool through_l2, Line line);
void global_write(const Buffer* buffer, i64 offset, u32 size, Line line);
void shared_read(const Array* array, i64 offset, u32 size, Line line);
void shared_write(const Array* array, i64 offset, u32 size, Line line);

template <class Memory>
inline void check(const Memory* memory, i64 offset, u32 size, u32 alignment, const char* verb, Line line) {
    if (offset < 0 || u64(offset) + size > memory->bytes)
        fail_outside(verb, memory->name, offset, size, memory->bytes, memory->granule, line);
    if (u64(offset) & (alignment - 1)) fail_misaligned(memory->name, offset, alignment, line);
}
inline void read(const Buffer* buffer, i64 offset, u32 size, bool through_l2, void* into, Line line) {
    check(buffer, offset, size, size, "reads", line);
    if (buffer->shadow) global_read(buffer, offset, size, through_l2, line);
    __builtin_memcpy(into, buffer->data + offset, size);
}
inline void write(const Buffer* buffer, i64 offset, u32 size, const void* from, Line line) {
    check(buffer, offset, size, size, "writes", line);
    global_write(buffer, offset, size, line);
    __builtin_memcpy(buffer->data + offset, from, size);
}
inline void read(const Array* array, i64 offset, u32 size, bool, void* into, Line line) {
    check(array, offset, size, size, "reads", line);
    shared_read(array, offset, size, line);
    __builtin_memcpy(into, array->data + offset, size);
}
inline void write(const Array* array, i64 offset, u32 size, const void* from, Line line) {
    check(array, offset, size, size, "writes", line);
    shared_write(array, offset, size, line);
    __builtin_memcpy(array->data + offset, from, size);
}

// An index, with the line it is used on: operator[] cannot take the line itself.
struct Index {
    i64 value;
    Line line;
    template <class Integer>
    Index(Integer index, Line at = KIT_LINE) : value(i64(index)), line(at) {}
};

template <class Type>
struct Unconst {
    using Result = Type;
    static constexpr bool constant = false;
};
template <class Type>
struct Unconst<const Type> {
    using Result = Type;
    static constexpr bool constant = true;
};
template <class One, class Other>
struct Same {};
template <class One>
struct Same<One, One> {
    using Yes = One;
};
template <class Memory, class Type>
struct Pointer;

// An element that can be written: `y[i] = value`, `y[i] += value`, `&y[i]`.
template <class Memory, class Type>
struct Reference {
    const Memory* memory;
    i64 offset;
    Line line;
    operator Type() const {
        Type value;
        read(memory, offset, sizeof(Type), false, &value, line);
        return value;
    }
    const Reference& operator=(Type value) const {
        write(memory, offset, sizeof(Type), &value, line);
        return *this;
    }
    const Reference& operator=(const Reference& other) const { return *this = Type(other); }
    template <class Other>
    const Reference& operator+=(Other value) const {
        return *this = Type(Type(*this) + value);
    }
    template <class Other>
    const Reference& operator-=(Other value) const {
        return *this = Type(Type(*this) - value);
    }
    template <class Other>
    const Reference& operator*=(Other value) const {
        return *this = Type(Type(*this) * value);
    }
    template <class Other>
    const Reference& operator|=(Other value) const {
        return *this = Type(Type(*this) | value);
    }
    Pointer<Memory, Type> operator&() const { return {memory, offset}; }
};
template <class Memory, class Type>
struct Access {
    using Result = Reference<Memory, Type>;
    static Result at(const Memory* memory, i64 offset, Line line) { return {memory, offset, line}; }
};
template <class Memory, class Type>
struct Access<Memory, const Type> {
    using Result = const Type;  // not to be assigned to
    static Result at(const Memory* memory, i64 offset, Line line) {
        Type value;
        read(memory, offset, sizeof(Type), false, &value, line);
        return value;
    }
};

// A pointer that knows its memory. It may point outside, as a real one may; it may not be used there.
template <class Memory, class Type>
struct Pointer {
    const Memory* memory;
    i64 offset;
    using Accessed = Access<Memory, Type>;
    static constexpr i64 size = sizeof(Type);

    template <class Other, class = typename Same<Other, const Type>::Yes>
    operator Pointer<Memory, Other>() const {
        return {memory, offset};
    }
    typename Accessed::Result operator[](Index index) const {
        return Accessed::at(memory, offset + index.value * size, index.line);
    }
    typename Accessed::Result operator*() const { return Accessed::at(memory, offset, Line{nullptr, 0}); }
    Pointer operator+(i64 count) const { return {memory, offset + count * size}; }
    Pointer operator-(i64 count) const { return {memory, offset - count * size}; }
    Pointer& operator+=(i64 count) { return *this = *this + count; }
    Pointer& operator-=(i64 count) { return *this = *this - count; }
    Pointer& operator++() { return *this += 1; }
    Pointer& operator--() { return *this -= 1; }
    i64 operator-(Pointer other) const { return (offset - other.offset) / size; }
    bool operator==(Pointer other) const { return memory == other.memory && offset == other.offset; }
    bool operator!=(Pointer other) const { return !(*this == other); }
    bool operator<(Pointer other) const { return offset < other.offset; }
    bool operator<=(Pointer other) const { return offset <= other.offset; }
    bool operator>(Pointer other) const { return offset > other.offset; }
    bool operator>=(Pointer other) const { return offset >= other.offset; }
};
template <class Type>
using Global = Pointer<Buffer, Type>;
template <class Type>
using Shared = Pointer<Array, Type>;

// ---- shared arrays: where one lies in the block's shared memory is settled when it is first used
struct Site {
    u32 size, count;
    const char* name;
    int number;
};
const Array* shared_array(Site& site, Line line);
const Array* shared_dynamic(u32 granule);

// ---- memory of the module
void register_state(Buffer& buffer);
template <class Type>
inline Global<Type> device_state(Buffer& buffer) {
    register_state(buffer);
    return {&buffer, 0};
}

// ---- what the machinery does for a thread, or for a warp once all of it is there
void sync_block(Line line);
void sync_warp(Line line);
void pause(Line line);
void fence();
void async_copy(const Array* shared, i64 offset, const Buffer* global, i64 from, int valid_bytes, Line line);
void async_commit();
void async_wait(u32 groups);
u32 shuffle_xor(u32 value, int mask, Line line);
void load_matrix(u32* r, const Array* array, i64 offset, bool transposed, Line line);
void mma(float* c, const u32* a, const u32* b, bool brain, Line line);
void mma_s8(int* c, const u32* a, const u32* b, Line line);
u64 atomic_add(const Buffer* buffer, i64 offset, u32 size, u64 value, bool relaxed, Line line);
u64 atomic_cas(const Buffer* buffer, i64 offset, u32 size, u64 expected, u64 wanted, Line line);
u64 load_acquire(const Buffer* buffer, i64 offset, u32 size, Line line);
void store_release(const Buffer* buffer, i64 offset, u32 size, u64 value, Line line);

// ---- what the launched kernel is given
struct Argument {
    Buffer buffer;
    int scalar;
};
template <class Type>
inline Global<Type> global(const Argument* arguments, int index) {
    return {&arguments[index].buffer, 0};
}
// Written for each kernel beside its source: calls it with its arguments.
void run_thread(const Argument* arguments);

}  // namespace emulated

#define KERNEL(most_threads) static
#define DEVICE inline
#define GLOBAL(...) emulated::Global<__VA_ARGS__>
#define SHARED_POINTER(...) emulated::Shared<__VA_ARGS__>
#define SHARED(type, name, count)                                              \
    static emulated::Site name##_site = {sizeof(type), u32(count), #name, -1}; \
    const emulated::Shared<type> name = {emulated::shared_array(name##_site, emulated::Line{__FILE__, __LINE__}), 0}
#define SHARED_DYNAMIC(type, name) const emulated::Shared<type> name = {emulated::shared_dynamic(sizeof(type)), 0}
#define DEVICE_STATE(type, name, count)                                                                              \
    alignas(16) static u8 name##_memory[sizeof(type) * (count)];                                                     \
    static emulated::Buffer name##_buffer = {name##_memory, sizeof(name##_memory), 0, #name, sizeof(type), true, 0}; \
    static const emulated::Global<type> name = emulated::device_state<type>(name##_buffer)

inline int thread() { return emulated::here.thread; }
inline int threads() { return emulated::here.threads; }
inline int lane() { return emulated::here.thread & 31; }
inline int warp() { return emulated::here.thread >> 5; }
inline int block_x() { return emulated::here.block[0]; }
inline int block_y() { return emulated::here.block[1]; }
inline int block_z() { return emulated::here.block[2]; }
inline int blocks_x() { return emulated::here.blocks[0]; }
inline int blocks_y() { return emulated::here.blocks[1]; }
inline int blocks_z() { return emulated::here.blocks[2]; }

inline void sync_block(emulated::Line line = KIT_LINE) { emulated::sync_block(line); }
inline void sync_warp(emulated::Line line = KIT_LINE) { emulated::sync_warp(line); }

// ---- conversions, on the bits, so that no mode of this process's floating point matters
inline u32 kit_bits(float value) {
    u32 bits;
    __builtin_memcpy(&bits, &value, 4);
    return bits;
}
inline float kit_float(u32 bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}
inline float to_float(half value) {
    const u32 sign = u32(value.bits & 0x8000u) << 16;
    const u32 exponent = value.bits >> 10 & 31u, mantissa = value.bits & 1023u;
    if (exponent == 31) return kit_float(sign | 0x7f800000u | mantissa << 13);
    if (exponent) return kit_float(sign | (exponent + 112) << 23 | mantissa << 13);
    const float magnitude = float(int(mantissa)) * 5.9604644775390625e-8f;  // 2^-24
    return sign ? -magnitude : magnitude;
}
inline float to_float(bfloat16 value) { return kit_float(u32(value.bits) << 16); }
inline float to_float(float value) { return value; }
inline float to_float(int8 value) { return float(value); }
inline float to_float(int value) { return float(value); }

template <class Type>
Type from_float(float value);
template <>
inline half from_float<half>(float value) {
    const u32 bits = kit_bits(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {u16(0x7fff)};           // not a number
    if (magnitude >= 0x477ff000u) return {u16(sign | 0x7c00u)};  // from 65520 on: infinite
    const u32 exponent = magnitude >> 23;
    if (exponent < 102) return {u16(sign)};  // below half of the smallest: zero
    const u32 significand = (magnitude & 0x7fffffu) | 0x800000u;
    const u32 dropped = exponent < 113 ? 126 - exponent : 13;  // bits that do not fit; more for denormals
    const u32 kept = significand >> dropped, rest = significand & ((1u << dropped) - 1), tie = 1u << (dropped - 1);
    const u32 rounded = kept + (rest > tie || (rest == tie && (kept & 1)));
    // A normal number's leading one adds itself to the exponent, and so does a carry out of the significand.
    return {u16(sign | (exponent < 113 ? rounded : rounded + ((exponent - 113) << 10)))};
}
template <>
inline bfloat16 from_float<bfloat16>(float value) {
    const u32 bits = kit_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {u16(0x7fff)};
    return {u16((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <>
inline float from_float<float>(float value) {
    return value;
}
template <>
inline int8 from_float<int8>(float value) {
    if (!(value == value)) return 0;
    if (value >= 127.0f) return 127;
    if (value <= -128.0f) return -128;
    const int down = int(value) - (float(int(value)) > value);  // rounded down
    const float rest = value - float(down);
    return int8(down + (rest > 0.5f || (rest == 0.5f && (down & 1))));
}
template <class Type>
inline Type low(u32 word) {
    return Type{u16(word & 0xffffu)};
}
template <class Type>
inline Type high(u32 word) {
    return Type{u16(word >> 16)};
}
template <class Type>
inline u32 pack(Type lower, Type upper) {
    return u32(lower.bits) | u32(upper.bits) << 16;
}

template <class Other, class Memory, class Type>
inline emulated::Pointer<Memory, Other> view(emulated::Pointer<Memory, Type> pointer) {
    return {pointer.memory, pointer.offset};
}
template <class Other, class Memory, class Type>
inline emulated::Pointer<Memory, const Other> view(emulated::Pointer<Memory, const Type> pointer) {
    return {pointer.memory, pointer.offset};
}
template <class Memory, class Type>
inline u32x4 load16(emulated::Pointer<Memory, Type> pointer, emulated::Line line = KIT_LINE) {
    u32x4 value;
    emulated::read(pointer.memory, pointer.offset, 16, false, &value, line);
    return value;
}
template <class Memory, class Type>
inline void store16(emulated::Pointer<Memory, Type> pointer, u32x4 value, emulated::Line line = KIT_LINE) {
    static_assert(!emulated::Unconst<Type>::constant, "store16 to const memory");
    emulated::write(pointer.memory, pointer.offset, 16, &value, line);
}
template <class Type>
inline typename emulated::Unconst<Type>::Result load_through_l2(emulated::Global<Type> pointer,
                                                                emulated::Line line = KIT_LINE) {
    static_assert(sizeof(Type) == 2 || sizeof(Type) == 4, "load_through_l2 reads 2 or 4 bytes");
    typename emulated::Unconst<Type>::Result value;
    emulated::read(pointer.memory, pointer.offset, sizeof(Type), true, &value, line);
    return value;
}
template <class Type>
inline u32x4 load16_through_l2(emulated::Global<Type> pointer, emulated::Line line = KIT_LINE) {
    u32x4 value;
    emulated::read(pointer.memory, pointer.offset, 16, true, &value, line);
    return value;
}
template <class Type>
inline void prefetch_l2(emulated::Global<Type> pointer, emulated::Line line = KIT_LINE) {
    emulated::check(pointer.memory, pointer.offset, 1, 1, "prefetches", line);
}
template <class Type>
inline u64 address_of(emulated::Global<Type> pointer) {
    return pointer.memory->address + u64(pointer.offset);
}

template <class Type, class Source>
inline void async_copy(emulated::Shared<Type> shared, emulated::Global<Source> global, int valid_bytes = 16,
                       emulated::Line line = KIT_LINE) {
    emulated::async_copy(shared.memory, shared.offset, global.memory, global.offset, valid_bytes, line);
}
inline void async_commit() { emulated::async_commit(); }
template <int groups>
inline void async_wait() {
    emulated::async_wait(groups);
}

template <class Type>
inline Type shuffle_xor(Type value, int mask, emulated::Line line = KIT_LINE) {
    static_assert(sizeof(Type) == 4, "shuffle_xor moves 4 bytes");
    u32 bits;
    __builtin_memcpy(&bits, &value, 4);
    bits = emulated::shuffle_xor(bits, mask, line);
    __builtin_memcpy(&value, &bits, 4);
    return value;
}
template <class Type>
inline void load_matrix_x4(u32 (&r)[4], emulated::Shared<Type> shared, emulated::Line line = KIT_LINE) {
    emulated::load_matrix(r, shared.memory, shared.offset, false, line);
}
template <class Type>
inline void load_matrix_x4_transposed(u32 (&r)[4], emulated::Shared<Type> shared, emulated::Line line = KIT_LINE) {
    emulated::load_matrix(r, shared.memory, shared.offset, true, line);
}
inline void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], half, emulated::Line line = KIT_LINE) {
    emulated::mma(c, a, b, false, line);
}
inline void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], bfloat16, emulated::Line line = KIT_LINE) {
    emulated::mma(c, a, b, true, line);
}
inline void mma_s8(int (&c)[4], const u32 (&a)[4], const u32 (&b)[2], emulated::Line line = KIT_LINE) {
    emulated::mma_s8(c, a, b, line);
}

inline u32 atomic_add(emulated::Global<u32> pointer, u32 value, emulated::Line line = KIT_LINE) {
    return u32(emulated::atomic_add(pointer.memory, pointer.offset, 4, value, false, line));
}
inline u32 atomic_add_relaxed(emulated::Global<u32> pointer, u32 value, emulated::Line line = KIT_LINE) {
    return u32(emulated::atomic_add(pointer.memory, pointer.offset, 4, value, true, line));
}
inline u32 atomic_cas(emulated::Global<u32> pointer, u32 expected, u32 wanted, emulated::Line line = KIT_LINE) {
    return u32(emulated::atomic_cas(pointer.memory, pointer.offset, 4, expected, wanted, line));
}
inline u64 atomic_cas(emulated::Global<u64> pointer, u64 expected, u64 wanted, emulated::Line line = KIT_LINE) {
    return emulated::atomic_cas(pointer.memory, pointer.offset, 8, expected, wanted, line);
}
inline u32 load_acquire(emulated::Global<const u32> pointer, emulated::Line line = KIT_LINE) {
    return u32(emulated::load_acquire(pointer.memory, pointer.offset, 4, line));
}
inline u64 load_acquire(emulated::Global<const u64> pointer, emulated::Line line = KIT_LINE) {
    return emulated::load_acquire(pointer.memory, pointer.offset, 8, line);
}
inline void store_release(emulated::Global<u32> pointer, u32 value, emulated::Line line = KIT_LINE) {
    emulated::store_release(pointer.memory, pointer.offset, 4, value, line);
}
inline void store_release(emulated::Global<u64> pointer, u64 value, emulated::Line line = KIT_LINE) {
    emulated::store_release(pointer.memory, pointer.offset, 8, value, line);
}
inline void fence() { emulated::fence(); }
#ifndef KIT_MACHINERY  // which includes the system's headers, and one of them has another pause
inline void pause(emulated::Line line = KIT_LINE) { emulated::pause(line); }
#endif
