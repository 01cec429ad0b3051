"""Run `rayrm serve` as a job: python jobs/serve.py EXPORT [--field value …]"""

from __future__ import annotations

from rayrm.commands.serve import main

if __name__ == "__main__":
    main()
