// PivotLinear for few rows of x: both products in one launch.
//
//   row form     inner = K x                 y = P [inner; C inner] + b      K (r, n), C (m - r, r)
//   column form  inner = x_p + C x_np        y = K inner + b                 K (m, r), C (r, n - r)
//
// Few rows take as long as it takes to read the weights. So these are read once, by all of the GPU at a time, in
// vectors of 16 bytes that go from memory to the registers that the tensor cores read, with no stop in shared memory.
//
// A tile is TILE channels of inner (made by a producer) or of what follows from inner (made by a consumer); a block
// makes one tile. Its warps split the sum, and their parts meet in shared memory in an order that never changes, so
// results repeat bit by bit. Blocks take tickets, and the first tickets are producers: a consumer waits for none but
// blocks that run already, however few of them the GPU holds at a time.
//
// Compiled with REAL (half, bfloat16, float), COLUMN (0, 1), WARPS, UNROLL, TILE, AHEAD, SLOTS: see kernels.py.
#include "kit.h"

constexpr int THREADS = 32 * WARPS;
constexpr int VECTOR = 16 / sizeof(REAL);  // elements of 16 bytes
constexpr int CHUNK = 4 * VECTOR;          // elements of a row of weights that the four lanes of a quad read at once
constexpr int SPAN = UNROLL * CHUNK;       // elements of a row that a warp reads before it multiplies
constexpr int STRIDE = WARPS * SPAN;       // elements of a row that the block reads meanwhile
constexpr int PARTS = TILE / 16;           // tensor core fragments, of 16 channels each
constexpr int GROUP = 16;                  // rows of x that are worked on at a time, in fragments of 8
constexpr int PITCH = TILE + 4;            // of a row of partial sums: lanes that write together hit different banks
constexpr int LINE = 64 / sizeof(REAL);    // elements that a prefetch is taken to bring
constexpr int PROBES = SLOTS < 16 ? SLOTS : 16;
constexpr int NO_SLOT = -1;

// ---- blocks that wait for blocks ------------------------------------------------------------------------------------

// Launches that run at the same time (streams, contexts) share this memory and are told apart by where they write. A
// slot belongs to its address for ever: all blocks of a launch find the same one, or all of them find none.
DEVICE_STATE(u64, owners, SLOTS);
DEVICE_STATE(u32, tickets, SLOTS);
DEVICE_STATE(u32, finished, SLOTS);

DEVICE int claim(u64 owner) {
    const u32 home = (u32)((owner * 0x9E3779B97F4A7C15ull) >> 32);
    for (u32 probe = 0; probe < PROBES; ++probe) {
        const u32 slot = (home + probe) % SLOTS;
        u64 held = load_acquire(owners + slot);
        if (held == 0) held = atomic_cas(owners + slot, 0, owner);
        if (held == 0 || held == owner) return (int)slot;
    }
    return NO_SLOT;
}

// For a block that reads the slot's counters no more. The last one leaves them as the next launch has to find them.
DEVICE void leave(int slot, int tiles) {
    if (atomic_add(finished + slot, 1) == (u32)tiles - 1) {
        store_release(tickets + slot, 0);
        store_release(finished + slot, 0);
    }
}

// ---- 16 bytes of a row ----------------------------------------------------------------------------------------------

DEVICE u32 bits_of(half value) { return value.bits; }
DEVICE u32 bits_of(bfloat16 value) { return value.bits; }
union Bits {
    float value;
    u32 word;
};
DEVICE u32 bits_of(float value) {
    Bits bits;
    bits.value = value;
    return bits.word;
}
DEVICE float float_of(u32 word) {
    Bits bits;
    bits.word = word;
    return bits.value;
}

// A vector of the elements below `count`, as `element(i)` gives them, and zeros.
template <typename Element>
DEVICE u32x4 gathered(int count, Element element) {
    u32x4 made;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (VECTOR == 4)
            made.word[i] = i < count ? bits_of(element(i)) : 0;
        else
            made.word[i] = (2 * i < count ? bits_of(element(2 * i)) : 0) |
                           (2 * i + 1 < count ? bits_of(element(2 * i + 1)) : 0) << 16;
    }
    return made;
}

// Whether rows of this size can be read in vectors: each vector is whole or not there at all.
template <typename Values>
DEVICE bool in_vectors(Values values, int size) {
    return size % VECTOR == 0 && address_of(values) % 16 == 0;
}

// ---- sums of products -----------------------------------------------------------------------------------------------

