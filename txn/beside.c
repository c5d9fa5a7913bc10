/* SPDX-License-Identifier: Apache-2.0 */
/* Uses are kept by what they do (DISK_x, ending or not) and by node, nodes by the one at their
 * bottom, and those by their file. A node reaches few others and nearly all that do different
 * things on one disk meet; so the work is in proportion to the list and the answer. Two partitions
 * of a disk are taken to be in each other's way. */
#include "txn/beside.h"

#include <errno.h>
#include <string.h>
#include <xxhash.h>

#include "base/mem.h"

#define ENDINGS 2u /* goes on, ends */

/* Of the place with that number; uses and places are index + 1, 0: none. */
struct site {
    unsigned newest[DISK_HOWS][ENDINGS]; /* use */
    unsigned next[DISK_HOWS][ENDINGS];   /* place with such uses over the same bottom */
    unsigned first[DISK_HOWS][ENDINGS];  /* of a bottom: the first of them */
    /* From this one on, all that write lead here: nobody need look again. */
    unsigned clear[ENDINGS];
    /* Of a bottom that is written to or tracked: others over a file of that hash, over any file,
     * all. */
    bool is_listed;
    unsigned next_in_file, next_any, next_listed;
};

struct beside {
    const struct footprint *f;
    size_t next;
    struct site *site;
    struct place **place;           /* by number */
    unsigned (*older)[DISK_HOWS];   /* of a use: the one of its place before it */
    unsigned *by_file, any, listed; /* places */
    size_t mask;
};

void beside_free(struct beside *b)
{
    if (!b)
        return;
    mem_free(b->site);
    mem_free(b->place);
    mem_free(b->older);
    mem_free(b->by_file);
    mem_free(b);
}

int beside_new(const struct footprint *f, struct beside **out)
{
    struct beside *b = mem_zalloc(sizeof *b);
    if (!b)
        return -ENOMEM;
    b->f = f;
    b->mask = 15;
    while (b->mask < f->n_disks)
        b->mask = b->mask * 2 + 1;
    b->site = mem_calloc(f->known.n_places + 1, sizeof *b->site);
    b->place = mem_calloc(f->known.n_places + 1, sizeof(struct place *));
    b->older = mem_calloc(f->n_disks + 1, sizeof *b->older);
    b->by_file = mem_calloc(b->mask + 1, sizeof *b->by_file);
    if (!b->site || !b->place || !b->older || !b->by_file) {
        beside_free(b);
        return -ENOMEM;
    }
    *out = b;
    return 0;
}

struct search {
    struct beside *b;
    const struct disk_use *use;
    beside_found *found;
    void *arg;
};

/* All that did so at that place. */
static int meet_place(const struct search *s, unsigned place, unsigned how, unsigned ends,
                      enum beside_why why)
{
    int r = 0;
    for (unsigned k = s->b->site[place - 1].newest[how][ends]; k && r == 0;
         k = s->b->older[k - 1][how]) {
        const struct disk_use *earlier = &s->b->f->disk[k - 1];
        if (earlier->action != s->use->action)
            r = s->found(s->arg, earlier, s->use, why);
    }
    return r;
}

/* Whose node leads to `place` writes past nobody there, and the reverse. */
static bool leads(const struct search *s, unsigned how, unsigned place)
{
    struct place *own = s->use->place, *other = s->b->place[place - 1];
    return how == DISK_TRACK ? place_reaches(own, other) : place_reaches(other, own);
}

/* All that did so over the bottom of ours. */
static int meet_disk(const struct search *s, unsigned how)
{
    const struct site *bottom = &s->b->site[place_bottom(s->use->place)->number];
    int r = 0;
    for (unsigned ends = 0; ends < ENDINGS && !(ends && s->use->ends); ends++) {
        for (unsigned p = bottom->first[how][ends]; p && r == 0;
             p = s->b->site[p - 1].next[how][ends])
            r = meet_place(s, p, how, ends, BESIDE_DISK);
    }
    return r;
}

/* Only those that do not lead to us or we to them. Of those who keep track no more than
 * PLACE_MAX_DEPTH can be led to; but any number who write may lead to one who keeps track, and
 * that again and again. */
