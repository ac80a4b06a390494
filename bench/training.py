"""Measures what training is made of with `arcface-worker bench`, a row at a time (make bench, scripts/bench.sh):

    python3 bench/training.py [--worker PATH] [--output FILE.json] [--again] [ROW]...

Heads and whole steps run against our own plain ones, in turn. Each row is written to FILE.json as soon as it is there, and the table
of all of them to FILE.md; a row of this very program on this machine is not measured again (--again). With BENCH_QUICK=1 sizes are
tiny and everything runs once: that shows that all of it works, and says nothing about speed. ROW may have wildcards: 'head-*'.
Exit code 2 if the program is missing, 1 if a row could not be measured, 130 if it was stopped.
"""

import argparse
import os
import sys
import tempfile
import time

import results
from results import Failed, megabytes, number

# Sizes of a quick run, by option.
QUICK = {
    "--classes": "300", "--dim": "16", "--batch": "4", "--network": "tiny", "--mib": "1",
    "--images": "300", "--templates": "60", "--pairs": "500", "--bootstrap": "5",
}
PAIRS = 5
HEADS = "Head: one step, D 512, B 128, against the plain head"
STEPS = "Whole steps: images to updated weights, against the plain trainer in fp32"
NETWORKS = "Networks alone"
REST = "Input, exchange, checkpoints, evaluation"
# Where files are written that are measured; in commands it is DIR.
WORK = os.path.join("target", "bench")
SCRATCH = "DIR"


def all_rows(has_bf16):
    """By name: section, what it is, and the arguments of `bench`."""
    rows = {}
    precisions = ["fp32", "bf16"] if has_bf16 else ["fp32"]
    for label, classes in [("100k", 100_000), ("500k", 500_000), ("1m", 1_000_000)]:
        for rate in ["1.0", "0.1"]:
            for precision in precisions:
                for malloc in ["default", "tuned"]:
                    rows[f"head-{label}-{rate}-{precision}-{malloc}"] = (
                        HEADS,
                        f"{classes:,} classes, rate {rate}, {precision}, {malloc} malloc",
                        f"head --classes {classes} --dim 512 --batch 128 --rate {rate} --precision {precision} --malloc {malloc} "
                        "--against plain",
                    )
    for network in ["r18", "mbf"]:
        for rate in ["1.0", "0.1"] if network == "r18" else ["1.0"]:
            for precision in precisions:
                rows[f"step-{network}-{rate}-{precision}"] = (
                    STEPS,
                    f"{network}, 100,000 classes, rate {rate}, B 64, {precision}, tuned malloc",
                    f"step --network {network} --classes 100000 --batch 64 --rate {rate} --precision {precision} --malloc tuned "
                    "--against plain",
                )
    if has_bf16:
        # As the reference is started, by a launcher that sets nothing.
        rows["step-r18-1.0-bf16-default"] = (
            STEPS,
            "r18, 100,000 classes, rate 1.0, B 64, bf16, default malloc",
            "step --network r18 --classes 100000 --batch 64 --rate 1.0 --precision bf16 --malloc default --against plain",
        )
    for network, batch, train, more in [
        ("r18", 64, True, ""), ("mbf", 64, True, ""), ("r50", 32, True, ""),
        ("r50", 32, True, " --gradient-checkpointing"), ("r50", 1, False, ""), ("r50", 32, False, ""), ("mbf", 32, False, ""),
    ]:
        what = "forward and backward" if train else "inference"
        for precision in precisions:
            rows[f"{'train' if train else 'infer'}-{network}-{batch}{'-checkpointing' if more else ''}-{precision}"] = (
                NETWORKS,
                f"{network}, B {batch}, {what}, {precision}{', gradient checkpointing' if more else ''}",
                f"backbone --network {network} --batch {batch} --precision {precision}{' --train' if train else ''}{more}",
            )
    rows["loader-drawn"] = (REST, "drawn images, B 128, 2 threads: wait for a batch", "loader --data synthetic --batch 128 --threads 2")
    for threads in [1, 2]:
        rows[f"loader-jpeg-{threads}"] = (
            REST,
            f"JPEG of 112x112, B 128, threads: {threads}; wait for a batch",
            f"loader --data jpeg --batch 128 --threads {threads} --repetitions 200",
        )
    for form, where in [("planes", "by the loader"), ("pixels", "by a GPU, not measured")]:
        rows[f"loader-jpeg-dali-{form}"] = (
            REST,
            f"the same with one thread and augment dali, looks changed {where}",
            f"loader --data jpeg --batch 128 --threads 1 --augment dali --form {form} --repetitions 200",
        )
    rows["loader-cache"] = (
        REST, "the same from data.cache, 1 thread", "loader --data jpeg --batch 128 --threads 1 --cache 1GiB --repetitions 200",
    )
    for ranks in [2, 4]:
        rows[f"collective-{ranks}"] = (REST, f"{ranks} ranks over loopback, 64 MiB", f"collective --ranks {ranks} --mib 64")
    rows["checkpoint"] = (REST, "part of 250,000 classes", f"checkpoint --classes 250000 --dim 512 --dir {SCRATCH}")
    rows["ijb"] = (
        REST,
        "IJB-C's size, 1:1, from features on disk",
        f"ijb --images 469375 --templates 23124 --pairs 15658489 --dim 512 --bootstrap 200 --dir {SCRATCH}",
    )
    return rows


