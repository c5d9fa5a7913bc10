/* SPDX-License-Identifier: Apache-2.0 */
/* Tests of base/: errors, the log, memory and arenas, numbers. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "base/bytes.h"
#include "base/error.h"
#include "base/log.h"
#include "base/mem.h"
#include "base/spin.h"
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- Errors ---- */

static void error_is_filled(void **state)
{
    struct tide_error err = {0};
    assert_int_equal(tide_fail(&err, -ENOENT, "bitmap '%s' not found", "b0"), -ENOENT);
    assert_int_equal(err.code, -ENOENT);
    assert_int_equal(err.class, TIDE_GENERIC);
    assert_string_equal(err.msg, "bitmap 'b0' not found");

    assert_int_equal(tide_fail_class(&err, TIDE_DEVICE_NOT_FOUND, -ENODEV, "no %d", 7), -ENODEV);
    assert_int_equal(err.code, -ENODEV);
    assert_int_equal(err.class, TIDE_DEVICE_NOT_FOUND);
    assert_string_equal(err.msg, "no 7");
}

static void error_takes_its_own_message(void **state)
{
    struct tide_error err;
    tide_fail(&err, -EIO, "disk full");
    tide_fail(&err, -EIO, "cannot write: %s", err.msg);
    assert_string_equal(err.msg, "cannot write: disk full");
}

static void error_prefix(void **state)
{
    struct tide_error err;
    tide_fail_class(&err, TIDE_DEVICE_NOT_ACTIVE, -EBUSY, "in use");
    tide_error_prefix(&err, "node '%s': ", "disk0");
    tide_error_prefix(&err, "%s", "");
    tide_error_prefix(&err, "action %d: ", 3);
    assert_string_equal(err.msg, "action 3: node 'disk0': in use");
    assert_int_equal(err.code, -EBUSY);
    assert_int_equal(err.class, TIDE_DEVICE_NOT_ACTIVE);
}

#define MSG_MAX (sizeof((struct tide_error *)0)->msg - 1)

/* Messages of n bytes 'x' and then one character: it is there in whole or not at all. */
static void error_is_cut_at_a_character(void **state)
{
    static const char *const characters[] = {"a", "\xc3\xa4", "\xe2\x82\xac", "\xf0\x9f\x92\xbe"};
    char text[MSG_MAX + 8];
    for (size_t k = 0; k < 4; k++) {
        size_t size = strlen(characters[k]);
        assert_int_equal(size, k + 1);
        for (size_t n = MSG_MAX - 5; n <= MSG_MAX; n++) {
            memset(text, 'x', n);
            strcpy(text + n, characters[k]);
            size_t want = n + size <= MSG_MAX ? n + size : n;
            struct tide_error err;
            tide_fail(&err, -EINVAL, "%s", text);
            assert_int_equal(strlen(err.msg), want);
            assert_memory_equal(err.msg, text, want);
            /* The same through a prefix: text moves to the right and out. */
            text[n + size] = '\0';
            tide_fail(&err, -EINVAL, "%s", text + 3);
            tide_error_prefix(&err, "xxx");
            assert_int_equal(strlen(err.msg), want);
            assert_memory_equal(err.msg, text, want);
        }
    }
}

static void error_suffix(void **state)
{
    (void)state;
    struct tide_error err;
    tide_fail(&err, -EIO, "no");
    tide_error_suffix(&err, "; and %s", "more");
    assert_string_equal(err.msg, "no; and more");
    while (strlen(err.msg) + 3 < sizeof err.msg)
        tide_error_suffix(&err, "%s", "\u20ac");
    size_t len = strlen(err.msg);
    tide_error_suffix(&err, "%s", "\u20ac\u20ac"); /* what is there only in part goes */
    assert_int_equal(strlen(err.msg), len);
    assert_int_equal(err.code, -EIO);
}

