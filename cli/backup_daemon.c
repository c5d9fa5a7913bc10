/* SPDX-License-Identifier: Apache-2.0 */
/* A backup's half in the daemon.
 *
 * The rule that makes increments right: a bitmap belongs to one point of one directory, by its
 * name, and is never cleared, merged into or reused. The bitmap of N+1 is added just before the
 * transaction that begins point N+1; the one of N goes on recording, and is removed when the
 * manifest with N+1 is on disk. So at every moment the bitmap named by the manifest's last point
 * holds all changes since that point, whatever died in between, and there is nothing to repair:
 * what does not belong to the last point is litter, and backup_sweep() removes it.
 *
 * Somebody else may break the rule: clear the bitmap, or stop it for a while. The daemon changes a
 * bitmap's generation then. The one in the manifest was read before the point's moment and found
 * unchanged after it; that of the point below is compared when the run is planned, and again after
 * the transaction has taken the bits. Reading it only afterwards would take a bitmap that was
 * cleared a moment before for a whole one; this is why the new bitmap is not added in the
 * transaction. It then also holds what changed in the moment before, which does no harm.
 *
 * An increment copies what a second bitmap says, the frozen one: made disabled, filled by a merge
 * in the same transaction, so that its bits stand still while the job runs and can be listed after.
 */
#include "base/mem.h"
#include "cli/backup.h"
#include "cli/interrupt.h"
#include "cli/progress.h"
#include "cli/view.h"
#include <errno.h>
#include <inttypes.h>
#include <string.h>

#define POLL_MS 200
#define SHORT_ID 8 /* characters of a uuid in names of nodes and jobs */
#define FROZEN ".frozen"

/* ---- names ---- */

/* In the name of every bitmap of this directory; before it stands the stem, which may change. */
static char *bitmap_mark(const struct backup *b)
{
    return cli_printf("-%.*s-", SHORT_ID, b->manifest.id);
}

static char *job_prefix(const struct backup *b)
{
    return cli_printf("tidemark-%.*s-", SHORT_ID, b->manifest.id);
}

static char *node_prefix(const struct backup *b)
{
    return cli_printf("tm-%.*s-", SHORT_ID, b->manifest.id);
}

static bool begins(const char *s, const char *prefix)
{
    return strncmp(s, prefix, strlen(prefix)) == 0;
}

static bool is_hex(const char *s, size_t len)
{
    return strspn(s, "0123456789abcdef") >= len;
}

/* STEM-<8 digits>-DISK-<uuid>, maybe with ".frozen" behind it, as name_things() makes them. */
bool backup_owns_bitmap(const char *name)
{
    size_t len = strlen(name), n_frozen = strlen(FROZEN), n_uuid = UUID_SIZE - 1;
    if (len > n_frozen && strcmp(name + len - n_frozen, FROZEN) == 0)
        len -= n_frozen;
    if (len < n_uuid + 1)
        return false;
    char uuid[UUID_SIZE];
    memcpy(uuid, name + len - n_uuid, n_uuid);
    uuid[n_uuid] = '\0';
    len -= n_uuid + 1; /* of "STEM-<8 digits>-DISK" */
    if (!uuid_is(uuid) || name[len] != '-')
        return false;
    for (size_t i = 1; i + SHORT_ID + 2 < len; i++)
        if (name[i] == '-' && is_hex(name + i + 1, SHORT_ID) && name[i + SHORT_ID + 1] == '-')
            return true;
    return false;
}

/* The whole uuid of the point is in the name of its bitmap: this is what ties the two together. */
static void name_things(const struct backup *b, struct backup_disk *d, size_t i)
{
    mem_autofree char *mark = bitmap_mark(b), *jobs = job_prefix(b), *nodes = node_prefix(b);
    d->bitmap = cli_printf("%s%s%s-%s", b->stem, mark, d->name, b->uuid);
    d->frozen = cli_printf("%s" FROZEN, d->bitmap);
    d->job = cli_printf("%s%s", jobs, d->name);
    d->node = cli_printf("%s%.*s-%zu", nodes, SHORT_ID, b->uuid, i + 1);
    d->file = manifest_file_name(d->name, d->full, b->number);
    d->tmp = cli_printf("%s.tmp", d->file);
}