def shrunk(arguments):
    """With the sizes of a quick run."""
    return [QUICK.get(before, argument) for before, argument in zip([None, *arguments], arguments)]


def arguments():
    about, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    quick = os.environ.get("BENCH_QUICK", "") not in ("", "0")
    usual = os.path.join(WORK, "quick", "training.json") if quick else os.path.join("docs", "benchmarks", "training.json")
    parser.add_argument("rows", nargs="*", metavar="ROW", help="what to measure; default: every row")
    parser.add_argument("--worker", metavar="PATH", default="target/release/arcface-worker", help="the program")
    parser.add_argument("--output", metavar="FILE.json", default=usual, help=f"where results go (default {usual})")
    parser.add_argument("--again", action="store_true", help="measure rows that FILE.json has")
    parser.add_argument("--list", action="store_true", help="name the rows and end")
    parser.set_defaults(quick=quick)
    return parser.parse_args()


def measure(worker, line, quick, folder):
    """What a row prints, and the command to have it again."""
    given = line.split()
    if quick:
        given = shrunk(given)
    is_pair = "--against" in given
    if quick:
        if "--repetitions" in given:
            at = given.index("--repetitions")
            del given[at : at + 2]
        given += ["--repetitions", "1"] + (["--steps", "1", "--threads", "1"] if is_pair else [])
    elif is_pair:
        given += ["--repetitions", str(PAIRS)]
    command = " ".join(["arcface-worker", "bench", *given, "--output", "json"])
    real = [folder if argument == SCRATCH else argument for argument in given]
    # Threads that wait for each other would take most of a quick run's time.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if quick else None
    return results.run([worker, "bench", *real, "--output", "json"], environment), command


def is_of(row, worker):
    """True if this very program was measured."""
    return row["worker"]["sha256"] == worker["sha256"]


def timed(result):
    """The times that a result holds: what of the row it is, median, minimum, and what passes in a second."""
    if "ratio" in result:
        a_second = f"{number(result['batch'] * 1e3 / result['ours_ms'])} images" if result["bench"] == "step" else ""
        return [("", result["ours_ms"], result["ours_min_ms"], a_second)]
    found = []
    for key in result:
        if key.endswith("median_ms"):
            prefix = key[: -len("median_ms")]
            a_second = ""
            for rate, unit in [
                ("images_per_second", "images"), (f"{prefix}gb_per_second", "GB"),
                (f"{prefix}gb_per_s", "GB"), (f"{prefix}mb_per_s", "MB"),
            ]:
                if rate in result:
                    a_second = f"{number(result[rate])} {unit}"
            found.append((prefix.strip("_").replace("_", " "), result[key], result[f"{prefix}min_ms"], a_second))
    return found


def lines_of(name, row, now):
    """Of the table."""
    result = row["result"]
    is_pair = "ratio" in result
    repetitions = f"{result['repetitions']} pairs of {result['steps']}" if is_pair else str(result["repetitions"])
    # Rows of an older program say so.
    older = "" if is_of(row, now) else f" (commit {row['worker']['commit']}, {row['date']})"
    for what, median, least, a_second in timed(result):
        yield [
            f"`{name}`: {row['what']}" + (f": {what}" if what else "") + older,
            number(median),
            number(least),
            repetitions,
            a_second,
            megabytes(result.get("ours_peak_bytes" if is_pair else "peak_bytes")),
            number(result.get("plain_ms")),
            megabytes(result.get("plain_peak_bytes")),
            f"{result['ratio']:.2f}" if is_pair else "",
        ]


