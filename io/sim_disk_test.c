/* SPDX-License-Identifier: Apache-2.0 */
/* Tests of the simulated disk as a data structure: sparse bytes against a plain array, what may and
 * what must survive a power cut, names, locks. Each choice of a cut is one seed; where a rule says
 * "may", both outcomes have to turn up among the seeds. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "base/bytes.h"
#include "io/sim_disk.h"
#include <errno.h>
#include <stdlib.h>

#define N_CHOICES 400

static struct sim_inode *open_file(struct sim_world *w, const char *path, int flags)
{
    struct sim_inode *ino = NULL;
    assert_int_equal(disk_open(w, path, flags, 0644, &ino), 0);
    return ino;
}

/* `n` sectors full of `byte`, answered at once. */
static uint64_t put(struct sim_world *w, struct sim_inode *ino, uint64_t sector, size_t n, int byte)
{
    unsigned char *buf = sim_alloc(n * SIM_SECTOR);
    memset(buf, byte, n * SIM_SECTOR);
    int64_t op = inode_write(w, ino, buf, n * SIM_SECTOR, sector * SIM_SECTOR);
    free(buf);
    assert_true(op > 0);
    inode_done(w, ino, (uint64_t)op);
    return (uint64_t)op;
}

/* The byte that fills the sector; fails if there are two. */
static int get(struct sim_world *w, const char *path, uint64_t sector)
{
    unsigned char buf[SIM_SECTOR];
    ssize_t n = sim_file_read(w, path, buf, sizeof buf, sector * SIM_SECTOR);
    assert_int_equal(n, sizeof buf);
    assert_memory_equal(buf, buf + 1, sizeof buf - 1);
    return buf[0];
}

static void sync_all(struct sim_world *w, struct sim_inode *ino)
{
    struct sim_rng rng = {1};
    inode_sync(ino, w->n_stamps, &rng);
    assert_int_equal(disk_sync_dir(w, "/", w->n_ops, &rng), 0);
}

/* A world with the durable file /f of 8 sectors 'a'. The file stays open. */
static struct sim_world *world_with_file(struct sim_inode **ino)
{
    struct sim_world *w = sim_world_new();
    *ino = open_file(w, "/f", O_RDWR | O_CREAT);
    put(w, *ino, 0, 8, 'a');
    sync_all(w, *ino);
    assert_int_equal(sim_world_pending(w), 0);
    return w;
}

/* The world after choice `seed`; the caller frees it. */
static struct sim_world *cut(const struct sim_world *w, enum sim_cut mode, uint64_t seed)
{
    struct sim_world *c = sim_world_clone(w);
    sim_power_cut(c, mode, seed);
    return c;
}

/* ------------------------------------------------------------------ sparse bytes */

#define FLAT (40 * SIM_CHUNK)

static void check_extents(const struct sim_store *s, const unsigned char *flat)
{
    for (uint64_t off = 0; off < FLAT;) {
        uint64_t len = FLAT - off;
        bool data = store_extent(s, off, &len);
        assert_true(len > 0);
        assert_true(data || sim_is_zero(flat + off, len));
        assert_int_equal(store_missing(s, off, len) == 0, data);
        off += len;
    }
}

static void store_is_like_an_array(void **state)
{
    unsigned char *flat = sim_alloc(FLAT), *buf = sim_alloc(FLAT);
    struct sim_store s = {0}, copy;
    struct sim_rng r = {11};
    for (unsigned i = 0; i < 4000; i++) {
        uint64_t off = sim_below(&r, FLAT), len = sim_below(&r, MIN(FLAT - off, 3 * SIM_CHUNK) + 1);
        if (sim_percent(&r, 30)) {
            off = round_down(off, SIM_CHUNK);
            len = round_down(len, SIM_CHUNK);
        }
        unsigned how = (unsigned)sim_below(&r, 5);
        memset(flat + off, how < 2 ? (int)i : 0, len);
        if (how < 3)
            store_write(&s, off, flat + off, len);
        else if (how == 3)
            store_zero(&s, off, len);
        else
            store_punch(&s, off, len);
        store_read(&s, 0, buf, FLAT);
        assert_memory_equal(buf, flat, FLAT);
        if (i % 50 == 0)
            check_extents(&s, flat);
    }
    store_copy(&copy, &s); /* shared until written */
    store_write(&copy, 0, "xyz", 3);
    store_read(&s, 0, buf, FLAT);
    assert_memory_equal(buf, flat, FLAT);
    assert_int_not_equal(store_hash(&s, FLAT, 0), store_hash(&copy, FLAT, 0));
    store_fini(&copy);
    store_fini(&s);
    free(flat);
    free(buf);
}

