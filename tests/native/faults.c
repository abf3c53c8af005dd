/* Preloaded into a process by test_faults.py: the system calls that expert reads depend on, made to fail on demand. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* What d2moe's reads meet: 'e' EIO once, 's' short reads of any length, 'd' EINVAL as long as the file is open with O_DIRECT,
 * 'l' a late answer (20 ms). */
static _Atomic int kind, hits;
void fault(int k) {
  hits = 0;
  kind = k;
}
int fault_hits(void) { return hits; }

static int fail(int error) {
  errno = error;
  return -1;
}

ssize_t preadv(int fd, const struct iovec *iov, int count, off_t offset) {
  static ssize_t (*real)(int, const struct iovec *, int, off_t);
  if (!real) real = dlsym(RTLD_NEXT, "preadv");
  switch (kind) {
    case 'e':
      if (hits++ == 0) return fail(EIO);
      break;
    case 's': {
      struct iovec one = iov[0];
      const size_t most = 1 + (size_t)(hits++ * 977 % 5000);
      if (one.iov_len > most) one.iov_len = most;
      /* Direct I/O cannot give such a length: through the page cache, as a network filesystem would. */
      const int flags = fcntl(fd, F_GETFL);
      if (flags & O_DIRECT) {
        if (((long)one.iov_base | (long)offset) % 512) return fail(EINVAL); /* what the kernel says to an unaligned rest */
        char path[64];
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        const int plain = open(path, O_RDONLY);
        const ssize_t n = real(plain, &one, 1, offset);
        close(plain);
        return n;
      }
      return real(fd, &one, 1, offset);
    }
    case 'd':
      if (fcntl(fd, F_GETFL) & O_DIRECT) {
        ++hits;
        return fail(EINVAL);
      }
      break;
    case 'l': {
      ++hits;
      const struct timespec t = {0, 20 * 1000 * 1000};
      nanosleep(&t, NULL);
    }
  }
  return real(fd, iov, count, offset);
}
ssize_t preadv64(int fd, const struct iovec *iov, int count, off_t offset) { return preadv(fd, iov, count, offset); }

/* FAULT_OPEN: open with O_DIRECT is refused, as on tmpfs. */
int open(const char *path, int flags, ...) {
  static int (*real)(const char *, int, ...);
  if (!real) real = dlsym(RTLD_NEXT, "open");
  va_list rest;
  va_start(rest, flags);
  const int mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, int) : 0;
  va_end(rest);
  if ((flags & O_DIRECT) && getenv("FAULT_OPEN")) return fail(EINVAL);
  return real(path, flags, mode);
}

/* Only n threads can be started from now on; -1: as many as ever. */
static _Atomic int threads = -1;
void fault_threads(int n) { threads = n; }

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*body)(void *), void *argument) {
  static int (*real)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
  if (!real) real = dlsym(RTLD_NEXT, "pthread_create");
  if (threads == 0) return EAGAIN;
  if (threads > 0) --threads;
  return real(thread, attributes, body, argument);
}