static void error_prefix_longer_than_the_buffer(void **state)
{
    char text[MSG_MAX + 2];
    memset(text, 'p', sizeof text - 1);
    text[sizeof text - 1] = '\0';
    struct tide_error err;
    tide_fail(&err, -EINVAL, "gone");
    tide_error_prefix(&err, "%s", text);
    assert_int_equal(strlen(err.msg), MSG_MAX);
    assert_memory_equal(err.msg, text, MSG_MAX);
    /* Exactly full: nothing of the old message is left, and nothing is cut. */
    text[MSG_MAX] = '\0';
    tide_fail(&err, -EINVAL, "gone");
    tide_error_prefix(&err, "%s", text);
    assert_string_equal(err.msg, text);
}

static void error_leaves_bad_utf8_alone(void **state)
{
    char text[MSG_MAX + 2];
    memset(text, 0x80, sizeof text - 1); /* continuation bytes only */
    text[sizeof text - 1] = '\0';
    struct tide_error err;
    tide_fail(&err, -EINVAL, "%s", text);
    assert_int_equal(strlen(err.msg), MSG_MAX);
}

static void class_names(void **state)
{
    assert_string_equal(tide_class_name(TIDE_GENERIC), "GenericError");
    assert_string_equal(tide_class_name(TIDE_COMMAND_NOT_FOUND), "CommandNotFound");
    assert_string_equal(tide_class_name(TIDE_DEVICE_NOT_FOUND), "DeviceNotFound");
    assert_string_equal(tide_class_name(TIDE_DEVICE_NOT_ACTIVE), "DeviceNotActive");
}

static void error_texts(void **state)
{
    assert_string_equal(tide_strerror(ENOENT), "No such file or directory");
    assert_non_null(tide_strerror(0));
    assert_string_equal(tide_strerror(-1), "Unknown error");
    assert_string_equal(tide_strerror(123456), "Unknown error");
}

/* ---- Log ---- */

/* Standard error goes to a file between log_catch() and log_caught(). */
static int caught_fd, stderr_fd;

static void log_catch(void)
{
    caught_fd = memfd_create("log", MFD_CLOEXEC);
    stderr_fd = dup(STDERR_FILENO);
    assert_true(caught_fd >= 0 && stderr_fd >= 0);
    assert_int_equal(dup2(caught_fd, STDERR_FILENO), STDERR_FILENO);
}

static const char *log_caught(void)
{
    static char text[8192];
    assert_int_equal(dup2(stderr_fd, STDERR_FILENO), STDERR_FILENO);
    close(stderr_fd);
    ssize_t n = pread(caught_fd, text, sizeof text - 1, 0);
    close(caught_fd);
    assert_true(n >= 0);
    text[n] = '\0';
    return text;
}

static void log_writes_lines_up_to_its_level(void **state)
{
    log_init("tidemarkd", LOG_LEVEL_WARN);
    log_catch();
    log_error("nbd", "client %d", 7);
    log_warn("qmp", "slow");
    log_info("nbd", "hidden");
    log_debug("nbd", "hidden");
    assert_string_equal(log_caught(),
                        "tidemarkd: error: nbd: client 7\ntidemarkd: warn: qmp: slow\n");
    log_init("t", LOG_LEVEL_DEBUG);
    log_catch();
    log_info("a", "b");
    log_debug("c", "d");
    assert_string_equal(log_caught(), "t: info: a: b\nt: debug: c: d\n");
}

static void log_cannot_be_forged(void **state)
{
    log_init("t", LOG_LEVEL_DEBUG);
    log_catch();
    log_info("nbd", "export '%s'", "x\nt: error: nbd: lie\x1b[2J\x7f\xc3\xa4");
    assert_string_equal(log_caught(), "t: info: nbd: export 'x?t: error: nbd: lie?[2J?\xc3\xa4'\n");
}

static void log_cuts_long_lines(void **state)
{
    char text[5000];
    memset(text, 'x', sizeof text - 1);
    text[sizeof text - 1] = '\0';
    log_init("t", LOG_LEVEL_DEBUG);
    log_catch();
    log_info("a", "%s", text);
    log_info("a", "end");
    log_init(text, LOG_LEVEL_DEBUG);
    log_info("a", "%s", text);
    const char *got = log_caught();
    const char *newline = strchr(got, '\n');
    assert_non_null(newline);
    assert_true(newline - got > 1000 && newline - got < 1024);
    assert_int_equal(strncmp(newline, "\nt: info: a: end\nxxx", 20), 0);
    assert_int_equal(got[strlen(got) - 1], '\n');
    log_init("t", LOG_LEVEL_INFO);
}

