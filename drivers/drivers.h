/* SPDX-License-Identifier: Apache-2.0 */
/* One constant for each driver; only drivers.c lists them. */
#pragma once
#include "block/driver.h"

extern const struct driver_ops blkdebug_driver;
extern const struct driver_ops file_driver, host_device_driver;
extern const struct driver_ops null_aio_driver, null_co_driver;
extern const struct driver_ops raw_driver;
extern const struct driver_ops throttle_driver;
