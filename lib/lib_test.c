/* SPDX-License-Identifier: Apache-2.0 */
/* libtidemark against a daemon that is a thread here and says what it is told: what is sent, what
 * becomes of each kind of answer, lost connections, time limits. */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <tidemark/tidemark.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#define TEST(name) static void name(void **state)
#define GREETING "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n"
#define OK "{\"return\": {}}\r\n"
#define LOSE ""      /* the connection, without an answer */
#define SILENT "..." /* no answer, until the client goes */

/* Answers to the requests behind qmp_capabilities, over several connections; NULL: the last. */
struct player {
    char dir[64], path[80];
    const char *const *script;
    int listener;
    pthread_t thread;
    char request[3][1200];
    size_t n;
};

/* One request, which ends with its line. */
static bool read_line(int fd, char *buf, size_t size)
{
    size_t used = 0;
    while (used + 1 < size && read(fd, buf + used, 1) == 1)
        if (buf[used++] == '\n')
            break;
    buf[used] = '\0';
    return used > 0;
}

/* True: there may be another connection. */
static bool serve(struct player *p, int fd)
{
    char buf[200];
    if (write(fd, GREETING, strlen(GREETING)) < 0 || !read_line(fd, buf, sizeof buf) ||
        write(fd, OK, strlen(OK)) < 0)
        return true;
    while (*p->script && read_line(fd, p->request[p->n % 3], sizeof p->request[0])) {
        const char *answer = *p->script++;
        p->n++;
        if (!*answer)
            return true;
        if (strcmp(answer, SILENT) == 0)
            return poll(&(struct pollfd){.fd = fd, .events = POLLRDHUP}, 1, -1) > 0;
        if (write(fd, answer, strlen(answer)) < 0)
            return true;
    }
    if (*p->script)
        return true;
    poll(&(struct pollfd){.fd = fd, .events = POLLRDHUP}, 1, -1); /* the client ends it */
    return false;
}

static void *play(void *arg)
{
    struct player *p = arg;
    bool more = true;
    while (more) {
        int fd = accept(p->listener, NULL, NULL);
        if (fd < 0)
            break;
        more = serve(p, fd) && *p->script;
        close(fd);
    }
    return NULL;
}

/* A listener with room for `backlog` + 1 clients, and a thread that runs `main`. */
static void begin_player(struct player *p, const char *const *script, int backlog,
                         void *(*main)(void *))
{
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    *p = (struct player){.dir = "/tmp/tidemark-lib-test-XXXXXX", .script = script};
    assert_non_null(mkdtemp(p->dir));
    snprintf(p->path, sizeof p->path, "%s/s", p->dir);
    memcpy(sa.sun_path, p->path, strlen(p->path) + 1);
    p->listener = socket(AF_UNIX, SOCK_STREAM, 0);
    assert_int_equal(bind(p->listener, (struct sockaddr *)&sa, sizeof sa), 0);
    assert_int_equal(listen(p->listener, backlog), 0);
    assert_int_equal(pthread_create(&p->thread, NULL, main, p), 0);
}

static struct tide_conn *begin(struct player *p, const char *const *script)
{
    begin_player(p, script, 4, play);
    struct tide_conn *conn = tide_conn_new();
    assert_non_null(conn);
    assert_false(tide_conn_is_open(conn));
    assert_int_equal(tide_conn_open(conn, p->path), 0);
    assert_true(tide_conn_is_open(conn));
    return conn;
}

static void end(struct player *p, struct tide_conn *conn)
{
    tide_conn_free(conn);
    shutdown(p->listener, SHUT_RDWR);
    pthread_join(p->thread, NULL);
    close(p->listener);
    unlink(p->path);
    rmdir(p->dir);
}

/* ---- opening ---- */

enum { N_SIGNALS = 20 };
static sem_t signalled;

static void note_signal(int sig)
{
    sem_post(&signalled);
}

/* There is no room for another client before so many signals have come. */
static void *play_late(void *arg)
{
    struct player *p = arg;
    for (unsigned i = 0; i < N_SIGNALS; i++)
        sem_wait(&signalled);
    close(accept(p->listener, NULL, NULL));
    return play(p);
}