static void log_keeps_errno(void **state)
{
    log_init("t", LOG_LEVEL_INFO);
    log_catch();
    close(STDERR_FILENO); /* writing fails with EBADF */
    errno = EXDEV;
    log_error("a", "lost");
    assert_int_equal(errno, EXDEV);
    assert_string_equal(log_caught(), "");
}

/* ---- Memory ---- */

static void mem_basics(void **state)
{
    unsigned char *p = mem_zalloc(100);
    assert_non_null(p);
    for (int i = 0; i < 100; i++)
        assert_int_equal(p[i], 0);
    p[99] = 7;
    p = mem_realloc(p, 50, 4);
    assert_non_null(p);
    assert_int_equal(p[99], 7);
    mem_free(p);
    mem_free(NULL);

    void *a = mem_aligned(4096, 10);
    assert_non_null(a);
    assert_int_equal((uintptr_t)a % 4096, 0);
    mem_free(a);
    a = mem_aligned(1, 10);
    assert_non_null(a);
    mem_free(a);

    mem_autofree char *s = mem_strdup("abc");
    assert_string_equal(s, "abc");
    mem_autofree char *t = mem_printf("%s-%d", s, 5);
    assert_string_equal(t, "abc-5");
    mem_autofree char *none = NULL;
    assert_null(none);
}

static void mem_of_no_bytes_is_not_a_failure(void **state)
{
    void *p[] = {mem_alloc(0), mem_zalloc(0), mem_calloc(0, 5), mem_aligned(64, 0),
                 mem_realloc(NULL, 0, 8)};
    for (size_t i = 0; i < sizeof p / sizeof *p; i++)
        assert_non_null(p[i]);
    p[0] = mem_realloc(p[0], 5, 0);
    assert_non_null(p[0]);
    for (size_t i = 0; i < sizeof p / sizeof *p; i++)
        mem_free(p[i]);
}

static void mem_refuses_what_overflows(void **state)
{
    volatile size_t huge = SIZE_MAX / 2 + 2; /* hidden from the compiler's own check */
    assert_null(mem_alloc(huge));
    assert_null(mem_zalloc(huge));
    assert_null(mem_aligned(16, huge));
    assert_null(mem_calloc(huge, 2));
    assert_null(mem_calloc(huge, 1));
    char *p = mem_alloc(10);
    assert_non_null(p);
    p[0] = 'a';
    assert_null(mem_realloc(p, huge, 2));
    assert_null(mem_realloc(p, 1, huge));
    assert_int_equal(p[0], 'a'); /* `p` stays */
    mem_free(p);
    struct arena a = {0};
    assert_null(arena_alloc(&a, huge));
    assert_null(arena_alloc(&a, SIZE_MAX));
    arena_free(&a);
}

static void *try_each(int which, void **kept)
{
    switch (which) {
    case 0:
        return mem_alloc(1);
    case 1:
        return mem_zalloc(1);
    case 2:
        return mem_calloc(1, 1);
    case 3:
        return mem_aligned(16, 1);
    case 4:
        return mem_strdup("x");
    case 5:
        return mem_printf("x");
    default:
        *kept = mem_alloc(1);
        assert_non_null(*kept);
        mem_fail_after(1);
        return mem_realloc(*kept, 2, 1);
    }
}

static void mem_failures_are_injected_everywhere(void **state)
{
    for (int which = 0; which <= 6; which++) {
        void *kept = NULL;
        mem_fail_after(which == 6 ? 0 : 1);
        assert_null(try_each(which, &kept));
        mem_free(kept);
        void *p = mem_alloc(1); /* once only */
        assert_non_null(p);
        mem_free(p);
        assert_int_equal(mem_fail_after(0), 2);
    }
}

static void mem_fails_the_nth_and_counts(void **state)
{
    mem_fail_after(3);
    void *p[5];
    for (int i = 0; i < 5; i++)
        p[i] = mem_alloc(1);
    assert_int_equal(mem_fail_after(0), 5);
    for (int i = 0; i < 5; i++) {
        assert_int_equal(p[i] == NULL, i == 2);
        mem_free(p[i]);
    }
    assert_int_equal(mem_fail_after(0), 0);
    mem_fail_after(1);
    assert_true(mem_fails());
    assert_false(mem_fails());
    assert_int_equal(mem_fail_after(0), 2);
}

