"""The code blocks of README and CONTRIBUTING, for the tests that run them."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def document(name):
    """Text of a document, None where there is the wheel alone."""
    path = ROOT / f"{name}.md"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def blocks(text):
    """Language and text of each block."""
    found = BLOCK.findall(text)
    assert 2 * len(found) == len(re.findall(r"^```", text, re.MULTILINE)), "a fence is unusual"
    return found


def block(text, language, word):
    """Text of the one block in a language in which a word stands."""
    (found,) = (code for kind, code in blocks(text) if kind == language and word in code)
    return found


def sides(diff):
    """The two programs that a diff holds: before it, and after."""
    lines = diff.splitlines()
    assert all(line[:1] in ("", " ", "+", "-") for line in lines)
    return ["\n".join(line[1:] for line in lines if line[:1] != other) for other in "+-"]


def apply(diff, root):
    """Apply a diff to the files that it names; the old lines of a hunk must stand there once."""
    for part in re.split(r"^\+\+\+ ", diff, flags=re.MULTILINE)[1:]:
        name, hunks = part.split("\n", 1)
        path = root / name
        text = path.read_text(encoding="utf-8")
        for hunk in re.split(r"^@@\n", hunks, flags=re.MULTILINE):
            before, after = (side + "\n" for side in sides(hunk))
            assert text.count(before) == 1, f"{name} has {text.count(before)} times:\n{before}"
            text = text.replace(before, after)
        path.write_text(text, encoding="utf-8")