// What a warp reads of a tile's weights at a time. Lane 4 g + t has channels g and g + 8 of every 16, and the t-th
// vector of each chunk. So sums run in another order than memory does, the same one for weights and x.
template <int STEPS>
struct Weights {
    u32x4 at[STEPS][2 * PARTS];
};

struct Tile {
    GLOBAL(const REAL) matrix;   // (channels, size)
    int first, channels, size;
    bool vectors;                // the matrix can be read in vectors
    bool fast;                   // and so can what it is multiplied by

    // From `from` on, with zeros behind the end. Channels that are not there are others: nobody looks at their sums.
    template <int STEPS>
    DEVICE void read(Weights<STEPS>& weights, int from) const {
#pragma unroll
        for (int place = 0; place < 2 * PARTS; ++place) {
            const int channel = first + place * 8 + lane() / 4, k0 = from + lane() % 4 * VECTOR;
            const auto row = matrix + ((u64)(channel < channels ? channel : channels - 1) * size + k0);
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                const int there = size - k0 - step * CHUNK;
                if (vectors)
                    weights.at[step][place] = there > 0 ? load16(row + step * CHUNK) : u32x4{{0, 0, 0, 0}};
                else
                    weights.at[step][place] =
                        gathered(there, [&](int i) -> REAL { return row[step * CHUNK + i]; });
            }
        }
    }

    // The beginnings of rows come first: they are read first.
    DEVICE void prefetch() const {
        for (int i = thread(); i < AHEAD / 64 * TILE; i += THREADS) {
            const int channel = first + i % TILE, k = i / TILE * LINE;
            if (channel < channels && k < size) prefetch_l2(matrix + ((u64)channel * size + k));
        }
    }
};

// The sums of a tile's channels for 8 * COUNT rows, over what a warp reads.
template <typename Type, int COUNT>
struct Sums {
    float of[PARTS][COUNT][4] = {};

    // x(row, k): the vector at k of a row, as multiplied by the weights from `from` on.
    template <int STEPS, typename Vectors>
    DEVICE void add(const Weights<STEPS>& weights, int from, Vectors x) {
        u32x4 rows[STEPS][COUNT];
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
#pragma unroll
            for (int i = 0; i < COUNT; ++i)
                rows[step][i] = x(8 * i + lane() / 4, from + step * CHUNK + lane() % 4 * VECTOR);
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
#pragma unroll
            for (int part = 0; part < PARTS; ++part)
#pragma unroll
                for (int i = 0; i < COUNT; ++i)
#pragma unroll
                    for (int word = 0; word < 4; word += 2) {
                        const u32x4 &above = weights.at[step][2 * part], &below = weights.at[step][2 * part + 1];
                        const u32 a[4] = {above.word[word], below.word[word], above.word[word + 1],
                                          below.word[word + 1]};
                        const u32 b[2] = {rows[step][i].word[word], rows[step][i].word[word + 1]};
                        mma(of[part][i], a, b, Type());
                    }
    }

    // To (row, channel), rows PITCH apart.
    DEVICE void store(SHARED_POINTER(float) partial) const {
#pragma unroll
        for (int part = 0; part < PARTS; ++part)
#pragma unroll
            for (int i = 0; i < COUNT; ++i)
#pragma unroll
                for (int place = 0; place < 4; ++place) {
                    const int row = 8 * i + lane() % 4 * 2 + place % 2;
                    const int channel = part * 16 + place / 2 * 8 + lane() / 4;
                    partial[row * PITCH + channel] = of[part][i][place];
                }
    }
};

// float32, without tensor cores: a lane sums over its own vectors, for all rows, and in the end its quad adds up.
template <int COUNT>
struct Sums<float, COUNT> {
    float of[2 * PARTS][8 * COUNT] = {};

    template <int STEPS, typename Vectors>
    DEVICE void add(const Weights<STEPS>& weights, int from, Vectors x) {
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
#pragma unroll
            for (int row = 0; row < 8 * COUNT; ++row) {
                const u32x4 values = x(row, from + step * CHUNK + lane() % 4 * VECTOR);
#pragma unroll
                for (int place = 0; place < 2 * PARTS; ++place)
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        of[place][row] += float_of(weights.at[step][place].word[i]) * float_of(values.word[i]);
            }
    }