TEST(signals_do_not_end_the_opening)
{
    static const char *const script[] = {OK, NULL};
    struct itimerval often = {{0, 5000}, {0, 5000}};
    struct sigaction act = {.sa_handler = note_signal, .sa_flags = SA_RESTART}, old;
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    struct player p;
    sigset_t alarm_only;
    sigemptyset(&alarm_only);
    sigaddset(&alarm_only, SIGALRM);
    assert_int_equal(sem_init(&signalled, 0, 0), 0);
    assert_int_equal(sigaction(SIGALRM, &act, &old), 0);
    pthread_sigmask(SIG_BLOCK, &alarm_only, NULL); /* the player's thread gets none */
    begin_player(&p, script, 0, play_late);
    int first = socket(AF_UNIX, SOCK_STREAM, 0);
    memcpy(sa.sun_path, p.path, strlen(p.path) + 1);
    assert_int_equal(connect(first, (struct sockaddr *)&sa, sizeof sa), 0);
    pthread_sigmask(SIG_UNBLOCK, &alarm_only, NULL);

    assert_int_equal(setitimer(ITIMER_REAL, &often, NULL), 0);
    struct tide_conn *conn = tide_conn_new();
    int r = tide_conn_open(conn, p.path);
    often = (struct itimerval){0};
    setitimer(ITIMER_REAL, &often, NULL);
    if (r < 0)
        fail_msg("%s", tide_conn_error(conn));
    assert_int_equal(tide_conn_call(conn, "stop", NULL, NULL), 0);
    close(first);
    end(&p, conn);
    sigaction(SIGALRM, &old, NULL);
    sem_destroy(&signalled);
}

/* ---- what is sent ---- */

TEST(lists_are_sent_as_they_were_built)
{
    static const char *const script[] = {OK, OK, NULL};
    struct player p;
    struct tide_conn *conn = begin(&p, script);
    struct tide_txn *txn = tide_txn_new();
    struct tide_block_dirty_bitmap_or_str sources[] = {
        {.string = "b0"}, {.object = &(struct tide_block_dirty_bitmap){"d1", "x"}}};
    assert_int_equal(tide_txn_block_dirty_bitmap_add(
                         txn,
                         &(struct tide_block_dirty_bitmap_add){
                             .node = "d0", .name = "b1", .granularity = 65536, .disabled = true}),
                     0);
    assert_int_equal(tide_txn_block_dirty_bitmap_merge(
                         txn, &(struct tide_block_dirty_bitmap_merge){"d0", "b1", 2, sources}),
                     0);
    assert_int_equal(tide_txn_abort(txn), 0);
    assert_int_equal(tide_txn_json(txn, "{\"type\": \"new-kind\", \"data\": {\"x\": [null]}}"), 0);
    assert_int_equal(tide_txn_json(txn, "[{\"type\": \"a\"}, {\"type\": \"b\"}]"), 0);
    assert_int_equal(tide_txn_length(txn), 6);
    assert_int_equal(tide_txn_run(txn, conn), 0);
    tide_txn_set_grouped(txn, true);
    assert_int_equal(tide_txn_set_id(txn, "me"), 0);
    assert_int_equal(tide_txn_run(txn, conn), 0);
    assert_string_equal(tide_txn_error(txn), "");
    assert_int_equal(tide_txn_failed_action(txn), -1);
    assert_false(tide_txn_replayed(txn));
    assert_false(tide_txn_undone(txn));
    tide_txn_free(txn);
    end(&p, conn);
#define ACTIONS                                                                                    \
    "{\"actions\":[{\"type\":\"block-dirty-bitmap-add\",\"data\":{\"node\":\"d0\",\"name\":"       \
    "\"b1\",\"granularity\":65536,\"disabled\":true}},"                                            \
    "{\"type\":\"block-dirty-bitmap-merge\",\"data\":{\"node\":\"d0\",\"target\":\"b1\","          \
    "\"bitmaps\":[\"b0\",{\"node\":\"d1\",\"name\":\"x\"}]}},"                                     \
    "{\"type\":\"abort\",\"data\":{}},{\"type\":\"new-kind\",\"data\":{\"x\":[null]}},"            \
    "{\"type\":\"a\"},{\"type\":\"b\"}]"
    assert_string_equal(p.request[0], "{\"execute\":\"transaction\",\"arguments\":" ACTIONS "}}\n");
    assert_string_equal(p.request[1], "{\"execute\":\"transaction\",\"arguments\":" ACTIONS
                                      ",\"properties\":{\"completion-mode\":\"grouped\",\"id\":"
                                      "\"me\"}}}\n");
}