/* ---- sweeping ---- */

static int call(struct backup *b, const char *command, json_t *args, json_t **reply,
                struct tide_error *err)
{
    return client_call(b->c->client, command, args, reply, err);
}

/* For what may be refused: only a lost connection is an error. */
static int try_call(struct backup *b, const char *command, json_t *args, struct tide_error *err)
{
    int r = call(b, command, args, NULL, err);
    return r == CLIENT_REFUSED ? 0 : r;
}

/* Waits until something happens in the daemon, or a moment. */
static int pause_for_event(struct backup *b, struct tide_error *err)
{
    json_t *event;
    int r = client_event(b->c->client, POLL_MS, &event, err);
    json_decref(event);
    return r;
}

/* Cancels the jobs of this directory and dismisses those that have ended. *n_left: still there. */
static int sweep_jobs_once(struct backup *b, const char *prefix, size_t *n_left,
                           struct tide_error *err)
{
    json_t *jobs, *j;
    size_t i;
    *n_left = 0;
    int r = call(b, "query-jobs", NULL, &jobs, err);
    if (r < 0)
        return r;
    json_array_foreach (jobs, i, j) {
        const char *id = view_string(j, "id", "");
        if (r < 0 || !begins(id, prefix))
            continue;
        bool concluded = strcmp(view_string(j, "status", ""), "concluded") == 0;
        *n_left += !concluded;
        r = try_call(b, concluded ? "job-dismiss" : "job-cancel", cli_pack("{s:s}", "id", id), err);
    }
    json_decref(jobs);
    return r;
}

static int sweep_jobs(struct backup *b, struct tide_error *err)
{
    mem_autofree char *prefix = job_prefix(b);
    for (;;) {
        size_t n_left;
        int r = sweep_jobs_once(b, prefix, &n_left, err);
        if (r < 0 || n_left == 0)
            return r;
        r = pause_for_event(b, err);
        if (r < 0)
            return r;
    }
}

static bool belongs_to_last_point(const struct backup *b, const char *bitmap)
{
    const struct manifest_point *last = manifest_last(&b->manifest);
    for (size_t i = 0; last && i < last->n_disks; i++)
        if (strcmp(last->disks[i].bitmap, bitmap) == 0)
            return true;
    return false;
}

static int sweep_bitmaps(struct backup *b, json_t *node, struct tide_error *err)
{
    mem_autofree char *mark = bitmap_mark(b);
    size_t i;
    json_t *entry;
    json_array_foreach (view_bitmaps(node), i, entry) {
        const char *name = view_string(entry, "name", "");
        if (!strstr(name, mark) || belongs_to_last_point(b, name))
            continue;
        int r = try_call(
            b, "block-dirty-bitmap-remove",
            cli_pack("{s:s, s:s}", "node", view_string(node, "node-name", ""), "name", name), err);
        if (r < 0)
            return r;
    }
    return 0;
}

int backup_sweep(struct backup *b, struct tide_error *err)
{
    mem_autofree char *prefix = node_prefix(b);
    json_t *nodes, *node;
    size_t i;
    int r = sweep_jobs(b, err);
    if (r == 0)
        r = view_nodes(b->c->client, &nodes, err);
    if (r < 0)
        return r;
    json_array_foreach (nodes, i, node) {
        const char *name = view_string(node, "node-name", "");
        if (r == 0 && begins(name, prefix))
            r = try_call(b, "blockdev-del", cli_pack("{s:s}", "node-name", name), err);
        if (r == 0)
            r = sweep_bitmaps(b, node, err);
    }
    json_decref(nodes);
    return r;
}

/* ---- planning ---- */

/* Why a bitmap may lack changes since a moment at which its generation was this one (has false: the
 * daemon did not tell); NULL if it has them all. */
