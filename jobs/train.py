"""Train a reward model: jobs/train.py CONFIG.yaml [--section.field value ...]"""

from __future__ import annotations

import argparse
import logging
import sys

from rayrm.config import describe
from rayrm.errors import RayrmError
from rayrm.training.config import TrainConfig


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train a reward model and export it; the same name resumes.",
        epilog="overrides:\n" + describe(TrainConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file, for example jobs/configs/quickstart.yaml")
    args, overrides = parser.parse_known_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        config = TrainConfig.load(args.config, overrides)
        from rayrm.training.fit import fit  # only now: torch and Ray take seconds to import

        result = fit(config)
    except RayrmError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(f"export: {result.export}")
    if result.metrics:
        accuracy, pairs = result.metrics["accuracy"], result.metrics["pairs"]
        figure = "n/a" if accuracy is None else f"{accuracy:.3f}"
        print(f"held-out accuracy: {figure} on {pairs} pairs")
    if result.report:
        print(f"report: {result.report}")


if __name__ == "__main__":
    main()
