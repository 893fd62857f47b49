"""Shows a run or a predictions file as one HTML page.

python -m eval.report RUN_OR_PREDICTIONS [--out FILE.html] [--items N]
"""

import argparse
import pathlib
import sys

from mammut.pages.report import write_report


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", type=pathlib.Path, metavar="RUN_OR_PREDICTIONS")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        help="the page; by default in the run, or beside the predictions",
    )
    parser.add_argument(
        "--items", type=int, default=12, help="how many of each kind are shown (default: 12)"
    )
    args = parser.parse_args(argv)
    if args.items < 1:
        sys.exit(f"eval.report: --items is {args.items}, expected at least 1")
    try:
        print(write_report(args.target, args.out, items=args.items))
    except KeyboardInterrupt:
        print("eval.report: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.exit(f"eval.report: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