TEST(a_bad_addition_is_remembered)
{
    static const char *const script[] = {OK, NULL};
    struct player p;
    struct tide_conn *conn = begin(&p, script);
    struct tide_txn *txn = tide_txn_new();
    struct tide_block_dirty_bitmap_add add = {.node = "d0"};
    assert_int_equal(tide_txn_abort(txn), 0);
    assert_int_equal(tide_txn_block_dirty_bitmap_add(txn, &add), -EINVAL);
    assert_string_equal(tide_txn_error(txn),
                        "action 1 (block-dirty-bitmap-add): member 'name' is missing");
    add.name = "\xff";
    assert_int_equal(tide_txn_block_dirty_bitmap_add(txn, &add), -EINVAL);
    assert_non_null(strstr(tide_txn_error(txn), "is missing")); /* the first stays */
    add.name = "b";
    assert_int_equal(tide_txn_block_dirty_bitmap_add(txn, &add), 0);
    assert_int_equal(tide_txn_run(txn, conn), -EINVAL);
    assert_int_equal(tide_txn_length(txn), 2);
    tide_txn_free(txn);
    static const char *const bad[] = {"", "x", "[", "7", NULL};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        txn = tide_txn_new();
        assert_int_equal(tide_txn_json(txn, bad[i]), -EINVAL);
        assert_int_equal(tide_txn_run(txn, conn), -EINVAL);
        tide_txn_free(txn);
    }
    txn = tide_txn_new();
    assert_int_equal(tide_txn_block_dirty_bitmap_add(txn, NULL), -EINVAL);
    tide_txn_free(txn);
    txn = tide_txn_new();
    assert_int_equal(tide_txn_set_id(txn, "\xff"), 0);
    assert_int_equal(tide_txn_run(txn, conn), -EINVAL);
    tide_txn_free(txn);
    assert_true(tide_conn_is_open(conn));
    end(&p, conn);
    assert_int_equal(p.n, 0); /* nothing was sent */
}

/* ---- what is answered ---- */

TEST(the_failing_action_can_be_read)
{
    static const char *const script[] = {
        "{\"event\": \"X\"}{\"error\": {\"class\": \"DeviceNotFound\", \"desc\": \"no\", \"data\": "
        "{\"action\": 1, \"kind\": \"abort\", \"phase\": \"prepare\", \"undone\": true}}}",
        "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\", \"data\": {\"action\": 0, "
        "\"undone\": false, \"replayed\": true}}}",
        "{\"error\": {\"class\": \"GenericError\", \"desc\": \"parse\"}}", OK, NULL};
    struct player p;
    struct tide_conn *conn = begin(&p, script);
    struct tide_txn *txn = tide_txn_new();
    tide_txn_json(txn, "[{\"type\": \"a\"}, {\"type\": \"b\"}]");
    assert_int_equal(tide_txn_run(txn, conn), -EREMOTEIO);
    assert_int_equal(tide_txn_failed_action(txn), 1);
    assert_string_equal(tide_txn_failed_kind(txn), "b");
    assert_string_equal(tide_txn_failed_phase(txn), "prepare");
    assert_string_equal(tide_txn_error(txn), "no");
    assert_string_equal(tide_txn_error_class(txn), "DeviceNotFound");
    assert_string_equal(tide_conn_error_class(conn), "DeviceNotFound");
    assert_true(tide_txn_undone(txn));
    assert_false(tide_txn_replayed(txn));
    assert_int_equal(tide_txn_run(txn, conn), -EREMOTEIO);
    assert_false(tide_txn_undone(txn));
    assert_true(tide_txn_replayed(txn));
    assert_int_equal(tide_txn_run(txn, conn), -EREMOTEIO);
    assert_int_equal(tide_txn_failed_action(txn), -1);
    assert_null(tide_txn_failed_kind(txn));
    assert_int_equal(tide_txn_run(txn, conn), 0);
    assert_string_equal(tide_txn_error(txn), "");
    tide_txn_free(txn);
    char *event;
    assert_int_equal(tide_conn_event(conn, 0, NULL), -EINVAL);
    assert_int_equal(tide_conn_event(conn, 0, &event), 1);
    assert_string_equal(event, "{\"event\":\"X\"}");
    tide_free(event);
    assert_int_equal(tide_conn_event(conn, 0, &event), 0);
    assert_null(event);
    end(&p, conn);
}