/* Past the rest of exit(): the buffers and the leak checker belong to the parent. */
static void leave_now(int code, void *arg)
{
    _exit(code);
}

static void mem_new_ends_the_process(void **state)
{
    uint64_t *p = mem_new(uint64_t);
    assert_int_equal(*p, 0);
    mem_free(p);
    fflush(NULL);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        close(STDERR_FILENO);
        mem_fail_after(1);
        on_exit(leave_now, NULL);
        (void)!mem_new(uint64_t);
        _exit(99);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), EXIT_FAILURE);
}

/* ---- Arena ---- */

static void arena_gives_zeroed_aligned_memory(void **state)
{
    struct arena a = {0};
    unsigned char *p[600];
    mem_fail_after(0);
    for (size_t i = 0; i < 600; i++) {
        p[i] = arena_alloc(&a, i);
        assert_non_null(p[i]);
        assert_int_equal((uintptr_t)p[i] % 16, 0);
        for (size_t j = 0; j < i; j++)
            assert_int_equal(p[i][j], 0);
        memset(p[i], (int)i, i);
    }
    for (size_t i = 0; i < 600; i++) { /* none lies in another */
        for (size_t j = 0; j < i; j++)
            assert_int_equal(p[i][j], (unsigned char)i);
    }
    assert_true(mem_fail_after(0) < 15); /* blocks grow */
    arena_free(&a);
    assert_null(a.blocks);
    assert_int_equal(a.used, 0);
    assert_int_equal(a.size, 0);
    arena_free(&a); /* of an empty one */
    assert_non_null(arena_alloc(&a, 1));
    arena_free(&a);
}

static void arena_keeps_its_room_beside_large_objects(void **state)
{
    struct arena a = {0};
    unsigned char *large = arena_alloc(&a, MIB); /* the first of all */
    assert_non_null(large);
    large[0] = large[MIB - 1] = 1;
    unsigned char *small = arena_alloc(&a, 16);
    assert_non_null(small);
    unsigned char *other = arena_alloc(&a, MIB);
    assert_non_null(other);
    other[MIB - 1] = 2;
    unsigned char *next = arena_alloc(&a, 16);
    assert_ptr_equal(next, small + 16);
    arena_free(&a);
}

static void arena_strndup_ends_its_copy(void **state)
{
    struct arena a = {0};
    assert_string_equal(arena_strndup(&a, "abcdef", 3), "abc");
    assert_string_equal(arena_strndup(&a, "abc", 100), "abc");
    assert_string_equal(arena_strndup(&a, "abc", 0), "");
    assert_string_equal(arena_strndup(&a, "0123456789abcdef", 16), "0123456789abcdef");
    assert_string_equal(arena_strndup(&a, "next", 4), "next");
    arena_free(&a);
}

static void arena_survives_a_failure(void **state)
{
    struct arena a = {0};
    mem_fail_after(1);
    assert_null(arena_alloc(&a, 10));
    mem_fail_after(1);
    assert_null(arena_strndup(&a, "x", 1));
    char *s = arena_strndup(&a, "kept", 4);
    mem_fail_after(1);
    assert_null(arena_alloc(&a, MIB));
    mem_fail_after(1);
    assert_null(arena_alloc(&a, 2000)); /* needs a new block */
    assert_string_equal(s, "kept");
    assert_non_null(arena_alloc(&a, 2000));
    mem_fail_after(0);
    arena_free(&a);
}

/* ---- Numbers ---- */

