/* SPDX-License-Identifier: Apache-2.0 */
/* Commands about jobs. job-* name any job by `id`; block-job-* name block jobs, mostly by `device`,
 * which is the job's id, and report an unknown one as DeviceNotActive. */
#include <errno.h>

#include "job/job.h"
#include "qmp/dispatch.h"
#include "qmp/instance.h"
#include "schema/handlers.h"

static int apply(struct qmp_call *call, const char *id, enum job_verb verb, bool force, bool block,
                 struct tide_error *err)
{
    struct job *j;
    int r = job_find(call->inst->jobs, id, block, &j, err);
    if (r == 0)
        r = verb == JOB_FINALIZE ? job_finalize(j, err) : job_apply(j, verb, force, block, err);
    return r;
}

#define JOB_COMMAND(command, member, verb, force, block)                                           \
    int qmp_##command(struct qmp_call *call, const struct q_##command *args, json_t **ret,         \
                      struct tide_error *err)                                                      \
    {                                                                                              \
        return apply(call, args->member, verb, force, block, err);                                 \
    }

JOB_COMMAND(job_pause, id, JOB_PAUSE, false, false)
JOB_COMMAND(job_resume, id, JOB_RESUME, false, false)
JOB_COMMAND(job_cancel, id, JOB_CANCEL, true, false)
JOB_COMMAND(job_complete, id, JOB_COMPLETE, false, false)
JOB_COMMAND(job_finalize, id, JOB_FINALIZE, false, false)
JOB_COMMAND(job_dismiss, id, JOB_DISMISS, false, false)
JOB_COMMAND(block_job_pause, device, JOB_PAUSE, false, true)
JOB_COMMAND(block_job_resume, device, JOB_RESUME, false, true)
JOB_COMMAND(block_job_cancel, device, JOB_CANCEL, args->has_force && args->force, true)
JOB_COMMAND(block_job_complete, device, JOB_COMPLETE, false, true)
JOB_COMMAND(block_job_finalize, id, JOB_FINALIZE, false, true)
JOB_COMMAND(block_job_dismiss, id, JOB_DISMISS, false, true)

int qmp_block_job_set_speed(struct qmp_call *call, const struct q_block_job_set_speed *args,
                            json_t **ret, struct tide_error *err)
{
    struct job *j;
    int r = job_find(call->inst->jobs, args->device, true, &j, err);
    return r < 0 ? r : job_set_speed(j, args->speed, err);
}

int qmp_query_jobs(struct qmp_call *call, const struct q_query_jobs *args, json_t **ret,
                   struct tide_error *err)
{
    *ret = jobs_query(call->inst->jobs);
    return *ret ? 0 : tide_fail(err, -ENOMEM, "no memory for the answer");
}

int qmp_query_block_jobs(struct qmp_call *call, const struct q_query_block_jobs *args, json_t **ret,
                         struct tide_error *err)
{
    *ret = jobs_query_block(call->inst->jobs);
    return *ret ? 0 : tide_fail(err, -ENOMEM, "no memory for the answer");
}