TEST(a_dry_run_is_reported)
{
    static const char *const script[] = {
        "{\"return\": {\"outcome\": \"would-commit\", \"held-ns\": 77, \"actions\": [{\"action\": "
        "0, "
        "\"kind\": \"a\", \"outcome\": \"exercised\", \"sees\": \"s\", \"does\": \"d\"}]}}",
        "{\"return\": {\"outcome\": \"would-fail\", \"held-ns\": 1, \"error\": \"why\", "
        "\"failed-action\": 0, \"actions\": [{\"action\": 0, \"outcome\": \"failed\"}]}}",
        NULL};
    struct player p;
    struct tide_conn *conn = begin(&p, script);
    struct tide_txn *txn = tide_txn_new();
    tide_txn_json(txn, "{\"type\": \"a\"}");
    tide_txn_set_dry_run(txn, true);
    assert_int_equal(tide_txn_run(txn, conn), 0);
    assert_true(tide_txn_would_commit(txn));
    assert_int_equal(tide_txn_held_ns(txn), 77);
    assert_string_equal(tide_txn_report_outcome(txn, 0), "exercised");
    assert_string_equal(tide_txn_report_sees(txn, 0), "s");
    assert_string_equal(tide_txn_report_does(txn, 0), "d");
    assert_null(tide_txn_report_outcome(txn, 1));
    assert_int_equal(tide_txn_run(txn, conn), 0);
    assert_false(tide_txn_would_commit(txn));
    assert_int_equal(tide_txn_failed_action(txn), 0);
    assert_string_equal(tide_txn_failed_kind(txn), "a");
    assert_string_equal(tide_txn_error(txn), "why");
    assert_null(tide_txn_report_sees(txn, 0));
    tide_txn_free(txn);
    end(&p, conn);
    assert_non_null(strstr(p.request[0], "\"properties\":{\"dry-run\":true}"));
}

TEST(any_command_can_be_called)
{
    static const char *const script[] = {
        "{\"return\": [1, {\"a\": null}]}", OK,
        "{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"no such\"}}", NULL};
    struct player p;
    struct tide_conn *conn = begin(&p, script);
    char *reply;
    assert_int_equal(tide_conn_call(conn, "x", "{\"b\": 1}", &reply), 0);
    assert_string_equal(reply, "[1,{\"a\":null}]");
    tide_free(reply);
    assert_int_equal(tide_conn_call(conn, "y", NULL, NULL), 0);
    assert_int_equal(tide_conn_call(conn, "z", "[1]", &reply), -EINVAL);
    assert_non_null(strstr(tide_conn_error(conn), "'z'"));
    assert_int_equal(tide_conn_call(conn, "\xff", NULL, &reply), -EINVAL);
    assert_int_equal(tide_conn_call(conn, NULL, NULL, &reply), -EINVAL);
    assert_int_equal(tide_conn_call(conn, "z", NULL, &reply), -EREMOTEIO);
    assert_null(reply);
    assert_string_equal(tide_conn_error(conn), "no such");
    assert_string_equal(tide_conn_error_class(conn), "CommandNotFound");
    assert_true(tide_conn_is_open(conn));
    end(&p, conn);
    assert_string_equal(p.request[0], "{\"execute\":\"x\",\"arguments\":{\"b\":1}}\n");
    assert_string_equal(p.request[1], "{\"execute\":\"y\"}\n");
}

/* ---- lost connections ---- */

TEST(a_list_with_an_id_is_sent_again)
{
    static const char *const script[] = {
        LOSE, "{\"return\": {\"id\": \"x\", \"outcome\": \"replayed\"}}", NULL};
    struct player p;
    struct tide_conn *conn = begin(&p, script);
    struct tide_txn *txn = tide_txn_new(), *other = tide_txn_new();
    tide_txn_json(txn, "{\"type\": \"a\"}");
    assert_int_equal(tide_txn_choose_id(txn), 0);
    assert_int_equal(tide_txn_choose_id(other), 0);
    assert_string_not_equal(tide_txn_id(txn), tide_txn_id(other));
    assert_int_equal(tide_txn_run(txn, conn), -ECONNRESET);
    assert_false(tide_conn_is_open(conn));
    assert_false(tide_txn_undone(txn)); /* nobody knows */
    assert_non_null(strstr(tide_txn_error(txn), "closed the connection"));
    assert_int_equal(tide_txn_run(txn, conn), -ENOTCONN);
    assert_int_equal(tide_conn_open(conn, p.path), 0);
    assert_int_equal(tide_txn_run(txn, conn), 0);
    assert_true(tide_txn_replayed(txn));
    tide_txn_free(txn);
    tide_txn_free(other);
    end(&p, conn);
    assert_int_equal(p.n, 2);
    assert_string_equal(p.request[0], p.request[1]);
}

