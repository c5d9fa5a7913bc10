/* SPDX-License-Identifier: Apache-2.0 */
#include "cli/txn_verbs.h"
#include <string.h>

#define BITMAP "block-dirty-bitmap-"

/* A kind that this version's schema does not have is refused by its name when it is used. */
const struct txn_verb txn_verbs[] = {
    {"add", BITMAP "add", "node/name", false, "add NODE/NAME [granularity=SIZE] [disabled]", NULL,
     NULL},
    {"remove", BITMAP "remove", "node/name", false, "remove NODE/NAME", NULL, NULL},
    {"clear", BITMAP "clear", "node/name", false, "clear NODE/NAME", NULL, NULL},
    {"enable", BITMAP "enable", "node/name", false, "enable NODE/NAME", NULL, NULL},
    {"disable", BITMAP "disable", "node/name", false, "disable NODE/NAME", NULL, NULL},
    {"merge", BITMAP "merge", "node/target", true, "merge NODE/TARGET from SOURCE...", NULL, NULL},
    {"rename", BITMAP "rename", "node/name to new-name", false, "rename NODE/NAME to NEW", NULL,
     NULL},
    {"copy", BITMAP "copy", "node/name", true, "copy NODE/NAME [disabled] from SOURCE...", NULL,
     NULL},
    {"backup", "blockdev-backup", "device to target", false,
     "backup NODE to TARGET sync=MODE [job=ID] [bitmap=NAME]", "job", "job-id"},
    {"export-add", "block-export-add", "type", false, "export-add TYPE id=ID node=NODE", "node",
     "node-name"},
    {"export-del", "block-export-del", "id", false, "export-del ID [mode=hard]", NULL, NULL},
    {"export-set-node", "block-export-set-node", "id to node-name", false,
     "export-set-node ID to NODE", NULL, NULL},
    {"node-add", "blockdev-add", "driver", false, "node-add DRIVER node=NAME [KEY=VALUE...]",
     "node", "node-name"},
    {"node-del", "blockdev-del", "node-name", false, "node-del NODE", NULL, NULL},
    {0},
};

const struct txn_verb *txn_verb_find(const char *word)
{
    for (const struct txn_verb *v = txn_verbs; v->word; v++) {
        if (strcmp(v->word, word) == 0)
            return v;
    }
    return NULL;
}

const struct txn_verb *txn_verb_of_kind(const char *kind)
{
    for (const struct txn_verb *v = txn_verbs; v->word; v++) {
        if (strcmp(v->kind, kind) == 0)
            return v;
    }
    return NULL;
}
