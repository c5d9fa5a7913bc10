#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Turns the declarations in schema/*.toml into C, introspection data, a manual and words.

    gen.py --out DIR [--only NAME]... FILE.toml...

The notation is explained at the head of schema/control.toml, the C names in schema/schema.h. The
output depends on the content of the files only, so it is the same everywhere. One class per kind of
declaration, one function per output file; add an output by writing a function and naming it in
OUTPUTS, or in LIBRARY what only the public library needs.
"""
import argparse
import json
import os
import re
import sys
import tomllib

C_RESERVED = set("""auto break case char const continue default do double else enum extern float for
goto if inline int long register restrict return short signed sizeof static struct switch typedef
union unsigned void volatile while bool true false errno unix linux asm typeof stdin stdout""".split())

# name: (C type, JSON kind of introspection, row in schema/tables.h)
BUILTINS = {
    "str": ("const char *", "str"),
    "bool": ("bool", "bool"),
    "int": ("int64_t", "int"),
    "int32": ("int32_t", "int"),
    "uint16": ("uint16_t", "int"),
    "uint32": ("uint32_t", "int"),
    "uint64": ("uint64_t", "int"),
    "size": ("uint64_t", "int"),
    "number": ("double", "number"),
    "any": ("json_t *", "any"),
    "null": (None, "null"),
}
JSON_KIND = {"str": "string", "bool": "boolean", "int": "int", "number": "number", "any": "value",
             "null": "null"}
LICENSE = "/* SPDX-License-Identifier: Apache-2.0 */\n"
NOTICE = "Made by gen/gen.py from the .toml files in schema/: change those."


class Bad(Exception):
    """A declaration that makes no sense; the text names it."""


def snake(name):
    """BlockdevRef -> blockdev_ref, node-name -> node_name."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return re.sub(r"[^A-Za-z0-9]", "_", name).lower()


def ident(name):
    """A member's name in C; the few words C keeps to itself get an underscore."""
    c = snake(name)
    return c + "_" if c in C_RESERVED else c


class Member:
    SYNTAX = re.compile(r"^(\[)?([A-Za-z0-9_]+)(\])?(\?)?(?: (.+))?$")

    def __init__(self, owner, name, spec):
        where = f"{owner}.{name}"
        if not isinstance(spec, list) or len(spec) < 2:
            raise Bad(f"{where}: want [type, meaning, feature...]")
        m = self.SYNTAX.match(spec[0])
        if not m or bool(m[1]) != bool(m[3]) or (m[5] and not m[4]):
            raise Bad(f"{where}: cannot read the type '{spec[0]}'")
        self.where, self.name, self.c = where, name, ident(name)
        self.list, self.type, self.optional, self.default = bool(m[1]), m[2], bool(m[4]), m[5]
        self.doc, self.features = spec[1], spec[2:]
        if not self.doc:
            raise Bad(f"{where}: has no meaning")

    def text(self):
        return f"[{self.type}]" if self.list else self.type


class Type:
    """A struct, union, alternate or enum; `cname` is what follows q_ in C."""

    def __init__(self, schema, name, decl):
        self.schema, self.name, self.decl = schema, name, decl
        self.cname, self.doc = snake(name), decl.get("doc")
        self.parsed = False  # reachable from arguments: has a struct and rows
        if not self.doc:
            raise Bad(f"{name}: has no doc")

    def members_of(self, table):
        return [Member(self.name, k, v) for k, v in table.items()]

    def refs(self):
        """Names of the types it uses."""
        return []


class Enum(Type):
    kind = "enum"

    def load(self):
        values = self.decl["values"]
        if values == "actions":
            values = {a.name: [a.doc] + a.features for a in self.schema.actions}
        self.values = [(w, *([d] if isinstance(d, str) else d)) for w, d in values.items()]

    def const(self, word):
        return f"Q_{self.cname.upper()}_{snake(word).upper()}"


class Struct(Type):
    kind = "struct"

    def load(self):
        self.members = self.members_of(self.decl.get("members", {}))
        if "base" in self.decl:
            base = self.schema.types[self.decl["base"]]
            base.load()
            self.members = base.members + self.members

    def refs(self):
        return [m.type for m in self.members]


