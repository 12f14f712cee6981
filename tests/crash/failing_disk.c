/* A disk that refuses, below Python: loaded with LD_PRELOAD, it makes system calls on files under a path fail.

   HOLDFAST_TEST_DISK="NUMBER:CALL:ERRNO:PASSES:FAILS:PATH" says what is refused, at any time while the process
   runs; without it nothing is. CALL is one of create, write, fsync, dirfsync, rename, link. PASSES calls (of
   write: bytes) come through before the first one that fails; FAILS of them fail, all if that is -1. A new
   NUMBER begins to count anew. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char counted[4096];
static long passed, failed;

static int refuses(const char *call, const char *path, long amount)
{
    const char *asked = getenv("HOLDFAST_TEST_DISK");
    char name[16];
    int number, at = 0, refuse;
    long serial, passes, fails;
    if (!asked || !*asked || !path) return 0;
    if (sscanf(asked, "%ld:%15[^:]:%d:%ld:%ld:%n", &serial, name, &number, &passes, &fails, &at) != 5) return 0;
    if (strcmp(name, call) || strncmp(path, asked + at, strlen(asked + at))) return 0;
    pthread_mutex_lock(&lock);
    if (strcmp(counted, asked)) {
        snprintf(counted, sizeof counted, "%s", asked);
        passed = failed = 0;
    }
    refuse = passed + amount > passes && (fails < 0 || failed < fails);
    if (refuse) failed++;
    else passed += amount;
    pthread_mutex_unlock(&lock);
    if (refuse) errno = number;
    return refuse;
}

static int refuses_fd(const char *call, int fd, long amount)
{
    char link[64], path[4096];
    ssize_t length;
    if (!getenv("HOLDFAST_TEST_DISK")) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return refuses(call, path, amount);
}

static long bytes(const struct iovec *parts, int count)
{
    long sum = 0;
    for (int i = 0; i < count; i++) sum += (long)parts[i].iov_len;
    return sum;
}

static const char *sync_call(int fd)
{
    struct stat status;
    return fstat(fd, &status) == 0 && S_ISDIR(status.st_mode) ? "dirfsync" : "fsync";
}

#define OPEN(name)                                                                   \
    int name(const char *path, int flags, ...)                                       \
    {                                                                                \
        mode_t mode = 0;                                                             \
        va_list rest;                                                                \
        if (flags & (O_CREAT | __O_TMPFILE)) {                                       \
            va_start(rest, flags);                                                   \
            mode = va_arg(rest, mode_t);                                             \
            va_end(rest);                                                            \
        }                                                                            \
        if (flags & O_CREAT && refuses("create", path, 1)) return -1;                \
        return ((int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #name))(path, flags, mode); \
    }

#define OPENAT(name)                                                                 \
    int name(int at, const char *path, int flags, ...)                               \
    {                                                                                \
        mode_t mode = 0;                                                             \
        va_list rest;                                                                \
        if (flags & (O_CREAT | __O_TMPFILE)) {                                       \
            va_start(rest, flags);                                                   \
            mode = va_arg(rest, mode_t);                                             \
            va_end(rest);                                                            \
        }                                                                            \
        if (flags & O_CREAT && refuses("create", path, 1)) return -1;                \
        return ((int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, #name))(at, path, flags, mode); \
    }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int fd, const void *data, size_t size)
{
    return refuses_fd("write", fd, (long)size) ? -1 : REAL(write)(fd, data, size);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at)
{
    return refuses_fd("write", fd, (long)size) ? -1 : REAL(pwrite)(fd, data, size, at);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at)
{
    return refuses_fd("write", fd, (long)size) ? -1 : REAL(pwrite64)(fd, data, size, at);
}

ssize_t writev(int fd, const struct iovec *parts, int count)
{
    return refuses_fd("write", fd, bytes(parts, count)) ? -1 : REAL(writev)(fd, parts, count);
}

ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t at)
{
    return refuses_fd("write", fd, bytes(parts, count)) ? -1 : REAL(pwritev)(fd, parts, count, at);
}

ssize_t pwritev64(int fd, const struct iovec *parts, int count, off64_t at)
{
    return refuses_fd("write", fd, bytes(parts, count)) ? -1 : REAL(pwritev64)(fd, parts, count, at);
}

ssize_t pwritev2(int fd, const struct iovec *parts, int count, off_t at, int flags)
{
    return refuses_fd("write", fd, bytes(parts, count)) ? -1 : REAL(pwritev2)(fd, parts, count, at, flags);
}

ssize_t pwritev64v2(int fd, const struct iovec *parts, int count, off64_t at, int flags)
{
    return refuses_fd("write", fd, bytes(parts, count)) ? -1 : REAL(pwritev64v2)(fd, parts, count, at, flags);
}

int fsync(int fd)
{
    return refuses_fd(sync_call(fd), fd, 1) ? -1 : REAL(fsync)(fd);
}

int fdatasync(int fd)
{
    return refuses_fd(sync_call(fd), fd, 1) ? -1 : REAL(fdatasync)(fd);
}

int rename(const char *from, const char *to)
{
    return refuses("rename", to, 1) ? -1 : REAL(rename)(from, to);
}

int renameat(int from_at, const char *from, int to_at, const char *to)
{
    return refuses("rename", to, 1) ? -1 : REAL(renameat)(from_at, from, to_at, to);
}

int renameat2(int from_at, const char *from, int to_at, const char *to, unsigned int flags)
{
    return refuses("rename", to, 1) ? -1 : REAL(renameat2)(from_at, from, to_at, to, flags);
}

int link(const char *from, const char *to)
{
    return refuses("link", to, 1) ? -1 : REAL(link)(from, to);
}

int linkat(int from_at, const char *from, int to_at, const char *to, int flags)
{
    return refuses("link", to, 1) ? -1 : REAL(linkat)(from_at, from, to_at, to, flags);
}
