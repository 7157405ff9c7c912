/* Matrix product of rows of cells with a packed panel of weights.
 *
 * A tile is up to TILE_ROWS rows times PANEL_BLOCKS blocks of 16 columns, held in registers while the depth goes by:
 * on AVX-512, 6 rows x 64 columns take 24 registers, and each row of weights (4 loads) serves 24 multiply-adds. */

struct product {
    const float *rows;      /* (segments, rows, 16): 16 of the depth at a time */
    const int64_t *offsets; /* of each segment, in floats from `rows` */
    int64_t num_segments, num_rows;
    const float *panels;
    int64_t planes_out;
    float *out; /* (planes_out, rows, 16) */
    int64_t out_plane;
    const float *bias; /* (planes_out, 16) or NULL */
    const float *residual;
    int64_t residual_plane;
    int relu;
};

/* `num_rows` and `num_blocks` are constants wherever this is expanded, so that sums stay in registers */
INLINE void multiply_tile(const struct product *product, int64_t row, int64_t block, const int num_rows,
                          const int num_blocks) {
    vector sums[TILE_ROWS][PANEL_BLOCKS * VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < num_rows; r++)
#pragma GCC unroll 8
        for (int j = 0; j < num_blocks * VECTORS; j++)
            sums[r][j] = (vector){0};
    const float *weights = product->panels + block * LANES * LANES * product->num_segments;
    for (int64_t s = 0; s < product->num_segments; s++) {
        const float *a = product->rows + product->offsets[s] + row * LANES;
        for (int k = 0; k < LANES; k++, a++) {
            vector b[PANEL_BLOCKS * VECTORS];
#pragma GCC unroll 8
            for (int j = 0; j < num_blocks * VECTORS; j++, weights += WIDTH)
                b[j] = *(const vector *)weights;
#pragma GCC unroll 8
            for (int r = 0; r < num_rows; r++) {
                vector x = (vector){0} + a[r * LANES];
#pragma GCC unroll 8
                for (int j = 0; j < num_blocks * VECTORS; j++)
                    sums[r][j] += x * b[j];
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < num_rows; r++)
#pragma GCC unroll 8
        for (int j = 0; j < num_blocks * VECTORS; j++) {
            int64_t plane = block + j / VECTORS, lane = j % VECTORS * WIDTH;
            vector value = sums[r][j];
            if (product->bias != NULL)
                value += *(const vector *)(product->bias + plane * LANES + lane);
            if (product->residual != NULL)
                value += *(const vector *)(product->residual + plane * product->residual_plane + (row + r) * LANES +
                                           lane);
            if (product->relu)
                value = clip_negative_vector(value);
            *(vector *)(product->out + plane * product->out_plane + (row + r) * LANES + lane) = value;
        }
}

#define DEFINE_TILES(blocks)                                                                                           \
    static void multiply_tiles_##blocks(const struct product *product, int64_t row, int64_t count, int64_t block) {    \
        switch (count) {                                                                                               \
        case 1: multiply_tile(product, row, block, 1, blocks); break;                                                  \
        case 2: multiply_tile(product, row, block, 2, blocks); break;                                                  \
        case 3: multiply_tile(product, row, block, 3, blocks); break;                                                  \
        FURTHER_TILES(blocks)                                                                                          \
        }                                                                                                              \
    }
#if TILE_ROWS == 6
#define FURTHER_TILES(blocks)                                                                                          \
    case 4: multiply_tile(product, row, block, 4, blocks); break;                                                      \
    case 5: multiply_tile(product, row, block, 5, blocks); break;                                                      \
    case 6: multiply_tile(product, row, block, 6, blocks); break;
#else
#define FURTHER_TILES(blocks)
#endif
DEFINE_TILES(1)
#if PANEL_BLOCKS == 4
DEFINE_TILES(2)
DEFINE_TILES(3)
DEFINE_TILES(4)
#endif

static void multiply(const struct product *product) {
    int64_t tiles = divide_up(product->num_rows, TILE_ROWS);
    for (int64_t block = 0; block < product->planes_out; block += PANEL_BLOCKS) {
        for (int64_t i = 0; i < tiles; i++) {
            /* Rows spread evenly: a last tile of one row would leave most of the multipliers idle */
            int64_t row = product->num_rows * i / tiles, count = product->num_rows * (i + 1) / tiles - row;
#if PANEL_BLOCKS == 4
            int64_t blocks = product->planes_out - block;
            if (blocks >= 4)
                multiply_tiles_4(product, row, count, block);
            else if (blocks == 3)
                multiply_tiles_3(product, row, count, block);
            else if (blocks == 2)
                multiply_tiles_2(product, row, count, block);
            else
#endif
                multiply_tiles_1(product, row, count, block);
        }
    }
}
