/* SPDX-License-Identifier: Apache-2.0 */
/* Two disks, one point in time: adds a bitmap to each that records from now on, and starts a backup
 * of what their old bitmaps recorded. The backups succeed together or not at all.
 *
 *     group_backup SOCKET OLD-BITMAP NEW-BITMAP DISK TARGET DISK TARGET
 */
#include <errno.h>
#include <stdio.h>
#include <tidemark/tidemark.h>

static void add_disk(struct tide_txn *txn, const char *disk, const char *target, char **bitmaps)
{
    struct tide_block_dirty_bitmap_add add = {.node = disk, .name = bitmaps[1]};
    struct tide_blockdev_backup backup = {.job_id = disk,
                                          .device = disk,
                                          .target = target,
                                          .sync = TIDE_MIRROR_SYNC_MODE_INCREMENTAL,
                                          .bitmap = bitmaps[0]};
    tide_txn_block_dirty_bitmap_add(txn, &add); /* errors are remembered until the list is run */
    tide_txn_blockdev_backup(txn, &backup);
}

static int run(struct tide_txn *txn, struct tide_conn *conn, const char *socket)
{
    int r = -ECONNRESET;
    /* With an id the same list may be sent again: it is never carried out twice. */
    for (int tries = 0; tries < 3 && r == -ECONNRESET; tries++) {
        r = tide_conn_open(conn, socket);
        if (r < 0)
            return fprintf(stderr, "%s\n", tide_conn_error(conn)), r;
        r = tide_txn_run(txn, conn);
    }
    if (r < 0 && tide_txn_failed_action(txn) >= 0)
        fprintf(stderr, "action %d (%s) failed, all is undone: ", tide_txn_failed_action(txn),
                tide_txn_failed_kind(txn));
    if (r < 0)
        fprintf(stderr, "%s\n", tide_txn_error(txn));
    return r;
}

int main(int argc, char **argv)
{
    if (argc != 8) {
        fprintf(stderr, "usage: %s SOCKET OLD-BITMAP NEW-BITMAP DISK TARGET DISK TARGET\n",
                argv[0]);
        return 2;
    }
    struct tide_conn *conn = tide_conn_new();
    struct tide_txn *txn = tide_txn_new();
    tide_txn_set_grouped(txn, true);
    tide_txn_choose_id(txn);
    add_disk(txn, argv[4], argv[5], argv + 2);
    add_disk(txn, argv[6], argv[7], argv + 2);
    int r = run(txn, conn, argv[1]);
    tide_txn_free(txn);
    tide_conn_free(conn);
    return r < 0;
}