TEST(time_limits)
{
    static const char *const script[] = {SILENT, OK, NULL};
    struct player p;
    struct tide_conn *conn = begin(&p, script);
    char *reply;
    tide_conn_set_timeout(conn, 50);
    assert_int_equal(tide_conn_call(conn, "x", NULL, &reply), -ETIMEDOUT);
    assert_false(tide_conn_is_open(conn));
    assert_non_null(strstr(tide_conn_error(conn), "50 ms"));
    assert_int_equal(tide_conn_open(conn, p.path), 0); /* the limit stays */
    tide_conn_set_timeout(conn, -5);
    assert_int_equal(tide_conn_call(conn, "x", NULL, &reply), 0);
    tide_free(reply);
    end(&p, conn);
}

/* A request that the daemon does not read, larger than what the socket holds. */
TEST(time_limits_hold_while_sending)
{
    static const char *const script[] = {SILENT, NULL};
    struct player p;
    struct tide_conn *conn = begin(&p, script);
    struct tide_txn *txn = tide_txn_new();
    size_t len = 16u << 20;
    char *id = malloc(len);
    memset(id, 'x', len - 1);
    id[len - 1] = '\0';
    tide_txn_set_id(txn, id);
    free(id);
    tide_conn_set_timeout(conn, 200);
    assert_int_equal(tide_txn_run(txn, conn), -ETIMEDOUT);
    tide_txn_free(txn);
    end(&p, conn);
}

TEST(connections_that_cannot_be)
{
    struct tide_conn *conn = tide_conn_new();
    char *event, long_path[300];
    memset(long_path, 'a', sizeof long_path - 1);
    long_path[sizeof long_path - 1] = '\0';
    assert_int_equal(tide_conn_open(conn, "/nonexistent/socket"), -ENOTCONN);
    assert_non_null(strstr(tide_conn_error(conn), "'/nonexistent/socket'"));
    assert_string_equal(tide_conn_error_class(conn), "");
    assert_int_equal(tide_conn_open(conn, long_path), -ENAMETOOLONG);
    assert_int_equal(tide_conn_open(conn, NULL), -EINVAL);
    assert_int_equal(tide_conn_call(conn, "x", NULL, NULL), -ENOTCONN);
    assert_int_equal(tide_conn_event(conn, 0, &event), -ENOTCONN);
    tide_conn_free(conn);
}

/* What _new() returns without memory goes through everything. */
TEST(null_is_no_memory)
{
    struct tide_conn *conn = tide_conn_new();
    char *text;
    assert_int_equal(tide_conn_open(NULL, "/x"), -ENOMEM);
    assert_int_equal(tide_conn_call(NULL, "x", NULL, &text), -ENOMEM);
    assert_int_equal(tide_conn_event(NULL, 0, &text), -ENOMEM);
    assert_false(tide_conn_is_open(NULL));
    assert_string_equal(tide_conn_error(NULL), "");
    tide_conn_set_timeout(NULL, 1);
    tide_conn_free(NULL);
    tide_free(NULL);
    assert_int_equal(tide_txn_abort(NULL), -ENOMEM);
    assert_int_equal(tide_txn_json(NULL, "[]"), -ENOMEM);
    assert_int_equal(tide_txn_set_id(NULL, "x"), -ENOMEM);
    assert_int_equal(tide_txn_choose_id(NULL), -ENOMEM);
    assert_int_equal(tide_txn_run(NULL, conn), -ENOMEM);
    assert_int_equal(tide_txn_failed_action(NULL), -1);
    assert_null(tide_txn_failed_kind(NULL));
    assert_null(tide_txn_failed_phase(NULL));
    assert_null(tide_txn_id(NULL));
    assert_null(tide_txn_report_sees(NULL, 0));
    assert_int_equal(tide_txn_length(NULL) + tide_txn_held_ns(NULL), 0);
    assert_false(tide_txn_undone(NULL) || tide_txn_replayed(NULL) || tide_txn_would_commit(NULL));
    tide_txn_set_grouped(NULL, true);
    tide_txn_set_dry_run(NULL, true);
    tide_txn_free(NULL);
    struct tide_txn *txn = tide_txn_new();
    assert_int_equal(tide_txn_run(txn, NULL), -ENOMEM);
    tide_txn_free(txn);
    tide_conn_free(conn);
    assert_true(*tide_version() != '\0');
}

