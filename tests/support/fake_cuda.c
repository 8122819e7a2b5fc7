/* A libcuda whose GPUs are memory of the host, for tests of modelstore/load/device.py.

Each stream copies in a thread of its own, in order, some time after it was asked to, as a GPU does. Calls that the real
driver refuses are refused with its numbers, and a use that a real GPU would answer with wrong bytes or a crash is
counted in `fake.violations`, with the first one's text: memory freed or unpinned under a copy, a double free, a copy out
of memory that is not pinned as a whole, a call without a current context, an event or stream used after its end.

The environment sets it up: FAKE_CUDA_BYTES (memory of each GPU), FAKE_CUDA_DELAY_US (before each copy), FAKE_CUDA_GPUS,
FAKE_CUDA_REFUSE (the name of a call that fails), FAKE_CUDA_INIT_MS (how long the first context takes).
*/
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_DEVICE = 101, INVALID_CONTEXT = 201,
       INVALID_HANDLE = 400, NOT_READY = 600, ALREADY_REGISTERED = 712, NOT_REGISTERED = 713, NOT_PERMITTED = 800 };

enum { GPUS = 8, BLOCKS = 4096, DEPTH = 16 };

typedef struct { int device, retained; size_t used; } Context;
typedef struct { char *start; size_t size; int device; int live, copying; } Range;
typedef struct Copy { char *target; const char *source; size_t size; Range *memory, *pinned; struct Event *event;
                      struct Copy *next; } Copy;
typedef struct { int device, live; pthread_t thread; pthread_cond_t more; Copy *first, *last; int running, ending;
                 } Stream;
typedef struct Event { int live, pending; } Event;

struct {
    int violations;
    char first_violation[200];
    uint64_t allocated, peak, contexts, pinned, copies, bytes_copied, streams, events, pinned_at_once;
} fake;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t progress = PTHREAD_COND_INITIALIZER;
static int initialized;
static Context contexts[GPUS];
static Range memory[BLOCKS], pinned[BLOCKS];
static __thread Context *stack[DEPTH];
static __thread int depth;

static void violation(const char *text) {
    if (!fake.violations++) snprintf(fake.first_violation, sizeof fake.first_violation, "%s", text);
}

static long number(const char *name, long otherwise) {
    const char *value = getenv(name);
    return value ? atol(value) : otherwise;
}

static int refused(const char *name) {
    const char *value = getenv("FAKE_CUDA_REFUSE");
    return value && !strcmp(value, name);
}

static Context *current(void) { return depth ? stack[depth - 1] : NULL; }

static Range *range_of(Range *ranges, const void *start, size_t size) {
    for (int i = 0; i < BLOCKS; i++)
        if (ranges[i].live && (char *)start >= ranges[i].start && (char *)start + size <= ranges[i].start + ranges[i].size)
            return &ranges[i];
    return NULL;
}

static Range *new_range(Range *ranges) {
    for (int i = 0; i < BLOCKS; i++)
        if (!ranges[i].live) return &ranges[i];
    abort();
}

#define BEGIN(name, error)                      \
    if (refused(name)) return (error);          \
    if (!initialized) return NOT_INITIALIZED;   \
    pthread_mutex_lock(&lock);
#define END(code)                               \
    do {                                        \
        int code_ = (code);                     \
        pthread_mutex_unlock(&lock);            \
        return code_;                           \
    } while (0)
#define NEEDS_CONTEXT(name)                     \
    if (!current() || !current()->retained) {   \
        violation(name " without a context");   \
        END(INVALID_CONTEXT);                   \
    }

int cuInit(unsigned flags) {
    if (refused("cuInit")) return NOT_PERMITTED;
    initialized = 1;
    return flags ? INVALID_VALUE : 0;
}

int cuGetErrorString(int code, const char **text) {
    *text = code == OUT_OF_MEMORY ? "out of memory" : "refused by the test";
    return 0;
}

int cuDeviceGet(int *device, int ordinal) {
    BEGIN("cuDeviceGet", INVALID_DEVICE)
    if (ordinal < 0 || ordinal >= number("FAKE_CUDA_GPUS", 1)) END(INVALID_DEVICE);
    *device = ordinal;
    END(0);
}

int cuDevicePrimaryCtxRetain(Context **context, int device) {
    BEGIN("cuDevicePrimaryCtxRetain", OUT_OF_MEMORY)
    if (!contexts[device].retained) usleep(1000 * number("FAKE_CUDA_INIT_MS", 0));
    contexts[device].device = device;
    contexts[device].retained++;
    fake.contexts++;
    *context = &contexts[device];
    END(0);
}