class Union(Type):
    kind = "union"

    def load(self):
        self.members = self.members_of(self.decl["members"])
        self.wrapped = self.decl.get("wrapped", False)
        tags = [m for m in self.members if m.name == self.decl["tag"]]
        if len(tags) != 1 or tags[0].optional:
            raise Bad(f"{self.name}: the tag has to be one of its members and not optional")
        self.tag = tags[0]
        self.enum = self.schema.types[self.tag.type]
        branches = self.decl.get("branches", {})
        if branches == "actions":
            branches = {a.name: a.args.name for a in self.schema.actions}
        self.branches = branches
        words = [v[0] for v in self.enum_values()]
        for word in branches:
            if word not in words:
                raise Bad(f"{self.name}: branch '{word}' is no value of the tag")
        if self.wrapped and any(m.name == "data" for m in self.members):
            raise Bad(f"{self.name}: a wrapped union keeps 'data' for the branch")
        if self.wrapped and set(words) != set(branches):
            raise Bad(f"{self.name}: a wrapped union needs a branch for each value of the tag")

    def enum_values(self):
        if not hasattr(self.enum, "values"):
            self.enum.load()
        return self.enum.values

    def branch(self, word):
        name = self.branches.get(word)
        return self.schema.types[name] if name else None

    def refs(self):
        return [m.type for m in self.members] + list(self.branches.values())


class Alternate(Type):
    kind = "alternate"

    def load(self):
        self.of = self.decl["of"]
        for t in self.of:
            if t not in ("str", "null") and self.schema.types[t].kind not in ("struct", "union"):
                raise Bad(f"{self.name}: cannot tell '{t}' by its kind")

    def refs(self):
        return self.of


class Command:
    """A command, an event or an action that is no command."""

    def __init__(self, schema, name, decl, args_key):
        self.name, self.cname, self.decl = name, snake(name), decl
        self.doc, self.features = decl.get("doc"), decl.get("features", [])
        if not self.doc:
            raise Bad(f"{name}: has no doc")
        args = decl.get(args_key, {})
        if isinstance(args, str):
            self.args = schema.types[args]
        else:
            self.args = Struct(schema, name, {"doc": self.doc, "members": args})
            self.args.inline = True
            schema.add(self.args)
        self.returns = decl.get("returns")


class Schema:
    KINDS = {"enum": Enum, "struct": Struct, "union": Union, "alternate": Alternate}

    def __init__(self, files):
        self.types, self.commands, self.events, self.actions = {}, {}, {}, []
        self.files = []
        raw = {}
        for path in files:
            with open(path, "rb") as f:
                data = tomllib.load(f)
            self.files.append((os.path.basename(path), data))
            for group, entries in data.items():
                for name, decl in entries.items():
                    if name in raw.setdefault(group, {}):
                        raise Bad(f"{group} '{name}' is declared twice")
                    raw[group][name] = decl
        for group in raw:
            if group not in (*self.KINDS, "command", "event", "action"):
                raise Bad(f"unknown kind of declaration '{group}'")
        for group, cls in self.KINDS.items():
            for name, decl in raw.get(group, {}).items():
                self.add(cls(self, name, decl))
        for name, decl in raw.get("action", {}).items():
            self.actions.append(Command(self, name, decl, "data"))
        for name, decl in raw.get("command", {}).items():
            self.commands[name] = Command(self, name, decl, "args")
        for name, decl in raw.get("event", {}).items():
            self.events[name] = Command(self, name, decl, "data")
        self.actions += [c for c in self.commands.values() if c.decl.get("action")]
        for t in self.types.values():
            t.load()
        self.check()
        self.mark_parsed()

    def add(self, t):
        if t.name in self.types:
            raise Bad(f"'{t.name}' is declared twice")
        self.types[t.name] = t

    def check(self):
        seen = {}
        for t in self.types.values():
            if t.cname in seen:
                raise Bad(f"'{t.name}' and '{seen[t.cname]}' have the same name in C")
            seen[t.cname] = t.name
            for ref in t.refs():
                if ref not in BUILTINS and ref not in self.types:
                    raise Bad(f"{t.name}: there is no type '{ref}'")
            if t.kind in ("struct", "union"):
                self.check_members(t)
        for c in self.commands.values():
            ret = (c.returns or "str").strip("[]")
            if ret not in BUILTINS and ret not in self.types:
                raise Bad(f"{c.name}: there is no type '{ret}'")
            if c.cname in seen and seen[c.cname] not in (c.name, c.args.name):
                raise Bad(f"command '{c.name}' and type '{seen[c.cname]}' clash in C")

    def check_members(self, t):
        groups = [t.members]
        if t.kind == "union" and not t.wrapped:
            groups += [t.members + self.types[b].members for b in t.branches.values()]
        for members in groups:
            names = [m.c for m in members]
            if len(set(names)) != len(names):
                raise Bad(f"{t.name}: two members have the same name")
        for m in t.members:
            if m.default is not None:
                self.default_of(m)
            if m.list and m.type in ("any", "null", "bool"):
                raise Bad(f"{m.where}: lists of '{m.type}' are not provided for")

    def mark_parsed(self):
        todo = [c.args for c in [*self.commands.values(), *self.actions]]
        todo += [t for t in self.types.values() if t.decl.get("also-parsed")]
        while todo:
            t = todo.pop()
            if not t.parsed:
                t.parsed = True
                todo += [self.types[r] for r in t.refs() if r not in BUILTINS]

    def default_of(self, m):
        """(integer, string) for the row of a member; None if it has no default."""
        d = m.default
        if d is None:
            return None
        if m.list:
            raise Bad(f"{m.where}: a list cannot have a default")
        if m.type == "str":
            return ("0", c_string(d))
        if m.type == "bool":
            if d not in ("true", "false"):
                raise Bad(f"{m.where}: the default is neither true nor false")
            return ("1" if d == "true" else "0", "NULL")
        if m.type in BUILTINS and BUILTINS[m.type][1] == "int":
            return (str(int(d)), "NULL")
        t = self.types.get(m.type)
        if t and t.kind == "enum":
            if not hasattr(t, "values"):
                t.load()
            if d not in [v[0] for v in t.values]:
                raise Bad(f"{m.where}: the default '{d}' is no value of {t.name}")
            return (t.const(d), "NULL")
        raise Bad(f"{m.where}: a {m.type} cannot have a default")

    def of_kind(self, kind, parsed=True):
        return [t for t in self.types.values() if t.kind == kind and (t.parsed or not parsed)]


