/* Running a network: memory for the results, threads, and the steps that one person goes through. */
#include "job.h"

#include <stdlib.h>
#include <string.h>

#define SPINS 4000

struct worker {
    struct job *job;
    struct team alone;
    int index;
    struct view *views;
};

static void wait_for_all(struct team *team) {
    if (team->size == 1)
        return;
    int generation = atomic_load_explicit(&team->generation, memory_order_acquire);
    if (atomic_fetch_add_explicit(&team->arrived, 1, memory_order_acq_rel) == team->size - 1) {
        atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
        pthread_mutex_lock(&team->lock);
        atomic_store_explicit(&team->generation, generation + 1, memory_order_release);
        pthread_cond_broadcast(&team->wake);
        pthread_mutex_unlock(&team->lock);
        return;
    }
    for (int spins = 0; spins < SPINS; spins++) {
        if (atomic_load_explicit(&team->generation, memory_order_acquire) != generation)
            return;
#ifdef HAVE_X86_KERNELS
        __builtin_ia32_pause();
#endif
    }
    /* The others lack a CPU: leave them this one */
    pthread_mutex_lock(&team->lock);
    while (atomic_load_explicit(&team->generation, memory_order_acquire) == generation)
        pthread_cond_wait(&team->wake, &team->lock);
    pthread_mutex_unlock(&team->lock);
}

static void load_person(const struct job *job, int64_t person, const struct view *view, int64_t begin, int64_t end) {
    int64_t channels = job->shape[1], frames = job->shape[2], joints = job->shape[3], people = job->shape[4];
    const float *x = job->x + person / people * channels * frames * joints * people + person % people;
    for (int64_t plane = 0; plane < count_planes(channels); plane++) {
        int64_t count = channels - plane * LANES < LANES ? channels - plane * LANES : LANES;
        for (int64_t row = begin * joints; row < end * joints; row++) {
            float *cell = view->data + plane * view->plane + row * LANES;
            for (int64_t c = 0; c < LANES; c++)
                cell[c] = c < count ? x[((plane * LANES + c) * frames * joints + row) * people] : 0.0f;
        }
    }
}

/* The part of one person in its clip's mean, for one plane. Sums of a frame in float, of frames in double: long clips
 * stay exact. */
static void average_plane(const struct job *job, int64_t person, const struct view *view, int64_t plane) {
    const struct network *network = job->network;
    int64_t channels = network->result_channels[network->num_operations], joints = network->num_joints;
    int64_t count = channels - plane * LANES < LANES ? channels - plane * LANES : LANES;
    const double *weights = job->frame_weights + person * view->frames;
    double totals[LANES] = {0};
    for (int64_t t = 0; t < view->frames; t++) {
        float sums[LANES] = {0};
        const float *cell = view->data + plane * view->plane + t * joints * LANES;
        for (int64_t i = 0; i < joints * LANES; i++)
            sums[i % LANES] += cell[i];
        for (int64_t c = 0; c < LANES; c++)
            totals[c] += weights[t] > 0 ? weights[t] * sums[c] : 0;
    }
    for (int64_t c = 0; c < count; c++)
        job->means[person * channels + plane * LANES + c] = totals[c] / (double)joints;
    if (job->features == NULL)
        return;
    float *features = job->features + person * view->frames * joints * channels;
    for (int64_t row = 0; row < view->frames * joints; row++)
        for (int64_t c = 0; c < count; c++)
            features[row * channels + plane * LANES + c] = view->data[plane * view->plane + row * LANES + c];
}

static void run_person(struct worker *worker, struct team *team, int64_t person, float *arena) {
    struct job *job = worker->job;
    const struct network *network = job->network;
    int last = network->num_operations + 1;
    struct view *views = worker->views;
    for (int i = 0; i < last; i++)
        views[i] = (struct view){arena + job->offsets[i], job->planes[i], job->frames[i]};
    float *scratch = job->memory + job->num_arenas * job->arena + worker->index * job->scratch;
    for (int step = 0; step <= last; step++) {
        const struct operation *operation = step > 0 && step < last ? &network->operations[step - 1] : NULL;
        int64_t units, each = 1;
        if (step == last)
            units = count_planes(network->result_channels[last - 1]);
        else if (operation == NULL)
            units = job->frames[0], each = divide_up(units, 4 * team->size);
        else {
            units = count_units(operation, job->frames[step], network->num_joints);
            each = choose_units(operation, units, network->num_joints, team->size);
        }
        struct task task = {operation, views, step, network->num_joints, 0, 0, scratch};
        while ((task.begin = each * atomic_fetch_add(&team->next[step], 1)) < units) {
            task.end = task.begin + each < units ? task.begin + each : units;
            if (operation != NULL)
                network->kernels->run(&task);
            else if (step == 0)
                load_person(job, person, &views[0], task.begin, task.end);
            else
                average_plane(job, person, &views[last - 1], task.begin);
        }
        wait_for_all(team);
        /* All have left this step, and none comes back to it before the barrier of another */
        atomic_store(&team->next[step], 0);
    }
}

