#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Compares the declarations with what qemu-storage-daemon tells about itself.

    compare_qsd.py [--all] FILE.toml...

Resolves both sides into trees of names and prints, for each command and event of ours that the other
daemon has, members that only one side has and members that differ in kind or in being optional. Names of types are
opaque and not compared. --all also lists branches and enum words that only the other side has: this
daemon has fewer drivers and objects on purpose. Exit status 1 if there are differences, 77 without
qemu-storage-daemon.
"""
import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
sys.dont_write_bytecode = True
import gen  # noqa: E402

# Where we differ on purpose: path -> why.
WANTED = {
    "block-export-add(type=vhost-user-blk)": "not served; refused by name",
    "block-export-add(type=fuse)": "not served; refused by name",
    "block-export-add(type=vduse-blk)": "not served; refused by name",
    "query-named-block-nodes>[].image.format-specific": "no format has any yet",
    "query-block>[].inserted.image.format-specific": "no format has any yet",
}


def fetch(program):
    """The other daemon's schema, over a socket pair that it inherits: nothing to wait for but its greeting."""
    ours, theirs = socket.socketpair()
    fd = theirs.fileno()
    with tempfile.TemporaryDirectory() as tmp:
        p = subprocess.Popen([program, "--chardev", f"socket,id=c,fd={fd}", "--monitor", "c"],
                             pass_fds=[fd], cwd=tmp)
        theirs.close()
        ours.settimeout(20)
        with ours.makefile("rw") as f:
            f.readline()
            replies = []
            for word in ("qmp_capabilities", "query-qmp-schema", "quit"):
                f.write(json.dumps({"execute": word}) + "\n")
                f.flush()
                replies.append(json.loads(f.readline()))
        p.wait(20)
    return replies[1]["return"]


class Tree:
    """One side: entries by name, and walks over them."""

    def __init__(self, entries):
        self.by_name = {e["name"]: e for e in entries}

    def names(self, kind):
        return {n for n, e in self.by_name.items() if e["meta-type"] == kind}

    def flatten(self, type_name, path, out, seen=()):
        """Fills out: path -> what is there, as text."""
        e = self.by_name[type_name]
        kind = e["meta-type"]
        if kind == "builtin":
            out[path] = e["json-type"]
        elif kind == "array":
            out[path] = "list"
            self.flatten(e["element-type"], path + "[]", out, seen)
        elif kind == "enum":
            out[path] = "enum"
            for m in e["members"]:
                out[f"{path}='{m['name']}'"] = "word" + self.marks(m)
        elif type_name in seen:
            out[path] = "recursion"
        elif kind == "alternate":
            out[path] = "alternate"
            for m in e["members"]:
                k = self.by_name[m["type"]]
                self.flatten(m["type"], f"{path}|{k.get('json-type', k['meta-type'])}", out, seen + (type_name,))
        else:
            out[path] = "object"
            self.members(e, path, out, seen + (type_name,))

    def marks(self, entry):
        return "".join(" " + f for f in sorted(entry.get("features", [])))

    def members(self, e, path, out, seen):
        for m in e["members"]:
            at = f"{path}.{m['name']}"
            self.flatten(m["type"], at, out, seen)
            out[at] += (", optional" if "default" in m else "") + self.marks(m)
        for v in e.get("variants", []):
            at = f"{path}({e['tag']}={v['case']})"
            self.flatten(v["type"], at, out, seen)


def compare(ours, theirs, name, is_command, show_all):
    a, b = {}, {}
    for tree, out in ((ours, a), (theirs, b)):
        e = tree.by_name[name]
        out[name] = e["meta-type"] + tree.marks(e)
        tree.flatten(e["arg-type"], name, out)
        out[name] += tree.marks(e)
        if is_command:
            tree.flatten(e["ret-type"], name + ">", out)
    lines = []
    for path in sorted(a.keys() | b.keys()):
        if any(path.startswith(w) for w in WANTED):
            continue
        if path not in a:
            # What hangs below a branch or word we lack needs no line of its own.
            missing_word = "='" in path or "(" in path.replace(name, "", 1)
            if show_all or not (missing_word and below_missing(path, a)):
                lines.append(f"  - only theirs: {path}: {b[path]}")
        elif path not in b:
            lines.append(f"  - only ours:   {path}: {a[path]}")
        elif a[path] != b[path]:
            lines.append(f"  - differs:     {path}: ours {a[path]}; theirs {b[path]}")
    return lines


def below_missing(path, ours):
    """Is this an enum word, or inside a branch, that our side does not have at all?"""
    if "='" in path:
        return True
    start = 0
    while (end := path.find(")", start)) >= 0:
        if path[:end + 1] not in ours:
            return True
        start = end + 1
    return False


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--all", action="store_true", help="also words and branches only they have")
    parser.add_argument("files", nargs="+", metavar="FILE.toml")
    args = parser.parse_args()
    program = shutil.which("qemu-storage-daemon")
    if not program:
        print("compare_qsd.py: no qemu-storage-daemon here")
        sys.exit(77)
    ours = Tree(gen.Introspection(gen.Schema(args.files)).out)
    theirs = Tree(fetch(program))
    found = 0
    for kind in ("command", "event"):
        for name in sorted(ours.names(kind)):
            if name not in theirs.by_name:
                print(f"{name}: only ours")
                continue
            lines = compare(ours, theirs, name, kind == "command", args.all)
            found += len(lines)
            print("\n".join([f"{name}: {'same' if not lines else ''}"] + lines))
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