def c_string(s):
    return json.dumps(s)


# ---- schema/types.h -----------------------------------------------------------------------------

def is_scalar(schema, m):
    """Members that need a has_X when they are optional."""
    if m.list:
        return False
    return BUILTINS[m.type][0][-1] != "*" if m.type in BUILTINS else schema.types[m.type].kind == "enum"


def c_type(schema, name, in_list):
    if name in BUILTINS:
        t = BUILTINS[name][0]
        return t if t.endswith("*") else t + " "
    t = schema.types[name]
    if t.kind == "enum":
        return f"enum q_{t.cname} "
    return f"struct q_{t.cname} " if in_list else f"struct q_{t.cname} *"


def c_member(schema, m, indent="    "):
    out = []
    if m.list:
        out.append(f"{indent}size_t n_{m.c};\n")
        out.append(f"{indent}{c_type(schema, m.type, True)}*{m.c};\n")
    else:
        if m.optional and is_scalar(schema, m):
            out.append(f"{indent}bool has_{m.c};\n")
        out.append(f"{indent}{c_type(schema, m.type, False)}{m.c};\n")
    return "".join(out)


def c_enum(t):
    doc = f"/* {t.doc} */\n"
    values = "".join(f"    {t.const(v[0])},\n" for v in t.values)
    return (f"{doc}enum q_{t.cname} {{\n{values}}};\n"
            f"extern const char *const q_{t.cname}_names[{len(t.values)}];\n\n")


def c_struct(schema, t):
    body = "".join(c_member(schema, m) for m in t.members) or "    char dummy; /* no members */\n"
    return f"/* {t.doc} */\nstruct q_{t.cname} {{\n{body}}};\n\n"


def used_branches(t):
    """Branches that have members, hence a place in the C union."""
    return [(w, t.branch(w)) for w in t.branches if t.branch(w).members]


def c_union(schema, t):
    body = "".join(c_member(schema, m) for m in t.members)
    if t.wrapped:
        body += "    const void *data; /* the struct of the branch */\n"
    elif used_branches(t):
        body += "    union {\n"
        body += "".join(f"        struct q_{b.cname} {ident(w)};\n" for w, b in used_branches(t))
        body += "    } u;\n"
    aliases = ""
    if t.decl.get("branches") != "actions":
        for w, b in t.branches.items():
            aliases += alias(f"{t.cname}_{snake(w)}", schema.types[b].cname)
    return f"/* {t.doc} */\nstruct q_{t.cname} {{\n{body}}};\n{aliases}\n"


def c_alternate(schema, t):
    body = "    enum q_kind kind;\n"
    for name in t.of:
        if name == "str":
            body += "    const char *string; /* Q_KIND_STRING */\n"
        elif name != "null":
            body += f"    const struct q_{schema.types[name].cname} *object; /* Q_KIND_OBJECT */\n"
    return f"/* {t.doc} */\nstruct q_{t.cname} {{\n{body}}};\n\n"


def alias(new, old):
    """Another name for a struct and its row; C has no typedef for tags."""
    if new == old:
        return ""
    return f"#define q_{new} q_{old}\n#define q_{new}_type q_{old}_type\n"