static void store_is_sparse(void **state)
{
    struct sim_store s = {0};
    uint64_t end = 16 * TIB, len = end;
    store_write(&s, end - 1, "x", 1);
    assert_int_equal(s.n_chunks, 1);
    assert_false(store_extent(&s, 0, &len));
    assert_int_equal(len, end - SIM_CHUNK);
    store_zero(&s, 0, 8 * TIB);
    assert_int_equal(s.n, 2);
    store_punch(&s, TIB, TIB);
    assert_int_equal(s.n, 3);
    len = UINT64_MAX / 4;
    assert_true(store_extent(&s, 0, &len));
    assert_int_equal(len, TIB);
    store_fini(&s);
}

/* ------------------------------------------------------------------ contents at a power cut */

static void flushed_survives_and_unflushed_may_not(void **state)
{
    struct sim_inode *ino;
    struct sim_world *w = world_with_file(&ino);
    unsigned kept = 0;
    put(w, ino, 3, 1, 'b');
    for (uint64_t seed = 0; seed < N_CHOICES; seed++) {
        struct sim_world *c = cut(w, SIM_CUT_ANY, seed);
        for (unsigned i = 0; i < 8; i++)
            if (i != 3)
                assert_int_equal(get(c, "/f", i), 'a');
        int byte = get(c, "/f", 3);
        assert_true(byte == 'a' || byte == 'b');
        kept += byte == 'b';
        assert_int_equal(sim_world_pending(c), 0);
        sim_world_free(c);
    }
    assert_in_range(kept, 1, N_CHOICES - 1);
    sync_all(w, ino);
    for (uint64_t seed = 0; seed < N_CHOICES; seed++) {
        struct sim_world *c = cut(w, SIM_CUT_ANY, seed);
        assert_int_equal(get(c, "/f", 3), 'b');
        sim_world_free(c);
    }
    sim_world_free(w);
}

static void modes_do_what_they_say(void **state)
{
    struct sim_inode *ino;
    struct sim_world *w = world_with_file(&ino);
    put(w, ino, 0, 4, 'b');
    put(w, ino, 2, 4, 'c');
    put(w, ino, 7, 1, 'd');
    static const struct {
        enum sim_cut mode;
        const char *sectors;
    } cases[] = {{SIM_CUT_NONE, "aaaaaaaa"},
                 {SIM_CUT_ALL, "bbccccad"},
                 {SIM_CUT_LAST, "aaaaaaad"},
                 {SIM_CUT_PROCESS, "bbccccad"}};
    for (unsigned k = 0; k < sizeof cases / sizeof *cases; k++) {
        struct sim_world *c = cut(w, cases[k].mode, k);
        for (unsigned i = 0; i < 8; i++)
            assert_int_equal(get(c, "/f", i), cases[k].sectors[i]);
        assert_int_equal(sim_world_pending(c) > 0, cases[k].mode == SIM_CUT_PROCESS);
        sim_world_free(c);
    }
    bool prefix[4] = {false}, writes[8] = {false};
    for (uint64_t seed = 0; seed < N_CHOICES; seed++) {
        struct sim_world *c = cut(w, SIM_CUT_PREFIX, seed);
        bool b = get(c, "/f", 0) == 'b', m = get(c, "/f", 4) == 'c', d = get(c, "/f", 7) == 'd';
        assert_true((b || !m) && (m || !d));
        prefix[b + m + d] = true;
        sim_world_free(c);
        c = cut(w, SIM_CUT_WRITES, seed);
        b = get(c, "/f", 0) == 'b';
        m = get(c, "/f", 4) == 'c';
        assert_int_equal(get(c, "/f", 1), b ? 'b' : 'a'); /* writes are whole */
        assert_int_equal(get(c, "/f", 2), m ? 'c' : b ? 'b' : 'a');
        writes[b * 4 + m * 2 + (get(c, "/f", 7) == 'd')] = true;
        sim_world_free(c);
    }
    for (unsigned i = 0; i < 8; i++)
        assert_true(writes[i] && prefix[i / 2]);
    sim_world_free(w);
}

