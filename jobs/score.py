"""Score a corpus: python jobs/score.py EXPORT IN OUT [--field value …]"""

from __future__ import annotations

import argparse
import sys

from rayrm.config import describe
from rayrm.errors import RayrmError
from rayrm.serving.config import ServeConfig


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Score a corpus of prompts and responses over the cluster; again goes on.",
        epilog="overrides:\n" + describe(ServeConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("export", help="directory or URI of an export, or a YAML file to serve it")
    parser.add_argument("source", metavar="IN", help="file, glob, directory or hub name")
    parser.add_argument("target", metavar="OUT", help="a .jsonl, .jsonl.gz or .parquet file")
    parser.add_argument("--split", default="train", help="of hub datasets (default: train)")
    parser.add_argument("--part-rows", type=int, default=1024, help="rows lost at most by a kill")
    args, overrides = parser.parse_known_args()
    try:
        config = ServeConfig.load(args.export, overrides)
        from rayrm.serving.corpus import (
            score_corpus,  # only now: torch and Ray take seconds to import
        )

        scored = score_corpus(
            config, args.source, args.target, split=args.split, part_rows=args.part_rows
        )
    except RayrmError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(f"{args.target}: {scored}")
    if scored.unrewarded == scored.rows:
        sys.exit("no row has a reward: the column `reward_error` says why")


if __name__ == "__main__":
    main()
