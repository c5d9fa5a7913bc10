/* SPDX-License-Identifier: Apache-2.0 */
/* A few coroutines look at one path after the other. Each may get stuck in a mount that hangs, with
 * a thread of io's pool; whoever asked leaves after a while, and the object goes with the last of
 * them. One list is asked about at a time, and as long as any asker is stuck nobody is asked anew,
 * so no number of questions can take all threads, not even of many clients at once. (The same care
 * as in drivers/file.c for allocated sizes.) */
#include "txn/file_ids.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "co/sync.h"
#include "io/io.h"

#define ASKERS 4u
#define ANSWER_NS 1000000000u

struct file_id {
    const char *path;
    const char *key; /* NULL: not known */
};

struct file_questions {
    struct io *io;
    struct co_mutex asking; /* who holds it has askers, and gives up in time */
    unsigned n_stuck;       /* askers that nobody waits for */
    bool left;              /* the last of them frees it */
};

struct file_ids {
    struct file_questions *questions;
    struct arena arena;
    struct file_id *id; /* by path */
    size_t n, next;
    unsigned n_askers;
    bool late; /* nobody waits any more: they are stuck */
    bool left; /* the last of them frees it */
    struct io_event all_answered;
};

int file_questions_new(struct io *io, struct file_questions **out)
{
    *out = mem_zalloc(sizeof **out);
    if (!*out)
        return -ENOMEM;
    (*out)->io = io;
    (*out)->asking = (struct co_mutex)CO_MUTEX_INIT;
    return 0;
}

void file_questions_free(struct file_questions *q)
{
    if (q && q->n_stuck)
        q->left = true;
    else
        mem_free(q);
}

static void destroy(struct file_ids *ids)
{
    arena_free(&ids->arena);
    mem_free(ids->id);
    mem_free(ids);
}

/* ------------------------------------------------------------------ asking */

static const char *keep(struct file_ids *ids, const char *key)
{
    return arena_strndup(&ids->arena, key, strlen(key));
}

static const char *key_of(struct file_ids *ids, const struct io_stat *st, const char *name)
{
    mem_autofree char *key =
        mem_printf(FOOTPRINT_FILE_KEY "%s%s", (unsigned long long)st->dev,
                   (unsigned long long)st->ino, name ? "/" : "", name ? name : "");
    return key ? keep(ids, key) : NULL;
}

/* It leads nowhere, and no action of a list makes a directory: it stands for itself. */
static const char *key_of_path(struct file_ids *ids, const char *path)
{
    mem_autofree char *key = mem_printf("p:%s", path);
    return key ? keep(ids, key) : NULL;
}

/* A file that does not exist is a name in a directory. A link to one may lead anywhere. */
static co_fn const char *key_of_nothing(struct file_ids *ids, const char *path)
{
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    mem_autofree char *dir = mem_printf("%.*s", (int)(name - path), path);
    struct io_file *file;
    struct io_stat st;
    int r = io_open(path, O_RDONLY | O_NOFOLLOW, 0, &file);
    if (r == 0)
        io_close(file);
    if (r != -ENOENT || !dir)
        return NULL;
    r = io_stat(*dir ? dir : ".", &st);
    return r == 0 ? key_of(ids, &st, name) : r == -ENOENT ? key_of_path(ids, path) : NULL;
}

static co_fn const char *find_key(struct file_ids *ids, const char *path)
{
    struct io_stat st;
    int r = io_stat(path, &st);
    if (r == 0)
        return key_of(ids, &st, NULL);
    if (r == -ENOENT)
        return key_of_nothing(ids, path);
    /* Nobody can open it by this path, now or later. */
    bool refused = r == -ENOTDIR || r == -EACCES || r == -ENAMETOOLONG || r == -ELOOP;
    return refused ? key_of_path(ids, path) : NULL;
}

/* Nobody has waited for this asker's last answer. */
static void answered_late(struct file_ids *ids)
{
    struct file_questions *q = ids->questions;
    if (ids->left && !ids->n_askers)
        destroy(ids);
    if (--q->n_stuck == 0 && q->left)
        mem_free(q);
}

static co_fn void ask(void *arg)
{
    struct file_ids *ids = arg;
    while (!ids->late && ids->next < ids->n) {
        struct file_id *id = &ids->id[ids->next++];
        id->key = find_key(ids, id->path);
    }
    ids->n_askers--;
    if (ids->late)
        answered_late(ids);
    else if (!ids->n_askers)
        io_event_set(&ids->all_answered);
}

static co_fn void start_askers(struct file_ids *ids)
{
    for (unsigned i = 0; i < ASKERS && ids->next < ids->n; i++) {
        ids->n_askers++;
        if (loop_run_now(ask, ids) < 0) {
            ids->n_askers--;
            break;
        }
    }
}

/* Who waits for a turn waits no longer than a second either: those before came earlier, and leave
 * a second after they came. */
static co_fn void ask_all(struct file_ids *ids)
{
    struct file_questions *q = ids->questions;
    uint64_t deadline = io_now(q->io) + ANSWER_NS;
    co_mutex_lock(&q->asking);
    if (!q->n_stuck && io_now(q->io) < deadline)
        start_askers(ids);
    while (ids->n_askers && io_event_wait(&ids->all_answered, deadline) == 0)
        ;
    ids->late = ids->n_askers > 0;
    q->n_stuck += ids->n_askers;
    co_mutex_unlock(&q->asking);
}

/* ------------------------------------------------------------------ paths */

static int compare(const void *a, const void *b)
{
    return strcmp(((const struct file_id *)a)->path, ((const struct file_id *)b)->path);
}

/* Copies: the request may end before the last answer. */
static int take_paths(struct file_ids *ids, const struct footprint *f)
{
    size_t n = 0;
    ids->id = mem_calloc(f->n_uses + 1, sizeof *ids->id);
    if (!ids->id)
        return -ENOMEM;
    for (size_t i = 0; i < f->n_uses; i++) {
        const struct store_name *name = &f->use[i].name;
        if (name->kind != STORE_FILE)
            continue;
        ids->id[n].path = keep(ids, name->a);
        if (!ids->id[n++].path)
            return -ENOMEM;
    }
    qsort(ids->id, n, sizeof *ids->id, compare);
    for (size_t i = 0; i < n; i++) {
        if (!i || compare(&ids->id[i], &ids->id[ids->n - 1]))
            ids->id[ids->n++] = ids->id[i];
    }
    return 0;
}

struct file_ids *file_ids_new(struct file_questions *q, const struct footprint *f)
{
    struct file_ids *ids = mem_zalloc(sizeof *ids);
    if (!ids)
        return NULL;
    if (take_paths(ids, f) < 0) {
        destroy(ids);
        return NULL;
    }
    ids->questions = q;
    ids->all_answered = (struct io_event)IO_EVENT_INIT;
    if (ids->n)
        ask_all(ids);
    return ids;
}

const char *file_ids_key(void *arg, const char *path)
{
    struct file_ids *ids = arg;
    struct file_id wanted = {.path = path};
    struct file_id *found =
        ids->n ? bsearch(&wanted, ids->id, ids->n, sizeof wanted, compare) : NULL;
    return found ? found->key : NULL;
}

void file_ids_free(struct file_ids *ids)
{
    if (!ids)
        return;
    ids->left = true;
    if (!ids->n_askers)
        destroy(ids);
}