static void sectors_are_torn_and_never_split(void **state)
{
    struct sim_inode *ino;
    struct sim_world *w = world_with_file(&ino);
    bool seen[1 << 6] = {false};
    bool middle = false;
    put(w, ino, 0, 6, 'b');
    put(w, ino, 5, 1, 'c');
    for (uint64_t seed = 0; seed < 4000; seed++) {
        struct sim_world *c = cut(w, SIM_CUT_SECTORS, seed);
        unsigned set = 0;
        for (unsigned i = 0; i < 6; i++)
            set |= (unsigned)(get(c, "/f", i) != 'a') << i; /* get() fails on a split one */
        middle |= get(c, "/f", 5) == 'b';                   /* the version in between */
        seen[set] = true;
        sim_world_free(c);
    }
    for (unsigned i = 0; i < 1 << 6; i++)
        assert_true(seen[i]);
    assert_true(middle);
    sim_world_free(w);
}

static void a_small_write_takes_its_sector_along(void **state)
{
    struct sim_inode *ino;
    struct sim_world *w = world_with_file(&ino);
    inode_write(w, ino, "zz", 2, 2 * SIM_SECTOR - 1); /* ends sector 1, begins sector 2 */
    bool only_one = false;
    for (uint64_t seed = 0; seed < N_CHOICES; seed++) {
        struct sim_world *c = cut(w, SIM_CUT_SECTORS, seed);
        unsigned char buf[4];
        sim_file_read(c, "/f", buf, 4, 2 * SIM_SECTOR - 2);
        assert_true(buf[0] == 'a' && buf[3] == 'a');
        only_one |= buf[1] != buf[2];
        sim_world_free(c);
    }
    assert_true(only_one);
    sim_world_free(w);
}

static void dsync_is_durable_alone(void **state)
{
    struct sim_inode *ino;
    struct sim_world *w = world_with_file(&ino);
    put(w, ino, 0, 6, 'b'); /* older, overlapping: must not come back over it */
    uint64_t op = put(w, ino, 2, 2, 'c');
    inode_sync_op(ino, op);
    unsigned lost = 0;
    for (uint64_t seed = 0; seed < N_CHOICES; seed++) {
        struct sim_world *c = cut(w, SIM_CUT_ANY, seed);
        assert_int_equal(get(c, "/f", 2), 'c');
        assert_int_equal(get(c, "/f", 3), 'c');
        lost += get(c, "/f", 1) == 'a';
        sim_world_free(c);
    }
    assert_in_range(lost, 1, N_CHOICES - 1);
    sim_world_free(w);
}

/* A write that was not answered when the sync was called need not be covered. */
static void a_sync_covers_what_was_answered(void **state)
{
    unsigned lost = 0;
    for (uint64_t seed = 0; seed < 40; seed++) {
        struct sim_inode *ino;
        struct sim_world *w = world_with_file(&ino);
        struct sim_rng rng = {seed};
        unsigned char x[SIM_SECTOR];
        memset(x, 'x', sizeof x);
        put(w, ino, 0, 1, 'b');
        uint64_t upto = w->n_stamps;
        int64_t op = inode_write(w, ino, x, sizeof x, SIM_SECTOR);
        inode_sync(ino, upto, &rng);
        inode_done(w, ino, (uint64_t)op);
        sim_power_cut(w, SIM_CUT_NONE, seed);
        assert_int_equal(get(w, "/f", 0), 'b');
        lost += get(w, "/f", 1) == 'a';
        sim_world_free(w);
    }
    assert_in_range(lost, 1, 39);
}