def types_h(schema):
    out = [LICENSE, f"/* Types of the QMP interface. {NOTICE} */\n",
           "#pragma once\n#include <jansson.h>\n#include <stdbool.h>\n#include <stdint.h>\n\n"
           "#include \"schema/schema.h\"\n\n",
           "/* What an alternate holds. */\nenum q_kind {\n"]
    out += [f"    Q_KIND_{k},\n" for k in KINDS]
    out.append("};\n\n")
    out += [c_enum(t) for t in schema.of_kind("enum", parsed=False)]
    rows = [t for k in ("struct", "alternate", "union") for t in schema.of_kind(k)]
    out += [f"struct q_{t.cname};\n" for t in rows] + ["\n"]
    out += [c_struct(schema, t) for t in schema.of_kind("struct")]
    out += [c_alternate(schema, t) for t in schema.of_kind("alternate")]
    out += [c_union(schema, t) for t in schema.of_kind("union")]
    out.append("/* Commands whose arguments are a type of another name. */\n")
    out += [alias(c.cname, c.args.cname) for c in [*schema.commands.values(), *schema.actions[:0]]]
    out.append("\n/* Rows for schema_parse(). */\n")
    out += [f"extern const struct schema_type q_{t.cname}_type;\n" for t in rows]
    return "".join(out)


KINDS = ["NULL", "STRING", "OBJECT"]

# ---- schema/tables.c ----------------------------------------------------------------------------


def row_ref(schema, name):
    return f"&schema_{name}_type" if name in BUILTINS else f"&q_{schema.types[name].cname}_type"


def member_row(schema, struct, m):
    flags = [f for f, on in (("SCHEMA_OPTIONAL", m.optional), ("SCHEMA_LIST", m.list),
                             ("SCHEMA_DEFAULT", m.default is not None)) if on]
    aux = "SCHEMA_NO_AUX"
    if m.list:
        aux = f"offsetof({struct}, n_{m.c})"
    elif m.optional and is_scalar(schema, m):
        aux = f"offsetof({struct}, has_{m.c})"
    default = schema.default_of(m) or ("0", "NULL")
    return (f"    {{{c_string(m.name)}, {row_ref(schema, m.type)}, offsetof({struct}, {m.c}), {aux},\n"
            f"     {' | '.join(flags) or '0'}, {default[0]}, {default[1]}}},\n")


def members_table(schema, t):
    if not t.members:
        return ""
    rows = "".join(member_row(schema, f"struct q_{t.cname}", m) for m in t.members)
    return f"static const struct schema_member m_{t.cname}[] = {{\n{rows}}};\n"


def row_head(t, kind):
    return (f"const struct schema_type q_{t.cname}_type = {{\n"
            f"    .name = {c_string(t.name)},\n    .kind = {kind},\n")


def members_fields(t):
    if not t.members:
        return ""
    return f"    .members = m_{t.cname},\n    .n_members = {len(t.members)},\n"


def table_enum(t):
    words = "".join(f"    {c_string(v[0])},\n" for v in t.values)
    return (f"const char *const q_{t.cname}_names[{len(t.values)}] = {{\n{words}}};\n"
            f"static {row_head(t, 'SCHEMA_ENUM')}    .size = sizeof(enum q_{t.cname}),\n"
            f"    .names = q_{t.cname}_names,\n    .n_names = {len(t.values)},\n}};\n\n")


def table_struct(schema, t):
    return (members_table(schema, t) + row_head(t, "SCHEMA_STRUCT") +
            f"    .size = sizeof(struct q_{t.cname}),\n" + members_fields(t) + "};\n\n")


def table_union(schema, t):
    branches = "".join(f"    [{t.enum.const(w)}] = &q_{t.branch(w).cname}_type,\n" for w in t.branches)
    offset = "data" if t.wrapped else "u" if used_branches(t) else t.tag.c
    return (members_table(schema, t) +
            f"static const struct schema_type *const b_{t.cname}[{len(t.enum.values)}] = {{\n"
            f"{branches}}};\n" + row_head(t, "SCHEMA_UNION") +
            f"    .size = sizeof(struct q_{t.cname}),\n" + members_fields(t) +
            f"    .tag = {t.members.index(t.tag)},\n    .wrapped = {'true' if t.wrapped else 'false'},\n"
            f"    .branches = b_{t.cname},\n"
            f"    .branch_off = offsetof(struct q_{t.cname}, {offset}),\n}};\n\n")