/* ---- peers that are out of their mind, and busy ones ---- */

TEST(what_is_no_answer_is_no_refusal)
{
    static const char *const script[] = {
        "{\"x\": 1}\r\n", "{\"error\": 3}\r\n",
        "{\"error\": {\"class\": \"GenericError\", \"desc\": \"d\", \"data\": {\"action\": "
        "-5}}}\r\n",
        "{\"error\": {\"class\": \"GenericError\", \"desc\": \"d\", \"data\": {\"action\": "
        "4294967296}}}\r\n",
        NULL};
    struct player p;
    struct tide_conn *conn = begin(&p, script);
    struct tide_txn *txn = tide_txn_new();
    assert_int_equal(tide_txn_abort(txn), 0);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(tide_txn_run(txn, conn), -ECONNRESET);
        assert_false(tide_txn_undone(txn));
        assert_false(tide_conn_is_open(conn));
        assert_int_equal(tide_conn_open(conn, p.path), 0);
    }
    for (int i = 0; i < 2; i++) {
        assert_int_equal(tide_txn_run(txn, conn), -EREMOTEIO);
        assert_int_equal(tide_txn_failed_action(txn), -1);
    }
    tide_txn_free(txn);
    end(&p, conn);
}

static int64_t cpu_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
    return ts.tv_sec * 1000000000 + ts.tv_nsec;
}

/* An event costs the same however many wait behind it: taking them costs about what reading did. */
TEST(a_flood_of_events_is_taken_in_order)
{
    enum { N = 200000 };
    char *flood = NULL, *event, want[40];
    size_t len;
    FILE *f = open_memstream(&flood, &len);
    for (int i = 0; i < N; i++)
        fprintf(f, "{\"event\":\"E%d\"}\r\n", i);
    fputs(OK, f);
    assert_int_equal(fclose(f), 0);
    const char *const script[] = {flood, OK, NULL};
    struct player p;
    struct tide_conn *conn = begin(&p, script);
    int64_t start = cpu_ns();
    assert_int_equal(tide_conn_call(conn, "stop", NULL, NULL), 0);
    int64_t reading = cpu_ns() - start;
    start = cpu_ns();
    for (int i = 0; i < N; i++) {
        snprintf(want, sizeof want, "{\"event\":\"E%d\"}", i);
        assert_int_equal(tide_conn_event(conn, 0, &event), 1);
        assert_string_equal(event, want);
        tide_free(event);
    }
    int64_t taking = cpu_ns() - start;
    assert_true(taking < 4 * reading);
    assert_int_equal(tide_conn_event(conn, 0, &event), 0);
    end(&p, conn);
    free(flood);
}

int main(void)
{
    alarm(500); /* a test that hangs dies */
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(signals_do_not_end_the_opening),
        cmocka_unit_test(lists_are_sent_as_they_were_built),
        cmocka_unit_test(a_bad_addition_is_remembered),
        cmocka_unit_test(the_failing_action_can_be_read),
        cmocka_unit_test(a_dry_run_is_reported),
        cmocka_unit_test(any_command_can_be_called),
        cmocka_unit_test(a_list_with_an_id_is_sent_again),
        cmocka_unit_test(time_limits),
        cmocka_unit_test(time_limits_hold_while_sending),
        cmocka_unit_test(connections_that_cannot_be),
        cmocka_unit_test(null_is_no_memory),
        cmocka_unit_test(what_is_no_answer_is_no_refusal),
        cmocka_unit_test(a_flood_of_events_is_taken_in_order),
    };
    return cmocka_run_group_tests_name("lib", tests, NULL, NULL);
}