static int meet_past(const struct search *s, unsigned how)
{
    const struct site *bottom = &s->b->site[place_bottom(s->use->place)->number];
    struct site *own = &s->b->site[s->use->place->number];
    int r = 0;
    for (unsigned ends = 0; ends < ENDINGS && !(ends && s->use->ends); ends++) {
        unsigned newest = bottom->first[how][ends];
        unsigned until = how == DISK_WRITE ? own->clear[ends] : 0;
        bool clear = true;
        for (unsigned p = newest; p != until && r == 0; p = s->b->site[p - 1].next[how][ends]) {
            if (leads(s, how, p))
                continue;
            clear = false;
            r = meet_place(s, p, how, ends, BESIDE_DISK);
        }
        if (how == DISK_WRITE && clear)
            own->clear[ends] = newest;
    }
    return r;
}

static int meet_all_of(const struct search *s, unsigned how, unsigned bottom)
{
    int r = 0;
    if (bottom - 1 == place_bottom(s->use->place)->number)
        return 0;
    for (unsigned ends = 0; ends < ENDINGS && !(ends && s->use->ends); ends++) {
        for (unsigned p = s->b->site[bottom - 1].first[how][ends]; p && r == 0;
             p = s->b->site[p - 1].next[how][ends])
            r = meet_place(s, p, how, ends, BESIDE_FILE);
    }
    return r;
}

static unsigned *bucket(struct beside *b, const char *file)
{
    return &b->by_file[XXH64(file, strlen(file), 0) & b->mask];
}

/* Those who write to the file, or track it, through another node at the bottom. */
static int meet_file(const struct search *s, unsigned how)
{
    struct beside *b = s->b;
    const struct place *bottom = place_bottom(s->use->place);
    unsigned p;
    int r = 0;
    if (bottom->any_file) {
        for (p = b->listed; p && r == 0; p = b->site[p - 1].next_listed)
            r = meet_all_of(s, how, p);
        return r;
    }
    if (!bottom->file)
        return 0;
    for (p = *bucket(b, bottom->file); p && r == 0; p = b->site[p - 1].next_in_file) {
        if (!strcmp(b->place[p - 1]->file, bottom->file))
            r = meet_all_of(s, how, p);
    }
    for (p = b->any; p && r == 0; p = b->site[p - 1].next_any)
        r = meet_all_of(s, how, p);
    return r;
}

static int meet(const struct search *s)
{
    unsigned how = s->use->how;
    int r = 0;
    if (how & 1u << DISK_TRACK)
        r = meet_past(s, DISK_WRITE);
    if (r == 0 && how & 1u << DISK_WRITE)
        r = meet_past(s, DISK_TRACK);
    if (r == 0 && how & (1u << DISK_WRITE | 1u << DISK_SOURCE))
        r = meet_disk(s, DISK_ALONE);
    if (r == 0 && how & 1u << DISK_ALONE)
        r = meet_disk(s, DISK_WRITE);
    if (r == 0 && how & 1u << DISK_ALONE)
        r = meet_disk(s, DISK_SOURCE);
    if (r == 0 && how & (1u << DISK_WRITE | 1u << DISK_TRACK))
        r = meet_file(s, DISK_WRITE);
    if (r == 0 && how & 1u << DISK_WRITE)
        r = meet_file(s, DISK_TRACK);
    return r;
}

static void push(unsigned *head, unsigned *next, unsigned p)
{
    *next = *head;
    *head = p;
}

static void list_bottom(struct beside *b, struct place *bottom)
{
    struct site *s = &b->site[bottom->number];
    unsigned p = bottom->number + 1;
    if (s->is_listed || (!bottom->file && !bottom->any_file))
        return;
    s->is_listed = true;
    b->place[p - 1] = bottom;
    push(&b->listed, &s->next_listed, p);
    if (bottom->any_file)
        push(&b->any, &s->next_any, p);
    else
        push(bucket(b, bottom->file), &s->next_in_file, p);
}

static void remember(struct beside *b, const struct disk_use *u)
{
    unsigned number = u->place->number, index = (unsigned)(u - b->f->disk);
    struct site *s = &b->site[number];
    struct place *bottom = place_bottom(u->place);
    b->place[number] = u->place;
    for (unsigned how = 0; how < DISK_HOWS; how++) {
        if (!(u->how & 1u << how))
            continue;
        if (!s->newest[how][u->ends])
            push(&b->site[bottom->number].first[how][u->ends], &s->next[how][u->ends], number + 1);
        push(&s->newest[how][u->ends], &b->older[index][how], index + 1);
    }
    if (u->how & (1u << DISK_WRITE | 1u << DISK_TRACK))
        list_bottom(b, bottom);
}

int beside_next(struct beside *b, beside_found *found, void *arg)
{
    const struct disk_use *u = &b->f->disk[b->next++];
    int r = meet(&(struct search){b, u, found, arg});
    remember(b, u);
    return r;
}
