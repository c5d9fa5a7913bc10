/* SPDX-License-Identifier: Apache-2.0 */
/* Memory, with failure injection, and arenas.
 *
 * Each function that gets memory first asks mem_fails(), which counts and lets a test choose the
 * one that fails. Count and choice belong to the thread, so that tests with threads stay exact. */
#include "base/mem.h"
#include "base/log.h"
#include <assert.h>
#include <errno.h>
#include <stdalign.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

static _Thread_local unsigned long n_allocs; /* since the last mem_fail_after() */
static _Thread_local unsigned long fail_in;  /* 0 = no failure is planned */

bool mem_fails(void)
{
    n_allocs++;
    return fail_in && --fail_in == 0;
}

unsigned long mem_fail_after(unsigned long n)
{
    unsigned long count = n_allocs;
    n_allocs = 0;
    fail_in = n;
    return count;
}

/* Malloc would refuse these too, but the sanitizers end the process instead. */
static bool too_big(size_t size)
{
    return size > PTRDIFF_MAX;
}

/* Nothing below asks libc for 0 bytes: NULL must mean failure and nothing else. */
static size_t at_least_one(size_t size)
{
    return size ? size : 1;
}

void *mem_alloc(size_t size)
{
    if (mem_fails() || too_big(size))
        return NULL;
    return malloc(at_least_one(size));
}

void *mem_zalloc(size_t size)
{
    if (mem_fails() || too_big(size))
        return NULL;
    return calloc(1, at_least_one(size));
}

void *mem_calloc(size_t n, size_t size)
{
    size_t total;
    if (__builtin_mul_overflow(n, size, &total))
        return NULL;
    return mem_zalloc(total);
}

void *mem_realloc(void *p, size_t n, size_t size)
{
    size_t total;
    if (__builtin_mul_overflow(n, size, &total) || too_big(total) || mem_fails())
        return NULL;
    return realloc(p, at_least_one(total));
}

void *mem_aligned(size_t align, size_t size)
{
    assert(align && !(align & (align - 1)));
    if (mem_fails() || too_big(size))
        return NULL;
    if (align < sizeof(void *))
        align = sizeof(void *);
    void *p;
    return posix_memalign(&p, align, at_least_one(size)) == 0 ? p : NULL;
}

char *mem_strdup(const char *s)
{
    size_t len = strlen(s);
    char *copy = mem_alloc(len + 1);
    if (copy)
        memcpy(copy, s, len + 1);
    return copy;
}

char *mem_printf(const char *fmt, ...)
{
    va_list ap, again;
    va_start(ap, fmt);
    va_copy(again, ap);
    int n = vsnprintf(NULL, 0, fmt, ap);
    va_end(ap);
    char *s = n < 0 ? NULL : mem_alloc((size_t)n + 1);
    if (s)
        vsnprintf(s, (size_t)n + 1, fmt, again);
    va_end(again);
    return s;
}

void mem_free(void *p)
{
    free(p);
}

/* The kernel places a mapping at a multiple of 4 KiB: twice as much has one of MEM_HUGE in it. */
void *mem_huge_alloc(void)
{
    if (mem_fails())
        return NULL;
    char *map =
        mmap(NULL, 2 * MEM_HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED)
        return NULL;
    char *p = mem_huge_of(map + MEM_HUGE - 1);
    if (p > map)
        munmap(map, (size_t)(p - map));
    munmap(p + MEM_HUGE, (size_t)(map + MEM_HUGE - p));
    madvise(p, MEM_HUGE, MADV_HUGEPAGE); /* if it is refused, then in small pages */
    return p;
}

void mem_huge_free(void *p)
{
    if (p)
        munmap(p, MEM_HUGE);
}

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>

void mem_poison(void *p, size_t size)
{
    __asan_poison_memory_region(p, size);
}

void mem_unpoison(void *p, size_t size)
{
    __asan_unpoison_memory_region(p, size);
}
#else
void mem_poison(void *p, size_t size)
{
}

void mem_unpoison(void *p, size_t size)
{
}
#endif

void *mem_zalloc_or_die(size_t size)
{
    void *p = mem_zalloc(size);
    if (!p) {
        log_error("memory", "cannot allocate %zu bytes", size);
        exit(EXIT_FAILURE);
    }
    return p;
}

/* An arena is a list of blocks; only the newest one has room. Blocks grow, so that a large request
 * costs few allocations and a small one little memory. A large object gets a block of its own,
 * linked behind the newest, so that the room there is not lost. */
struct arena_block {
    struct arena_block *next;
    alignas(16) unsigned char data[];
};

#define ARENA_ALIGN 16
#define ARENA_FIRST 1024          /* bytes in the first block */
#define ARENA_LARGEST (64 * 1024) /* blocks double up to here */
#define ARENA_LARGE_OBJECT (ARENA_LARGEST / 4)

static struct arena_block *block_new(size_t size)
{
    size_t total;
    if (__builtin_add_overflow(size, sizeof(struct arena_block), &total))
        return NULL;
    return mem_zalloc(total);
}

static void *alloc_own_block(struct arena *a, size_t size)
{
    struct arena_block *b = block_new(size);
    if (!b)
        return NULL;
    if (a->blocks) {
        b->next = a->blocks->next;
        a->blocks->next = b;
    } else { /* it is the newest, and full */
        a->blocks = b;
        a->used = a->size = size;
    }
    return b->data;
}

/* A new newest block in which at least four objects of `size` fit. */
static int add_block(struct arena *a, size_t size)
{
    size_t room = a->size < ARENA_FIRST ? ARENA_FIRST : a->size * 2;
    while (room < size * 4)
        room *= 2;
    if (room > ARENA_LARGEST)
        room = ARENA_LARGEST;
    struct arena_block *b = block_new(room);
    if (!b)
        return -ENOMEM;
    b->next = a->blocks;
    a->blocks = b;
    a->used = 0;
    a->size = room;
    return 0;
}

void *arena_alloc(struct arena *a, size_t size)
{
    if (too_big(size))
        return NULL;
    size = (at_least_one(size) + ARENA_ALIGN - 1) & ~(size_t)(ARENA_ALIGN - 1);
    if (size > a->size - a->used) {
        if (size > ARENA_LARGE_OBJECT)
            return alloc_own_block(a, size);
        if (add_block(a, size) < 0)
            return NULL;
    }
    void *p = a->blocks->data + a->used;
    a->used += size;
    return p;
}

char *arena_strndup(struct arena *a, const char *s, size_t len)
{
    len = strnlen(s, len);
    char *copy = arena_alloc(a, len + 1);
    if (copy)
        memcpy(copy, s, len); /* the byte after it is zero already */
    return copy;
}

void arena_free(struct arena *a)
{
    struct arena_block *b = a->blocks;
    while (b) {
        struct arena_block *next = b->next;
        mem_free(b);
        b = next;
    }
    *a = (struct arena){0};
}