static void sizes_are_pending_too(void **state)
{
    struct sim_inode *ino;
    struct sim_world *w = world_with_file(&ino);
    bool seen[3] = {false};
    inode_done(w, ino, (uint64_t)inode_truncate(w, ino, SIM_SECTOR));
    inode_done(w, ino, (uint64_t)inode_truncate(w, ino, 16 * SIM_SECTOR));
    assert_int_equal(get(w, "/f", 7), 0);
    for (uint64_t seed = 0; seed < N_CHOICES; seed++) {
        struct sim_world *c = cut(w, SIM_CUT_ANY, seed);
        int64_t size = sim_file_size(c, "/f") / (int64_t)SIM_SECTOR;
        assert_true(size == 1 || size == 8 || size == 16);
        seen[size / 8] = true;
        if (size == 16) /* what was cut off never shows again */
            assert_int_equal(get(c, "/f", 7), 0);
        if (size == 8)
            assert_int_equal(get(c, "/f", 7), 'a');
        sim_world_free(c);
    }
    assert_true(seen[0] && seen[1] && seen[2]);
    sync_all(w, ino);
    sim_power_cut(w, SIM_CUT_NONE, 1);
    assert_int_equal(sim_file_size(w, "/f"), 16 * SIM_SECTOR);
    assert_int_equal(get(w, "/f", 0), 'a');
    assert_int_equal(get(w, "/f", 1), 0);
    sim_world_free(w);
}

static void zeroes_are_pending_too(void **state)
{
    struct sim_inode *ino;
    struct sim_world *w = world_with_file(&ino);
    inode_done(w, ino, (uint64_t)inode_zero(w, ino, SIM_SECTOR, 100 * SIM_SECTOR, IO_ZERO_KEEP));
    assert_int_equal(ino->size, 8 * SIM_SECTOR); /* never grows */
    unsigned torn = 0;
    for (uint64_t seed = 0; seed < N_CHOICES; seed++) {
        struct sim_world *c = cut(w, SIM_CUT_SECTORS, seed);
        torn += get(c, "/f", 1) != get(c, "/f", 7);
        assert_int_equal(get(c, "/f", 0), 'a');
        sim_world_free(c);
    }
    assert_in_range(torn, 1, N_CHOICES - 1);
    sync_all(w, ino);
    inode_done(w, ino, (uint64_t)inode_zero(w, ino, 0, 8 * SIM_SECTOR, IO_ZERO_PUNCH));
    assert_int_equal(sim_disk_used(w), 0);
    sim_power_cut(w, SIM_CUT_NONE, 1);
    assert_int_equal(get(w, "/f", 0), 'a');
    assert_int_equal(get(w, "/f", 1), 0);
    sim_world_free(w);
}

static void a_failed_sync_loses_writes(void **state)
{
    unsigned lost = 0, seen_by_reader = 0;
    for (uint64_t seed = 0; seed < 100; seed++) {
        struct sim_inode *ino;
        struct sim_world *w = world_with_file(&ino);
        struct sim_rng rng = {seed};
        put(w, ino, 0, 1, 'b');
        put(w, ino, 1, 1, 'b');
        inode_lose(ino, w->n_stamps, &rng);
        seen_by_reader += get(w, "/f", 0) == 'b' && get(w, "/f", 1) == 'b';
        inode_sync(ino, w->n_stamps, &rng); /* succeeds, and brings nothing back */
        sim_power_cut(w, SIM_CUT_ALL, seed);
        bool all = get(w, "/f", 0) == 'b' && get(w, "/f", 1) == 'b';
        assert_false(all);
        lost += get(w, "/f", 0) == 'a' && get(w, "/f", 1) == 'a';
        sim_world_free(w);
    }
    assert_in_range(lost, 1, 99);
    assert_in_range(seen_by_reader, 1, 99);
}

static void a_full_disk_says_so(void **state)
{
    struct sim_inode *ino;
    struct sim_world *w = world_with_file(&ino);
    unsigned char x[SIM_CHUNK] = "x";
    sim_disk_limit(w, 2 * SIM_CHUNK);
    assert_int_equal(sim_disk_used(w), SIM_CHUNK);
    assert_true(inode_write(w, ino, x, sizeof x, 0) > 0); /* in place */
    assert_true(inode_write(w, ino, x, sizeof x, SIM_CHUNK) > 0);
    assert_int_equal(inode_write(w, ino, x, 1, 2 * SIM_CHUNK), -ENOSPC);
    assert_true(inode_truncate(w, ino, TIB) > 0); /* a hole costs nothing */
    assert_int_equal(inode_zero(w, ino, 0, TIB, IO_ZERO_KEEP), -ENOSPC);
    assert_true(inode_zero(w, ino, 0, TIB, IO_DISCARD) > 0);
    assert_true(inode_write(w, ino, x, 1, 2 * SIM_CHUNK) > 0);
    assert_int_equal(inode_write(w, ino, x, 1, UINT64_MAX), -EFBIG);
    assert_int_equal(inode_truncate(w, ino, UINT64_MAX), -EFBIG);
    sim_world_free(w);
}

