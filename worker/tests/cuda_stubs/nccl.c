// An NCCL that works on the memory of the host, between threads and processes of one machine: ranks meet in a file that the
// unique id names and that all of them map. Each communicator has a thread for what it was given, as a GPU has a stream, so
// calls return before they are done. Arguments are checked more strictly than NCCL does. Tests make it fail: by the fields of a
// stream, by what it is compiled with, and by variables of the environment.
#define _GNU_SOURCE
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

#include "stream.h"

static int number(const char* name, int usual) {
    const char* text = getenv(name);
    return text ? atoi(text) : usual;
}

#ifndef VERSION
#define VERSION number("STUB_NCCL", 22809)
#endif
// What becomes of an initialisation: 0 it succeeds, 1 it never ends, 2 it fails later, 3 it is refused at once.
#ifndef INIT_FAULT
#define INIT_FAULT number("STUB_NCCL_INIT", 0)
#endif

// ncclResult_t
enum { SUCCESS, UNHANDLED_CUDA, SYSTEM, INTERNAL, INVALID_ARGUMENT, INVALID_USAGE, REMOTE, IN_PROGRESS };
// ncclDataType_t
enum { UINT8 = 1, INT64 = 4, HALF = 6, FLOAT = 7, DOUBLE = 8, BFLOAT16 = 9 };
// ncclRedOp_t
enum { SUM = 0, MAX = 2 };

struct unique_id {
    char internal[128];
};

// ncclConfig_t of 2.28
struct config {
    size_t size;
    unsigned int magic, version;
    int blocking, cga, least_ctas, most_ctas;
    const char* net;
    int split_share, traffic_class;
    const char* name;
    int collnet, cta_policy, shrink_share, nvls_ctas, channels_per_net_peer, nvlink_centric;
};

#define MOST_RANKS 16
#define CHUNK ((size_t)1 << 18)
#define ALIVE 0x6e63636cu

enum operation { ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, BROADCAST };

struct description {
    uint64_t operation, count, type, detail;
};

// What the ranks of a world share; chunks follow, one a rank.
struct shared {
    _Atomic int ranks;
    _Atomic uint64_t arrived[MOST_RANKS];
    struct description described[MOST_RANKS];
};

struct work {
    enum operation operation;
    const char* send;
    char* receive;
    size_t count;
    int type, detail;
    struct stream* stream;
};

struct comm {
    // Never freed: a call after its end is found out.
    _Atomic uint32_t alive;
    int rank, ranks;
    struct shared* shared;
    size_t bytes;
    struct unique_id id;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct work work;
    bool has_work, closing;
    _Atomic bool aborted;
    _Atomic int state;
    uint64_t steps;
};

static _Thread_local char last_error[256];

static int complain(int code, const char* why) {
    snprintf(last_error, sizeof last_error, "%s", why);
    return code;
}

static size_t size_of(int type) {
    switch (type) {
    case UINT8: return 1;
    case HALF:
    case BFLOAT16: return 2;
    case FLOAT: return 4;
    case INT64:
    case DOUBLE: return 8;
    default: return 0;
    }
}