static char *why_incomplete(json_t *node, const char *name, bool has, uint64_t generation)
{
    json_t *bitmap = view_bitmap(node, name);
    uint64_t now;
    bool has_now = view_generation(bitmap, &now);
    if (!bitmap)
        return cli_printf("bitmap '%s' is gone", name);
    if (view_true(bitmap, "inconsistent"))
        return cli_printf("bitmap '%s' is inconsistent", name);
    if (!view_true(bitmap, "recording"))
        return cli_printf("bitmap '%s' was disabled", name);
    if (has && !has_now)
        return cli_printf("this daemon does not tell whether bitmap '%s' was cleared", name);
    if (!has && has_now)
        return cli_printf("the last point does not tell whether bitmap '%s' was cleared since",
                          name);
    if (has && now != generation)
        return cli_printf("bitmap '%s' was cleared, disabled or made anew", name);
    return NULL;
}

/* Why the disk cannot be copied incrementally; NULL if it can. */
static char *why_full(const struct backup *b, struct backup_disk *d, json_t *node, bool can_list)
{
    const struct manifest_point *last = manifest_last(&b->manifest);
    if (!last)
        return cli_printf("the directory holds no point yet");
    d->below = manifest_disk(last, d->name);
    if (!d->below)
        return cli_printf("point %" PRIu64 ", the last one, does not have it", last->number);
    if (d->below->size != d->size)
        return cli_printf("its size changed from %" PRIu64 " to %" PRIu64 " bytes", d->below->size,
                          d->size);
    char *why =
        why_incomplete(node, d->below->bitmap, d->below->has_generation, d->below->generation);
    if (why)
        return why;
    json_t *bitmap = view_bitmap(node, d->below->bitmap);
    if (view_true(bitmap, "busy"))
        return cli_printf("bitmap '%s' is in use by something else", d->below->bitmap);
    if (!can_list)
        return cli_printf("this daemon cannot list dirty ranges (query-dirty-ranges)");
    d->below_granularity = view_number(bitmap, "granularity");
    return NULL;
}

static int plan_disk(struct backup *b, struct backup_disk *d, json_t *nodes, bool can_list,
                     struct tide_error *err)
{
    json_t *node = view_node(nodes, d->name);
    if (!node)
        return tide_fail(err, -ENOENT, "node '%s' not found", d->name);
    d->size = view_size(node);
    if (!b->want_full)
        d->why = why_full(b, d, node, can_list);
    if (d->why && b->want_incremental)
        return tide_fail(err, -EINVAL, "disk '%s' cannot be copied incrementally: %s", d->name,
                         d->why);
    d->full = b->want_full || d->why;
    d->read_only = view_true(node, "ro");
    return 0;
}

static int has_command(struct backup *b, const char *name, bool *has, struct tide_error *err)
{
    json_t *commands, *entry;
    size_t i;
    int r = call(b, "query-commands", NULL, &commands, err);
    if (r < 0)
        return r;
    *has = false;
    json_array_foreach (commands, i, entry)
        if (strcmp(view_string(entry, "name", ""), name) == 0)
            *has = true;
    json_decref(commands);
    return 0;
}

int backup_plan(struct backup *b, struct tide_error *err)
{
    json_t *nodes;
    bool can_list;
    const struct manifest_point *last = manifest_last(&b->manifest);
    uuid_new(b->uuid);
    b->number = last ? last->number + 1 : 1;
    int r = has_command(b, "query-dirty-ranges", &can_list, err);
    if (r == 0)
        r = has_command(b, "query-tidemark", &b->grouped, err);
    if (r == 0)
        r = view_nodes(b->c->client, &nodes, err);
    if (r < 0)
        return r;
    for (size_t i = 0; r == 0 && i < b->n; i++)
        r = plan_disk(b, &b->disks[i], nodes, can_list, err);
    for (size_t i = 0; r == 0 && i < b->n; i++)
        name_things(b, &b->disks[i], i);
    json_decref(nodes);
    return r;
}

/* ---- the transaction ---- */

int backup_open_targets(struct backup *b, struct tide_error *err)
{
    for (size_t i = 0; i < b->n; i++) {
        struct backup_disk *d = &b->disks[i];
        mem_autofree char *path = cli_printf("%s/%s", b->path, d->tmp);
        int r = call(b, "blockdev-add",
                     cli_pack("{s:s, s:s, s:s, s:s}", "driver", "file", "node-name", d->node,
                              "filename", path, "discard", "unmap"),
                     NULL, err);
        if (r < 0)
            return r;
    }
    return 0;
}

