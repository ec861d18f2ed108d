// Tiles of x W^T on the tensor cores: x is (M, K) and W is (N, K), the elements of a row side by side in both.
//
// A tile of a matrix lies in shared memory as rows of Chunks chunks of 16 bytes. Chunks change places by exclusive or
// with the row (a swizzle), so that the eight rows that a load_matrix reads at once lie in different banks.
#pragma once

// Which chunk of a tile holds chunk `chunk` of row `row`. Rows of 4 chunks share a line of the 32 banks by two.
template <int Chunks>
DEVICE constexpr int swizzled(int row, int chunk) {
    static_assert(Chunks == 4 || Chunks == 8, "a row is half a line of the banks, or one");
    return row * Chunks + (chunk ^ (row / (8 / Chunks) % Chunks));
}

// Whether eight rows that a load_matrix reads have, for any chunk, all of the eight places of a line between them.
template <int Chunks>
DEVICE constexpr bool in_different_banks() {
    for (int row = 0; row < 64; row += 8)
        for (int chunk = 0; chunk < Chunks; ++chunk) {
            u32 places = 0;
            for (int i = 0; i < 8; ++i) places |= 1u << swizzled<Chunks>(row + i, chunk) % 8;
            if (places != 255) return false;
        }
    return true;
}
static_assert(in_different_banks<4>() && in_different_banks<8>(), "a swizzle without conflicts");

// Whether every row of a matrix starts at a multiple of 16 bytes, and is whole chunks.
template <class Element, class Matrix>
DEVICE bool in_chunks(Matrix matrix, int columns) {
    return columns % (16 / int(sizeof(Element))) == 0 && address_of(matrix) % 16 == 0;
}

// Starts to copy Rows x Chunks chunks of a matrix of rows x columns elements into a tile, from (row0, column0) on; what
// lies outside of the matrix becomes zero. Where rows are not `chunked`, elements are copied one by one, and are there
// at the next barrier.
template <class Element, int Rows, int Chunks, int Threads, class Tile, class Matrix>
DEVICE void fill(Tile tile, Matrix matrix, int row0, int column0, int rows, int columns, bool chunked) {
    constexpr int Width = 16 / int(sizeof(Element));
    for (int i = thread(); i < Rows * Chunks; i += Threads) {
        int row = row0 + i / Chunks, column = column0 + i % Chunks * Width;
        int left = row < rows ? columns - column : 0;
        int valid = left < 0 ? 0 : left < Width ? left : Width;
        auto target = tile + swizzled<Chunks>(i / Chunks, i % Chunks) * Width;
        auto source = matrix + (valid > 0 ? u64(row) * columns + column : 0);
        if (chunked) {
            async_copy(target, source, valid * int(sizeof(Element)));
        } else {
            for (int j = 0; j < Width; ++j) {
                Element value{};
                if (j < valid) value = source[j];
                target[j] = value;
            }
        }
    }
}

// The operand a of an mma: 16 rows from `row` on, 2 chunks from `chunk` on.
template <class Element, int Chunks, class Tile>
DEVICE void load_a(u32 (&a)[4], Tile tile, int row, int chunk) {
    load_matrix_x4(a, tile + swizzled<Chunks>(row + lane() % 16, chunk + lane() / 16) * (16 / int(sizeof(Element))));
}

// The operands b of two mma: 8 rows of W from `row` on for the first, the next 8 for the second, 2 chunks of each.
template <class Element, int Chunks, class Tile>
DEVICE void load_b(u32 (&b)[2][2], Tile tile, int row, int chunk) {
    u32 r[4];
    int place = swizzled<Chunks>(row + lane() / 16 * 8 + lane() % 8, chunk + lane() / 8 % 2);
    load_matrix_x4(r, tile + place * (16 / int(sizeof(Element))));
    b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
}

DEVICE void multiply(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], half) { mma(c, a, b, half{}); }
DEVICE void multiply(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], bfloat16) { mma(c, a, b, bfloat16{}); }
DEVICE void multiply(int (&c)[4], const u32 (&a)[4], const u32 (&b)[2], int8) { mma_s8(c, a, b); }

