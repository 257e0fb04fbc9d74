// An NVRTC that compiles nothing: its machine code is the first bytes of an ELF. It counts programs that were not destroyed.

#include <stddef.h>
#include <string.h>

static int programs;

int fake_programs(void) { return programs; }

int nvrtcVersion(int *major, int *minor) { *major = 12, *minor = 0; return 0; }
int nvrtcCreateProgram(void **program, const char *source, const char *name, int headers, const char *const *texts, const char *const *names) {
    __atomic_fetch_add(&programs, 1, __ATOMIC_RELAXED);
    *program = &programs;
    return source && strcmp(name, "waterfill.cu") == 0 ? 0 : 3;
}
// As of an architecture that it does not know.
static int bad;
int nvrtcCompileProgram(void *program, int count, const char *const *options) {
    bad = count != 2 || strcmp(options[0], "--gpu-architecture=sm_10") == 0;
    return bad ? 5 : 0;
}
int nvrtcGetProgramLogSize(void *program, size_t *bytes) { *bytes = 4; return 0; }
int nvrtcGetProgramLog(void *program, char *log) { memcpy(log, "bad", 4); return 0; }
int nvrtcGetCUBINSize(void *program, size_t *bytes) { *bytes = 4; return 0; }
int nvrtcGetCUBIN(void *program, char *code) { memcpy(code, "\x7f" "ELF", 4); return 0; }
int nvrtcDestroyProgram(void **program) {
    if (*program != &programs) return 4;
    __atomic_fetch_sub(&programs, 1, __ATOMIC_RELAXED);
    *program = NULL;
    return 0;
}
