/* Matrix product of rows of bytes with a packed panel of signed bytes, and its way back to bytes or floats. As in
 * multiply.h, but each step takes 4 of the depth: dot products of 4 bytes, summed in int32 (exact). */

struct byte_product {
    const float *rows;      /* (segments, rows, 64 bytes): 64 of the depth at a time */
    const int64_t *offsets; /* of each segment, in floats from `rows` */
    int64_t num_segments, num_rows;
    const int8_t *panels;
    int64_t channels_out;
    const float *scale, *bias; /* (C' padded to 64); bias may be NULL */
    const uint8_t *residual;   /* (planes', rows, 64) or NULL */
    int64_t residual_plane;
    float residual_factor, zero_point;
    int relu, to_bytes;
    float *out; /* (planes', rows, 64 bytes or 16 floats) */
    int64_t out_plane;
};

typedef uint8_t byte_vector __attribute__((vector_size(WIDTH)));
typedef int16_t half_bits __attribute__((vector_size(WIDTH * 4)));

/* sums + the dot products of 4 bytes of x (unsigned) and of weights (signed) in each 32 bits */
INLINE vector_bits add_dot_products(vector_bits sums, vector_bits x, vector_bits weights) {
#if defined(DOT_VNNI)
    return (vector_bits)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)x, (__m512i)weights);
#elif defined(DOT_MADD)
    /* Bytes 0 and 2, then 1 and 3, as 16 bits: the instruction for bytes would saturate */
    half_bits even = ((half_bits)weights << 8) >> 8, odd = (half_bits)weights >> 8;
    return sums + DOT_MADD(x & 0x00ff00ff, even) + DOT_MADD((x >> 8) & 0x00ff00ff, odd);
#else
    for (int i = 0; i < 4; i++)
        sums += ((x >> (8 * i)) & 255) * ((weights << (24 - 8 * i)) >> 24);
    return sums;
#endif
}

/* round(x) held to 0 to 255 */
INLINE byte_vector round_to_bytes(vector x) {
    x = smaller_of(larger_of(x + 0.5f, (vector){0}), (vector){0} + 255.5f);
    return __builtin_convertvector(__builtin_convertvector(x, vector_bits), byte_vector);
}

INLINE vector load_bytes(const uint8_t *p) {
    byte_vector bytes;
    memcpy(&bytes, p, sizeof bytes);
    return __builtin_convertvector(__builtin_convertvector(bytes, vector_bits), vector);
}

INLINE void store_product(const struct byte_product *product, vector_bits sums, int64_t row, int64_t channel) {
    vector value = __builtin_convertvector(sums, vector) * *(const vector *)(product->scale + channel);
    if (product->bias != NULL)
        value += *(const vector *)(product->bias + channel);
    int64_t line = channel / BYTE_LANES, lane = channel % BYTE_LANES;
    if (product->residual != NULL)
        value += product->residual_factor *
                 load_bytes(product->residual + (line * product->residual_plane + row * LANES) * 4 + lane);
    if (product->relu)
        value = clip_negative_vector(value);
    if (product->to_bytes) {
        byte_vector bytes = round_to_bytes(value + product->zero_point);
        memcpy((uint8_t *)(product->out + line * product->out_plane + row * LANES) + lane, &bytes, sizeof bytes);
    } else if (channel / LANES < count_planes(product->channels_out))
        *(vector *)(product->out + channel / LANES * product->out_plane + row * LANES + channel % LANES) = value;
}

INLINE void multiply_byte_tile(const struct byte_product *product, int64_t row, int64_t block, const int num_rows) {
    vector_bits sums[TILE_ROWS][PANEL_BLOCKS * VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < num_rows; r++)
#pragma GCC unroll 8
        for (int j = 0; j < PANEL_BLOCKS * VECTORS; j++)
            sums[r][j] = (vector_bits){0};
    const int8_t *weights = product->panels + block * LANES * BYTE_LANES * product->num_segments;
    for (int64_t s = 0; s < product->num_segments; s++) {
        const int32_t *a = (const int32_t *)(product->rows + product->offsets[s] + row * LANES);
        for (int k = 0; k < LANES; k++, a++) {
            vector_bits b[PANEL_BLOCKS * VECTORS];
#pragma GCC unroll 8
            for (int j = 0; j < PANEL_BLOCKS * VECTORS; j++, weights += sizeof(vector))
                b[j] = *(const vector_bits *)weights;
#pragma GCC unroll 8
            for (int r = 0; r < num_rows; r++) {
                vector_bits x = (vector_bits){0} + a[r * LANES];
#pragma GCC unroll 8
                for (int j = 0; j < PANEL_BLOCKS * VECTORS; j++)
                    sums[r][j] = add_dot_products(sums[r][j], x, b[j]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < num_rows; r++)
#pragma GCC unroll 8
        for (int j = 0; j < PANEL_BLOCKS * VECTORS; j++)
            store_product(product, sums[r][j], row + r, block * LANES + j * WIDTH);
}

static void multiply_bytes(const struct byte_product *product) {
    int64_t tiles = divide_up(product->num_rows, TILE_ROWS);
    int64_t blocks = divide_up(product->channels_out, BYTE_LANES) * (BYTE_LANES / LANES);
    for (int64_t block = 0; block < blocks; block += PANEL_BLOCKS)
        for (int64_t i = 0; i < tiles; i++) {
            int64_t row = product->num_rows * i / tiles, count = product->num_rows * (i + 1) / tiles - row;
            switch (count) {
            case 1: multiply_byte_tile(product, row, block, 1); break;
            case 2: multiply_byte_tile(product, row, block, 2); break;
            case 3: multiply_byte_tile(product, row, block, 3); break;
#if TILE_ROWS == 6
            case 4: multiply_byte_tile(product, row, block, 4); break;
            case 5: multiply_byte_tile(product, row, block, 5); break;
            case 6: multiply_byte_tile(product, row, block, 6); break;
#endif
            }
        }
}
