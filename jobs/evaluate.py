"""Evaluate an export, as `rayrm evaluate` does: python jobs/evaluate.py EXPORT DATA…"""

from __future__ import annotations

from rayrm.commands.evaluate import main

if __name__ == "__main__":
    main()