    DEVICE void store(SHARED_POINTER(float) partial) const {
#pragma unroll
        for (int place = 0; place < 2 * PARTS; ++place)
#pragma unroll
            for (int row = 0; row < 8 * COUNT; ++row) {
                float sum = of[place][row];
                sum += shuffle_xor(sum, 1);
                sum += shuffle_xor(sum, 2);
                if (lane() % 4 == row % 4) partial[row * PITCH + place * 8 + lane() / 4] = sum;
            }
    }
};

// The loads of the next weights are on their way while the last ones are multiplied.
template <int COUNT, typename Vectors>
DEVICE void multiply_fast(SHARED_POINTER(float) partial, Weights<UNROLL>& now, const Tile& tile, Vectors x) {
    Sums<REAL, COUNT> sums;
    for (int from = warp() * SPAN; from < tile.size; from += STRIDE) {
        Weights<UNROLL> next;
        tile.read(next, from + STRIDE);
        sums.add(now, from, [&](int row, int k) { return k < tile.size ? x(row, k) : u32x4{{0, 0, 0, 0}}; });
        now = next;
    }
    sums.store(partial + warp() * GROUP * PITCH);
}

template <typename Element>
DEVICE void multiply_any(SHARED_POINTER(float) partial, const Tile& tile, int here, Element x) {
    for (int row0 = 0; row0 < here; row0 += 8) {
        Sums<REAL, 1> sums;
        for (int from = warp() * CHUNK; from < tile.size; from += WARPS * CHUNK) {
            Weights<1> now;
            tile.read(now, from);
            sums.add(now, from, [&](int row, int k) {
                return gathered(tile.size - k, [&](int i) -> REAL { return x(row0 + row, k + i); });
            });
        }
        sums.store(partial + (warp() * GROUP + row0) * PITCH);
    }
}

// The sums of a tile for `here` rows (1 to GROUP) by all warps, each to its part of `partial`, for all threads to read.
// vector(row, k) or element(row, k): what the weights are multiplied by. `weights`: read, where the tile is fast.
template <typename Vectors, typename Elements>
DEVICE void multiply(SHARED_POINTER(float) partial, Weights<UNROLL>& weights, const Tile& tile, int here,
                     Vectors vector, Elements element) {
    if (!tile.fast)
        multiply_any(partial, tile, here, element);
    else if (here > 8)
        multiply_fast<2>(partial, weights, tile, vector);
    else
        multiply_fast<1>(partial, weights, tile, vector);
    sync_block();
}

DEVICE float total(SHARED_POINTER(const float) partial, int row, int channel) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) sum += partial[(i * GROUP + row) * PITCH + channel];
    return sum;
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