/* ------------------------------------------------------------------ names */

static void paths_have_one_form(void **state)
{
    static const char *const cases[][2] = {{"/", "/"},      {"//a//b/", "/a/b"}, {"./x", "x"},
                                           {".//./x", "x"}, {".", "."},          {"./", "."}};
    char out[SIM_PATH_MAX], big[SIM_PATH_MAX + 10];
    for (unsigned i = 0; i < sizeof cases / sizeof *cases; i++) {
        assert_int_equal(disk_path(cases[i][0], out), 0);
        assert_string_equal(out, cases[i][1]);
    }
    assert_int_equal(disk_path("", out), -ENOENT);
    memset(big, 'a', sizeof big);
    big[sizeof big - 1] = 0;
    assert_int_equal(disk_path(big, out), -ENAMETOOLONG);
}

static void names_give_the_errors_of_linux(void **state)
{
    struct sim_inode *ino;
    struct sim_world *w = world_with_file(&ino);
    assert_int_equal(sim_mkdir(w, "/d"), 0);
    assert_int_equal(sim_mkdir(w, "/d"), -EEXIST);
    assert_int_equal(sim_mkdir(w, "/no/d"), -ENOENT);
    assert_int_equal(sim_file_write(w, "/d/g", "g", 1, 0), 0);
    static const struct {
        const char *path;
        int flags, r;
    } opens[] = {{"/none", O_RDONLY, -ENOENT},       {"/no/f", O_RDWR | O_CREAT, -ENOENT},
                 {"/f/x", O_RDONLY, -ENOTDIR},       {"/f", O_RDWR | O_CREAT | O_EXCL, -EEXIST},
                 {"/f", O_DIRECTORY, -ENOTDIR},      {"/d", O_RDWR, -EISDIR},
                 {"/d", O_RDONLY | O_CREAT, -EISDIR}};
    for (unsigned i = 0; i < sizeof opens / sizeof *opens; i++)
        assert_int_equal(disk_open(w, opens[i].path, opens[i].flags, 0, &ino), opens[i].r);
    assert_int_equal(disk_rename(w, "/none", "/x", 0), -ENOENT);
    assert_int_equal(disk_rename(w, "/f", "/no/x", 0), -ENOENT);
    assert_int_equal(disk_rename(w, "/f", "/d/g", IO_NOREPLACE), -EEXIST);
    assert_int_equal(disk_rename(w, "/f", "/x", IO_EXCHANGE), -ENOENT);
    assert_int_equal(disk_rename(w, "/f", "/d", 0), -EISDIR);
    assert_int_equal(disk_rename(w, "/f", "/x", IO_EXCHANGE | IO_NOREPLACE), -EINVAL);
    assert_int_equal(disk_unlink(w, "/none"), -ENOENT);
    assert_int_equal(disk_unlink(w, "/d"), -EISDIR);
    struct sim_rng rng = {0};
    assert_int_equal(disk_sync_dir(w, "/f", 0, &rng), -ENOTDIR);
    assert_int_equal(disk_sync_dir(w, "/none", 0, &rng), -ENOENT);
    sim_world_free(w);
}

static void an_open_file_outlives_its_name(void **state)
{
    struct sim_inode *ino;
    struct sim_world *w = world_with_file(&ino);
    struct io_stat st;
    assert_int_equal(disk_unlink(w, "/f"), 0);
    disk_stat(w, ino, &st);
    assert_int_equal(st.nlink, 0);
    assert_int_equal(st.size, 8 * SIM_SECTOR);
    assert_int_equal(sim_file_size(w, "/f"), -ENOENT);
    struct sim_rng rng = {0};
    disk_sync_dir(w, "/", w->n_ops, &rng);
    put(w, ino, 0, 1, 'z');
    disk_close(w, ino, 1);
    assert_int_equal(sim_disk_used(w), 0);
    sim_world_free(w);
}