static void add_action(json_t *actions, const char *type, json_t *data)
{
    json_array_append_new(actions, cli_pack("{s:s, s:o}", "type", type, "data", data));
}

static json_t *add_bitmap(const struct backup_disk *d, const char *name, uint64_t granularity)
{
    return cli_pack("{s:s, s:s, s:I}", "node", d->name, "name", name, "granularity",
                    (json_int_t)granularity);
}

/* Whether a bitmap of this node can outlive the daemon only a try tells. */
static int add_new_bitmap(struct backup *b, const struct backup_disk *d, struct tide_error *err)
{
    int r = CLIENT_REFUSED;
    if (!d->read_only) { /* some daemons accept it there and then lose it */
        json_t *bitmap = add_bitmap(d, d->bitmap, b->granularity);
        json_object_set_new(bitmap, "persistent", json_true());
        r = call(b, "block-dirty-bitmap-add", bitmap, NULL, err);
    }
    if (r == CLIENT_REFUSED)
        r = call(b, "block-dirty-bitmap-add", add_bitmap(d, d->bitmap, b->granularity), NULL, err);
    return r;
}

static int broken_record(const struct backup_disk *d, const char *why, struct tide_error *err)
{
    return tide_fail(err, -EBUSY,
                     "disk '%s': %s, while the backup began; no point was made: run it again",
                     d->name, why);
}

static int add_new_bitmaps(struct backup *b, struct tide_error *err)
{
    json_t *nodes;
    int r = 0;
    for (size_t i = 0; r == 0 && i < b->n; i++)
        r = add_new_bitmap(b, &b->disks[i], err);
    if (r == 0)
        r = view_nodes(b->c->client, &nodes, err);
    if (r < 0)
        return r;
    for (size_t i = 0; r == 0 && i < b->n; i++) {
        struct backup_disk *d = &b->disks[i];
        json_t *node = view_node(nodes, d->name);
        d->has_generation = view_generation(view_bitmap(node, d->bitmap), &d->generation);
        mem_autofree char *why = why_incomplete(node, d->bitmap, d->has_generation, d->generation);
        if (why)
            r = broken_record(d, why, err);
    }
    json_decref(nodes);
    return r;
}

/* After the transaction: the old bitmap was whole when it was merged, the new one still is. */
static int check_bitmaps(struct backup *b, struct tide_error *err)
{
    json_t *nodes;
    int r = view_nodes(b->c->client, &nodes, err);
    if (r < 0)
        return r;
    for (size_t i = 0; r == 0 && i < b->n; i++) {
        const struct backup_disk *d = &b->disks[i];
        json_t *node = view_node(nodes, d->name);
        mem_autofree char *why = why_incomplete(node, d->bitmap, d->has_generation, d->generation);
        mem_autofree char *why_below =
            d->full ? NULL
                    : why_incomplete(node, d->below->bitmap, d->below->has_generation,
                                     d->below->generation);
        if (why || why_below)
            r = broken_record(d, why ? why : why_below, err);
    }
    json_decref(nodes);
    return r;
}

static void add_disk_actions(const struct backup *b, const struct backup_disk *d, json_t *actions)
{
    json_t *job =
        cli_pack("{s:s, s:s, s:s, s:s, s:b}", "job-id", d->job, "device", d->name, "target",
                 d->node, "sync", d->full ? "full" : "bitmap", "auto-dismiss", 0);
    if (b->speed)
        json_object_set_new(job, "speed", cli_pack("I", (json_int_t)b->speed));
    if (!d->full) {
        json_t *frozen = add_bitmap(d, d->frozen, d->below_granularity);
        json_object_set_new(frozen, "disabled", json_true());
        add_action(actions, "block-dirty-bitmap-add", frozen);
        add_action(actions, "block-dirty-bitmap-merge",
                   cli_pack("{s:s, s:s, s:[s]}", "node", d->name, "target", d->frozen, "bitmaps",
                            d->below->bitmap));
        json_object_set_new(job, "bitmap", cli_pack("s", d->frozen));
        json_object_set_new(job, "bitmap-mode", cli_pack("s", "never"));
    }
    add_action(actions, "blockdev-backup", job);
}

