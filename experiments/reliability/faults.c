// System calls that fail when told to: loaded before libc, for experiments/reliability/faults.py.
//
// faults_arm(folder, nth, error, sticky): the nth call from now on (1 is the next) that touches a
// file below `folder` fails with errno `error`; error 0 writes half of what a write should. sticky:
// so does every later call of its kind. Calls are counted and their names kept in either case.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/file.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[4096], names[1 << 20], sticky_name[32];
static size_t used;
static long nth, seen;
static int armed, error_number, sticky;

void faults_arm(const char *where, long number, int error, int stays)
{
    snprintf(folder, sizeof folder, "%s", where);
    used = seen = 0;
    names[0] = sticky_name[0] = 0;
    nth = number, error_number = error, sticky = stays, armed = 1;
}

const char *faults_names(void) { return names; }  // of the calls so far, a space after each

static int below(const char *path)
{
    char here[4096];
    if (!path || path[0] != '/')
        path = getcwd(here, sizeof here);
    size_t length = strlen(folder);  // and not what merely begins alike, as a child's output
    return path && !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

static int open_below(int file)
{
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    return path[0] == '/' && below(path);
}

// Counts a call that matters; is it the one to fail?
static int fails(const char *name, int matters)
{
    if (!armed || !matters)
        return 0;
    seen++;
    size_t length = strlen(name);
    if (used + length + 2 < sizeof names) {
        memcpy(names + used, name, length);
        memcpy(names + used + length, " ", 2);
        used += length + 1;
    }
    int now = seen == nth;
    if (now && sticky)
        snprintf(sticky_name, sizeof sticky_name, "%s", name);
    return now || (sticky_name[0] && !strcmp(sticky_name, name));
}

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) \
        real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define REFUSE return errno = error_number ? error_number : EIO, -1

#define WRITE(name, type, parameters, arguments, halved) \
    type name parameters \
    { \
        REAL(name); \
        if (fails(#name, open_below(file))) { \
            if (error_number || size < 2) \
                REFUSE; \
            size /= 2; \
            return real halved; \
        } \
        return real arguments; \
    }
WRITE(write, ssize_t, (int file, const void *from, size_t size), (file, from, size), (file, from, size))
WRITE(pwrite64, ssize_t, (int file, const void *from, size_t size, off64_t at), (file, from, size, at),
      (file, from, size, at))
WRITE(sendfile64, ssize_t, (int file, int from, off64_t *at, size_t size), (file, from, at, size),
      (file, from, at, size))
WRITE(sendfile, ssize_t, (int file, int from, off_t *at, size_t size), (file, from, at, size),
      (file, from, at, size))

#define ON_FILE(name, type, parameters, arguments) \
    type name parameters \
    { \
        REAL(name); \
        if (fails(#name, open_below(file))) \
            REFUSE; \
        return real arguments; \
    }
ON_FILE(read, ssize_t, (int file, void *to, size_t size), (file, to, size))
ON_FILE(writev, ssize_t, (int file, const struct iovec *parts, int count), (file, parts, count))
ON_FILE(fsync, int, (int file), (file))
ON_FILE(fdatasync, int, (int file), (file))
ON_FILE(ftruncate64, int, (int file, off64_t size), (file, size))
ON_FILE(flock, int, (int file, int how), (file, how))

ON_FILE(lseek, off_t, (int file, off_t at, int from), (file, at, from))
ON_FILE(lseek64, off64_t, (int file, off64_t at, int from), (file, at, from))
ON_FILE(fstat, int, (int file, struct stat *found), (file, found))
ON_FILE(fstat64, int, (int file, struct stat64 *found), (file, found))

#define MAP(name, offset) \
    void *name(void *at, size_t size, int protection, int flags, int file, offset from) \
    { \
        REAL(name); \
        if (armed && file >= 0 && fails(#name, open_below(file))) \
            return errno = error_number ? error_number : EIO, MAP_FAILED; \
        return real(at, size, protection, flags, file, from); \
    }
MAP(mmap, off_t)
MAP(mmap64, off64_t)

int close(int file)  // closed in any case, as Linux has it
{
    REAL(close);
    int now = armed && fails("close", open_below(file));
    int result = real(file);
    if (now)
        REFUSE;
    return result;
}

#define ON_PATH(name, parameters, path, arguments) \
    int name parameters \
    { \
        REAL(name); \
        if (fails(#name, below(path))) \
            REFUSE; \
        return real arguments; \
    }
ON_PATH(rename, (const char *from, const char *to), to, (from, to))
ON_PATH(renameat, (int a, const char *from, int b, const char *to), to, (a, from, b, to))
ON_PATH(unlink, (const char *path), path, (path))
ON_PATH(rmdir, (const char *path), path, (path))
ON_PATH(mkdir, (const char *path, mode_t mode), path, (path, mode))
ON_PATH(link, (const char *from, const char *to), to, (from, to))
ON_PATH(chmod, (const char *path, mode_t mode), path, (path, mode))

ON_PATH(stat, (const char *path, struct stat *found), path, (path, found))
ON_PATH(stat64, (const char *path, struct stat64 *found), path, (path, found))
ON_PATH(lstat, (const char *path, struct stat *found), path, (path, found))
ON_PATH(lstat64, (const char *path, struct stat64 *found), path, (path, found))

DIR *opendir(const char *path)
{
    REAL(opendir);
    if (fails("opendir", below(path)))
        return errno = error_number ? error_number : EIO, NULL;
    return real(path);
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) \
    { \
        REAL(name); \
        va_list more; \
        va_start(more, flags); \
        int mode = va_arg(more, int); \
        va_end(more); \
        if (fails(flags & (O_WRONLY | O_RDWR) ? "open-to-write" : "open", below(path))) \
            REFUSE; \
        return real(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