int cuDevicePrimaryCtxRelease_v2(int device) {
    BEGIN("cuDevicePrimaryCtxRelease_v2", INVALID_CONTEXT)
    if (!contexts[device].retained) violation("a context released too often");
    contexts[device].retained--;
    fake.contexts--;
    if (!contexts[device].retained && contexts[device].used) violation("a context released under its memory");
    END(0);
}

int cuCtxPushCurrent_v2(Context *context) {
    BEGIN("cuCtxPushCurrent_v2", INVALID_CONTEXT)
    if (!context->retained) violation("a released context made current");
    stack[depth++] = context;
    END(0);
}

int cuCtxPopCurrent_v2(Context **context) {
    BEGIN("cuCtxPopCurrent_v2", INVALID_CONTEXT)
    if (!depth) END(INVALID_CONTEXT);
    *context = stack[--depth];
    END(0);
}

int cuCtxSynchronize(void) {
    BEGIN("cuCtxSynchronize", INVALID_CONTEXT)
    NEEDS_CONTEXT("cuCtxSynchronize")
    int device = current()->device;
    for (int i = 0; i < BLOCKS; i++)
        while (memory[i].live && memory[i].device == device && memory[i].copying) pthread_cond_wait(&progress, &lock);
    END(0);
}

int cuMemAlloc_v2(uint64_t *address, size_t size) {
    BEGIN("cuMemAlloc_v2", OUT_OF_MEMORY)
    NEEDS_CONTEXT("cuMemAlloc")
    Context *context = current();
    if (!size) END(INVALID_VALUE);
    if (context->used + size > (size_t)number("FAKE_CUDA_BYTES", 1L << 40)) END(OUT_OF_MEMORY);
    Range *range = new_range(memory);
    if (posix_memalign((void **)&range->start, 256, size)) abort();
    memset(range->start, 0xEE, size); /* what the last user left there */
    range->size = size, range->device = context->device, range->live = 1, range->copying = 0;
    context->used += size;
    fake.allocated += size;
    if (fake.allocated > fake.peak) fake.peak = fake.allocated;
    *address = (uint64_t)(uintptr_t)range->start;
    END(0);
}

int cuMemFree_v2(uint64_t address) {
    BEGIN("cuMemFree_v2", INVALID_VALUE)
    NEEDS_CONTEXT("cuMemFree")
    Range *range = range_of(memory, (void *)(uintptr_t)address, 1);
    if (!range || range->start != (char *)(uintptr_t)address) {
        violation("memory freed that is not allocated");
        END(INVALID_VALUE);
    }
    if (range->copying) violation("memory freed under a copy");
    contexts[range->device].used -= range->size;
    fake.allocated -= range->size;
    range->live = 0;
    memset(range->start, 0xDD, range->size); /* a tensor that outlives it shows this */
    free(range->start);
    END(0);
}

int cuMemHostRegister_v2(void *start, size_t size, unsigned flags) {
    if (flags != 1) violation("memory pinned for one GPU alone");
    BEGIN("cuMemHostRegister_v2", OUT_OF_MEMORY)
    NEEDS_CONTEXT("cuMemHostRegister")
    for (int i = 0; i < BLOCKS; i++)
        if (pinned[i].live && (char *)start < pinned[i].start + pinned[i].size && pinned[i].start < (char *)start + size)
            END(ALREADY_REGISTERED);
    Range *range = new_range(pinned);
    range->start = start, range->size = size, range->live = 1, range->copying = 0;
    fake.pinned++;
    if (size > fake.pinned_at_once) fake.pinned_at_once = size;
    END(0);
}

int cuMemHostUnregister(void *start) {
    BEGIN("cuMemHostUnregister", NOT_REGISTERED)
    NEEDS_CONTEXT("cuMemHostUnregister")
    Range *range = range_of(pinned, start, 1);
    if (!range || range->start != start) {
        violation("memory unpinned that is not pinned");
        END(NOT_REGISTERED);
    }
    if (range->copying) violation("memory unpinned under a copy");
    range->live = 0;
    fake.pinned--;
    END(0);
}

static void *copy_all(void *argument) {
    Stream *stream = argument;
    pthread_mutex_lock(&lock);
    while (1) {
        while (!stream->first && !stream->ending) pthread_cond_wait(&stream->more, &lock);
        Copy *copy = stream->first;
        if (!copy) break;
        stream->first = copy->next;
        if (!stream->first) stream->last = NULL;
        stream->running = 1;
        pthread_mutex_unlock(&lock);
        if (copy->size) {
            usleep(number("FAKE_CUDA_DELAY_US", 0));
            memcpy(copy->target, copy->source, copy->size);
        }
        pthread_mutex_lock(&lock);
        if (copy->memory) copy->memory->copying--;
        if (copy->pinned) copy->pinned->copying--;
        if (copy->event) copy->event->pending--;
        if (copy->size) fake.copies++, fake.bytes_copied += copy->size;
        free(copy);
        stream->running = 0;
        pthread_cond_broadcast(&progress);
    }
    pthread_mutex_unlock(&lock);
    return NULL;
}