static bool there(struct sim_world *w, const char *path)
{
    return sim_file_size(w, path) >= 0;
}

static void names_need_sync_dir(void **state)
{
    struct sim_inode *ino;
    struct sim_world *w = world_with_file(&ino);
    struct sim_rng rng = {0};
    sim_file_write(w, "/gone", "x", 1, 0);
    sim_file_write(w, "/old", "x", 1, 0);
    inode_sync(open_file(w, "/new", O_RDWR | O_CREAT), w->n_stamps, &rng); /* content only */
    disk_unlink(w, "/gone");
    disk_rename(w, "/old", "/moved", 0);
    unsigned n[3] = {0};
    for (uint64_t seed = 0; seed < N_CHOICES; seed++) {
        struct sim_world *c = cut(w, SIM_CUT_ANY, seed);
        n[0] += there(c, "/new");
        n[1] += there(c, "/gone");
        n[2] += there(c, "/moved");
        assert_int_not_equal(there(c, "/moved"), there(c, "/old")); /* atomic */
        sim_world_free(c);
    }
    for (unsigned i = 0; i < 3; i++)
        assert_in_range(n[i], 1, N_CHOICES - 1);
    disk_sync_dir(w, "/", w->n_ops, &rng);
    for (uint64_t seed = 0; seed < N_CHOICES; seed++) {
        struct sim_world *c = cut(w, SIM_CUT_ANY, seed);
        assert_true(there(c, "/new") && !there(c, "/gone") && there(c, "/moved"));
        sim_world_free(c);
    }
    sim_world_free(w);
}

/* Three changes of the names a and b: the later ones never survive without the earlier. */
static void changes_of_one_name_keep_their_order(void **state)
{
    struct sim_world *w = sim_world_new();
    sim_file_write(w, "/a", "1", 1, 0);
    sim_file_write(w, "/b", "2", 1, 0);
    disk_rename(w, "/a", "/b", IO_EXCHANGE);
    disk_unlink(w, "/b");
    disk_rename(w, "/a", "/c", 0);
    bool seen[4] = {false};
    for (uint64_t seed = 0; seed < N_CHOICES; seed++) {
        struct sim_world *c = cut(w, SIM_CUT_ANY, seed);
        char a = 0, b = 0, d = 0;
        sim_file_read(c, "/a", &a, 1, 0);
        sim_file_read(c, "/b", &b, 1, 0);
        sim_file_read(c, "/c", &d, 1, 0);
        assert_true(a != '2' || b == '1' || b == 0);
        assert_true(a != '1' || (b == '2' && !d)); /* nothing happened */
        assert_true(!d || (d == '2' && !a));
        seen[a == '1' ? 0 : d && !b ? 1 : d ? 2 : 3] = true;
        sim_world_free(c);
    }
    assert_true(seen[0] && seen[1] && seen[2] && seen[3]);
    sim_world_free(w);
}

static void both_directories_must_be_synced(void **state)
{
    struct sim_world *w = sim_world_new();
    struct sim_rng rng = {0};
    sim_mkdir(w, "/d");
    sim_mkdir(w, "/e");
    sim_file_write(w, "/d/f", "1", 1, 0);
    disk_rename(w, "/d/f", "/e/f", 0);
    disk_sync_dir(w, "/e", w->n_ops, &rng);
    struct sim_world *c = cut(w, SIM_CUT_NONE, 0);
    assert_true(there(c, "/d/f") && !there(c, "/e/f"));
    sim_world_free(c);
    disk_sync_dir(w, "/d", w->n_ops, &rng);
    sim_power_cut(w, SIM_CUT_NONE, 0);
    assert_true(!there(w, "/d/f") && there(w, "/e/f"));
    assert_int_equal(sim_file_remove(w, "/e/f"), 0);
    assert_int_equal(sim_world_pending(w), 0);
    sim_world_free(w);
}

/* ------------------------------------------------------------------ locks, clones */