def table_alternate(schema, t):
    struct, fields = f"struct q_{t.cname}", ""
    for name in t.of:
        if name == "str":
            fields += f"    .string_off = offsetof({struct}, string),\n    .has_string = true,\n"
        elif name == "null":
            fields += "    .has_null = true,\n"
        else:
            fields += (f"    .object = {row_ref(schema, name)},\n"
                       f"    .object_off = offsetof({struct}, object),\n")
    return row_head(t, "SCHEMA_ALTERNATE") + f"    .size = sizeof({struct}),\n{fields}}};\n\n"


def tables_c(schema):
    out = [LICENSE, f"/* Rows that schema/parse.c walks. {NOTICE} */\n",
           "#include <stddef.h>\n\n#include \"schema/tables.h\"\n#include \"schema/types.h\"\n\n"]
    enums = schema.of_kind("enum", parsed=False)
    out += [table_enum(t) for t in enums if t.parsed]
    for t in enums:
        if not t.parsed:
            words = "".join(f"    {c_string(v[0])},\n" for v in t.values)
            out.append(f"const char *const q_{t.cname}_names[{len(t.values)}] = {{\n{words}}};\n\n")
    out += [table_struct(schema, t) for t in schema.of_kind("struct")]
    out += [table_alternate(schema, t) for t in schema.of_kind("alternate")]
    out += [table_union(schema, t) for t in schema.of_kind("union")]
    return "".join(out)


# ---- schema/introspect.c ------------------------------------------------------------------------

class Introspection:
    """The list that query-qmp-schema returns. Types get numbers in the order of their first use."""

    def __init__(self, schema):
        self.schema, self.numbers, self.todo, self.out = schema, {}, [], []
        self.empty = Struct(schema, "q-empty", {"doc": "no members"})
        self.empty.load()
        for c in schema.commands.values():
            self.command(c)
        for e in schema.events.values():
            self.out.append({"name": e.name, "meta-type": "event", "arg-type": self.of(e.args)})
            self.mark(self.out[-1], e.features)
        while self.todo:
            self.define(*self.todo.pop(0))

    def mark(self, entry, features):
        if features:
            entry["features"] = list(features)

    def number(self, key, what):
        if key not in self.numbers:
            self.numbers[key] = str(len(self.numbers))
            self.todo.append((self.numbers[key], what))
        return self.numbers[key]

    def of(self, t):
        if t.kind in ("struct", "union") and not t.members:
            return self.number("q-empty", self.empty)
        return self.number(t.name, t)

    def ref(self, text):
        """Name of the type that "str" or "[Name]" means."""
        if text.startswith("["):
            element = self.ref(text[1:-1])
            key = f"[{element}]"
            if key not in self.numbers:
                self.numbers[key] = key
                self.todo.append((key, element))
            return key
        if text not in BUILTINS:
            return self.of(self.schema.types[text])
        word = BUILTINS[text][1]
        if word not in self.numbers:
            self.numbers[word] = word
            self.todo.append((word, None))
        return word

    def command(self, c):
        entry = {"name": c.name, "meta-type": "command", "arg-type": self.of(c.args),
                 "ret-type": self.ref(c.returns) if c.returns else self.of(self.empty)}
        self.mark(entry, c.features)
        self.out.append(entry)

    def members(self, members):
        out = []
        for m in members:
            entry = {"name": m.name, "type": self.ref(m.text())}
            if m.optional:
                entry["default"] = None
            self.mark(entry, m.features)
            out.append(entry)
        return out

    def define(self, name, t):
        if t is None:
            entry = {"meta-type": "builtin", "json-type": JSON_KIND[name]}
        elif isinstance(t, str):
            entry = {"meta-type": "array", "element-type": t}
        else:
            entry = getattr(self, "define_" + t.kind)(t)
        self.out.append({"name": name, **entry})

    def define_enum(self, t):
        members = [{"name": v[0]} for v in t.values]
        for m, v in zip(members, t.values):
            self.mark(m, v[2:])
        return {"meta-type": "enum", "members": members, "values": [v[0] for v in t.values]}

    def define_struct(self, t):
        return {"meta-type": "object", "members": self.members(t.members)}

    def define_union(self, t):
        variants = []
        for word, *_ in t.enum.values:
            branch = t.branch(word) or self.empty
            if t.wrapped:
                wrapper = Struct(self.schema, f"{branch.name}-wrapper", {"doc": branch.doc})
                wrapper.members = [Member("wrapper", "data", ["any", "the arguments"])]
                wrapper.members[0].type = branch.name if branch.members else self.empty.name
                self.schema.types.setdefault(self.empty.name, self.empty)
                branch = wrapper
            variants.append({"case": word, "type": self.of(branch)})
        return {"meta-type": "object", "members": self.members(t.members), "tag": t.tag.name,
                "variants": variants}

    def define_alternate(self, t):
        return {"meta-type": "alternate", "members": [{"type": self.ref(n)} for n in t.of]}


