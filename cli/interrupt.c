/* SPDX-License-Identifier: Apache-2.0 */
#include "cli/interrupt.h"
#include <signal.h>

static volatile sig_atomic_t was_interrupted;

static void note_interrupt(int signo)
{
    was_interrupted = 1;
}

void interrupts_catch(void)
{
    struct sigaction sa = {.sa_handler = note_interrupt, .sa_flags = (int)SA_RESETHAND};
    sigemptyset(&sa.sa_mask);
    sigaction(SIGINT, &sa, NULL);
    sigaction(SIGTERM, &sa, NULL);
    sigaction(SIGHUP, &sa, NULL);
}

bool interrupted(void)
{
    return was_interrupted != 0;
}
