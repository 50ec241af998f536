// For LD_PRELOAD: the calls that change or read files of one folder are counted, and one of them fails or ends the process.
// A program that cannot call faults_arm is armed by FAULTS_FOLDER, FAULTS_KIND and FAULTS_NUMBER; it leaves the number of
// its calls in the file FAULTS_CALLS.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

enum fault { COUNT, KILL_BEFORE, KILL_AFTER, KILL_IN_THE_MIDDLE, FAIL, SHORT };

static char       folder[PATH_MAX];
static enum fault fault;
static int        error_number;
static long       fails_at, calls;

// From now on: the call with this number (from 0) meets the fault. error: errno of FAIL.
void faults_arm(const char * path, int kind, long number, int error) {
    snprintf(folder, sizeof(folder), "%s/", path);
    fault        = (enum fault) kind;
    fails_at     = number;
    error_number = error;
    calls        = 0;
}

__attribute__((constructor)) static void arm_by_environment(void) {
    const char * path = getenv("FAULTS_FOLDER"), * kind = getenv("FAULTS_KIND"), * number = getenv("FAULTS_NUMBER");
    if (path && kind && number) {
        faults_arm(path, atoi(kind), atol(number), EIO);
    }
}

__attribute__((destructor)) static void leave_calls(void) {
    const char * path = getenv("FAULTS_CALLS");
    FILE * file = path ? fopen(path, "w") : NULL;
    if (file) {
        fprintf(file, "%ld\n", calls);
        fclose(file);
    }
}

long faults_calls(void) {
    return calls;
}

static int is_watched(const char * path) {
    return folder[0] != '\0' && strncmp(path, folder, strlen(folder)) == 0;
}

static int is_watched_file(int file) {
    char link[64], path[PATH_MAX];
    if (folder[0] == '\0') {
        return 0;
    }
    snprintf(link, sizeof(link), "/proc/self/fd/%d", file);
    const ssize_t length = readlink(link, path, sizeof(path) - 1);
    if (length < 0) {
        return 0;
    }
    path[length] = '\0';
    return is_watched(path);
}

// Whether this call is the one.
static int is_chosen(int watched) {
    return watched && calls++ == fails_at && fault != COUNT;
}

static void die(void) {
    kill(getpid(), SIGKILL);
}

#define REAL(name) ((__typeof__(&name)) dlsym(RTLD_NEXT, #name))

// A call that transfers nothing: it happens wholly or not at all.
#define AROUND(watched, call)                \
    do {                                     \
        const int chosen = is_chosen(watched); \
        if (chosen && fault == FAIL) {       \
            errno = error_number;            \
            return -1;                       \
        }                                    \
        if (chosen && fault == KILL_BEFORE) {\
            die();                           \
        }                                    \
        const int result = call;             \
        if (chosen && fault != SHORT) {      \
            die();                           \
        }                                    \
        return result;                       \
    } while (0)

// A call that may transfer less than it was asked for.
#define AROUND_TRANSFER(file, size, call)    \
    do {                                     \
        const int chosen = is_chosen(is_watched_file(file)); \
        if (chosen && fault == FAIL) {       \
            errno = error_number;            \
            return -1;                       \
        }                                    \
        if (chosen && fault == KILL_BEFORE) {\
            die();                           \
        }                                    \
        if (chosen && fault != KILL_AFTER && (size) > 1) { \
            (size) /= 2;                     \
        }                                    \
        const ssize_t result = call;         \
        if (chosen && fault != SHORT) {      \
            die();                           \
        }                                    \
        return result;                       \
    } while (0)

ssize_t write(int file, const void * data, size_t size) {
    AROUND_TRANSFER(file, size, REAL(write)(file, data, size));
}

ssize_t read(int file, void * data, size_t size) {
    AROUND_TRANSFER(file, size, REAL(read)(file, data, size));
}

ssize_t pread64(int file, void * data, size_t size, off64_t offset) {
    AROUND_TRANSFER(file, size, REAL(pread64)(file, data, size, offset));
}

int fsync(int file) {
    AROUND(is_watched_file(file), REAL(fsync)(file));
}

int fdatasync(int file) {
    AROUND(is_watched_file(file), REAL(fdatasync)(file));
}

int ftruncate64(int file, off64_t size) {
    AROUND(is_watched_file(file), REAL(ftruncate64)(file, size));
}

int rename(const char * from, const char * to) {
    AROUND(is_watched(from) || is_watched(to), REAL(rename)(from, to));
}

int unlink(const char * path) {
    AROUND(is_watched(path), REAL(unlink)(path));
}

int open64(const char * path, int flags, ...) {
    mode_t mode = 0;
    if (flags & (O_CREAT | O_TMPFILE)) {
        __builtin_va_list rest;
        __builtin_va_start(rest, flags);
        mode = __builtin_va_arg(rest, mode_t);
        __builtin_va_end(rest);
    }
    AROUND(is_watched(path), REAL(open64)(path, flags, mode));
}
