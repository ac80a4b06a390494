"""Runs whole jobs with `arcface-coordinator run` and says what came of them:

    python3 bench/jobs.py [--bin DIR] [--output FILE.json] [--again] [--list] [ROW]...

accuracy-N trains the job of `make demo` with seed N in bf16 with the tiled head, and in fp32 with the plain one: the fast way has to
learn as well as the plain one. scaling-* trains one rank with two threads and two ranks with one thread each, in turn, in one
global batch: a second rank is to cost nothing. Each row is written to FILE.json as soon as it is there, and the table of all of
them to FILE.md; a row of this very program on this machine is not measured again (--again). With BENCH_QUICK=1 sizes are tiny:
that shows that all of it works. ROW may have wildcards. Exit code 2 if a program is missing, 1 if a row could not be measured, 130
if it was stopped.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import time

import results
from results import Failed, Unusable

QUICK = os.environ.get("BENCH_QUICK", "") not in ("", "0")
WORK = os.path.join("target", "bench", "quick" if QUICK else "", "jobs")
# The job of `make demo`, of which rows change what they are about.
DEMO = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, "configs", "demo_cpu.toml")
SIDES = {"fast": ("bf16", "tiled"), "plain": ("fp32", "plain")}
RANKS = [1, 2]
PAIRS = 1 if QUICK else 3
# As scripts/demo.sh draws it; of a quick run less.
DATA = {"--identities": 4 if QUICK else 500, "--images-per-identity": 8 if QUICK else 40, "--pairs": 20 if QUICK else 1000}


def all_rows():
    """By name: what it is, and what measures it."""
    rows = {f"accuracy-{seed}": (f"accuracy, seed {seed}", lambda job, seed=seed: accuracy(job, seed)) for seed in (1, 2, 3)}
    for network, precision, steps in [("tiny", "fp32", 60), ("mbf", "bf16", 40)]:
        what = f"samples/s, {network}, {precision}, B 64"
        rows[f"scaling-{network}-{precision}"] = (what, lambda job, of=(network, precision, steps): scaling(job, *of))
    return rows


class Jobs:
    """Starts one job after the other."""

    def __init__(self, folder):
        self.worker = os.path.join(folder, "arcface-worker")
        self.coordinator = os.path.join(folder, "arcface-coordinator")
        self.of = results.program(self.worker, "--bin")
        if not os.access(self.coordinator, os.X_OK):
            raise Unusable(f"there is no program {self.coordinator} (make build; --bin names another one)")

    def data(self):
        """The folder of the demonstration's data, drawn when it is not there."""
        folder = os.path.join(WORK, "data")
        if not os.path.exists(os.path.join(folder, "whole")):
            sizes = [str(part) for pair in DATA.items() for part in pair]
            results.output([self.worker, "data", "synth", *sizes, "--output", folder])
            results.write(os.path.join(folder, "whole"), "")
        return folder

    def train(self, name, nodes, slots, changes):
        """Trains the demonstration's job with these keys changed, on this machine; its records."""
        folder = os.path.join(WORK, name)
        shutil.rmtree(folder, ignore_errors=True)
        command = [self.coordinator, "run", DEMO, "--nodes", str(nodes), "--slots", str(slots), "--device", "cpu"]
        # JSON's values are TOML's.
        for key, value in {"output": folder, **changes}.items():
            command += ["--set", f"{key}={json.dumps(value)}"]
        results.output(command)
        with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as file:
            return [json.loads(line) for line in file]


def accuracy(jobs, seed):
    """Both accuracies at the end."""
    found = {}
    for side, (precision, implementation) in SIDES.items():
        changes = {
            "job.seed": seed, "train.precision": precision, "head.implementation": implementation, "data.rec": jobs.data(),
            "data.cache": "1GiB",
        }  # fmt: skip
        if QUICK:
            changes.update({"train.batch_size": 4, "train.num_epoch": 1})
        records = jobs.train(f"accuracy_{side}_{seed}", 2, 1, changes)
        found[side] = [record["accuracy"] for record in records if record["kind"] == "evaluation"][-1]
    return {**found, "difference": abs(found["fast"] - found["plain"])}


def scaling(jobs, network, precision, steps):
    """Medians over the log's intervals after the first one, by number of ranks."""
    speeds = {ranks: [] for ranks in RANKS}
    steps = 4 if QUICK else steps
    for pair in range(PAIRS):
        for ranks in RANKS if pair % 2 == 0 else reversed(RANKS):
            changes = {
                "job.world_size": ranks, "model.network": network, "head.num_classes": 1000, "data.rec": "synthetic",
                "data.num_image": 64 * steps, "train.batch_size": 64 // ranks, "train.num_epoch": 1, "train.lr": 0.01,
                "train.frequent": 2 if QUICK else 5, "train.precision": precision, "eval.val_targets": [],
                "checkpoint.every_steps": 0,
            }  # fmt: skip
            records = jobs.train(f"scaling_{network}_{precision}_{ranks}", 1, ranks, changes)
            of_intervals = [record["samples_per_second"] for record in records if record["kind"] == "metrics"]
            speeds[ranks].append(statistics.median(of_intervals[1:]))
    ratios = [two / one for one, two in zip(speeds[1], speeds[2])]
    return {"one": statistics.median(speeds[1]), "two": statistics.median(speeds[2]), "ratios": ratios}


