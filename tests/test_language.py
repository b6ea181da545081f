"""Docstrings, comments, messages and documents avoid the phrases that make readers stop (CONTRIBUTING.md, Language)."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What to avoid -> what to write. Each pattern is searched in prose, without regard to case.
PHRASES = {
    r"nothing speaks": 'a condition, such as "Call only if `why_plain` returned None"',
    r"\bof (?:a |the )?\w+ is no tensor\b": "static (non-tensor) configuration",
    r"\bways? (?:of|that|to run)\b(?! (?:the )?(?:inheritance|saying))": "implementation, candidate",
    r"\bin a row of\b|\brow of (?:such )?blocks": "a run of consecutive blocks",
    r"\b(?:is|are|was|were) told\b": "reports, returns",
    r"\btells? (?:its|their|of|the rest|whether|what|why|where|dtypes)\b": "reports, returns",
    r"\bwho(?:ever)? (?:asks?|reads|was written|takes part|looks)\b": "the caller, the reader by its name",
    r"\bwhat (?:was|is) given\b": "the argument",
    r"\bimagined\b": "not present, without memory",
    r"\boperand that is there\b|\bwhat is not there\b|\bwhere there is one\b": "non-empty, if present",
    r"\bonce for all that\b|\bof what is\b": "name the quantity",
    r"\bnobody asked\b|\bwhere it is wanted\b|\bis wanted\b|\bare wanted\b": "requested",
    r"\b(?:settle|settles|settled)\b": "materialize",
    r"\bspread-th\b|\bspread(?:s|ing)? (?:it|over|the residual)": "upsample, zero-insert",
}
# A first line that is a fragment, no sentence about the thing.
FRAGMENT = re.compile(r"^(?:Of|Why|Whether|What|Where|Those|That which|As) ")

PYTHON = sorted(p for d in ("resnet_kernels", "benchmarks", "examples") for p in ROOT.glob(f"{d}/**/*.py"))
SOURCES = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh"))
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])


def prose_of_python(text):
    """Yield (line, text) of comments, docstrings and the messages in other strings."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING) or "FSTRING_MIDDLE" in tokenize.tok_name[token.type]:
            yield token.start[0], token.string


def prose_of_c(text):
    """Yield (line, text) of comments and string literals."""
    for number, line in enumerate(text.splitlines(), 1):
        for match in re.finditer(r"//.*|\"(?:[^\"\\]|\\.)*\"", line):
            yield number, match[0]


def prose(path):
    text = path.read_text()
    if path.suffix == ".py":
        return prose_of_python(text)
    return prose_of_c(text) if path.suffix != ".md" else enumerate(text.splitlines(), 1)


def phrases_in(path):
    return [
        f"{path.relative_to(ROOT)}:{line}: {match[0]!r}: write {instead}"
        for line, text in prose(path)
        for pattern, instead in PHRASES.items()
        for match in re.finditer(pattern, re.sub(r"\s+", " ", text), re.IGNORECASE)
    ]


@pytest.mark.parametrize("paths", [PYTHON, SOURCES, DOCUMENTS], ids=["python", "c", "documents"])
def test_no_phrase_that_makes_a_reader_stop(paths):
    assert paths
    found = [line for path in paths for line in phrases_in(path)]
    assert not found, "\n".join(found)


def test_a_docstring_begins_with_a_sentence_about_the_thing():
    found = []
    for path in PYTHON:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                docstring = ast.get_docstring(node) or ""
                if FRAGMENT.match(docstring):
                    line = getattr(node, "lineno", 1)
                    found.append(f"{path.relative_to(ROOT)}:{line}: {docstring.splitlines()[0]}")
    assert not found, "\n".join(found)


def test_what_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("test_language.ROOT", tmp_path)
    path = tmp_path / "m.py"
    path.write_text(
        '"""Runs only\nwhere nothing speaks for it."""\nx = 1  # settled before\nraise ValueError("is told")\n'
    )
    assert [line.split(": ")[1] for line in phrases_in(path)] == ["'nothing speaks'", "'settled'", "'is told'"]
    path = tmp_path / "m.cu"
    path.write_text("int x;  // whoever reads it\n")
    assert len(phrases_in(path)) == 1