def introspect_c(schema):
    text = json.dumps(Introspection(schema).out, separators=(",", ":"))
    lines = [text[i:i + 76] for i in range(0, len(text), 76)]
    body = "\n".join("    " + c_string(line) for line in lines)
    return (f"{LICENSE}/* The answer to query-qmp-schema. {NOTICE} */\n"
            "#include \"schema/schema.h\"\n\n"
            f"static const char text[] =\n{body};\n\n"
            "json_t *schema_introspect(void)\n{\n"
            "    return json_loadb(text, sizeof text - 1, 0, NULL);\n}\n")


# ---- qmp/commands.c, handlers.h, txn/actions.c --------------------------------------------------

def plain_commands(schema):
    """Commands with a handler of their own; those that are actions run as a transaction of one."""
    return [c for c in schema.commands.values() if not c.decl.get("action")]


def handlers_h(schema):
    out = [LICENSE, f"/* Handlers of the commands that are no actions. {NOTICE} */\n",
           "#pragma once\n#include \"schema/types.h\"\n\nstruct qmp_call;\n\n",
           "/* `args` is parsed and checked and lives as long as the call; *ret is a new reference, left\n"
           " * alone (NULL) by commands that return nothing. 0 or -errno with `err` filled. */\n"]
    for c in plain_commands(schema):
        out.append(f"int qmp_{c.cname}(struct qmp_call *call, const struct q_{c.cname} *args, "
                   "json_t **ret,\n    struct tide_error *err);\n")
    return "".join(out)


def command_flags(c):
    flags = [f for f, on in (("QMP_ACTION", c.decl.get("action")),
                             ("QMP_DEPRECATED", "deprecated" in c.features),
                             ("QMP_QUERY", c.decl.get("query")),
                             ("QMP_DISKS", c.decl.get("asks-disks")),
                             ("QMP_ANYTIME", c.decl.get("while-transaction"))) if on]
    return " | ".join(flags) or "0"


def commands_c(schema):
    kinds = schema.types["TransactionActionKind"]
    out = [LICENSE, f"/* The table of commands. {NOTICE} */\n",
           "#include \"qmp/dispatch.h\"\n\n#include \"schema/handlers.h\"\n#include \"schema/types.h\"\n\n",
           "/* Handlers have types of their own; a call through a pointer needs one type for all. */\n"]
    for c in plain_commands(schema):
        out.append(f"static int run_{c.cname}(struct qmp_call *call, const void *args, json_t **ret,\n"
                   f"                         struct tide_error *err)\n{{\n"
                   f"    return qmp_{c.cname}(call, args, ret, err);\n}}\n\n")
    out.append("const struct qmp_command qmp_commands[] = {\n")
    for c in sorted(schema.commands.values(), key=lambda c: c.name):
        action = c.decl.get("action")
        out.append(f"    {{.name = {c_string(c.name)},\n     .args = &q_{c.cname}_type,\n"
                   f"     .flags = {command_flags(c)},\n"
                   f"     .run = {'NULL' if action else 'run_' + c.cname},\n"
                   f"     .action_kind = {kinds.const(c.name) if action else '-1'}}},\n")
    out.append(f"}};\nconst size_t n_qmp_commands = {len(schema.commands)};\n")
    return "".join(out)


def actions_c(schema):
    kinds = schema.types["TransactionActionKind"]
    out = [LICENSE, f"/* The table of transaction actions. {NOTICE} */\n",
           "#include \"txn/txn.h\"\n\n#include \"schema/types.h\"\n\n"]
    out += [f"extern const struct action_ops {a.cname}_ops;\n" for a in schema.actions]
    out.append("\n/* The index is an enum q_transaction_action_kind. */\n"
               "const struct action_entry txn_actions[] = {\n")
    for a in schema.actions:
        out.append(f"    [{kinds.const(a.name)}] = {{.kind = {c_string(a.name)},\n"
                   f"        .args = &q_{a.args.cname}_type,\n        .ops = &{a.cname}_ops}},\n")
    out.append(f"}};\nconst size_t n_txn_actions = {len(schema.actions)};\n")
    return "".join(out)


# ---- the public library: tidemark/actions.h, lib/library.c ---------------------------------------

