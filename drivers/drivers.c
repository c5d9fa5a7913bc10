/* SPDX-License-Identifier: Apache-2.0 */
/* The drivers of this daemon. A new one is a file beside this one and a line here (and its options
 * in schema/block.toml). */
#include "drivers/drivers.h"

const struct driver_ops *const drivers[] = {
    &blkdebug_driver, &file_driver, &host_device_driver, &null_aio_driver,
    &null_co_driver,  &raw_driver,  &throttle_driver,    NULL,
};