// How a block computes TileM x TileN of the product: WarpsM x WarpsN warps, each with a part of the tile; K in steps
// of Chunks chunks, Stages of them in shared memory at a time, all but one on their way.
template <class Element, class Sum, int TileM, int TileN, int Chunks, int WarpsM, int WarpsN, int Stages>
struct TileProduct {
    static constexpr int Threads = 32 * WarpsM * WarpsN;
    static constexpr int Step = Chunks * 16 / int(sizeof(Element));
    static constexpr int XTile = TileM * Step, WTile = TileN * Step;  // elements
    static constexpr int Rows = TileM / WarpsM, Columns = TileN / WarpsN;  // of a warp
    static constexpr int OperandsA = Rows / 16, OperandsB = Columns / 8;
    static_assert(Rows % 16 == 0 && Columns % 16 == 0, "a warp has whole operands");
    static_assert(Stages >= 2, "one stage is computed with while another is filled");

    Sum sums[OperandsA][OperandsB][4];

    DEVICE int first_row() const { return warp() / WarpsN * Rows; }
    DEVICE int first_column() const { return warp() % WarpsN * Columns; }

    // The sums of the tile at (row0, column0) over the whole of K. xs and ws: shared, Stages tiles each.
    template <class Tiles, class Matrix>
    DEVICE void compute(Tiles xs, Tiles ws, Matrix x, Matrix w, int row0, int column0, int M, int N, int K) {
        for (auto& of_row : sums)
            for (auto& sum : of_row)
                for (auto& s : sum) s = 0;
        bool x_chunked = in_chunks<Element>(x, K), w_chunked = in_chunks<Element>(w, K);
        int steps = (K - 1) / Step + 1;
        auto fill_stage = [&](int step) {
            int stage = step % Stages;
            fill<Element, TileM, Chunks, Threads>(xs + stage * XTile, x, row0, step * Step, M, K, x_chunked);
            fill<Element, TileN, Chunks, Threads>(ws + stage * WTile, w, column0, step * Step, N, K, w_chunked);
        };
        for (int step = 0; step < Stages - 1; ++step) {
            if (step < steps) fill_stage(step);
            async_commit();  // a group of nothing too: the waits below count groups
        }
        for (int step = 0; step < steps; ++step) {
            async_wait<Stages - 2>();
            sync_block();  // this stage is there for all, and all are done with the one that is filled next
            if (step + Stages - 1 < steps) fill_stage(step + Stages - 1);
            async_commit();
            add(xs + step % Stages * XTile, ws + step % Stages * WTile);
        }
    }

    // Calls store(row, column, sum) for every sum that this thread has, by its place in the matrix.
    template <class Store>
    DEVICE void each(int row0, int column0, Store store) const {
        for (int i = 0; i < OperandsA; ++i)
            for (int j = 0; j < OperandsB; ++j)
                for (int k = 0; k < 4; ++k) {
                    int row = row0 + first_row() + i * 16 + lane() / 4 + k / 2 * 8;
                    int column = column0 + first_column() + j * 8 + lane() % 4 * 2 + k % 2;
                    store(row, column, sums[i][j][k]);
                }
    }

  private:
    template <class Tiles>
    DEVICE void add(Tiles xs, Tiles ws) {
        for (int chunk = 0; chunk < Chunks; chunk += 2) {
            u32 a[OperandsA][4], b[OperandsB / 2][2][2];
            for (int i = 0; i < OperandsA; ++i) load_a<Element, Chunks>(a[i], xs, first_row() + i * 16, chunk);
            for (int j = 0; j < OperandsB / 2; ++j) load_b<Element, Chunks>(b[j], ws, first_column() + j * 16, chunk);
            for (int i = 0; i < OperandsA; ++i)
                for (int j = 0; j < OperandsB; ++j) multiply(sums[i][j], a[i], b[j / 2][j % 2], Element{});
        }
    }
};