HEAD = ["", "median, ms", "min, ms", "repetitions", "a second", "peak, MB", "plain, ms", "plain's peak, MB", "ratio"]


def document(machine, rows):
    """The tables, in Markdown; the newest row's program is the one that others are held against."""
    known = [row for name, row in rows.items() if name in all_rows(True)]
    newest = max(known, key=lambda row: row["at"])
    quick = any(row["quick"] for row in known)
    text = (
        "# What training is made of, measured\n\n"
        + ("**Tiny sizes, once each: these figures say nothing about speed.**\n\n" if quick else "")
        + f"{results.machine_line(machine)}. {newest['worker']['version']}, commit {newest['worker']['commit']}, "
        f"{newest['date']}, release profile. Written by `make bench` from [training.json](training.json), which has more "
        "of each row; `make bench AGAIN=1 ROWS=NAME` measures one anew.\n\n"
        "Medians and minima over repetitions after one that does not count. A ratio is how many times as long the plain form takes: "
        "the median of pairs that ran in turn, each side in a process of its own. Peaks of heads and whole steps are with weights and "
        "optimizer state, those of networks without weights and gradients, and in inference of tensors alone. \"Tuned\" is an allocator that keeps freed memory and uses large "
        "pages, for both sides, as in a job.\n"
    )
    for section in [HEADS, STEPS, NETWORKS, REST]:
        here = {name: rows[name] for name, (of, _, _) in all_rows(True).items() if of == section and name in rows}
        lines = [line for name, row in here.items() for line in lines_of(name, row, newest["worker"])]
        if lines:
            used = [column for column in range(len(HEAD)) if column < 4 or any(line[column] for line in lines)]
            picked = [[line[column] for column in used] for line in [HEAD, *lines]]
            again = "\n".join(f"{row['command']}  # {name}" for name, row in here.items())
            text += f"\n## {section}\n\n{results.table(picked[0], picked[1:])}\n```sh\n{again}\n```\n"
    return text


def say(line):
    print(f"bench: {line}", file=sys.stderr, flush=True)


def run(args):
    """The exit code."""
    rows = all_rows(args.quick or "avx512_bf16" in results.machine()["features"])
    wanted = results.chosen(rows, args.rows)
    if args.list:
        for name in wanted:
            print(f"{name:28} {rows[name][2]}")
        return 0
    worker = results.program(args.worker)
    saved = results.Results(args.output, document)
    if results.is_noisy():
        say(f"something else computes here (load {os.getloadavg()[0]:.1f}): the times will say more about that")
    code = 0
    os.makedirs(WORK, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="scratch-", dir=WORK) as folder:
        for place, name in enumerate(wanted, 1):
            _, what, line = rows[name]
            old = saved.rows.get(name)
            if not args.again and old and (old["what"], old["quick"]) == (what, args.quick) and is_of(old, worker):
                say(f"{name} ({place} of {len(wanted)}): measured already")
                continue
            begin = time.monotonic()
            try:
                result, command = measure(args.worker, line, args.quick, folder)
            except Failed as error:
                say(f"{name} ({place} of {len(wanted)}): {error}")
                code = 1
                continue
            row = {"what": what, "command": command, "quick": args.quick, "worker": worker}
            row.update(date=results.today(), at=time.time(), result=result)
            saved.put(name, row)
            took = time.monotonic() - begin
            times = [f"{part} {number(median)} ms".strip() for part, median, _, _ in timed(result)]
            ratio = f", ratio {result['ratio']:.2f}" if "ratio" in result else ""
            say(f"{name} ({place} of {len(wanted)}, {took:.0f} s): {'; '.join(times)}{ratio}")
    say(f"the table is in {os.path.splitext(args.output)[0]}.md")
    return code


def main():
    args = arguments()
    return results.exit_code(lambda: run(args), say)


if __name__ == "__main__":
    sys.exit(main())
