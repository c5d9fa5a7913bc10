/* SPDX-License-Identifier: Apache-2.0 */
/* Tests of the QMP client, and of what the tool does with it, against a server in the same process.
 */
#include "base/bytes.h"
#include "base/mem.h"
#include "cli/backup.h"
#include "cli/cli.h"
#include "cli/cli_test.h"
#include "cli/view.h"
#include "lib/client.h"
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>

/* ---- the client ---- */

/* At "s" in the directory. */
static int listen_in(struct dir *d)
{
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    snprintf(sa.sun_path, sizeof sa.sun_path, "%s/s", d->path);
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    assert_int_equal(bind(listener, (struct sockaddr *)&sa, sizeof sa), 0);
    assert_int_equal(listen(listener, 1), 0);
    return listener;
}

/* A daemon that says what it is told, whatever it is asked: `script` has one text for the greeting
 * and one for every request; NULL closes the connection. */
static pid_t play(struct dir *d, const char *const *script)
{
    int listener = listen_in(d);
    pid_t pid = fork();
    if (pid == 0) {
        char buf[4096];
        int fd = accept(listener, NULL, NULL);
        for (; *script; script++) {
            if (write(fd, *script, strlen(*script)) < 0)
                break;
            if (script[1] && read(fd, buf, sizeof buf) <= 0)
                break;
        }
        _exit(0);
    }
    close(listener);
    return pid;
}

#define GREETING "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n"
#define EMPTY "{\"return\": {}}\r\n"

static int open_player(struct dir *d, const char *const *script, struct client **c, pid_t *pid,
                       struct tide_error *err)
{
    char path[80];
    dir_new(d);
    *pid = play(d, script);
    snprintf(path, sizeof path, "%s/s", d->path);
    return client_open(path, c, err);
}

static void close_player(struct dir *d, struct client *c, pid_t pid)
{
    client_close(c);
    waitpid(pid, NULL, 0);
    dir_free(d, (const char *const[]){"s", NULL});
}

TEST(client_talks)
{
    struct dir d;
    struct client *c;
    struct tide_error err;
    json_t *reply, *event;
    pid_t pid;
    static const char *const script[] = {
        GREETING, EMPTY,
        /* events before the answer, no line ends, brackets and quotes in strings */
        "{\"event\": \"A\"}{\"event\":\"B\",\"data\":{\"x\":\"}]\\\"\"}} {\"return\": [1, {}]}",
        "{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"no such thing\"}}",
        "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}, \"id\": 1}", EMPTY, NULL};
    assert_int_equal(open_player(&d, script, &c, &pid, &err), 0);
    assert_int_equal(client_call(c, "x", NULL, &reply, &err), 0);
    assert_int_equal(json_array_size(reply), 2);
    json_decref(reply);
    assert_int_equal(client_event(c, 0, &event, &err), 0);
    assert_string_equal(view_string(event, "event", ""), "A");
    json_decref(event);
    assert_int_equal(client_event(c, 0, &event, &err), 0);
    assert_string_equal(view_string(event, "event", ""), "B");
    json_decref(event);
    assert_int_equal(client_event(c, 0, &event, &err), 0);
    assert_null(event);
    assert_int_equal(client_call(c, "x", json_pack("{s:i}", "a", 1), &reply, &err), CLIENT_REFUSED);
    assert_true(client_unknown_command(&err));
    assert_string_equal(err.msg, "no such thing");
    assert_int_equal(client_call(c, "x", NULL, NULL, &err), CLIENT_REFUSED);
    assert_false(client_unknown_command(&err));
    assert_int_equal(client_quit(c, 5000, &err), 0);
    close_player(&d, c, pid);
}

TEST(client_survives_bad_peers)
{
    static const char *const scripts[][4] = {
        {"hello\n[1]", NULL},          /* no object */
        {"{\"no\": \"QMP\"}", NULL},   /* another protocol */
        {"{\"QMP\": nonsense}", NULL}, /* no JSON */
        {"{\"QMP\": {", NULL},         /* torn */
        {GREETING, NULL},              /* closes before the answer */
        {GREETING, "{\"return\": {}", NULL},
    };
    for (size_t i = 0; i < sizeof scripts / sizeof *scripts; i++) {
        struct dir d;
        struct client *c = NULL;
        struct tide_error err;
        pid_t pid;
        assert_int_equal(open_player(&d, scripts[i], &c, &pid, &err), CLIENT_UNREACHABLE);
        close_player(&d, NULL, pid);
    }
}

TEST(client_without_a_daemon)
{
    struct client *c;
    struct tide_error err;
    char path[200];
    assert_int_equal(client_open("/tmp/tidemark-no-such-socket", &c, &err), CLIENT_UNREACHABLE);
    memset(path, 'a', sizeof path - 1);
    path[sizeof path - 1] = '\0';
    assert_int_equal(client_open(path, &c, &err), -ENAMETOOLONG);
}