def action_types(schema):
    """All types that the arguments of actions are made of, by kind."""
    todo, seen = [a.args for a in schema.actions], {}
    while todo:
        t = todo.pop()
        if t.name not in seen:
            seen[t.name] = t
            todo += [schema.types[r] for r in t.refs() if r not in BUILTINS]
    return {kind: [t for t in schema.of_kind(kind) if t.name in seen]
            for kind in ("enum", "struct", "alternate", "union")}


def public(text):
    """The same declaration under the names of the library."""
    return re.sub(r"\bQ_", "TIDE_", re.sub(r"\bq_", "tide_", text)).replace("json_t *", "struct json_t *")


def comment(text, indent=""):
    width = 100 - len(indent)
    lines, line = [], "/*"
    for word in (text + " */").split():
        if len(line) + 1 + len(word) > width:
            lines.append(indent + line)
            line = " *"
        line += " " + word
    return "\n".join([*lines, indent + line]) + "\n"


def public_member(schema, m):
    notes = "" if not m.optional else " (optional)" if m.default is None else f" (optional; {m.default})"
    c = re.sub(r"^( +)(struct \w+ \*)", r"\1const \2", public(c_member(schema, m)), flags=re.M)
    return comment(m.doc + notes, "    ") + c.replace("const char **", "const char *const *")


def public_struct(schema, t):
    body = "".join(public_member(schema, m) for m in t.members) or "    char dummy; /* no members */\n"
    if t.kind == "union" and used_branches(t):
        body += comment(f"what {t.tag.name} says", "    ") + "    union {\n"
        body += "".join(public(f"        struct q_{b.cname} {ident(w)};\n") for w, b in used_branches(t))
        body += "    } u;\n"
    return f"{comment(t.doc)}struct tide_{t.cname} {{\n{body}}};\n\n"


def public_enum(t):
    values = "".join(comment(v[1], "    ") + f"    {public(t.const(v[0]))},\n" for v in t.values)
    return f"{comment(t.doc)}enum tide_{t.cname} {{\n{values}}};\n\n"


def adder(a):
    args = f", const struct tide_{a.args.cname} *args" if a.args.members else ""
    return f"int tide_txn_{a.cname}(struct tide_txn *txn{args})"


ACTIONS_H = """/* What a list of actions is made of: see tidemark/tidemark.h, which includes this.
 *
 * Strings are UTF-8, end with a zero byte, and are copied. What is optional is left out by being 0 or
 * NULL; an optional number, bool or word of which 0 is meant has a has_X to say so. A list is a pointer
 * to its first element, with the number of elements before it. Of a choice between a name and an
 * object (with a `kind`), give one of them and leave `kind` alone.
 *
 * The functions add an action behind those that the list has. 0, -EINVAL (a member is missing or no
 * UTF-8) or -ENOMEM; a failure is remembered, so that tide_txn_run() returns it and runs nothing. */
"""


def actions_h(schema):
    types = action_types(schema)
    for kind in types["union"]:
        if kind.wrapped:
            raise Bad(f"{kind.name}: a wrapped union in an action is not provided for in the library")
    rows = [t for k in ("struct", "alternate", "union") for t in types[k]]
    out = [LICENSE, f"/* {NOTICE} */\n", ACTIONS_H,
           "#pragma once\n#include <stdbool.h>\n#include <stddef.h>\n#include <stdint.h>\n\n"
           "#ifdef __cplusplus\nextern \"C\" {\n#endif\n\nstruct tide_txn;\n\n"]
    if types["alternate"]:
        out.append("enum tide_kind {\n" + "".join(f"    TIDE_KIND_{k},\n" for k in KINDS) + "};\n\n")
    out += [public_enum(t) for t in types["enum"]]
    out += [f"struct tide_{t.cname};\n" for t in rows] + ["\n"]
    out += [public_struct(schema, t) for t in types["struct"]]
    out += [public(c_alternate(schema, t)) for t in types["alternate"]]
    out += [public_struct(schema, t) for t in types["union"]]
    out += [comment(a.doc) + adder(a) + ";\n" for a in schema.actions]
    out.append("\n#ifdef __cplusplus\n}\n#endif\n")
    return "".join(out)


def layout_checks(t):
    """The library reads the public structs by the rows of the ones inside."""
    def same(expr):
        return f"_Static_assert({expr % 'tide_'} == {expr % 'q_'}, \"{t.name}\");\n"
    names = [m.c for m in t.members] if t.kind != "alternate" else ["kind"]
    names += [f"has_{m.c}" for m in t.members if m.optional and is_scalar(t.schema, m)] \
        if t.kind != "alternate" else []
    if t.kind == "union" and used_branches(t):
        names.append("u")
    out = same(f"sizeof(struct %s{t.cname})")
    return out + "".join(same(f"offsetof(struct %s{t.cname}, {n})") for n in names)


