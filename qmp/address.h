/* SPDX-License-Identifier: Apache-2.0 */
/* Socket addresses as the schema has them, as io/ wants them. */
#pragma once
#include "base/error.h"

struct io_addr;
struct q_socket_address;
struct q_socket_address_legacy;

int address_from_flat(const struct q_socket_address *q, struct io_addr *out,
                      struct tide_error *err);
int address_from_legacy(const struct q_socket_address_legacy *q, struct io_addr *out,
                        struct tide_error *err);
