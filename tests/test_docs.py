"""The pages: their commands run where they are marked for it, and are parsed everywhere else."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from rayrm.commands import COMMANDS
from rayrm.commands.serve import OPERATIONS
from tests.makers import make_base

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

FENCE = re.compile(r"(?:<!-- (.*?) -->\s*\n)?```(\w*)\n(.*?)```", re.DOTALL)

# Programs that are not ours, whose arguments are not checked.
OTHERS = {
    ".",
    "curl",
    "export",
    "pip",
    "prometheus",
    "ray",
    "submit()",
    "tensorboard",
    "run=$PWD/runs/first-try",
    "serve",
}


@dataclass(frozen=True)
class Block:
    """Shell commands of a page, with what a comment before them says."""

    page: Path
    mark: str
    commands: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page.name}: {self.commands[0]}"


def blocks(page: Path) -> Iterator[Block]:
    for mark, language, body in FENCE.findall(page.read_text()):
        if language == "sh":
            joined = re.sub(r"\\\n\s*", "", body)
            lines = [line.strip() for line in joined.splitlines()]
            commands = tuple(line for line in lines if line and not line.startswith("#"))
            yield Block(page, mark, commands)


BLOCKS = [block for page in PAGES for block in blocks(page)]
OURS = [
    (block, command)
    for block in BLOCKS
    for command in block.commands
    if command.split()[0] not in OTHERS
]


@pytest.mark.parametrize(("block", "command"), OURS, ids=[command for _, command in OURS])
def test_a_command_of_the_pages_is_one_that_there_is(block: Block, command: str) -> None:
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
        return
    while words[0] in ("python", "submit"):
        words = words[1:]
    name = Path(words[0]).stem if words[0].startswith("jobs/") else words[1]
    if words[0].startswith("jobs/"):
        assert (ROOT / words[0]).exists()
        words = ["rayrm", *words]
    if name in COMMANDS:
        check_arguments(name, words[2:])


def check_arguments(name: str, words: list[str]) -> None:
    """Every flag and override is in the command's help."""
    if name == "serve" and words[0] in OPERATIONS:
        return
    usage = help_of(name)
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    own = [flag for flag in flags if re.search(rf"{re.escape(flag)}\b", usage)]
    assert flags == own, f"{set(flags) - set(own)} are not in rayrm {name} --help"


@cache
def help_of(name: str) -> str:
    code = f"from rayrm.commands import main; main([{name!r}, '--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_what_is_not_run_says_why() -> None:
    """A fence of commands of ours is marked to be run, or says why it is not."""
    silent = [
        str(block)
        for block in BLOCKS
        if block.page.parent.name == "docs" and not block.mark.startswith(("run", "not run: "))
    ]
    assert silent == []


def test_what_is_marked_runs(tmp_path: Path) -> None:
    words = ["red", "blue", "pink", "green"]
    pairs = [
        {"prompt": f"Name {n}.", "chosen": f"apples {word}", "rejected": f"pears {word}"}
        for n in range(8)
        for word in words
    ]
    rows = [{"prompt": pair["prompt"], "response": pair["chosen"]} for pair in pairs]
    for name, records in (("pairs", pairs), ("rows", rows)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    config = {
        "name": "first",
        "data": {"train": "pairs.jsonl", "max_length": 128},
        "model": {"path": str(make_base(tmp_path / "base"))},
        "train": {"learning_rate": 1e-2, "dtype": "float32"},
    }
    (tmp_path / "train.yaml").write_text(json.dumps(config))
    bin = tmp_path / "bin"
    bin.mkdir()
    script = bin / "rayrm"
    script.write_text(
        f"#!/bin/sh\nexec {sys.executable} -c 'from rayrm.commands import main; main()' \"$@\"\n"
    )
    script.chmod(0o755)
    env = {
        **os.environ,
        "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_TMPDIR": tempfile.mkdtemp(prefix="ray", dir="/tmp"),  # sockets' paths must be short
    }
    marked = [block for block in BLOCKS if block.mark == "run"]
    marked.sort(key=lambda block: block.page.name != "train.md")  # whose export the others have
    assert len(marked) >= 3
    for block in marked:
        for command in block.commands:
            done = subprocess.run(
                command,
                shell=True,
                cwd=tmp_path,
                capture_output=True,
                text=True,
                check=False,
                env=env,
            )
            assert done.returncode == 0, f"{block.page.name}: {command}\n{done.stderr[-2000:]}"
    assert (tmp_path / "runs/first/export/rayrm.json").exists()


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_python_of_the_pages_is_python(page: Path) -> None:
    for _, language, body in FENCE.findall(page.read_text()):
        if language == "python":
            compile(body, str(page), "exec")


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists() or target == "configuration.md", (
                    page,
                    target,
                )


def test_the_readme_is_for_two_minutes() -> None:
    assert (ROOT / "README.md").read_text().count("\n") <= 200
