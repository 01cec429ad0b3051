"""Run `rayrm score` as a job: python jobs/score.py EXPORT IN OUT [--field value …]"""

from __future__ import annotations

from rayrm.commands.score import main

if __name__ == "__main__":
    main()
