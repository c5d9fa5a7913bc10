/* SPDX-License-Identifier: Apache-2.0 */
/* Flush: a sync covers what completed before it *starts*, so a flush may join a sync only while
 * that one waits to start. One runs, one waits, the rest join the waiting one. */
#include <errno.h>
#include <unistd.h>

#include "io/real_file.h"

ssize_t file_do_sync(struct pool_op *op)
{
    int r;
    do
        r = fdatasync(op->file->fd);
    while (r < 0 && errno == EINTR);
    return r < 0 ? -errno : 0;
}

/* On the stack of a flush that came while a sync ran. */
struct sync_waiter {
    struct co *co;
    int result;
    bool lead; /* do the sync for all who wait */
    struct sync_waiter *next;
};

/* A sync starts: whoever has come by now is covered. Returns its result. */
static co_fn int sync_lead(struct real_file *f)
{
    spin_lock(&f->sync_spin);
    struct sync_waiter *group = f->sync_head;
    f->sync_head = f->sync_tail = NULL;
    int r = f->sync_error;
    spin_unlock(&f->sync_spin);

    if (r == 0) {
        struct real_loop *rl = loop_self()->engine;
        rl->requests++;
        r = file_io(f)->be->sync(f);
        rl->requests--;
    }

    spin_lock(&f->sync_spin);
    if (r < 0 && !f->direct)
        f->sync_error = r;
    struct sync_waiter *lead = f->sync_head;
    if (lead) {
        f->sync_head = lead->next;
        if (!f->sync_head)
            f->sync_tail = NULL;
    } else {
        f->syncing = false;
    }
    spin_unlock(&f->sync_spin);

    while (group) {
        struct sync_waiter *w = group;
        group = w->next;
        w->result = r;
        co_wake(w->co);
    }
    if (lead) {
        lead->lead = true;
        co_wake(lead->co);
    }
    return r;
}

co_fn int real_fsync(struct io_file *file)
{
    struct real_file *f = file_of(file);
    role_wait(f->inode);

    spin_lock(&f->sync_spin);
    if (!f->syncing) {
        f->syncing = true;
        spin_unlock(&f->sync_spin);
        return sync_lead(f);
    }
    struct sync_waiter w = {.co = co_self()};
    if (f->sync_tail)
        f->sync_tail->next = &w;
    else
        f->sync_head = &w;
    f->sync_tail = &w;
    spin_unlock(&f->sync_spin);
    co_yield();
    return w.lead ? sync_lead(f) : w.result;
}
