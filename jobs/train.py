"""Run `rayrm train` as a job: python jobs/train.py CONFIG.yaml [--field value …]"""

from __future__ import annotations

from rayrm.commands.train import main

if __name__ == "__main__":
    main()
