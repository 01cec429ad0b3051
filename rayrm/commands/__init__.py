"""Run the command line: rayrm train, evaluate, serve, score, plan.

Each command is a module here, which jobs/ also calls; only the one that runs is imported. Does not
know the commands' arguments.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

# One line of help per command.
COMMANDS = {
    "train": "train a reward model on preferences, and export it",
    "evaluate": "evaluate an export on preferences: metrics and a report",
    "serve": "serve an export; try out, promote and roll back versions",
    "score": "score a corpus of prompts and responses on the cluster",
    "plan": "plan how many GPUs each part of a PPO run needs",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `rayrm COMMAND …`, as the console script does; exit with an error if it is unknown."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
    elif words[0] not in COMMANDS:
        sys.exit(f"rayrm: no command {words[0]!r}\n\n{usage()}")
    else:
        import_module(f"rayrm.commands.{words[0]}").main(words[1:], f"rayrm {words[0]}")


def usage() -> str:
    """Return the help text that lists the commands."""
    lines = [f"  {name:10}{meaning}" for name, meaning in COMMANDS.items()]
    return "\n".join(["usage: rayrm COMMAND …; rayrm COMMAND --help", "", *lines])
