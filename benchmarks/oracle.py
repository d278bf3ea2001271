"""The oracle against its floors, its peers and its targets.

`make bench` runs it: one table for each case, and with `--json FILE` the same as JSON. A case with
its options is `--only navigation,top100`; `--scale 0.1` is a quick look at a tenth of the rows.

All rows of a table are timed in one process, in turn, on the same inputs. Columns: the median time
of at least 7 runs after a warm-up (fewer, and it is said, where a run takes seconds), its ratio to
that of the floor, the error of the posterior mean against explicit differences in float64 (the
largest over the queries, relative), the largest tail mass, and the peak of memory beyond the
inputs. Times are of this machine; ratios of one run travel better. The bank of the size of ImageNet
has a script of its own, imagenet.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback

import torch
from measure import Options
from report import Report, meta

CASES = {
    "navigation": "dense",
    "top100": "dense",
    "low-dim": "dense",
    "certificate": "certified",
    "class-wise": "classes",
    "tail": "tails",
    "training": "training",
}


def run(name: str, options: Options) -> Report:
    """One case; what it raises is reported, and does not stop the others."""
    try:
        module = __import__(CASES[name])
        return getattr(module, name.replace("-", "_"))(options)
    except Exception as error:
        traceback.print_exc()
        report = Report(name, f"failed: {type(error).__name__}: {error}")
        report.tables["failed"] = [{"name": name, "failed": True}]
        return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", help="also write the numbers to this file")
    parser.add_argument("--runs", type=int, default=7, help="counted runs of each row (default 7)")
    parser.add_argument("--only", help=f"some of the cases, by commas: {', '.join(CASES)}")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the rows (default 1)")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(CASES)
    unknown = [name for name in names if name not in CASES]
    if unknown or arguments.runs < 1 or not 0 < arguments.scale <= 1:
        parser.error(f"expected cases among {list(CASES)}, --runs >= 1 and --scale in (0, 1]")
    options = Options(arguments.runs, arguments.scale)
    about = {**meta(), "runs": options.runs, "scale": options.scale}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    torch.manual_seed(0)
    reports = []
    for name in names:
        start = time.perf_counter()
        reports.append(run(name, options))
        print(f"  ({time.perf_counter() - start:.0f} s)", flush=True)
    targets = [(report.name, target) for report in reports for target in report.targets]
    if targets:
        print("\n== targets")
        for case, target in targets:
            verdict = {None: "not measured", True: "met", False: "MISSED"}[target["met"]]
            reached = "" if target["reached"] is None else f"{target['reached']:.3g}"
            print(f"  {verdict:13}{reached:>9} {target['wanted']:9}{case}: {target['text']}")
    if arguments.json:
        cases = [{key: value for key, value in vars(report).items()} for report in reports]
        with open(arguments.json, "w") as file:
            json.dump({"meta": about, "cases": cases}, file, indent=1)
    failed = [name for report in reports for name in report.failed]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