KERNEL(THREADS)
void NAME(GLOBAL(const REAL) x, GLOBAL(const REAL) kept, GLOBAL(const REAL) coefficients, GLOBAL(const REAL) bias,
          GLOBAL(const int) positions, int rows, int n, int r, int m, GLOBAL(REAL) y, GLOBAL(REAL) inner) {
    SHARED(float, partial, WARPS * GROUP * PITCH);
    SHARED(float, sums, GROUP * TILE);
    SHARED(REAL, pivots, GROUP * TILE);
    SHARED(int, told, 2);
    SHARED(int, ordered, WARPS);
    if (rows <= 0) return;

    const auto first_weights = COLUMN ? coefficients : kept, second_weights = COLUMN ? kept : coefficients;
    const int width = COLUMN ? n - r : n;    // what a channel of inner sums
    const int others = COLUMN ? m : m - r;   // channels that follow from inner
    const int producers = (r + TILE - 1) / TILE, tiles = producers + (others + TILE - 1) / TILE;
    const bool first_vectors = in_vectors(first_weights, width), second_vectors = in_vectors(second_weights, r);
    bool x_vectors = in_vectors(x, n), inner_vectors = in_vectors(inner, r);
    const auto producer = [&](int i) {
        return Tile{first_weights, i * TILE, r, width, first_vectors, first_vectors && x_vectors};
    };
    const auto consumer = [&](int i) {
        return Tile{second_weights, (i - producers) * TILE, others, r, second_vectors, second_vectors && inner_vectors};
    };

    // Which tile is this block's is not known before its ticket comes back. But blocks are as many as tiles: together
    // they ask for the beginnings of all of them, those of consumers too, while tickets are on their way.
    (block_x() < producers ? producer(block_x()) : consumer(block_x())).prefetch();
    if (thread() == 0) {
        told[0] = claim(address_of(y));
        told[1] = told[0] == NO_SLOT ? block_x() : (int)atomic_add_relaxed(tickets + told[0], 1);
    }
    // Places that are none occur where a build times the kernel on whatever memory holds.
    const auto x_channel = [&](int i) {
        const int place = positions[i];
        return (u32)place < (u32)n ? place : 0;
    };
    // Where the permutation is folded into other weights, the channels of x are in order: their vectors lie in memory.
    const int start = COLUMN && width > 0 ? x_channel(r) : 0;
    if (COLUMN) {
        int wrong = start % VECTOR | (start > r);
        for (int i = thread(); i < width; i += THREADS) wrong |= positions[r + i] ^ (start + i);
#pragma unroll
        for (int mask = 16; mask > 0; mask /= 2) wrong |= shuffle_xor(wrong, mask);
        if (lane() == 0) ordered[warp()] = wrong == 0;
    }
    sync_block();
    const int slot = told[0], index = told[1];
    if (COLUMN)
#pragma unroll
        for (int i = 0; i < WARPS; ++i) x_vectors = x_vectors && ordered[i];

    const auto store = [&](int row, int channel, float sum) {
        const int place = COLUMN ? channel : positions[channel];
        if ((u32)place >= (u32)m) return;
        y[(u64)row * m + place] = from_float<REAL>(sum + to_float(bias[place]));
    };
    // Rows that are not there are others too.
    const auto last = [&](int row) { return (u64)(row < rows ? row : rows - 1); };

    // A consumer without a slot cannot wait for anybody, so it makes all of inner for itself: right, and slow.
    const bool produces = index < producers, alone = slot == NO_SLOT && !produces;
    const int p_first = produces ? index : 0, p_last = produces ? index + 1 : alone ? producers : 0;
    const Tile mine = consumer(index);
    Weights<UNROLL> weights;
    if (!produces && !alone) {
        if (mine.fast) mine.read(weights, warp() * SPAN);
        if (thread() == 0) {
            while (load_acquire(finished + slot) < (u32)producers) pause();
            leave(slot, tiles);
        }
        sync_block();
    }

    for (int row0 = 0; row0 < rows; row0 += GROUP) {
        const int here = rows - row0 < GROUP ? rows - row0 : GROUP;
        if (alone)
            for (int i = thread(); i < here * TILE; i += THREADS) sums[i] = 0;
        for (int p = p_first; p < p_last; ++p) {
            const Tile tile = producer(p);
            if (tile.fast) tile.read(weights, warp() * SPAN);
            multiply(
                partial, weights, tile, here,
                [&](int row, int k) { return load16(x + (last(row0 + row) * n + start + k)); },
                [&](int row, int k) -> REAL { return x[last(row0 + row) * n + (COLUMN ? x_channel(r + k) : k)]; });
            for (int i = thread(); i < here * TILE; i += THREADS) {
                const int row = row0 + i / TILE, channel = tile.first + i % TILE;
                if (channel >= r) continue;
                float sum = total(partial, i / TILE, i % TILE);
                if (COLUMN) sum += to_float(x[(u64)row * n + x_channel(channel)]);
                if (alone) {
                    pivots[i] = from_float<REAL>(sum);
                    continue;
                }
                inner[(u64)row * r + channel] = from_float<REAL>(sum);
                if (!COLUMN) store(row, channel, sum);
            }
            sync_block();
            if (!alone) continue;
            for (int i = thread(); i < here * TILE; i += THREADS) {
                const int channel = mine.first + i % TILE;
                if (channel >= others) continue;
                const auto line = mine.matrix + ((u64)channel * r + tile.first);
                for (int k = 0; k < TILE && tile.first + k < r; ++k)
                    sums[i] += to_float(line[k]) * to_float(pivots[i / TILE * TILE + k]);
            }
        }
        if (produces) continue;
        if (!alone) {
            if (mine.fast && row0 > 0) mine.read(weights, warp() * SPAN);
            multiply(
                partial, weights, mine, here,
                [&](int row, int k) { return load16_through_l2(inner + (last(row0 + row) * r + k)); },
                [&](int row, int k) -> REAL { return load_through_l2(inner + (last(row0 + row) * r + k)); });
        }
        for (int i = thread(); i < here * TILE; i += THREADS) {
            const int channel = mine.first + i % TILE;
            if (channel >= others) continue;
            const float sum = alone ? sums[i] : total(partial, i / TILE, i % TILE);
            store(row0 + i / TILE, (COLUMN ? 0 : r) + channel, sum);
        }
        sync_block();
    }
    if (produces && slot != NO_SLOT && thread() == 0) leave(slot, tiles);
}