TEST(dirty_ranges_come_in_pages)
{
    struct dir d;
    struct client *c;
    struct tide_error err;
    struct ranges r = {0};
    pid_t pid;
    static const char *const script[] = {
        GREETING,
        EMPTY,
        "{\"return\": {\"ranges\": [{\"offset\": 0, \"length\": 10}], \"next\": 20}}",
        "{\"return\": {\"ranges\": [{\"offset\": 20, \"length\": 5}]}}",
        "{\"return\": {\"ranges\": [{\"offset\": 9, \"length\": 5}]}}", /* goes back */
        "{\"return\": {\"ranges\": [], \"next\": 20}}",
        "{\"return\": {\"ranges\": [], \"next\": 20}}", /* for ever */
        NULL};
    assert_int_equal(open_player(&d, script, &c, &pid, &err), 0);
    assert_int_equal(view_dirty_ranges(c, "disk1", "b", &r, &err), 0);
    assert_int_equal(r.n, 2);
    assert_int_equal(ranges_total(&r), 15);
    assert_int_equal(view_dirty_ranges(c, "disk1", "b", &r, &err), -EPROTO);
    assert_int_equal(view_dirty_ranges(c, "disk1", "b", &r, &err), -EPROTO);
    ranges_fini(&r);
    close_player(&d, c, pid);
}

/* ---- bitmaps of points ---- */

TEST(own_bitmaps_are_known_by_name)
{
    static const char *const own[] = {"tidemark-backup-0123abcd-disk1-" P1,
                                      "tidemark-backup-0123abcd-disk1-" P1 ".frozen",
                                      "x-00000000-a-b-c-" P1};
    static const char *const others[] = {"",
                                         "b0",
                                         P1,
                                         "-" P1,
                                         "week-" P1,
                                         "tidemark-backup-0123abcd-disk1",
                                         "tidemark-backup-0123ABCD-disk1-" P1,
                                         "tidemark-backup-0123abcd-" P1,
                                         "-0123abcd-disk1-" P1,
                                         "tidemark-backup-0123abcd-disk1-" P1 ".x",
                                         "tidemark-backup-0123abcd-disk1_" P1};
    for (size_t i = 0; i < sizeof own / sizeof *own; i++)
        assert_true(backup_owns_bitmap(own[i]));
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        assert_false(backup_owns_bitmap(others[i]));
}

#define COMMANDS "{\"return\": [{\"name\": \"query-dirty-ranges\"}]}"
/* A node with the bitmap of the last point, with more members. */
#define NODE(members)                                                                              \
    "{\"return\": [{\"node-name\": \"disk1\", \"ro\": true, \"image\": {\"virtual-size\": "        \
    "1048576}, "                                                                                   \
    "\"dirty-bitmaps\": [{\"name\": \"b-2\", \"granularity\": 65536, \"recording\": true" members  \
    "}]}]}"

struct run {
    struct cli cli;
    struct backup b;
    struct backup_disk disk;
};

/* A run over the disk of make_manifest(), whose last point was made with `generation` (-1: without
 * one). */
static void run_new(struct run *r, int generation)
{
    *r = (struct run){.disk = {.name = "disk1", .fd = -1, .size = MIB},
                      .b = {.stem = "b", .granularity = 65536, .path = "/none", .n = 1}};
    make_manifest(&r->b.manifest);
    struct manifest_disk *d = &r->b.manifest.points[1].disks[0];
    d->has_generation = generation >= 0;
    d->generation = generation >= 0 ? (uint64_t)generation : 0;
    r->b.c = &r->cli;
    r->b.disks = &r->disk;
}

static void run_free(struct run *r)
{
    struct backup_disk *d = &r->disk;
    char *strings[] = {d->why, d->bitmap, d->frozen, d->node, d->job, d->file, d->tmp};
    for (size_t i = 0; i < sizeof strings / sizeof *strings; i++)
        mem_free(strings[i]);
    manifest_fini(&r->b.manifest);
}

