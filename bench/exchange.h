/* SPDX-License-Identifier: Apache-2.0 */
/* Requests and replies on a connection of nbd_open(), for programs that have one of them and give
 * up at the first fault: then it is printed, and the program ends with status 1. */
#pragma once
#include <stddef.h>
#include <stdint.h>

#define REQUEST_MAGIC 0x25609513u
#define SIMPLE_MAGIC 0x67446698u
enum { REQUEST_LEN = 28, SIMPLE_LEN = 16 };
enum { CMD_WRITE = 1, CMD_TRIM = 4, CMD_BLOCK_STATUS = 7 };

/* A request of REQUEST_LEN bytes, without flags, into `p`. */
void exchange_request(uint8_t *p, unsigned command, uint64_t cookie, uint64_t off, uint32_t len);
void exchange_send(int fd, const uint8_t *p, size_t len);
/* Waits until something is there: how many bytes, at least one, at most `room`. */
size_t exchange_receive(int fd, uint8_t *p, size_t room);