static float from_bfloat16(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

static uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (isnan(value)) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// As NCCL's: the larger of a number and NaN is the number.
static double larger(double a, double b) {
    return isnan(a) || a < b ? b : a;
}

#define COMBINE(T, READ, WRITE)                                                              \
    {                                                                                        \
        T* a = into;                                                                         \
        const T* b = from;                                                                   \
        for (size_t i = 0; i < bytes / sizeof(T); i++)                                       \
            a[i] = WRITE(how == SUM ? READ(a[i]) + READ(b[i]) : larger(READ(a[i]), READ(b[i]))); \
    }

static void combine(void* into, const void* from, size_t bytes, int type, int how) {
    switch (type) {
    case FLOAT: COMBINE(float, (float), (float)) break;
    case DOUBLE: COMBINE(double, (double), (double)) break;
    case HALF: COMBINE(_Float16, (float), (_Float16)) break;
    case BFLOAT16: COMBINE(uint16_t, from_bfloat16, to_bfloat16) break;
    case INT64: {
        int64_t* a = into;
        const int64_t* b = from;
        for (size_t i = 0; i < bytes / sizeof *a; i++)
            a[i] = how == SUM ? (int64_t)((uint64_t)a[i] + (uint64_t)b[i]) : a[i] > b[i] ? a[i] : b[i];
        break;
    }
    }
}

static char* chunk_of(struct comm* comm, int rank) {
    return (char*)comm->shared + 4096 + (size_t)rank * CHUNK;
}

// Returns when every rank has come here as often; false if this one was aborted meanwhile.
static bool meet(struct comm* comm) {
    uint64_t step = ++comm->steps;
    atomic_store(&comm->shared->arrived[comm->rank], step);
    for (int rank = 0; rank < comm->ranks; rank++) {
        for (int turns = 0; atomic_load(&comm->shared->arrived[rank]) < step; turns++) {
            if (atomic_load(&comm->aborted)) return false;
            if (turns < 200)
                sched_yield();
            else
                usleep(50);
        }
    }
    return !atomic_load(&comm->aborted);
}

static void until_aborted(struct comm* comm) {
    while (!atomic_load(&comm->aborted)) usleep(200);
}

// One piece: from `send` of those that give, over all ranks' chunks, into `receive` of those that take.
static bool piece(struct comm* comm, const struct work* work, const char* send, char* receive, size_t bytes) {
    bool reduces = work->operation == ALL_REDUCE || work->operation == REDUCE_SCATTER;
    if (send) memcpy(chunk_of(comm, comm->rank), send, bytes);
    if (!meet(comm)) return false;
    if (receive && reduces) {
        memcpy(receive, chunk_of(comm, 0), bytes);
        for (int rank = 1; rank < comm->ranks; rank++)
            combine(receive, chunk_of(comm, rank), bytes, work->type, work->detail);
    } else if (receive && work->operation == BROADCAST) {
        memcpy(receive, chunk_of(comm, work->detail), bytes);
    } else if (receive) {
        size_t whole = work->count * size_of(work->type);
        for (int rank = 0; rank < comm->ranks; rank++)
            memcpy(receive + (size_t)rank * whole, chunk_of(comm, rank), bytes);
    }
    return meet(comm);
}

static int perform(struct comm* comm, const struct work* work) {
    switch (atomic_exchange(&work->stream->fault, FAULT_NONE)) {
    case FAULT_HANG: until_aborted(comm); return IN_PROGRESS;
    case FAULT_CUDA: return UNHANDLED_CUDA;
    case FAULT_REMOTE: return REMOTE;
    }
    comm->shared->described[comm->rank] = (struct description){
        work->operation, work->count, (uint64_t)work->type, (uint64_t)work->detail};
    if (!meet(comm)) return IN_PROGRESS;
    for (int rank = 0; rank < comm->ranks; rank++)
        if (memcmp(&comm->shared->described[rank], &comm->shared->described[comm->rank], sizeof(struct description)))
            return INVALID_USAGE;
    size_t whole = work->count * size_of(work->type);
    int parts = work->operation == REDUCE_SCATTER ? comm->ranks : 1;
    for (int part = 0; part < parts; part++) {
        for (size_t offset = 0; offset < whole; offset += CHUNK) {
            size_t bytes = whole - offset < CHUNK ? whole - offset : CHUNK;
            bool gives = work->operation != BROADCAST || work->detail == comm->rank;
            bool takes = parts == 1 || part == comm->rank;
            const char* send = gives ? work->send + (size_t)part * whole + offset : NULL;
            if (!piece(comm, work, send, takes ? work->receive + offset : NULL, bytes)) return IN_PROGRESS;
        }
    }
    return SUCCESS;
}

static void* serve(void* argument) {
    struct comm* comm = argument;
    int fault = INIT_FAULT;
    if (fault == 1) until_aborted(comm);
    if (fault == 2) {
        atomic_store(&comm->state, SYSTEM);
        until_aborted(comm);
    }
    if (!meet(comm)) return NULL;
    // All have mapped it.
    unlink(comm->id.internal);
    atomic_store(&comm->state, SUCCESS);
    pthread_mutex_lock(&comm->lock);
    while (!atomic_load(&comm->aborted) && !comm->closing) {
        if (!comm->has_work) {
            pthread_cond_wait(&comm->changed, &comm->lock);
            continue;
        }
        struct work work = comm->work;
        pthread_mutex_unlock(&comm->lock);
        // On its way to the stream.
        atomic_store(&comm->state, SUCCESS);
        int result = perform(comm, &work);
        pthread_mutex_lock(&comm->lock);
        comm->has_work = false;
        if (result == SUCCESS)
            atomic_fetch_add(&work.stream->completed, 1);
        else if (result != IN_PROGRESS)
            atomic_store(&comm->state, result);
    }
    pthread_mutex_unlock(&comm->lock);
    return NULL;
}

static struct comm* living(void* handle) {
    struct comm* comm = handle;
    if (!comm || atomic_load(&comm->alive) != ALIVE) {
        fprintf(stderr, "a call on a communicator that has ended\n");
        abort();
    }
    return comm;
}

static int end(struct comm* comm) {
    pthread_mutex_lock(&comm->lock);
    pthread_cond_broadcast(&comm->changed);
    pthread_mutex_unlock(&comm->lock);
    pthread_join(comm->thread, NULL);
    munmap(comm->shared, comm->bytes);
    return SUCCESS;
}

int ncclGetVersion(int* version) {
    *version = VERSION;
    return SUCCESS;
}

const char* ncclGetErrorString(int result) {
    static const char* names[] = {"no error", "unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
        "unhandled system error (run with NCCL_DEBUG=INFO for details)", "internal error", "invalid argument",
        "invalid usage", "remote process exited or there was a network error", "NCCL operation in progress"};
    return result >= 0 && result <= IN_PROGRESS ? names[result] : "unknown result code";
}

const char* ncclGetLastError(void* comm) {
    (void)comm;
    return last_error;
}

int ncclGetUniqueId(struct unique_id* id) {
    uint64_t random;
    if (getrandom(&random, sizeof random, 0) != sizeof random) return SYSTEM;
    const char* folder = getenv("TMPDIR");
    snprintf(id->internal, sizeof id->internal, "%s/nccl-stand-in-%016llx", folder ? folder : "/tmp",
        (unsigned long long)random);
    return SUCCESS;
}

static bool as_the_header_says(const struct config* config) {
    const int unset[] = {config->cga, config->least_ctas, config->most_ctas, config->split_share,
        config->traffic_class, config->collnet, config->cta_policy, config->shrink_share, config->nvls_ctas,
        config->channels_per_net_peer, config->nvlink_centric};
    bool as_set = config->size == sizeof *config && config->magic == 0xcafebeef && config->version / 100 == 228;
    for (size_t i = 0; i < sizeof unset / sizeof *unset; i++) as_set = as_set && unset[i] == INT_MIN;
    return as_set && config->blocking == 0 && !config->net && !config->name;
}

int ncclCommInitRankConfig(void** result, int ranks, struct unique_id id, int rank, const struct config* config) {
    if (INIT_FAULT == 3) return complain(INVALID_USAGE, "Duplicate GPU detected");
    if (!as_the_header_says(config)) return complain(INVALID_ARGUMENT, "the configuration is not 2.28's, non-blocking");
    if (ranks < 1 || ranks > MOST_RANKS || rank < 0 || rank >= ranks)
        return complain(INVALID_ARGUMENT, "no such rank");
    struct comm* comm = calloc(1, sizeof *comm);
    comm->rank = rank;
    comm->ranks = ranks;
    comm->id = id;
    comm->bytes = 4096 + (size_t)ranks * CHUNK;
    atomic_store(&comm->state, IN_PROGRESS);
    pthread_mutex_init(&comm->lock, NULL);
    pthread_cond_init(&comm->changed, NULL);
    int file = open(id.internal, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (file < 0 || ftruncate(file, (off_t)comm->bytes)) return complain(SYSTEM, "no file to meet in");
    comm->shared = mmap(NULL, comm->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (comm->shared == MAP_FAILED) return complain(SYSTEM, "no memory to meet in");
    int others = 0;
    if (!atomic_compare_exchange_strong(&comm->shared->ranks, &others, ranks) && others != ranks)
        return complain(INVALID_USAGE, "the ranks count the world differently");
    atomic_store(&comm->alive, ALIVE);
    *result = comm;
    if (pthread_create(&comm->thread, NULL, serve, comm)) return complain(SYSTEM, "no thread");
    return IN_PROGRESS;
}

int ncclCommGetAsyncError(void* handle, int* state) {
    *state = atomic_load(&living(handle)->state);
    return SUCCESS;
}

int ncclCommAbort(void* handle) {
    struct comm* comm = living(handle);
    atomic_store(&comm->aborted, true);
    unlink(comm->id.internal);
    end(comm);
    atomic_store(&comm->alive, 0);
    return SUCCESS;
}

int ncclCommFinalize(void* handle) {
    struct comm* comm = living(handle);
    if (comm->has_work) return complain(INVALID_USAGE, "an operation is not done");
    return SUCCESS;
}

int ncclCommDestroy(void* handle) {
    struct comm* comm = living(handle);
    pthread_mutex_lock(&comm->lock);
    comm->closing = true;
    pthread_mutex_unlock(&comm->lock);
    end(comm);
    atomic_store(&comm->alive, 0);
    return SUCCESS;
}

static int give(void* handle, struct work work) {
    struct comm* comm = living(handle);
    bool reduces = work.operation == ALL_REDUCE || work.operation == REDUCE_SCATTER;
    size_t size = size_of(work.type);
    if (!work.stream) return complain(INVALID_ARGUMENT, "no stream of its own");
    if (!work.send || !work.receive || !work.count || !size) return complain(INVALID_ARGUMENT, "no memory, count or type");
    if (reduces && (work.type == UINT8 || (work.detail != SUM && work.detail != MAX)))
        return complain(INVALID_ARGUMENT, "no such reduction");
    if (work.operation == BROADCAST && (work.detail < 0 || work.detail >= comm->ranks))
        return complain(INVALID_ARGUMENT, "no such root");
    if (atomic_load(&comm->state) != SUCCESS) return complain(INVALID_USAGE, "the call before is still on its way");
    // What was computed before must have been waited for, once an operation.
    if (atomic_load(&work.stream->waits) != atomic_fetch_add(&work.stream->enqueued, 1) + 1)
        return complain(INVALID_USAGE, "the stream does not wait for what is computed");
    uint32_t fault = atomic_load(&work.stream->fault);
    if (fault == FAULT_REFUSE) return complain(INVALID_ARGUMENT, "refused, as the test wants");
    if (fault == FAULT_STUCK) {
        until_aborted(comm);
        return complain(INTERNAL, "aborted");
    }
    pthread_mutex_lock(&comm->lock);
    bool busy = comm->has_work;
    if (!busy) {
        comm->work = work;
        comm->has_work = true;
        atomic_store(&comm->state, IN_PROGRESS);
        pthread_cond_broadcast(&comm->changed);
    }
    pthread_mutex_unlock(&comm->lock);
    return busy ? complain(INVALID_USAGE, "the operation before is not done") : IN_PROGRESS;
}

int ncclAllReduce(const void* send, void* receive, size_t count, int type, int how, void* comm, void* stream) {
    return give(comm, (struct work){ALL_REDUCE, send, receive, count, type, how, stream});
}

int ncclAllGather(const void* send, void* receive, size_t count, int type, void* comm, void* stream) {
    return give(comm, (struct work){ALL_GATHER, send, receive, count, type, 0, stream});
}

int ncclReduceScatter(const void* send, void* receive, size_t count, int type, int how, void* comm, void* stream) {
    return give(comm, (struct work){REDUCE_SCATTER, send, receive, count, type, how, stream});
}

int ncclBroadcast(const void* send, void* receive, size_t count, int type, int root, void* comm, void* stream) {
    return give(comm, (struct work){BROADCAST, send, receive, count, type, root, stream});
}