def library_c(schema):
    types = action_types(schema)
    out = [LICENSE, f"/* Adding actions, kind by kind. {NOTICE} */\n",
           "#include <stddef.h>\n\n#include \"lib/txn.h\"\n#include \"schema/types.h\"\n\n"]
    out += [layout_checks(t) for k in ("struct", "alternate", "union") for t in types[k]]
    for t in types["enum"]:
        out.append(f"_Static_assert((int){public(t.const(t.values[-1][0]))} == "
                   f"(int){t.const(t.values[-1][0])}, \"{t.name}\");\n")
    for a in schema.actions:
        args = "args" if a.args.members else '""'
        out.append(f"\n{adder(a)}\n{{\n    return txn_add(txn, {c_string(a.name)}, "
                   f"&q_{a.args.cname}_type, {args});\n}}\n")
    return "".join(out)


# ---- manual and words ---------------------------------------------------------------------------

def md_members(members):
    out = ""
    for m in members:
        notes = [m.text() + (" (optional)" if m.optional else "")]
        notes += [f"default {m.default}"] if m.default is not None else []
        out += f"- `{m.name}`: {', '.join(notes + m.features)}: {m.doc}\n"
    return out


def md_type(schema, t):
    out = f"### {t.name}\n\n{t.doc}\n\n"
    if t.kind == "enum":
        return out + "".join(f"- `{v[0]}`{''.join(f' ({f})' for f in v[2:])}: {v[1]}\n" for v in t.values) + "\n"
    if t.kind == "alternate":
        return out + "One of: " + ", ".join(t.of) + "\n\n"
    out += md_members(t.members)
    if t.kind == "union":
        place = "in `data`" if t.wrapped else "besides"
        for w, b in t.branches.items():
            name = schema.types[b].name
            if schema.types[b].members:
                out += f"- if `{t.tag.name}` is `{w}`, {place}: members of {name}\n"
    return out + "\n"


def md_command(c, word):
    marks = [f for f in c.features]
    marks += ["also an action of `transaction`"] if c.decl.get("action") else []
    out = f"### {c.name}\n\n{c.doc}{' (' + ', '.join(marks) + ')' if marks else ''}\n\n"
    if getattr(c.args, "inline", False):
        out += md_members(c.args.members)
    else:
        out += f"- {word}: members of {c.args.name}\n"
    return out + (f"- returns {c.returns}\n" if c.returns else "") + "\n"


def qmp_md(schema):
    out = ["# QMP reference\n\n", "Made from the declarations in `schema/`. Members without "
           "\"optional\" have to be given.\n\n## Commands\n\n"]
    out += [md_command(c, "arguments") for c in sorted(schema.commands.values(), key=lambda c: c.name)]
    out.append("## Actions that are no commands\n\n")
    out += [md_command(a, "data") for a in schema.actions if a.name not in schema.commands]
    out.append("## Events\n\n")
    out += [md_command(e, "data") for e in sorted(schema.events.values(), key=lambda e: e.name)]
    out.append("## Types\n\n")
    out += [md_type(schema, t) for t in sorted(schema.types.values(), key=lambda t: t.name)
            if not getattr(t, "inline", False)]
    return "".join(out)


def words_txt(schema):
    words = set(schema.commands) | set(schema.events)
    for t in schema.types.values():
        if t.kind in ("struct", "union") and t.parsed:
            words |= {m.name for m in t.members}
        if t.kind == "enum" and t.parsed:
            words |= {v[0] for v in t.values}
    return "".join(w + "\n" for w in sorted(words))


OUTPUTS = {
    "types.h": types_h, "tables.c": tables_c, "introspect.c": introspect_c,
    "handlers.h": handlers_h, "commands.c": commands_c, "actions.c": actions_c,
    "qmp.md": qmp_md, "words.txt": words_txt,
}
LIBRARY = {"actions.h": actions_h, "library.c": library_c}  # only when asked for


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--only", action="append", choices=[*OUTPUTS, *LIBRARY], help="write this file only")
    parser.add_argument("files", nargs="+", metavar="FILE.toml")
    args = parser.parse_args()
    try:
        schema = Schema(args.files)
        texts = {name: {**OUTPUTS, **LIBRARY}[name](schema) for name in args.only or OUTPUTS}
    except (Bad, KeyError, tomllib.TOMLDecodeError) as e:
        sys.exit(f"gen.py: {e}")
    for name, text in texts.items():
        with open(os.path.join(args.out, name), "w", encoding="utf-8") as f:
            f.write(text)


if __name__ == "__main__":
    main()
