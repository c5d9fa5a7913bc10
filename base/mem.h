/* SPDX-License-Identifier: Apache-2.0 */
/* Memory. Every allocation of the daemon goes through here, so that a test can make the n-th one
 * fail. From a request on, an allocation that fails is -ENOMEM; at start-up it ends the process. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

/* NULL when memory is gone. Zeroed unless named otherwise. Any thread. */
void *mem_zalloc(size_t size) __attribute__((malloc, warn_unused_result));
void *mem_alloc(size_t size) __attribute__((malloc, warn_unused_result)); /* not zeroed */
void *mem_calloc(size_t n, size_t size) __attribute__((malloc, warn_unused_result));
/* Grows or shrinks; on failure NULL, and `p` stays. */
void *mem_realloc(void *p, size_t n, size_t size) __attribute__((warn_unused_result));
/* `align` is a power of two. Not zeroed. */
void *mem_aligned(size_t align, size_t size) __attribute__((malloc, warn_unused_result));
char *mem_strdup(const char *s) __attribute__((malloc, warn_unused_result));
char *mem_printf(const char *fmt, ...) __attribute__((format(printf, 1, 2), warn_unused_result));
void mem_free(void *p); /* NULL is fine; for everything above */

/* Start-up and tests only: ends the process when memory is gone. */
#define mem_new(type) ((type *)mem_zalloc_or_die(sizeof(type)))
void *mem_zalloc_or_die(size_t size);

/* A block of MEM_HUGE bytes that begins at a multiple of that, zeroed, in one page of the
 * processor's where there are such pages. For much memory that is used at once. */
#define MEM_HUGE ((size_t)2 << 20)
void *mem_huge_alloc(void) __attribute__((warn_unused_result));
void mem_huge_free(void *p);
static inline void *mem_huge_of(void *p) /* the block that p points into */
{
    return (void *)((uintptr_t)p & ~(uintptr_t)(MEM_HUGE - 1));
}

/* For who hands out parts of a block: nobody may touch them, or they may again. Only the address
 * sanitizer knows. */
void mem_poison(void *p, size_t size);
void mem_unpoison(void *p, size_t size);

/* Tests: the n-th allocation from now on (1 = the next) of this thread fails, once; 0 = none.
 * Returns how many allocations were made since the last call. */
unsigned long mem_fail_after(unsigned long n);
/* For code that gets memory elsewhere (mmap): counts as one allocation; true = it shall fail. */
bool mem_fails(void);

/* Release at the end of the scope: `mem_autofree char *s = ...`. */
static inline void mem_free_at(void *pp)
{
    mem_free(*(void **)pp);
}
#define mem_autofree __attribute__((cleanup(mem_free_at)))

/* An arena: what lives for one request is allocated here and freed at once. One thread at a time.
 */
struct arena_block;
struct arena {
    struct arena_block *blocks;
    size_t used, size; /* of the newest block */
};
/* A zeroed `struct arena` is empty and valid. NULL when memory is gone; zeroed; 16-byte aligned. */
void *arena_alloc(struct arena *a, size_t size) __attribute__((warn_unused_result));
char *arena_strndup(struct arena *a, const char *s, size_t len) __attribute__((warn_unused_result));
void arena_free(struct arena *a); /* empty again */
