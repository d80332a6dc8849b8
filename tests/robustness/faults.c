// A file system that fails, or a process that is killed, at the n-th change below one folder; loaded by LD_PRELOAD.
// Every call that changes files is a step: the kernel's own, whoever makes it, Python or a library.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static char root[4096];
static int stage = -1, number, fault, lasting, seen;

// From now on: at step `at` below `folder` raise `signal_number`, or fail with `error`, once or from then on.
void faults_arm(const char *folder, int at, int signal_number, int error, int for_ever) {
  snprintf(root, sizeof root, "%s", folder);
  stage = at, number = signal_number, fault = error, lasting = for_ever, seen = 0;
}

int faults_seen(void) { return seen; }

// Whether this call must fail; a signal is raised here. `frees` says that the call needs no space on the disk.
static int step(const char *path, int frees) {
  if (!root[0] || !path || strncmp(path, root, strlen(root)) != 0) return 0;
  int now = seen++;
  if (now != stage && !(lasting && now > stage && stage >= 0 && !frees)) return 0;
  if (number) {
    raise(number);
    return 0;
  }
  errno = fault;
  return 1;
}

static const char *path_of(int descriptor, char *buffer, size_t size) {
  char name[64];
  snprintf(name, sizeof name, "/proc/self/fd/%d", descriptor);
  ssize_t length = root[0] ? readlink(name, buffer, size - 1) : -1;
  if (length < 0) return NULL;
  buffer[length] = 0;
  return buffer;
}

static int step_of(int descriptor) {
  char buffer[4096];
  return step(path_of(descriptor, buffer, sizeof buffer), 0);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define CHANGES (O_CREAT | O_WRONLY | O_RDWR | O_TRUNC)
#define MODE(flags)            \
  mode_t mode = 0;             \
  if (flags & O_CREAT) {       \
    va_list list;              \
    va_start(list, flags);     \
    mode = va_arg(list, mode_t); \
    va_end(list);              \
  }

#define OPEN(name)                                               \
  int name(const char *path, int flags, ...) {                   \
    MODE(flags)                                                  \
    if ((flags & CHANGES) && step(path, 0)) return -1;           \
    return REAL(name)(path, flags, mode);                        \
  }
#define OPEN_AT(name)                                            \
  int name(int folder, const char *path, int flags, ...) {       \
    MODE(flags)                                                  \
    if ((flags & CHANGES) && step(path, 0)) return -1;           \
    return REAL(name)(folder, path, flags, mode);                \
  }
OPEN(open)
OPEN(open64)
OPEN_AT(openat)
OPEN_AT(openat64)

int mkdir(const char *path, mode_t mode) { return step(path, 0) ? -1 : REAL(mkdir)(path, mode); }
int rename(const char *from, const char *to) { return step(to, 1) ? -1 : REAL(rename)(from, to); }
int renameat(int a, const char *from, int b, const char *to) {
  return step(to, 1) ? -1 : REAL(renameat)(a, from, b, to);
}
int link(const char *from, const char *to) { return step(to, 0) ? -1 : REAL(link)(from, to); }
int linkat(int a, const char *from, int b, const char *to, int flags) {
  return step(to, 0) ? -1 : REAL(linkat)(a, from, b, to, flags);
}
int unlink(const char *path) { return step(path, 1) ? -1 : REAL(unlink)(path); }
int rmdir(const char *path) { return step(path, 1) ? -1 : REAL(rmdir)(path); }
int unlinkat(int folder, const char *path, int flags) {
  char buffer[4096];
  return step(path[0] == '/' ? path : path_of(folder, buffer, sizeof buffer), 1) ? -1 : REAL(unlinkat)(folder, path, flags);
}
int fsync(int descriptor) { return step_of(descriptor) ? -1 : REAL(fsync)(descriptor); }
int ftruncate64(int descriptor, off64_t size) {
  return step_of(descriptor) ? -1 : REAL(ftruncate64)(descriptor, size);
}
int fdatasync(int descriptor) { return step_of(descriptor) ? -1 : REAL(fdatasync)(descriptor); }

// A write is a step twice: before its first byte, and when half of it is on the disk.
ssize_t write(int descriptor, const void *bytes, size_t count) {
  char buffer[4096];
  const char *path = path_of(descriptor, buffer, sizeof buffer);
  if (!path || strncmp(path, root, strlen(root)) != 0) return REAL(write)(descriptor, bytes, count);
  if (step(path, 0)) return -1;
  ssize_t done = count > 1 ? REAL(write)(descriptor, bytes, count / 2) : 0;
  if (done < 0 || step(path, 0)) return -1;
  ssize_t rest = REAL(write)(descriptor, (const char *)bytes + done, count - done);
  return rest < 0 ? rest : done + rest;
}

#define FROM_FILE(name, offset)                                                  \
  ssize_t name(int to, int from, offset *start, size_t count) {                  \
    return step_of(to) ? -1 : REAL(name)(to, from, start, count);                \
  }
extern ssize_t sendfile(int, int, off_t *, size_t);
extern ssize_t sendfile64(int, int, off64_t *, size_t);
FROM_FILE(sendfile, off_t)
FROM_FILE(sendfile64, off64_t)
ssize_t copy_file_range(int from, off64_t *a, int to, off64_t *b, size_t count, unsigned flags) {
  return step_of(to) ? -1 : REAL(copy_file_range)(from, a, to, b, count, flags);
}
