"""The command rayrm: train, evaluate, serve, score, plan.

Each has a module of its own, which jobs/ calls too. Loads nothing heavy before it has to.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

# Each command and what it does, in a line.
COMMANDS = {
    "train": "fit a reward model to preferences, and export it",
    "evaluate": "score an export on preferences: figures and a report",
    "serve": "serve an export, or try, promote and roll back what is served",
    "score": "score a corpus of prompts and responses over the cluster",
    "plan": "plan how many GPUs each part of a PPO run needs",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """What the console script runs: rayrm COMMAND …"""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
    elif words[0] not in COMMANDS:
        sys.exit(f"rayrm: no command {words[0]!r}\n\n{usage()}")
    else:
        import_module(f"rayrm.commands.{words[0]}").main(words[1:], f"rayrm {words[0]}")


def usage() -> str:
    lines = [f"  {name:10}{meaning}" for name, meaning in COMMANDS.items()]
    return "\n".join(["usage: rayrm COMMAND …; rayrm COMMAND --help", "", *lines])
