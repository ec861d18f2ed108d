// y = x W^T + bias on the tensor cores: float16 or bfloat16, sums in float32, rounded once.
//
// REAL, TILE_M, TILE_N, CHUNKS, WARPS_M, WARPS_N and STAGES are defined by what compiles this.
#include "kit.h"
#include "tile_product.h"

using Product = TileProduct<REAL, float, TILE_M, TILE_N, CHUNKS, WARPS_M, WARPS_N, STAGES>;

// Block (i, j) computes rows i TILE_M ... and columns j TILE_N ... of y.
KERNEL(32 * WARPS_M * WARPS_N)
void graphopt_gemm_half(GLOBAL(const REAL) x, GLOBAL(const REAL) weight, GLOBAL(const REAL) bias, int M, int N, int K,
                        GLOBAL(REAL) y) {
    SHARED(REAL, xs, STAGES * Product::XTile);
    SHARED(REAL, ws, STAGES * Product::WTile);
    int row0 = block_x() * TILE_M, column0 = block_y() * TILE_N;
    Product product;
    product.compute(xs, ws, x, weight, row0, column0, M, N, K);
    product.each(row0, column0, [&](int row, int column, float sum) {
        if (row < M && column < N) y[u64(row) * N + column] = from_float<REAL>(sum + to_float(bias[column]));
    });
}
