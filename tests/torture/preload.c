/* A library that is loaded before libc. It counts the calls by which a process changes files below one folder; at one
 * of them it kills the process or lets the call fail. It is inactive until torture_arm is called, and supports one thread.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

struct report {
    long count;     /* calls so far */
    char call[16];  /* the call at which the fault occurred; empty before */
    char path[496];
};

static struct {
    const char *folder; /* absolute; NULL while inactive */
    long at;            /* number of the call with the fault, from 1; 0: none */
    int error;          /* error number of the call; 0: the process is killed */
    int full;           /* every later call that needs space fails too, as on a full disk */
    int torn;           /* half of a write is done before the fault */
    struct report *report;
} armed;

void torture_arm(const char *folder, long at, int error, int full, int torn, struct report *report) {
    static char kept[4096];
    snprintf(kept, sizeof kept, "%s/", folder);
    armed.at = at, armed.error = error, armed.full = full, armed.torn = torn, armed.report = report;
    armed.folder = kept;
}

static void name_of(int fd, char *out, size_t size) {
    char link[64];
    snprintf(link, sizeof link, fd == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, out, size - 1);
    out[n < 0 ? 0 : n] = 0;
}

/* Counts one call; returns 1 if the call has to fail. `path` is NULL for a call on the descriptor `fd`. */
static int must_fail(const char *call, int fd, const char *path, int needs_room) {
    char full[8192];
    if (!armed.folder) return 0;
    if (path && *path == '/') {
        snprintf(full, sizeof full, "%s", path);
    } else {
        name_of(fd, full, 4096);
        if (path) {
            size_t n = strlen(full);
            snprintf(full + n, sizeof full - n, "/%s", path);
        }
    }
    if (strncmp(full, armed.folder, strlen(armed.folder))) return 0;
    long count = ++armed.report->count;
    if (!armed.at || count < armed.at || (count > armed.at && !(armed.full && needs_room))) return 0;
    if (count == armed.at) {
        snprintf(armed.report->call, sizeof armed.report->call, "%s", call);
        snprintf(armed.report->path, sizeof armed.report->path, "%s", full + strlen(armed.folder));
        if (!armed.error) kill(getpid(), SIGKILL);
    }
    errno = armed.error;
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAIL(...) if (must_fail(__VA_ARGS__)) return -1
#define WRITES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT))

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
        if (WRITES(flags)) FAIL("open", AT_FDCWD, path, 1); \
        return REAL(name)(path, flags, mode); \
    }
OPEN(open) OPEN(open64)

#define OPENAT(name) \
    int name(int fd, const char *path, int flags, ...) { \
        va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
        if (WRITES(flags)) FAIL("open", fd, path, 1); \
        return REAL(name)(fd, path, flags, mode); \
    }
OPENAT(openat) OPENAT(openat64)

#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) { \
        if (strpbrk(mode, "wa+") && must_fail("open", AT_FDCWD, path, 1)) return NULL; \
        return REAL(name)(path, mode); \
    }
FOPEN(fopen) FOPEN(fopen64)

ssize_t write(int fd, const void *data, size_t size) {
    if (armed.folder && armed.torn && size > 1 && armed.at == armed.report->count + 1) {
        char name[4096];
        name_of(fd, name, sizeof name);
        if (!strncmp(name, armed.folder, strlen(armed.folder))) {
            ssize_t half = REAL(write)(fd, data, size / 2);
            if (!armed.error) must_fail("write", fd, NULL, 1);
            armed.report->count++, armed.at++; /* a short write now, the error at the next call */
            return half;
        }
    }
    FAIL("write", fd, NULL, 1);
    return REAL(write)(fd, data, size);
}

#define CALL(type, name, call, fd, path, room, parameters, arguments) \
    type name parameters { FAIL(call, fd, path, room); return REAL(name) arguments; }
CALL(ssize_t, writev, "write", fd, NULL, 1, (int fd, const struct iovec *data, int n), (fd, data, n))
CALL(ssize_t, pwrite, "write", fd, NULL, 1, (int fd, const void *data, size_t n, off_t at), (fd, data, n, at))
CALL(ssize_t, pwrite64, "write", fd, NULL, 1, (int fd, const void *data, size_t n, off64_t at), (fd, data, n, at))
CALL(int, ftruncate, "truncate", fd, NULL, 1, (int fd, off_t n), (fd, n))
CALL(int, ftruncate64, "truncate", fd, NULL, 1, (int fd, off64_t n), (fd, n))
CALL(int, fsync, "fsync", fd, NULL, 1, (int fd), (fd))
CALL(int, fdatasync, "fsync", fd, NULL, 1, (int fd), (fd))
CALL(int, rename, "rename", AT_FDCWD, to, 0, (const char *from, const char *to), (from, to))
CALL(int, renameat, "rename", fd, to, 0, (int from_fd, const char *from, int fd, const char *to), (from_fd, from, fd, to))
CALL(int, link, "link", AT_FDCWD, to, 1, (const char *from, const char *to), (from, to))
CALL(int, unlink, "unlink", AT_FDCWD, path, 0, (const char *path), (path))
CALL(int, unlinkat, "unlink", fd, path, 0, (int fd, const char *path, int flags), (fd, path, flags))
CALL(int, rmdir, "unlink", AT_FDCWD, path, 0, (const char *path), (path))
CALL(int, mkdir, "mkdir", AT_FDCWD, path, 1, (const char *path, mode_t mode), (path, mode))
CALL(int, mkdirat, "mkdir", fd, path, 1, (int fd, const char *path, mode_t mode), (fd, path, mode))
