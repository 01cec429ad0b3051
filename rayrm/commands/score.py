"""Run `rayrm score EXPORT IN OUT [--field value …]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rayrm.commands.parser import errors_in_a_line, make_parser
from rayrm.serving.config import ServeConfig


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = make_parser(
        prog,
        "Score a corpus of prompts and responses on the cluster; the same call again resumes it.",
        ServeConfig,
    )
    parser.add_argument("export", help="directory or URI of an export, or a YAML file to serve it")
    parser.add_argument("source", metavar="IN", help="file, glob, directory or hub name")
    parser.add_argument("target", metavar="OUT", help="a .jsonl, .jsonl.gz or .parquet file")
    parser.add_argument("--split", default="train", help="split of hub datasets (default: train)")
    parser.add_argument(
        "--part-rows",
        type=int,
        default=1024,
        help="rows per part; a kill loses the parts in flight",
    )
    args, overrides = parser.parse_known_args(arguments)
    with errors_in_a_line():
        config = ServeConfig.load(args.export, overrides)
        from rayrm.serving.corpus import score_corpus  # here: torch and Ray take seconds

        scored = score_corpus(
            config, args.source, args.target, split=args.split, part_rows=args.part_rows
        )
    print(f"{args.target}: {scored}")
    if scored.unrewarded == scored.rows:
        sys.exit("no row has a reward; see the column `reward_error`")
