/* A folded network (kinegraph/models/folded.py) laid out for the kernels.
 *
 * Activations of one person lie in planes of 16 channels: (planes, rows, 16), a row being one joint in one frame,
 * row = frame * num_joints + joint. Channels past the last real one meet weights that are zero, so they stay zero.
 * 16 floats are a cache line, and a matrix product finds the rows of a plane at a fixed distance: nothing is packed.
 * Results as bytes lie in planes of 64 channels, which again are a cache line a row; where a value is a number of
 * floats, such a line counts as 16. A byte q stands for (q - zero point) * scale.
 */
#ifndef KINEGRAPH_NETWORK_H
#define KINEGRAPH_NETWORK_H

#include <stddef.h>
#include <stdint.h>

#define LANES 16
#define BYTE_LANES 64
#define ALIGNMENT 64
/* What is larger is a mistake or an attack; products of these stay far below 2^63 */
#define MAX_CHANNELS 65536
#define MAX_JOINTS 4096
#define MAX_FRAMES 1048576
#define MAX_TAPS 1024
#define MAX_REACH 65536
#define MAX_OPERATIONS 4096
#define MAX_SOURCES 64
#define MAX_SCRATCH_BYTES ((int64_t)1 << 34)

enum kind { AFFINE, GRAPH, TEMPORAL, WINOGRAD, MAXIMUM, SUM, CONCATENATION, QUANTIZE, DEQUANTIZE };

/* Bytes of a caller. They need not be aligned. */
struct span {
    const void *bytes;
    int64_t size;
};

/* Rows as weighted sums of other rows: row i is the sum over e in [start[i], start[i + 1]) of weight[e] * source[e] */
struct links {
    int64_t rows;
    int32_t *start, *source;
    float *weight;
};

/* One matrix product of a graph convolution: in each frame `rows` rows, each of `slots` sums of joints side by side */
struct part {
    int64_t rows, slots;
    struct links mixing; /* slots * rows sums of joints, slot after slot; on bytes one joint with weight 1 each */
    void *panels;        /* weights (slots * C, C'), packed */
    float *scale;        /* on bytes: what a product counts, by channel (planes' * 64) */
};

/* How an operation on bytes ends: relu(sum * scale + bias + residual byte * residual_factor) + zero_point */
struct rescaling {
    float residual_factor, zero_point;
    int fill; /* the byte that stands for 0 in the input: frames outside the clip */
};

struct operation {
    enum kind kind;
    int relu, num_sources, residual; /* residual: a result that is added before relu, or -1 */
    int *sources;                    /* results: 0 is the input, i + 1 the result of operation i */
    int64_t channels_in, channels_out, planes_in, planes_out;
    int64_t taps, stride, dilation, before; /* of TEMPORAL and WINOGRAD; MAXIMUM: taps is its size */
    int64_t *source_channels;               /* CONCATENATION */
    float *scale, *bias; /* AFFINE: (planes, V, 16) both; GRAPH: bias (planes', V, 16); otherwise bias (planes', 16) */
    void *panels; /* packed weights: TEMPORAL (taps * C, C'), WINOGRAD (points, phases * C, C') */
    int reads_bytes, writes_bytes; /* planes_in and planes_out are of 64 channels then */
    struct rescaling rescaling;    /* of what reads bytes; QUANTIZE and DEQUANTIZE: residual_factor is their factor */
    int64_t num_parts;
    struct part *parts;
    struct links combination; /* GRAPH: each joint as a sum of rows of the parts, counted through all parts */
    int32_t *link_first, *link_rows; /* of the part that a link of the combination leads to: its first row, its rows */
};

/* A result of one person at run time */
struct view {
    float *data;
    int64_t plane; /* floats from one plane to the next */
    int64_t frames;
};

/* What a call of a kernel works on: units [begin, end) of an operation, see count_units */
struct task {
    const struct operation *operation;
    const struct view *views; /* by result */
    int result;
    int64_t joints, begin, end;
    float *scratch; /* count_scratch floats */
};

struct kernels {
    const char *name;
    int64_t panel_blocks; /* a packed panel of weights holds this many blocks of 16 columns */
    void (*run)(const struct task *task);
};

extern const struct kernels kernels_plain;
#if defined(__x86_64__) && defined(__GNUC__)
#define HAVE_X86_KERNELS 1
extern const struct kernels kernels_avx2, kernels_avx512, kernels_avx512vnni;
#endif

struct network {
    const struct kernels *kernels;
    int64_t num_channels, num_joints, num_classes;
    int num_operations, only_real_frames;
    struct operation *operations;
    int64_t *result_channels, *result_strides; /* of result 0 (the input) and of each operation */
    int *result_is_bytes;
    float *head_weight, *head_bias;            /* (C', classes), (classes,); NULL until the head is set */
    void *kept_scratch;                        /* of the last call: touching new pages costs as much as a layer */
    int64_t kept_bytes;
};

#define OUT_OF_MEMORY "out of memory"

/* network.c. Those that return text return NULL or what is wrong; nothing is added then. */
struct network *create_network(const struct kernels *kernels, int64_t channels, int64_t joints);
void free_network(struct network *network);
void *allocate(int64_t count, int64_t size); /* zeros, aligned; free with free() */
const char *begin_operation(struct network *network, enum kind kind, const int *sources, int num_sources, int residual,
                            int relu);
/* Before the set_ functions, for an operation that reads bytes or writes them */
const char *use_bytes(struct network *network, int reads, int writes, struct rescaling rescaling);
struct operation *opened_operation(struct network *network);
void discard_operation(struct network *network);
const char *end_operation(struct network *network); /* -> the new result is network->num_operations */
const char *set_head(struct network *network, int64_t classes, int only_real_frames, struct span weight,
                     struct span bias);

/* layers.c: filling the operation that was begun */
const char *set_affine(struct network *network, struct span scale, struct span shift);
const char *set_graph(struct network *network, int64_t channels_out, int64_t num_parts, struct span bias);
const char *set_part(struct network *network, int64_t index, int64_t rows, int64_t slots, const struct span links[3],
                     struct span weight, struct span scale);
const char *set_combination(struct network *network, const struct span links[3]);
const char *set_temporal(struct network *network, int64_t channels_out, const int64_t geometry[4], struct span weight,
                         struct span scale, struct span bias);
const char *set_maximum(struct network *network, int64_t size, int64_t stride, int64_t before);

/* plan.c: how an operation is cut into tasks */
int64_t count_units(const struct operation *operation, int64_t frames_out, int64_t joints);
int64_t count_scratch(const struct operation *operation, int64_t units, int64_t joints); /* floats */
int64_t choose_units(const struct operation *operation, int64_t units, int64_t joints, int64_t workers);

/* Winograd schemes, by stride (winograd.h says which) */
#define NESTED_OUTPUTS 12
#define NESTED_POINTS 30
#define NESTED_WINDOW 20
#define HALVED_OUTPUTS 4
#define HALVED_POINTS 8
#define HALVED_WINDOW 8

static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t count_planes(int64_t channels) { return divide_up(channels, LANES); }
static inline int64_t count_result_planes(int64_t channels, int is_bytes) {
    return divide_up(channels, is_bytes ? BYTE_LANES : LANES);
}

#endif