static void range_in_never_overflows(void **state)
{
    static const struct {
        uint64_t off, len, size;
        bool in;
    } cases[] = {
        {0, 0, 0, true},
        {0, 1, 0, false},
        {1, 0, 0, false},
        {0, 512, 512, true},
        {0, 513, 512, false},
        {511, 1, 512, true},
        {512, 0, 512, true}, /* empty, at the end */
        {512, 1, 512, false},
        {513, 0, 512, false},
        {UINT64_MAX, 0, 512, false},
        {UINT64_MAX, UINT64_MAX, 512, false},
        {1, UINT64_MAX, 512, false},
        {2, UINT64_MAX - 1, UINT64_MAX, false}, /* the sum wraps to 0 */
        {1, UINT64_MAX - 1, UINT64_MAX, true},
        {0, UINT64_MAX, UINT64_MAX, true},
        {UINT64_C(1) << 63, UINT64_C(1) << 63, UINT64_MAX, false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        assert_int_equal(range_in(cases[i].off, cases[i].len, cases[i].size), cases[i].in);
}

static void bytes_in_network_order(void **state)
{
    unsigned char b[9] = {0};
    put_be64(b + 1, UINT64_C(0x0102030405060708)); /* not aligned */
    for (int i = 1; i <= 8; i++)
        assert_int_equal(b[i], i);
    assert_int_equal(get_be64(b + 1), UINT64_C(0x0102030405060708));
    assert_int_equal(get_be32(b + 1), 0x01020304);
    assert_int_equal(get_be16(b + 1), 0x0102);
    put_be32(b + 1, 0xfffefdfc);
    assert_int_equal(get_be32(b + 1), 0xfffefdfc);
    put_be16(b + 1, 0xabcd);
    assert_int_equal(b[1], 0xab);
}

static void rounding(void **state)
{
    assert_int_equal(round_down(4095, 4096), 0);
    assert_int_equal(round_down(4096, 4096), 4096);
    assert_int_equal(round_up(0, 4096), 0);
    assert_int_equal(round_up(1, 4096), 4096);
    assert_int_equal(round_up(4096, 4096), 4096);
    assert_int_equal(round_down(UINT64_MAX, TIB), UINT64_MAX - TIB + 1);
    assert_false(is_pow2(0));
    assert_true(is_pow2(1));
    assert_false(is_pow2(3));
    assert_true(is_pow2(UINT64_C(1) << 63));
    assert_false(is_pow2(UINT64_MAX));
    assert_int_equal(MIN(3, 5) + MAX(3, 5), 8);
    assert_int_equal(GIB / MIB, 1024);
    assert_int_equal(MIB / KIB, 1024);
}

static void spin_is_free_after_unlock(void **state)
{
    struct spin s = SPIN_INIT;
    for (int i = 0; i < 3; i++) {
        spin_lock(&s);
        assert_true(atomic_flag_test_and_set(&s.held));
        spin_unlock(&s);
    }
    assert_false(atomic_flag_test_and_set(&s.held));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(error_is_filled),
        cmocka_unit_test(error_takes_its_own_message),
        cmocka_unit_test(error_prefix),
        cmocka_unit_test(error_is_cut_at_a_character),
        cmocka_unit_test(error_suffix),
        cmocka_unit_test(error_prefix_longer_than_the_buffer),
        cmocka_unit_test(error_leaves_bad_utf8_alone),
        cmocka_unit_test(class_names),
        cmocka_unit_test(error_texts),
        cmocka_unit_test(log_writes_lines_up_to_its_level),
        cmocka_unit_test(log_cannot_be_forged),
        cmocka_unit_test(log_cuts_long_lines),
        cmocka_unit_test(log_keeps_errno),
        cmocka_unit_test(mem_basics),
        cmocka_unit_test(mem_of_no_bytes_is_not_a_failure),
        cmocka_unit_test(mem_refuses_what_overflows),
        cmocka_unit_test(mem_failures_are_injected_everywhere),
        cmocka_unit_test(mem_fails_the_nth_and_counts),
        cmocka_unit_test(mem_new_ends_the_process),
        cmocka_unit_test(arena_gives_zeroed_aligned_memory),
        cmocka_unit_test(arena_keeps_its_room_beside_large_objects),
        cmocka_unit_test(arena_strndup_ends_its_copy),
        cmocka_unit_test(arena_survives_a_failure),
        cmocka_unit_test(range_in_never_overflows),
        cmocka_unit_test(bytes_in_network_order),
        cmocka_unit_test(rounding),
        cmocka_unit_test(spin_is_free_after_unlock),
    };
    return cmocka_run_group_tests_name("base", tests, NULL, NULL);
}
