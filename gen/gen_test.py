#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Tests of the generator: the same output every time, no name twice, bad declarations refused by name.

    gen_test.py FILE.toml...    (the real declarations)
"""
import os
import re
import subprocess
import sys
import tempfile
import unittest

sys.dont_write_bytecode = True
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import gen  # noqa: E402

FILES = []


def generate(files, seed):
    """Output of a process of its own, with another order of hashing: name -> text."""
    with tempfile.TemporaryDirectory() as out:
        for only in [], [f"--only={name}" for name in gen.LIBRARY]:
            subprocess.run([sys.executable, os.path.join(HERE, "gen.py"), "--out", out, *only, *files],
                           check=True, env={**os.environ, "PYTHONHASHSEED": str(seed)})
        texts = {}
        for name in [*gen.OUTPUTS, *gen.LIBRARY]:
            with open(os.path.join(out, name), encoding="utf-8") as f:
                texts[name] = f.read()
        return texts


class Real(unittest.TestCase):
    def test_output_is_the_same_every_time(self):
        self.assertEqual(generate(FILES, 1), generate(FILES, 2))

    def test_names_are_unique(self):
        text = generate(FILES, 0)["types.h"]
        for what, pattern in (("struct or enum", r"^(?:struct|enum) (q_\w+) \{"),
                              ("enum value", r"^    (Q_\w+),"), ("row", r"(q_\w+_type);"),
                              ("alias", r"^#define (q_\w+)")):
            names = re.findall(pattern, text, re.M)
            self.assertTrue(names, what)
            self.assertEqual(len(names), len(set(names)), what)
        tags = set(re.findall(r"^(?:struct|enum) (q_\w+) \{", text, re.M))
        self.assertFalse(tags & set(re.findall(r"^#define (q_\w+)", text, re.M)))

    def test_every_action_is_in_the_library(self):
        out = generate(FILES, 0)
        for a in gen.Schema(FILES).actions:
            self.assertIn(f"int tide_txn_{a.cname}(struct tide_txn *txn", out["actions.h"])
            self.assertIn(f'"{a.name}"', out["library.c"])
        self.assertNotRegex(out["actions.h"], r"\b[qQ]_")

    def test_output_has_no_path(self):
        for name, text in generate([os.path.abspath(f) for f in FILES], 0).items():
            self.assertNotIn(os.path.abspath(FILES[0]), text, name)

    def test_every_command_is_in_every_output(self):
        out = generate(FILES, 0)
        for name in gen.Schema(FILES).commands:
            for file in ("introspect.c", "commands.c", "qmp.md", "words.txt"):
                text = out[file].replace('"\n    "', "") if file == "introspect.c" else out[file]
                self.assertIn(name, text, f"{name} in {file}")


class Refused(unittest.TestCase):
    def refuse(self, text, *words):
        with tempfile.NamedTemporaryFile("w", suffix=".toml") as f:
            f.write(text)
            f.flush()
            with self.assertRaises(gen.Bad) as caught:
                gen.Schema([f.name])
        for word in words:
            self.assertIn(word, str(caught.exception))

    def struct(self, member):
        return f'[struct.A]\ndoc = "a"\n[struct.A.members]\n{member}\n'

    def test_declarations(self):
        self.refuse(self.struct('b = ["Nope", "x"]'), "A", "Nope")
        self.refuse(self.struct('b = ["str", ""]'), "A.b", "no meaning")
        self.refuse(self.struct('b = "str"'), "A.b")
        self.refuse(self.struct('b = ["[str", "x"]'), "A.b", "[str")
        self.refuse(self.struct('b = ["str word", "x"]'), "A.b")
        self.refuse(self.struct('b = ["bool? maybe", "x"]'), "A.b", "true")
        self.refuse(self.struct('b = ["any? 1", "x"]'), "A.b")
        self.refuse(self.struct('b = ["[str]? x", "x"]'), "A.b")
        self.refuse(self.struct('b-c = ["str", "x"]\nb_c = ["str", "y"]'), "A", "same name")
        self.refuse("[struct.A]\n", "A", "doc")
        self.refuse('[thing.A]\ndoc = "a"\n', "thing")
        self.refuse('[command.a-b]\ndoc = "x"\n[command.a_b]\ndoc = "y"\n', "a_b", "a-b")

    def test_unions(self):
        union = ('[enum.E]\ndoc = "e"\n[enum.E.values]\none = "1"\ntwo = "2"\n' +
                 self.struct('b = ["str", "x"]') +
                 '[union.U]\ndoc = "u"\ntag = "t"\n%s\n[union.U.members]\nt = ["E%s", "tag"]\n'
                 '[union.U.branches]\n%s = "A"\n')
        self.refuse(union % ("", "?", "one"), "U", "tag")
        self.refuse(union % ("", "", "three"), "U", "three")
        self.refuse(union % ("wrapped = true", "", "one"), "U", "wrapped")


if __name__ == "__main__":
    FILES = sys.argv[1:]
    unittest.main(argv=sys.argv[:1])
