/* SPDX-License-Identifier: Apache-2.0 */
/* The switch for every other machine: makecontext() and swapcontext() of libc. Correct and slow,
 * because swapcontext() asks the kernel to save the signal mask each time.
 *
 * The ucontext_t of a parked context lies in the frame of co_switch() on its own stack, so that a
 * context is one pointer here too. */
#include "co/switch.h"
#include <assert.h>
#include <stdint.h>
#include <stdlib.h>
#include <ucontext.h>

const char co_switch_name[] = "ucontext";

void co_switch(void **save, void *to)
{
    ucontext_t here;
    *save = &here;
    int r = swapcontext(&here, to);
    assert(r == 0); /* fails only if the stack of makecontext() was too small */
}

/* makecontext() passes ints only, so what begin() needs lies on the new stack, and begin() gets its
 * address in two halves. */
struct start {
    ucontext_t uc; /* first: the context is a pointer to it */
    void *(*run)(void *arg);
    void *arg;
};

static void begin(unsigned high, unsigned low)
{
    struct start *start = (struct start *)(uintptr_t)((uint64_t)high << 32 | low);
    setcontext(start->run(start->arg));
    abort(); /* setcontext() does not return if its argument is valid */
}

void *co_switch_prepare(void *low, void *top, void *(*run)(void *arg), void *arg)
{
    uintptr_t at = ((uintptr_t)top - sizeof(struct start)) & ~(uintptr_t)63;
    struct start *start = (struct start *)at;
    int r = getcontext(&start->uc);
    assert(r == 0);
    start->uc.uc_stack.ss_sp = low;
    start->uc.uc_stack.ss_size = at - (uintptr_t)low;
    start->uc.uc_link = NULL; /* begin() never returns */
    start->run = run;
    start->arg = arg;
    makecontext(&start->uc, (void (*)(void))begin, 2, (unsigned)((uint64_t)at >> 32), (unsigned)at);
    return &start->uc;
}
