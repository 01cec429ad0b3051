"""Run `rayrm evaluate` as a job: python jobs/evaluate.py EXPORT DATA…"""

from __future__ import annotations

from rayrm.commands.evaluate import main

if __name__ == "__main__":
    main()
