// y = (x W^T) times a scale for each row of x times one for each row of W: int8 tensor cores, exact int32 sums.
//
// OUT, TILE_M, TILE_N, CHUNKS, WARPS_M, WARPS_N and STAGES are defined by what compiles this.
#include "kit.h"
#include "tile_product.h"

using Product = TileProduct<int8, int, TILE_M, TILE_N, CHUNKS, WARPS_M, WARPS_N, STAGES>;

// Block (i, j) computes rows i TILE_M ... and columns j TILE_N ... of y.
KERNEL(32 * WARPS_M * WARPS_N)
void graphopt_gemm_int8(GLOBAL(const int8) x, GLOBAL(const int8) weight, GLOBAL(const float) x_scale,
                        GLOBAL(const float) weight_scale, int M, int N, int K, GLOBAL(OUT) y) {
    SHARED(int8, xs, STAGES * Product::XTile);
    SHARED(int8, ws, STAGES * Product::WTile);
    int row0 = block_x() * TILE_M, column0 = block_y() * TILE_N;
    Product product;
    product.compute(xs, ws, x, weight, row0, column0, M, N, K);
    product.each(row0, column0, [&](int row, int column, int sum) {
        if (row < M && column < N)
            y[u64(row) * N + column] = from_float<OUT>(float(sum) * x_scale[row] * weight_scale[column]);
    });
}