/* A bitmap that was cleared, or stopped for a while, looks as before: only its generation tells. */
TEST(lost_sight_makes_a_full_backup)
{
    static const struct {
        int generation; /* of the last point */
        const char *node, *why;
    } cases[] = {
        {7, NODE(", \"generation\": 7"), NULL},
        {7, NODE(", \"generation\": 8"), "was cleared"},
        {7, NODE(", \"generation\": 6"), "was cleared"},
        {7, NODE(""), "this daemon does not tell"},
        {7, NODE(", \"generation\": \"7\""), "this daemon does not tell"},
        {7, NODE(", \"generation\": -7"), "this daemon does not tell"},
        {0, NODE(", \"generation\": 0"), NULL},
        {0, NODE(""), "this daemon does not tell"},
        {-1, NODE(""), NULL}, /* as older tools made it, and a daemon that does not tell */
        {-1, NODE(", \"generation\": 0"), "last point does not tell"},
        {-1, NODE(", \"busy\": true"), "in use"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *const script[] = {GREETING, EMPTY, COMMANDS, COMMANDS, cases[i].node, NULL};
        struct run r;
        struct dir d;
        struct tide_error err;
        pid_t pid;
        run_new(&r, cases[i].generation);
        assert_int_equal(open_player(&d, script, &r.cli.client, &pid, &err), 0);
        assert_int_equal(backup_plan(&r.b, &err), 0);
        assert_int_equal(r.disk.full, cases[i].why != NULL);
        if (cases[i].why && !strstr(r.disk.why, cases[i].why))
            fail_msg("case %zu: '%s'", i, r.disk.why);
        close_player(&d, r.cli.client, pid);
        run_free(&r);
    }
}

#define NEW_NODE(members, members_below)                                                           \
    "{\"return\": [{\"node-name\": \"disk1\", \"dirty-bitmaps\": ["                                \
    "{\"name\": \"b-new\"" members "}, {\"name\": \"b-2\"" members_below "}]}]}"
#define ON ", \"recording\": true"
#define GEN(n) ON ", \"generation\": " #n

/* Somebody clears the old or the new bitmap while the run is between its first look and its
 * transaction: no point comes of it. */
TEST(lost_sight_while_a_backup_begins)
{
    static const struct {
        const char *before, *after;
        int result;
    } cases[] = {
        {NEW_NODE(GEN(9), GEN(7)), NEW_NODE(GEN(9), GEN(7)), 0},
        {NEW_NODE(GEN(9), GEN(7)), NEW_NODE(GEN(10), GEN(7)), -EBUSY},
        {NEW_NODE(GEN(9), GEN(7)), NEW_NODE(GEN(9), GEN(10)), -EBUSY},
        {NEW_NODE(GEN(9), GEN(7)), NEW_NODE(", \"generation\": 9", GEN(7)), -EBUSY},
        {NEW_NODE(GEN(9), GEN(7)), "{\"return\": [{\"node-name\": \"disk1\"}]}", -EBUSY},
        {NEW_NODE(", \"generation\": 9", GEN(7)), NULL, -EBUSY},
        {NEW_NODE(GEN(9), GEN(7)), NULL, CLIENT_UNREACHABLE},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        /* the bitmap, refused as a persistent one; the look; the transaction; the look */
        const char *const script[] = {GREETING,        EMPTY, "{\"error\": {}}", EMPTY,
                                      cases[i].before, EMPTY, cases[i].after,    NULL};
        struct run r;
        struct dir d;
        struct tide_error err;
        pid_t pid;
        run_new(&r, 7);
        r.disk.below = &r.b.manifest.points[1].disks[0];
        r.disk.bitmap = cli_strdup("b-new");
        r.disk.frozen = cli_strdup("b-new.frozen");
        r.disk.job = cli_strdup("job");
        r.disk.node = cli_strdup("target");
        assert_int_equal(open_player(&d, script, &r.cli.client, &pid, &err), 0);
        assert_int_equal(backup_begin(&r.b, &err), cases[i].result);
        if (cases[i].result == 0)
            assert_true(r.disk.has_generation && r.disk.generation == 9);
        close_player(&d, r.cli.client, pid);
        run_free(&r);
    }
}

/* ---- waiting for jobs ---- */

/* One that waits for its group, none of which moves, and three that wait for a command. */
#define STANDING                                                                                   \
    "{\"return\": [{\"id\": \"a\", \"status\": \"waiting\"}, {\"id\": \"b\", \"status\": "         \
    "\"pending\"}, {\"id\": \"c\", \"status\": \"ready\"}, {\"id\": \"d\", \"status\": "           \
    "\"paused\"}]}"

/* A daemon that answers every request by `answer`. */
static pid_t play_on(struct dir *d, const char *answer)
{
    int listener = listen_in(d);
    pid_t pid = fork();
    if (pid == 0) {
        char buf[4096];
        int fd = accept(listener, NULL, NULL);
        const char *text = GREETING;
        while (write(fd, text, strlen(text)) > 0 && read(fd, buf, sizeof buf) > 0)
            text = strstr(buf, "qmp_capabilities") ? EMPTY : answer;
        _exit(0);
    }
    close(listener);
    return pid;
}

TEST(waiting_for_jobs_that_stand_ends)
{
    const char *words[] = {"a", "b", "c", "d"};
    struct dir d;
    char path[80];
    dir_new(&d);
    snprintf(path, sizeof path, "%s/s", d.path);
    pid_t pid = play_on(&d, STANDING);
    struct cli c = {.socket = path, .args = words, .n_args = 4};
    alarm(500); /* a test that hangs dies */
    assert_int_equal(cmd_job_wait(&c), CLI_PARTLY);
    alarm(0);
    close_player(&d, c.client, pid);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(client_talks),
        cmocka_unit_test(client_survives_bad_peers),
        cmocka_unit_test(client_without_a_daemon),
        cmocka_unit_test(dirty_ranges_come_in_pages),
        cmocka_unit_test(own_bitmaps_are_known_by_name),
        cmocka_unit_test(lost_sight_makes_a_full_backup),
        cmocka_unit_test(lost_sight_while_a_backup_begins),
        cmocka_unit_test(waiting_for_jobs_that_stand_ends),
    };
    return cmocka_run_group_tests_name("client", tests, NULL, NULL);
}
