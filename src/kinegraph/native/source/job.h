/* One call of compute(). */
#ifndef KINEGRAPH_JOB_H
#define KINEGRAPH_JOB_H

#include "network.h"

#include <pthread.h>
#include <stdatomic.h>

#define MAX_THREADS 256

/* Workers that run one person together */
struct team {
    int size;
    atomic_int arrived, generation;
    pthread_mutex_t lock; /* lock and wake are for those that have waited long; a team of one has none */
    pthread_cond_t wake;
    atomic_llong *next; /* per step: the task that nobody has taken yet */
};

struct job {
    struct network *network;
    const float *x;
    const int64_t *shape; /* N, C, T, V, M */
    float *features;
    double *means;         /* (N * M, C') */
    double *frame_weights; /* (N * M, T'): what a frame counts in the mean of its clip */
    int64_t *frames, *offsets, *planes; /* per result: frames, place in an arena, floats of a plane */
    int64_t arena, scratch;             /* floats */
    float *memory;                      /* arenas, then a scratch for each worker */
    int64_t num_arenas, people_alone, people, bytes;
    int num_threads;
    atomic_llong next_person;
    struct team team;
    pthread_mutex_t gate;
};

/* memory.c. Between them the job is run; these two are called with Python's lock held. */
const char *prepare_job(struct job *job, struct network *network, const int64_t shape[5], int num_threads);
void finish_job(struct job *job);

/* run.c. Fills logits (N, classes) and, where job->features is set, those (N * M, T', V, C'). */
const char *run_job(struct job *job, float *logits);

#endif