static void *work(void *argument) {
    struct worker *worker = argument;
    struct job *job = worker->job;
    /* Held by the caller until it knows how many threads there are */
    pthread_mutex_lock(&job->gate);
    pthread_mutex_unlock(&job->gate);
    int64_t person;
    while ((person = atomic_fetch_add(&job->next_person, 1)) < job->people_alone)
        run_person(worker, &worker->alone, person, job->memory + worker->index * job->arena);
    wait_for_all(&job->team);
    for (person = job->people_alone; person < job->people; person++)
        run_person(worker, &job->team, person, job->memory);
    return NULL;
}

static const char *run_workers(struct job *job, int num_threads) {
    int steps = job->network->num_operations + 2;
    struct worker *workers = calloc((size_t)num_threads, sizeof *workers);
    pthread_t *threads = calloc((size_t)num_threads, sizeof *threads);
    struct view *views = calloc((size_t)(num_threads * steps), sizeof *views);
    atomic_llong *next = calloc((size_t)((num_threads + 1) * steps), sizeof *next);
    const char *problem = workers && threads && views && next ? NULL : OUT_OF_MEMORY;
    int locks = pthread_mutex_init(&job->gate, NULL) == 0;
    locks += locks == 1 && pthread_mutex_init(&job->team.lock, NULL) == 0;
    locks += locks == 2 && pthread_cond_init(&job->team.wake, NULL) == 0;
    if (problem == NULL && locks < 3)
        problem = OUT_OF_MEMORY;
    if (problem == NULL) {
        job->team.next = next + num_threads * steps;
        pthread_mutex_lock(&job->gate);
        int started = 1;
        for (int i = 0; i < num_threads; i++) {
            workers[i] = (struct worker){.job = job, .index = i, .views = views + i * steps};
            workers[i].alone.size = 1;
            workers[i].alone.next = next + i * steps;
            if (i > 0 && i == started && pthread_create(&threads[i], NULL, work, &workers[i]) == 0)
                started++;
        }
        job->team.size = started;
        pthread_mutex_unlock(&job->gate);
        work(&workers[0]);
        for (int i = 1; i < started; i++)
            pthread_join(threads[i], NULL);
    }
    if (locks > 2)
        pthread_cond_destroy(&job->team.wake);
    if (locks > 1)
        pthread_mutex_destroy(&job->team.lock);
    if (locks > 0)
        pthread_mutex_destroy(&job->gate);
    free(workers);
    free(threads);
    free(views);
    free(next);
    return problem;
}

/* The last frame in which a person has a value other than zero, or -1 */
static int64_t find_last_frame(const struct job *job, int64_t person) {
    int64_t channels = job->shape[1], frames = job->shape[2], joints = job->shape[3], people = job->shape[4];
    const float *x = job->x + person / people * channels * frames * joints * people + person % people;
    for (int64_t t = frames - 1; t >= 0; t--)
        for (int64_t c = 0; c < channels; c++)
            for (int64_t v = 0; v < joints; v++)
                if (x[((c * frames + t) * joints + v) * people] != 0)
                    return t;
    return -1;
}

/* Frames of a clip count the same, those that are not real nothing; where nobody has a real one, all are */
static void weigh_frames(const struct job *job, int64_t clip) {
    const struct network *network = job->network;
    int64_t frames = job->frames[network->num_operations], stride = network->result_strides[network->num_operations];
    int64_t people = job->shape[4], count = 0;
    double *weights = job->frame_weights + clip * people * frames;
    for (int64_t m = 0; network->only_real_frames && m < people; m++) {
        int64_t last = find_last_frame(job, clip * people + m);
        for (int64_t t = 0; t < frames; t++) {
            weights[m * frames + t] = t * stride <= last;
            count += t * stride <= last;
        }
    }
    for (int64_t i = 0; i < people * frames; i++)
        weights[i] = count > 0 ? weights[i] / (double)count : 1 / (double)(people * frames);
}

const char *run_job(struct job *job, float *logits) {
    const struct network *network = job->network;
    for (int64_t clip = 0; clip < job->shape[0]; clip++)
        weigh_frames(job, clip);
    const char *problem = run_workers(job, job->num_threads);
    int64_t channels = network->result_channels[network->num_operations], people = job->shape[4];
    for (int64_t clip = 0; problem == NULL && clip < job->shape[0]; clip++)
        for (int64_t label = 0; label < network->num_classes; label++) {
            double logit = network->head_bias[label];
            for (int64_t c = 0; c < channels; c++) {
                double mean = 0;
                for (int64_t m = 0; m < people; m++)
                    mean += job->means[(clip * people + m) * channels + c];
                logit += mean * network->head_weight[c * network->num_classes + label];
            }
            logits[clip * network->num_classes + label] = (float)logit;
        }
    return problem;
}
