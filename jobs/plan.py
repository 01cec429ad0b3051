"""Run `rayrm plan` as a job: python jobs/plan.py [--gpus 8 32 64] …"""

from __future__ import annotations

from rayrm.commands.plan import main

if __name__ == "__main__":
    main()
