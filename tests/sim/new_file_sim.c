/* SPDX-License-Identifier: Apache-2.0 */
/* Power fails around lists with a drive-backup, whose target may have stood there before.
 *
 *   At the target's name is what was there before, byte for byte, or the new file in its whole
 *   size, whatever of it has been copied by then; nothing in between.
 *   After the answer to a list that succeeded it is the new file, after one that was undone the
 * old. After the end of the job it has the disk's contents. */
#include <string.h>

#include "world.h"

#define DISK_SIZE 262144u
#define OLD_SIZE 5000u
#define N_LISTS 4u

struct target {
    char path[16];
    bool existed, tried, placed, copied; /* the last two: somebody has been told so */
    bool undone;                         /* its list is, or ends with an abort */
};

struct new_file_state {
    struct target target[N_LISTS];
};

static void fill(unsigned char *buf, size_t len, unsigned char seed)
{
    for (size_t i = 0; i < len; i++)
        buf[i] = (unsigned char)(seed + i * 7);
}

static void new_file_prepare(struct world *w, struct sim_config *cfg)
{
    struct new_file_state *s = w->state;
    static unsigned char data[DISK_SIZE];
    fill(data, sizeof data, 1);
    CHECK(sim_file_write(w->disk, "disk", data, sizeof data, 0) == 0);
    fill(data, OLD_SIZE, 2);
    for (unsigned i = 0; i < N_LISTS; i++) {
        struct target *t = &s->target[i];
        snprintf(t->path, sizeof t->path, "target%u", i);
        t->existed = chance_one_in(&w->chance, 2);
        t->undone = chance_one_in(&w->chance, 4);
        if (t->existed)
            CHECK(sim_file_write(w->disk, t->path, data, OLD_SIZE, 0) == 0);
    }
}

static co_fn void new_file_live(struct world *w)
{
    struct new_file_state *s = w->state;
    world_add_file(w, "disk", "disk", "");
    for (unsigned i = 0; i < N_LISTS; i++) {
        struct target *t = &s->target[i];
        t->tried = true;
        json_t *v = qmp_call(&w->qmp, "transaction",
                             "{\"actions\":[{\"type\":\"drive-backup\",\"data\":{\"job-id\":\"j\","
                             "\"device\":\"disk\",\"sync\":\"full\",\"format\":\"raw\","
                             "\"target\":\"%s\"}}%s]}",
                             t->path, t->undone ? ",{\"type\":\"abort\",\"data\":{}}" : "");
        CHECK((qmp_error(v) != NULL) == t->undone);
        json_decref(v);
        t->placed = !t->undone;
        if (t->undone)
            t->tried = false; /* who has been told so may rely on it */
        if (t->placed && !*qmp_wait_job(&w->qmp, "j", "null")->error)
            t->copied = true;
    }
}

static void check_target(struct world *w, const struct target *t)
{
    static unsigned char is[DISK_SIZE + 1], want[DISK_SIZE];
    ssize_t n = sim_file_read(w->disk, t->path, is, sizeof is, 0);
    fill(want, OLD_SIZE, 2);
    bool old = t->existed ? n == OLD_SIZE && !memcmp(is, want, OLD_SIZE) : n < 0;
    bool fresh = n == DISK_SIZE;
    CHECK_SAY(old || fresh, "'%s' has %zd bytes", t->path, n);
    CHECK_SAY(fresh || !t->placed, "'%s' was there, and is not", t->path);
    CHECK_SAY(old || t->tried, "'%s' is replaced", t->path);
    fill(want, DISK_SIZE, 1);
    CHECK(!t->copied || !memcmp(is, want, DISK_SIZE));
}

static co_fn void check_all(struct world *w)
{
    struct new_file_state *s = w->state;
    for (unsigned i = 0; i < N_LISTS; i++)
        check_target(w, &s->target[i]);
}

static void nothing(struct world *w)
{
}

static const struct scenario new_file = {
    .name = "targets made by lists",
    .state_size = sizeof(struct new_file_state),
    .n_seeds = 400,
    .cut_one_in = 1,
    .cut_steps = 1500,
    .prepare = new_file_prepare,
    .live = new_file_live,
    .closed = check_all,
    .after_cut = check_all,
    .finish = nothing,
};

int main(void)
{
    const struct scenario *all[] = {&new_file};
    return scenario_main(all, 1);
}
