// A CUDA driver that runs nothing: it writes down how it is called, and refuses what it is told to refuse.
// It has only the functions that are known to be called; cudarc panics at any other.

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

static char calls[1 << 16];
static char refused[64];
static int refusal;
static int architecture = 90;
// This thread's contexts, the current one last.
static __thread uintptr_t contexts[8];
static __thread int depth;
// This thread's capture mode: global, as a thread begins.
static __thread int mode;

const char *fake_calls(void) { return calls; }
void fake_forget(void) { calls[0] = 0; }
void fake_refuse(const char *name, int result) {
    snprintf(refused, sizeof refused, "%s", name);
    refusal = result;
}
void fake_architecture(int value) { architecture = value; }
int fake_contexts(void) { return depth; }
int fake_mode(void) { return mode; }

static int called(const char *name, const char *format, ...) {
    size_t length = strlen(calls);
    length += snprintf(calls + length, sizeof calls - length, "%s", name);
    va_list arguments;
    va_start(arguments, format);
    length += vsnprintf(calls + length, sizeof calls - length, format, arguments);
    va_end(arguments);
    snprintf(calls + length, sizeof calls - length, "\n");
    return strcmp(name, refused) == 0 ? refusal : 0;
}

// What the driver writes is written only if it does not refuse.
#define CALLED(...) do { int result = called(__func__, __VA_ARGS__); if (result) return result; } while (0)

int cuInit(unsigned flags) { CALLED(" %u", flags); return 0; }
int cuDeviceGet(int *device, int ordinal) { CALLED(" %d", ordinal); *device = ordinal; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    CALLED(" %d of %d", attribute, device);
    // Major, minor, shared bytes of a block.
    *value = attribute == 75 ? architecture / 10 : attribute == 76 ? architecture % 10 : attribute == 97 ? 232448 : -1;
    return 0;
}
int cuDevicePrimaryCtxRetain(uintptr_t *context, int device) { CALLED(" %d", device); *context = 0xC0 + device; return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { CALLED(" %d", device); return 0; }
int cuCtxGetCurrent(uintptr_t *context) { CALLED(""); *context = depth ? contexts[depth - 1] : 0; return 0; }
int cuCtxPushCurrent_v2(uintptr_t context) { CALLED(" %#lx", (long)context); contexts[depth++] = context; return 0; }
int cuCtxPopCurrent_v2(uintptr_t *context) { CALLED(""); *context = contexts[--depth]; return 0; }
int cuThreadExchangeStreamCaptureMode(int *other) {
    CALLED(" %d for %d", *other, mode);
    int before = mode;
    mode = *other, *other = before;
    return 0;
}
int cuModuleLoadData(uintptr_t *module, const void *image) {
    CALLED(" %.3s", (const char *)image + 1);
    static uintptr_t last = 0x30;
    *module = last++;
    return 0;
}
int cuModuleGetFunction(uintptr_t *function, uintptr_t module, const char *name) {
    CALLED(" %s", name);
    *function = module;
    return 0;
}
int cuFuncSetAttribute(uintptr_t function, int attribute, int value) { CALLED(" %d to %d", attribute, value); return 0; }

typedef struct { int id; char pad[4]; unsigned x, y, z; char rest[52]; } Attribute;
typedef struct { unsigned grid[3], block[3], shared; uintptr_t stream; Attribute *attributes; unsigned count; } Config;

static int launched(const char *name, const Config *config) {
    char cluster[64] = "";
    if (config->count > 0) {
        const Attribute *first = config->attributes;
        snprintf(cluster, sizeof cluster, ", attribute %d: clusters of %ux%ux%u", first->id, first->x, first->y, first->z);
    }
    return called(name, " %ux%ux%u blocks of %ux%ux%u threads, %u bytes, stream %#lx%s", config->grid[0], config->grid[1],
        config->grid[2], config->block[0], config->block[1], config->block[2], config->shared, (long)config->stream, cluster);
}
int cuOccupancyMaxActiveClusters(int *clusters, uintptr_t function, const Config *config) {
    *clusters = 1;
    return launched(__func__, config);
}
int cuLaunchKernelEx(const Config *config, uintptr_t function, void **parameters, void **extra) {
    return parameters[0] && !extra ? launched(__func__, config) : 1;
}

int cuMemAlloc_v2(uint64_t *address, size_t bytes) { CALLED(" %zu", bytes); *address = 0xA110C; return 0; }
int cuMemsetD8Async(uint64_t address, unsigned char value, size_t bytes, uintptr_t stream) {
    CALLED(" %#lx to %d, %zu bytes, stream %#lx", (long)address, value, bytes, (long)stream);
    return 0;
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t address, size_t bytes, uintptr_t stream) {
    CALLED(" %#lx, %zu bytes, stream %#lx", (long)address, bytes, (long)stream);
    memset(to, 1, bytes);
    return 0;
}
int cuMemHostRegister_v2(void *host, size_t bytes, unsigned flags) { CALLED(" %zu bytes, flags %u", bytes, flags); return 0; }
int cuMemHostUnregister(void *host) { CALLED(""); return 0; }
int cuMemHostGetDevicePointer_v2(uint64_t *address, void *host, unsigned flags) {
    CALLED(" flags %u", flags);
    *address = (uint64_t)host;
    return 0;
}
int cuStreamCreate(uintptr_t *stream, unsigned flags) { CALLED(" flags %u", flags); *stream = 0x57; return 0; }
int cuStreamSynchronize(uintptr_t stream) { CALLED(" %#lx", (long)stream); return 0; }
int cuStreamDestroy_v2(uintptr_t stream) { CALLED(" %#lx", (long)stream); return 0; }