static void locks_are_those_of_linux(void **state)
{
    struct sim_inode *ino;
    struct sim_world *w = world_with_file(&ino);
    enum io_lock sh = IO_LOCK_SHARED, ex = IO_LOCK_EXCLUSIVE;
    assert_int_equal(inode_lock(ino, 1, 100, 50, sh, false), 0);
    assert_int_equal(inode_lock(ino, 2, 100, 50, sh, false), 0);
    assert_int_equal(inode_lock(ino, 2, 120, 1, ex, false), -EAGAIN);
    assert_int_equal(inode_lock(ino, 2, 150, 1, ex, true), 0); /* half-open */
    assert_int_equal(inode_lock(ino, 2, 0, 0, IO_UNLOCK, false), 0);
    assert_int_equal(inode_lock(ino, 1, 120, 10, ex, false), 0); /* upgrade of the middle */
    assert_int_equal(inode_lock(ino, 2, 120, 1, sh, true), -EAGAIN);
    assert_int_equal(inode_lock(ino, 2, 110, 1, sh, true), 0);
    assert_int_equal(inode_lock(ino, 2, 110, 1, ex, true), -EAGAIN);
    assert_int_equal(inode_lock(ino, 1, 110, 30, IO_UNLOCK, false), 0); /* a hole in it */
    assert_int_equal(inode_lock(ino, 2, 110, 30, ex, false), 0);
    assert_int_equal(inode_lock(ino, 2, 109, 1, ex, true), -EAGAIN);
    assert_int_equal(inode_lock(ino, 2, 140, 1, ex, true), -EAGAIN);
    ino->opens++; /* 1 closes: its locks go */
    disk_close(w, ino, 1);
    assert_int_equal(inode_lock(ino, 2, 0, 1000, ex, false), 0);
    sim_power_cut(w, SIM_CUT_PROCESS, 0);
    assert_int_equal(ino->n_locks, 0);
    sim_world_free(w);
}

static void a_clone_is_equal_and_apart(void **state)
{
    struct sim_inode *ino;
    struct sim_world *w = world_with_file(&ino);
    put(w, ino, 1, 2, 'b');
    disk_rename(w, "/f", "/g", 0);
    struct sim_world *c = sim_world_clone(w);
    assert_true(sim_world_hash(c) == sim_world_hash(w));
    assert_int_equal(sim_world_pending(c), sim_world_pending(w));
    for (uint64_t seed = 0; seed < 50; seed++) {
        struct sim_world *x = cut(w, SIM_CUT_ANY, seed), *y = cut(c, SIM_CUT_ANY, seed);
        assert_true(sim_world_hash(x) == sim_world_hash(y)); /* same choice, same disk */
        sim_world_free(x);
        sim_world_free(y);
    }
    put(w, ino, 1, 1, 'q');
    assert_int_equal(get(c, "/g", 1), 'b');
    sim_world_free(w);
    assert_int_equal(get(c, "/g", 2), 'b');
    sim_world_free(c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(store_is_like_an_array),
        cmocka_unit_test(store_is_sparse),
        cmocka_unit_test(flushed_survives_and_unflushed_may_not),
        cmocka_unit_test(modes_do_what_they_say),
        cmocka_unit_test(sectors_are_torn_and_never_split),
        cmocka_unit_test(a_small_write_takes_its_sector_along),
        cmocka_unit_test(dsync_is_durable_alone),
        cmocka_unit_test(a_sync_covers_what_was_answered),
        cmocka_unit_test(sizes_are_pending_too),
        cmocka_unit_test(zeroes_are_pending_too),
        cmocka_unit_test(a_failed_sync_loses_writes),
        cmocka_unit_test(a_full_disk_says_so),
        cmocka_unit_test(paths_have_one_form),
        cmocka_unit_test(names_give_the_errors_of_linux),
        cmocka_unit_test(an_open_file_outlives_its_name),
        cmocka_unit_test(names_need_sync_dir),
        cmocka_unit_test(changes_of_one_name_keep_their_order),
        cmocka_unit_test(both_directories_must_be_synced),
        cmocka_unit_test(locks_are_those_of_linux),
        cmocka_unit_test(a_clone_is_equal_and_apart),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