def document(machine, rows):
    """The tables, in Markdown."""
    newest = max(rows.values(), key=lambda row: row["at"])
    text = (
        "# Whole jobs, measured\n\n"
        + ("**Tiny sizes: these figures say nothing.**\n\n" if newest["quick"] else "")
        + f"{results.machine_line(machine)}. Written by `python3 bench/jobs.py`, of a program of commit {newest['worker']['commit']}, "
        f"{newest['date']}; `python3 bench/jobs.py --again ROW` measures a row anew.\n"
    )
    def label(name):
        """Rows of an older program say so."""
        of = rows[name]["worker"]
        older = "" if of["sha256"] == newest["worker"]["sha256"] else f" (commit {of['commit']})"
        what = "" if "fast" in rows[name]["result"] else f": {rows[name]['what']}"
        return f"`{name}`{what}{older}"

    known = {name: rows[name]["result"] for name in all_rows() if name in rows}
    lines = [
        [label(name), f"{result['fast']:.4f}", f"{result['plain']:.4f}", f"{result['difference']:.4f}"]
        for name, result in known.items()
        if "fast" in result
    ]
    if lines:
        text += (
            "\n## Accuracy\n\nThe job of `make demo` (`tiny`, two ranks, two epochs), verification on 1,000 pairs of identities that were never "
            "trained on. Bar: the difference is at most 0.005.\n\n"
        ) + results.table(["", "bf16, tiled head", "fp32, plain head", "difference"], lines)
    lines = [
        [label(name), results.number(result["one"]), results.number(result["two"]), ratios(result["ratios"])]
        for name, result in known.items()
        if "one" in result
    ]
    if lines:
        text += (
            f"\n## A second rank\n\nOne global batch on two cores, {PAIRS} pairs of jobs in turn, with drawn images. Bar: two ranks are within 10 % of "
            "one.\n\n"
        ) + results.table(["", "one rank, two threads", "two ranks, a thread each", "ratio, median (of each pair)"], lines)
    return text


def ratios(each):
    return f"{statistics.median(each):.2f} ({', '.join(f'{ratio:.2f}' for ratio in each)})"


def say(line):
    print(f"jobs: {line}", file=sys.stderr, flush=True)


def run(args):
    """The exit code."""
    rows = all_rows()
    wanted = results.chosen(rows, args.rows)
    if args.list:
        for name in wanted:
            print(f"{name:24} {rows[name][0]}")
        return 0
    jobs = Jobs(args.bin)
    saved = results.Results(args.output, document)
    if results.is_noisy():
        say(f"something else computes here (load {os.getloadavg()[0]:.1f}): speeds will say more about that")
    code = 0
    for place, name in enumerate(wanted, 1):
        what, measure = rows[name]
        old = saved.rows.get(name)
        if not args.again and old and old["quick"] == QUICK and old["worker"]["sha256"] == jobs.of["sha256"]:
            say(f"{name} ({place} of {len(wanted)}): measured already")
            continue
        begin = time.monotonic()
        try:
            result = measure(jobs)
        except (Failed, OSError, ValueError, LookupError, statistics.StatisticsError) as error:
            say(f"{name} ({place} of {len(wanted)}): {error}")
            code = 1
            continue
        row = {"what": what, "quick": QUICK, "worker": jobs.of, "date": results.today(), "at": time.time(), "result": result}
        saved.put(name, row)
        say(f"{name} ({place} of {len(wanted)}, {time.monotonic() - begin:.0f} s): {json.dumps(result)}")
    return code


def main():
    about, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(description=about, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = os.path.join(WORK, "jobs.json") if QUICK else os.path.join("docs", "benchmarks", "jobs.json")
    parser.add_argument("rows", nargs="*", metavar="ROW", help="what to measure; default: every row")
    parser.add_argument("--bin", metavar="DIR", default="target/release", help="folder of the programs")
    parser.add_argument("--output", metavar="FILE.json", default=usual, help=f"where results go (default {usual})")
    parser.add_argument("--again", action="store_true", help="measure rows that FILE.json has")
    parser.add_argument("--list", action="store_true", help="name the rows and end")
    args = parser.parse_args()
    return results.exit_code(lambda: run(args), say)


if __name__ == "__main__":
    sys.exit(main())