int backup_begin(struct backup *b, struct tide_error *err)
{
    int r = add_new_bitmaps(b, err);
    if (r < 0)
        return r;
    json_t *actions = cli_pack("[]");
    for (size_t i = 0; i < b->n; i++)
        add_disk_actions(b, &b->disks[i], actions);
    json_t *args = cli_pack("{s:o}", "actions", actions);
    /* A daemon that refuses bitmap actions in a group still gives a right backup: if one job fails,
     * this tool cancels the others and makes no point. */
    if (b->grouped)
        json_object_set_new(args, "properties", cli_pack("{s:s}", "completion-mode", "grouped"));
    r = call(b, "transaction", args, NULL, err);
    return r < 0 ? r : check_bitmaps(b, err);
}

/* ---- waiting ---- */

static struct backup_disk *disk_of_job(struct backup *b, const char *id)
{
    for (size_t i = 0; i < b->n; i++)
        if (strcmp(b->disks[i].job, id) == 0)
            return &b->disks[i];
    return NULL;
}

/* Takes over the progress of the jobs. The first error is kept; one that is not "cancelled" because
 * another job of the group failed is preferred. */
static int take_jobs(struct backup *b, size_t *n_running, struct tide_error *err)
{
    json_t *jobs, *j;
    size_t i, n_seen = 0;
    int r = call(b, "query-jobs", NULL, &jobs, err), failed = 0;
    if (r < 0)
        return r;
    *n_running = 0;
    json_array_foreach (jobs, i, j) {
        struct backup_disk *d = disk_of_job(b, view_string(j, "id", ""));
        if (!d)
            continue;
        n_seen++;
        const char *error = view_string(j, "error", NULL);
        d->done = view_number(j, "current-progress");
        d->total = view_number(j, "total-progress");
        d->concluded = strcmp(view_string(j, "status", ""), "concluded") == 0;
        *n_running += !d->concluded;
        bool cancelled = error && strstr(error, "ancel");
        if (error && (!failed || !cancelled))
            failed = tide_fail(err, -EIO, "copying disk '%s' failed: %s", d->name, error);
    }
    json_decref(jobs);
    if (!failed && n_seen < b->n)
        return tide_fail(err, -EIO, "a job of this backup was dismissed by somebody else");
    /* In a group the one that failed first may conclude last: wait for all before judging. */
    return b->grouped && *n_running ? 0 : failed;
}

int backup_wait(struct backup *b, struct tide_error *err)
{
    struct progress p;
    struct progress_line *lines = cli_alloc(b->n, sizeof *lines);
    size_t n_running = b->n;
    progress_start(&p, b->c->progress);
    int r = 0;
    while (r == 0) {
        r = take_jobs(b, &n_running, err);
        for (size_t i = 0; i < b->n; i++)
            lines[i] =
                (struct progress_line){b->disks[i].name, b->disks[i].done, b->disks[i].total};
        if (r < 0 || n_running == 0)
            break;
        progress_draw(&p, lines, b->n, false);
        r = pause_for_event(b, err);
        if (r == 0 && interrupted())
            r = tide_fail(err, -EINTR, "interrupted; no point was made, and nothing is forgotten");
    }
    progress_end(&p);
    mem_free(lines);
    return r;
}

/* ---- after the jobs ---- */

int backup_collect(struct backup *b, struct tide_error *err)
{
    int r = sweep_jobs(b, err); /* all have concluded: this dismisses them */
    for (size_t i = 0; r == 0 && i < b->n; i++) {
        struct backup_disk *d = &b->disks[i];
        r = call(b, "blockdev-del", cli_pack("{s:s}", "node-name", d->node), NULL, err);
        if (r < 0)
            break;
        if (!d->full)
            r = view_dirty_ranges(b->c->client, d->name, d->frozen, &d->ranges, err);
        else if (d->size)
            ranges_add(&d->ranges, 0, d->size);
        ranges_clip(&d->ranges, d->size);
    }
    return r;
}
