/* SPDX-License-Identifier: Apache-2.0 */
/* Verbs of a job that was made and has not started. No client ever meets one, for the list that
 * makes it also starts it before it is answered: so this is asked of job.h itself. The other states
 * are asked over QMP, in tests/system/test_contract_jobs.py. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#include "job/job.h"

static void kick(struct job *j)
{
}

static const struct job_ops ops = {.type = "test", .kick = kick};

struct fixture {
    struct jobs *js;
    struct job job;
    struct tide_error err;
};

static void begin(struct fixture *f)
{
    const struct job_options o = {.id = "j", .auto_finalize = true, .auto_dismiss = true};
    *f = (struct fixture){0};
    assert_int_equal(jobs_new(NULL, NULL, &f->js), 0);
    assert_int_equal(job_register(&f->job, f->js, &ops, &o, &f->err), 0);
}

static void end(struct fixture *f)
{
    assert_int_equal(f->job.status, JOB_CREATED);
    job_drop(&f->job);
    jobs_free(f->js);
}

static void refused(struct fixture *f, int r, const char *verb)
{
    assert_int_equal(r, -EPERM);
    assert_non_null(strstr(f->err.msg, "'j'"));
    assert_non_null(strstr(f->err.msg, "'created'"));
    assert_non_null(strstr(f->err.msg, verb));
}

static void created_job_takes_cancel(void **state)
{
    for (int soft = 0; soft < 2; soft++) {
        struct fixture f;
        begin(&f);
        assert_int_equal(job_apply(&f.job, JOB_CANCEL, !soft, soft, &f.err), 0);
        assert_true(job_cancelled(&f.job));
        end(&f);
    }
}

static void created_job_takes_pause(void **state)
{
    struct fixture f;
    begin(&f);
    assert_int_equal(job_apply(&f.job, JOB_PAUSE, false, false, &f.err), 0);
    assert_true(job_wants_pause(&f.job));
    assert_int_equal(job_apply(&f.job, JOB_PAUSE, false, false, &f.err),
                     -EPERM); /* it is already */
    end(&f);
}

static void created_job_takes_resume(void **state)
{
    struct fixture f;
    begin(&f);
    assert_int_equal(job_apply(&f.job, JOB_RESUME, false, false, &f.err), -EPERM);
    assert_non_null(strstr(f.err.msg, "was not paused"));
    assert_int_equal(job_apply(&f.job, JOB_PAUSE, false, false, &f.err), 0);
    assert_int_equal(job_apply(&f.job, JOB_RESUME, false, false, &f.err), 0);
    assert_false(job_wants_pause(&f.job));
    end(&f);
}

static void created_job_takes_set_speed(void **state)
{
    struct fixture f;
    begin(&f);
    assert_int_equal(job_set_speed(&f.job, 77, &f.err), 0);
    assert_int_equal(atomic_load(&f.job.speed), 77);
    assert_int_equal(job_set_speed(&f.job, -1, &f.err), -EINVAL);
    assert_int_equal(atomic_load(&f.job.speed), 77);
    end(&f);
}

static void created_job_takes_no_complete(void **state)
{
    struct fixture f;
    begin(&f);
    refused(&f, job_apply(&f.job, JOB_COMPLETE, false, false, &f.err), "'complete'");
    end(&f);
}

static void created_job_takes_no_finalize(void **state)
{
    struct fixture f;
    begin(&f);
    refused(&f, job_finalize(&f.job, &f.err), "'finalize'");
    end(&f);
}

static void created_job_takes_no_dismiss(void **state)
{
    struct fixture f;
    begin(&f);
    refused(&f, job_apply(&f.job, JOB_DISMISS, false, false, &f.err), "'dismiss'");
    end(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(created_job_takes_cancel),
        cmocka_unit_test(created_job_takes_pause),
        cmocka_unit_test(created_job_takes_resume),
        cmocka_unit_test(created_job_takes_set_speed),
        cmocka_unit_test(created_job_takes_no_complete),
        cmocka_unit_test(created_job_takes_no_finalize),
        cmocka_unit_test(created_job_takes_no_dismiss),
    };
    return cmocka_run_group_tests_name("job", tests, NULL, NULL);
}
