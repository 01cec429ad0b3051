"""Run `rayrm evaluate EXPORT DATA… [--report DIR]`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rayrm.commands.parser import errors_in_a_line, make_parser
from rayrm.config import local_path


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = make_parser(prog, "Evaluate an export on preference records.")
    parser.add_argument("export", help="directory, URI or hub name")
    parser.add_argument("data", nargs="+", help="files, globs, directories or hub names")
    parser.add_argument("--against", metavar="EXPORT", help="another export to compare with")
    parser.add_argument("--split", default="test", help="split of hub datasets (default: test)")
    parser.add_argument("--json", metavar="FILE", type=local_path, help="write all metrics here")
    parser.add_argument(
        "--report", metavar="DIR", type=local_path, help="write an HTML page with plots here"
    )
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--max-length", type=int, help="maximum length of a row in tokens")
    parser.add_argument("--overlong", default="truncate", choices=["truncate", "error"])
    parser.add_argument("--on-bad-record", default="error", choices=["error", "skip"])
    args = parser.parse_args(arguments)
    with errors_in_a_line():
        from rayrm.data.records import read_groups  # imported here since torch takes seconds
        from rayrm.evaluation.evaluate import score
        from rayrm.evaluation.report import Evaluated, write_report
        from rayrm.model.engine import RewardModel

        groups, read = read_groups(args.data, split=args.split, on_bad_record=args.on_bad_record)
        print(read)
        evaluated, dtypes = [], []
        for export in [args.export, args.against] if args.against else [args.export]:
            model = RewardModel.load(
                export,
                args.device,
                args.dtype,
                max_length=args.max_length,
                overlong=args.overlong,
            )
            scored = score(model, groups, progress=True)
            history = model.export.history if model.export else []
            evaluated.append(Evaluated(model.version, scored, history))
            dtypes.append(model.dtype)
            del model
    figures = [
        {"version": e.version, "dtype": dtype, **e.figures}
        for e, dtype in zip(evaluated, dtypes, strict=True)
    ]
    print(table(figures))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        against = {"against": figures[1]} if args.against else {}
        args.json.write_text(json.dumps(figures[0] | against, indent=2) + "\n")
    if args.report:
        page = write_report(args.report, groups, evaluated, f"{', '.join(args.data)}: {read}")
        print(f"report: {page}")


def table(figures: Sequence[dict[str, Any]]) -> str:
    """Format metrics: a row per metric, subset and benchmark score, a column per export."""
    columns = [lines(f) for f in figures]
    names = list(dict.fromkeys(name for column in columns for name in column))
    width = max(map(len, names))
    cells = [[column.get(name, "n/a") for name in names] for column in columns]
    padded = [[f"{cell:{max(map(len, column))}}" for cell in column] for column in cells]
    rows = zip(names, *padded, strict=True)
    return "\n".join(f"{name:{width}}  {'  '.join(row)}".rstrip() for name, *row in rows)


def lines(figures: dict[str, Any]) -> dict[str, str]:
    """Return an export's formatted metrics by the name of their row."""
    found = {
        key.replace("_", " "): f"{value:.4g}" if isinstance(value, float) else str(value)
        for key, value in figures.items()
        if not isinstance(value, dict) and value is not None
    }
    for name, subset in figures["subsets"].items():
        accuracy = "n/a" if subset["accuracy"] is None else f"{subset['accuracy']:.3f}"
        found[f"  {name or '(no subset)'}"] = f"{accuracy}  {subset['pairs']} pairs"
    for key in ("easy", "normal", "hard", "mean") if figures["rm_bench"] else ():
        value = figures["rm_bench"][key]
        found[f"RM-Bench {key}"] = "n/a" if value is None else f"{value:.3f}"
    if figures["reward_bench"]:
        for name, section in figures["reward_bench"]["sections"].items():
            found[f"RewardBench {name}"] = f"{section['score']:.3f}"
        mean = figures["reward_bench"]["mean"]
        found["RewardBench mean"] = "n/a" if mean is None else f"{mean:.3f}"
    return found
