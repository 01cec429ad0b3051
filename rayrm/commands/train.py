"""Run `rayrm train CONFIG.yaml [--section.field value …]`."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from rayrm.commands.parser import errors_in_a_line, make_parser
from rayrm.training.config import TrainConfig


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = make_parser(
        prog, "Train a reward model and export it; the same name resumes the run.", TrainConfig
    )
    parser.add_argument("config", help="YAML file, for example jobs/configs/quickstart.yaml")
    args, overrides = parser.parse_known_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with errors_in_a_line():
        config = TrainConfig.load(args.config, overrides)
        from rayrm.training.fit import fit  # here: torch and Ray take seconds to import

        result = fit(config)
    print(f"export: {result.export}")
    if result.metrics:
        accuracy, pairs = result.metrics["accuracy"], result.metrics["pairs"]
        figure = "n/a" if accuracy is None else f"{accuracy:.3f}"
        print(f"held-out accuracy: {figure} on {pairs} pairs")
    if result.report:
        print(f"report: {result.report}")
