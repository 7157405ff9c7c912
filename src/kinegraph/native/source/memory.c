/* Memory of a call: where the results of a person lie, and what the workers need beside. */
#include "job.h"

#include <stdlib.h>
#include <string.h>

/* People that run side by side need memory for each of them */
#define MAX_ARENAS_BYTES ((int64_t)1 << 30)
#define KEPT_SCRATCH_BYTES ((int64_t)256 << 20)

/* Results share memory where the one is read for the last time before the other is written. -> floats of an arena */
static int64_t place_results(struct job *job) {
    const struct network *network = job->network;
    int results = network->num_operations + 1, num_slots = 0;
    int *last_use = calloc((size_t)results, sizeof *last_use), *slot = calloc((size_t)results, sizeof *slot);
    int *free_from = calloc((size_t)results, sizeof *free_from);
    int64_t *size = calloc((size_t)results, sizeof *size), total = -1;
    if (!last_use || !slot || !free_from || !size)
        goto end;
    for (int i = 1; i < results; i++) {
        const struct operation *operation = &network->operations[i - 1];
        for (int s = 0; s < operation->num_sources; s++)
            last_use[operation->sources[s]] = i;
        if (operation->residual >= 0)
            last_use[operation->residual] = i;
    }
    for (int i = 0; i < results; i++) {
        int64_t rows = (job->frames[i] * network->num_joints) | 1; /* odd: planes do not meet in the same cache sets */
        job->planes[i] = rows * LANES;
        int64_t planes = count_result_planes(network->result_channels[i], network->result_is_bytes[i]);
        int64_t needed = planes * job->planes[i];
        int best = num_slots;
        for (int s = 0; s < num_slots; s++)
            if (free_from[s] < i && (best == num_slots || llabs(size[s] - needed) < llabs(size[best] - needed)))
                best = s;
        num_slots += best == num_slots;
        size[best] = needed > size[best] ? needed : size[best];
        free_from[best] = i == results - 1 ? results : last_use[i] > i ? last_use[i] : i;
        slot[i] = best;
    }
    total = 0;
    for (int s = 0; s < num_slots; s++) {
        int64_t own = size[s];
        size[s] = total;
        total += own;
    }
    for (int i = 0; i < results; i++)
        job->offsets[i] = size[slot[i]];
end:
    free(last_use);
    free(slot);
    free(free_from);
    free(size);
    return total;
}

static int64_t count_worker_scratch(const struct job *job, int64_t workers) {
    const struct network *network = job->network;
    int64_t most = LANES;
    for (int i = 0; i < network->num_operations; i++) {
        const struct operation *operation = &network->operations[i];
        int64_t units = count_units(operation, job->frames[i + 1], network->num_joints);
        int64_t each = choose_units(operation, units, network->num_joints, workers);
        int64_t floats = divide_up(count_scratch(operation, each, network->num_joints), LANES) * LANES;
        most = floats > most ? floats : most;
    }
    return most;
}

/* The memory of the last call where it is large enough */
static const char *take_memory(struct job *job) {
    struct network *network = job->network;
    int64_t threads = job->num_threads;
    job->num_arenas = 1;
    job->people_alone = threads > 1 ? job->people / threads * threads : 0;
    if (job->people_alone > 0 && job->arena <= MAX_ARENAS_BYTES / (int64_t)sizeof(float) / threads)
        job->num_arenas = threads;
    else
        job->people_alone = 0;
    if (job->arena > MAX_SCRATCH_BYTES / 4 || job->scratch > MAX_SCRATCH_BYTES / MAX_THREADS)
        return "a clip that needs too much memory";
    job->bytes = (job->num_arenas * job->arena + threads * job->scratch) * (int64_t)sizeof(float);
    if (network->kept_scratch != NULL && network->kept_bytes >= job->bytes) {
        job->memory = network->kept_scratch;
        job->bytes = network->kept_bytes;
        network->kept_scratch = NULL;
        return NULL;
    }
    job->memory = allocate(job->bytes, 1);
    return job->memory == NULL ? OUT_OF_MEMORY : NULL;
}

const char *prepare_job(struct job *job, struct network *network, const int64_t shape[5], int num_threads) {
    memset(job, 0, sizeof *job);
    int results = network->num_operations + 1;
    job->network = network;
    job->shape = shape;
    job->num_threads = num_threads;
    job->people = shape[0] * shape[4];
    job->means = calloc((size_t)(job->people * network->result_channels[results - 1]), sizeof(double));
    job->frames = calloc((size_t)results, sizeof(int64_t));
    int64_t frames_out = divide_up(shape[2], network->result_strides[results - 1]);
    job->frame_weights = calloc((size_t)(job->people * frames_out), sizeof(double));
    job->offsets = calloc((size_t)results, sizeof(int64_t));
    job->planes = calloc((size_t)results, sizeof(int64_t));
    if (!job->means || !job->frame_weights || !job->frames || !job->offsets || !job->planes)
        return OUT_OF_MEMORY;
    for (int i = 0; i < results; i++)
        job->frames[i] = divide_up(shape[2], network->result_strides[i]);
    job->arena = place_results(job);
    if (job->arena < 0)
        return OUT_OF_MEMORY;
    int64_t alone = count_worker_scratch(job, 1), together = count_worker_scratch(job, num_threads);
    job->scratch = alone > together ? alone : together;
    return take_memory(job);
}

void finish_job(struct job *job) {
    struct network *network = job->network;
    if (job->memory != NULL && job->bytes <= KEPT_SCRATCH_BYTES &&
        (network->kept_scratch == NULL || network->kept_bytes < job->bytes)) {
        free(network->kept_scratch);
        network->kept_scratch = job->memory;
        network->kept_bytes = job->bytes;
    } else
        free(job->memory);
    free(job->means);
    free(job->frame_weights);
    free(job->frames);
    free(job->offsets);
    free(job->planes);
}
