/* SPDX-License-Identifier: Apache-2.0 */
/* Long work of the tool ends in good order when it is interrupted. */
#pragma once
#include <stdbool.h>

/* From now on SIGINT, SIGTERM and SIGHUP are noted and do not end the process; a second one does.
 */
void interrupts_catch(void);
bool interrupted(void);
