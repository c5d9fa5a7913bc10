/* SPDX-License-Identifier: Apache-2.0 */
/* What clients are told. QMP clients pick features by QEMU's version, so the greeting names the one
 * whose contract is kept here; `package` says who really speaks. */
#pragma once

#define QMP_MAJOR 7
#define QMP_MINOR 2
#define QMP_MICRO 0
#define TIDEMARK_PACKAGE "tidemark " TIDEMARK_VERSION
