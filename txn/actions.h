/* SPDX-License-Identifier: Apache-2.0 */
/* Every action's operations, by the name of its kind; the generated table refers to them. */
#pragma once
#include "txn/txn.h"

extern const struct action_ops abort_ops;
extern const struct action_ops block_dirty_bitmap_add_ops, block_dirty_bitmap_remove_ops,
    block_dirty_bitmap_clear_ops, block_dirty_bitmap_enable_ops, block_dirty_bitmap_disable_ops,
    block_dirty_bitmap_merge_ops, block_dirty_bitmap_rename_ops, block_dirty_bitmap_copy_ops;
extern const struct action_ops x_block_dirty_bitmap_enable_ops, x_block_dirty_bitmap_disable_ops,
    x_block_dirty_bitmap_merge_ops;
extern const struct action_ops blockdev_backup_ops, drive_backup_ops;
extern const struct action_ops blockdev_add_ops, blockdev_del_ops;
extern const struct action_ops block_export_add_ops, block_export_del_ops,
    block_export_set_node_ops;
