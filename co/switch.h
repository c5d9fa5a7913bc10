/* SPDX-License-Identifier: Apache-2.0 */
/* Private to co/: what the machine-dependent part does for co.c, and what co.c does for sync.c.
 *
 * A context that does not run is one pointer into its stack; its registers lie there. Exactly one
 * of switch_x86_64.S, switch_aarch64.S and switch_ucontext.c is linked. */
#pragma once
#include "co/co.h"

/* Which tools must be told. gcc and clang say it differently. */
#if defined(__SANITIZE_ADDRESS__)
#define CO_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CO_ASAN 1
#endif
#endif
#if defined(__SANITIZE_THREAD__)
#define CO_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define CO_TSAN 1
#endif
#endif
#ifdef CO_ASAN
#define CO_NO_ASAN __attribute__((no_sanitize_address))
#else
#define CO_NO_ASAN
#endif

/* Store the running context in *save and continue `to`. Returns when somebody continues *save.
 * Callee-saved registers only: the compiler has saved the others. The floating-point control words
 * are left alone: nobody here changes them, and saving them costs more than all the rest. */
void co_switch(void **save, void *to);

/* A context on the stack [low, top) that calls run(arg) when it is continued for the first time.
 * When run() returns, the context that it returns is continued and this one is no more: a new one
 * may be prepared in its place. `top` is 16-byte aligned. */
void *co_switch_prepare(void *low, void *top, void *(*run)(void *arg), void *arg);

extern const char co_switch_name[];

/* One word of a parked coroutine for the lock that it waits for: does it want to write? */
void co_set_wants_write(struct co *c, bool wants);
bool co_wants_write(struct co *c);