static void append(Stream *stream, Copy *copy) {
    if (stream->last) stream->last->next = copy;
    else stream->first = copy;
    stream->last = copy;
    pthread_cond_signal(&stream->more);
}

int cuMemcpyHtoDAsync_v2(uint64_t address, const void *source, size_t size, Stream *stream) {
    BEGIN("cuMemcpyHtoDAsync_v2", INVALID_VALUE)
    NEEDS_CONTEXT("cuMemcpyHtoDAsync")
    Range *target = range_of(memory, (void *)(uintptr_t)address, size);
    Range *from = range_of(pinned, source, size);
    if (!stream->live || stream->device != current()->device) {
        violation("a copy on a stream of another device, or of none");
        END(INVALID_HANDLE);
    }
    if (!target || target->device != current()->device) {
        violation("a copy to memory that is not allocated on the device");
        END(INVALID_VALUE);
    }
    if (!from && !refused("cuMemHostRegister_v2")) violation("a copy out of memory that is not pinned as a whole");
    Copy *copy = calloc(1, sizeof *copy);
    *copy = (Copy){(char *)(uintptr_t)address, source, size, target, from, NULL, NULL};
    target->copying++;
    if (from) from->copying++;
    append(stream, copy);
    END(0);
}

int cuStreamCreate(Stream **stream, unsigned flags) {
    BEGIN("cuStreamCreate", INVALID_VALUE)
    NEEDS_CONTEXT("cuStreamCreate")
    if (flags != 1) violation("a stream that waits for the default stream");
    *stream = calloc(1, sizeof **stream);
    (*stream)->device = current()->device, (*stream)->live = 1;
    pthread_cond_init(&(*stream)->more, NULL);
    pthread_create(&(*stream)->thread, NULL, copy_all, *stream);
    fake.streams++;
    END(0);
}

int cuStreamSynchronize(Stream *stream) {
    BEGIN("cuStreamSynchronize", INVALID_HANDLE)
    NEEDS_CONTEXT("cuStreamSynchronize")
    while (stream->first || stream->running) pthread_cond_wait(&progress, &lock);
    END(0);
}

int cuStreamDestroy_v2(Stream *stream) {
    BEGIN("cuStreamDestroy_v2", INVALID_HANDLE)
    NEEDS_CONTEXT("cuStreamDestroy")
    if (!stream->live) violation("a stream destroyed twice");
    stream->live = 0, stream->ending = 1;
    fake.streams--;
    pthread_cond_signal(&stream->more);
    END(0); /* the memory stays, so that a later use is seen */
}

int cuEventCreate(Event **event, unsigned flags) {
    BEGIN("cuEventCreate", INVALID_VALUE)
    NEEDS_CONTEXT("cuEventCreate")
    if (!(flags & 1)) violation("an event whose waiter does not sleep");
    *event = calloc(1, sizeof **event);
    (*event)->live = 1;
    fake.events++;
    END(0);
}

int cuEventRecord(Event *event, Stream *stream) {
    BEGIN("cuEventRecord", INVALID_HANDLE)
    NEEDS_CONTEXT("cuEventRecord")
    if (!event->live || !stream->live) violation("an event or a stream used after its end");
    if (event->pending) violation("an event recorded again before it came");
    Copy *mark = calloc(1, sizeof *mark);
    mark->event = event;
    event->pending++;
    append(stream, mark);
    END(0);
}

int cuEventQuery(Event *event) {
    BEGIN("cuEventQuery", INVALID_HANDLE)
    NEEDS_CONTEXT("cuEventQuery")
    if (!event->live) violation("an event asked after its end");
    END(event->pending ? NOT_READY : 0);
}

int cuEventSynchronize(Event *event) {
    BEGIN("cuEventSynchronize", INVALID_HANDLE)
    NEEDS_CONTEXT("cuEventSynchronize")
    if (!event->live) violation("an event waited for after its end");
    while (event->pending) pthread_cond_wait(&progress, &lock);
    END(0);
}

int cuEventDestroy_v2(Event *event) {
    BEGIN("cuEventDestroy_v2", INVALID_HANDLE)
    NEEDS_CONTEXT("cuEventDestroy")
    if (!event->live) violation("an event destroyed twice");
    if (event->pending) violation("an event destroyed before it came");
    event->live = 0;
    fake.events--;
    END(0);
}
