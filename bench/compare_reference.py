"""Times the PyTorch reference and our worker in turn, on the same sizes:

    scripts/python.sh bench/compare_reference.py --reference DIR [--output FILE.json] [ROW]...

DIR is `recognition/arcface_torch` of an InsightFace checkout, or the checkout; it is run as it is, by reference_side.py. Each
measurement is a process of its own, which repeats its work --steps times after one that does not count and says the median. A
pair is one process of every side, one after the other, and back again in the next pair, so that a disturbance of the machine
meets all. Ratios are medians over the pairs. All sides are measured twice: with an allocator that gives large blocks back to the system
("default"), and with one that keeps freed memory and uses large pages ("tuned"), since a part of the reference's time is page faults.

Prints a table. With --output it is also in FILE.md, and what it was made of in FILE.json, after every pair: stop it with Ctrl-C,
and start it again to go on; rows of this very program with as many pairs are not measured again (--again). ROW may
have wildcards: 'head-*'. Needs PyTorch. Exit code 2 if something is missing, 1 if a row could not be measured, 130 if it was
stopped.
"""

import argparse
import importlib.util
import os
import statistics
import sys
import tempfile

import results
from results import Failed, Interrupted, Unusable, megabytes, number

# By allocator: the reference has that of the C library, which is tuned by the first variables; ours comes tuned, and the last one makes it
# as others are (`arcface-worker bench --malloc`).
ALLOCATORS = {
    "tuned": {
        "MALLOC_MMAP_THRESHOLD_": "17179869184",
        "MALLOC_TRIM_THRESHOLD_": "17179869184",
        "MALLOC_TOP_PAD_": "268435456",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    },
    "default": {"MALLOC_CONF": "oversize_threshold:8388608,dirty_decay_ms:10000,muzzy_decay_ms:0,thp:default"},
}
MODULES = ["partial_fc_v2.py", "losses.py", os.path.join("backbones", "__init__.py")]
TITLES = {"reference": "reference", "ours_fp32": "ours, fp32", "ours_bf16": "ours, bf16", "plain": "plain"}
HERE = os.path.dirname(os.path.abspath(__file__))


def all_rows():
    """By name: the part of `bench`, and its sizes."""
    rows = {}
    for label, classes in [("100k", 100_000), ("500k", 500_000), ("1m", 1_000_000)]:
        for suffix, rate in [("", 1.0), ("-0.1", 0.1)]:
            rows[f"head-{label}{suffix}"] = ("head", {"classes": classes, "dim": 512, "batch": 128, "rate": rate})
    for network in ["r18", "mbf"]:
        rows[f"train-{network}"] = ("backbone", {"network": network, "batch": 64, "train": True})
    rows["infer-r50"] = ("backbone", {"network": "r50", "batch": 32, "train": False})
    for network, suffix, rate in [("r18", "", 1.0), ("r18", "-0.1", 0.1), ("mbf", "", 1.0)]:
        rows[f"step-{network}{suffix}"] = ("step", {"network": network, "classes": 100_000, "batch": 64, "rate": rate})
    return rows


def arguments():
    about, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help="what to measure; default: every row")
    parser.add_argument("--reference", metavar="DIR", help="folder with the reference's modules")
    parser.add_argument("--worker", metavar="PATH", default="target/release/arcface-worker", help="our program")
    parser.add_argument("--pairs", type=positive, default=5, help="processes of each side (default 5)")
    parser.add_argument("--steps", type=positive, default=3, help="repetitions that count in each process (default 3)")
    parser.add_argument("--threads", type=positive, default=results.cores(), help="of each side (default: one a core)")
    parser.add_argument("--malloc", choices=["default", "tuned", "both"], default="both", help="allocator (default both)")
    parser.add_argument(
        "--bf16", choices=["auto", "yes", "no"], default="auto", help="measure ours in bf16 too; auto: if the processor has it"
    )
    parser.add_argument("--no-plain", action="store_true", help="leave out our plain head and trainer")
    parser.add_argument("--output", metavar="FILE.json", help="where results go, and their table beside it")
    parser.add_argument("--again", action="store_true", help="measure rows that FILE.json has")
    parser.add_argument("--list", action="store_true", help="name the rows and end")
    for size in ["classes", "dim", "batch"]:
        parser.add_argument(f"--{size}", type=positive, metavar="N", help="instead of every row's own, for trials")
    parser.add_argument("--network", metavar="NAME", help="instead of every row's own, for trials")
    return parser.parse_args()


def positive(text):
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def reference_folder(given):
    if given is None:
        raise Unusable("--reference DIR is missing: the folder recognition/arcface_torch of an InsightFace checkout")
    inside = os.path.join(given, "recognition", "arcface_torch")
    folder = inside if os.path.isdir(inside) else given
    for module in MODULES:
        if not os.path.isfile(os.path.join(folder, module)):
            raise Unusable(f"no reference in {given}: it has no {module} (recognition/arcface_torch of InsightFace has)")
    return os.path.abspath(folder)


def flags(sizes):
    """Of both sides, which have the same."""
    given = []
    for name, value in sizes.items():
        if value is True:
            given.append(f"--{name}")
        elif value is not False:
            given += [f"--{name}", str(value)]
    return given


def commands(args, folder, part, sizes):
    """A command for each side."""
    repeat = ["--repetitions", str(args.steps)]
    threads = ["--threads", str(args.threads)]
    child = os.path.join(HERE, "reference_side.py")
    sides = {"reference": [sys.executable, "-s", child, "--reference", folder, *threads, *repeat, part, *flags(sizes)]}
    worker = [args.worker, "bench", part, *flags(sizes), *repeat, "--output", "json"]
    if part != "backbone":  # OMP_NUM_THREADS tells it its threads
        worker += threads
    sides["ours_fp32"] = [*worker, "--precision", "fp32"]
    if args.bf16 == "yes" or args.bf16 == "auto" and "avx512_bf16" in results.machine()["features"]:
        sides["ours_bf16"] = [*worker, "--precision", "bf16"]
    if part != "backbone" and not args.no_plain:
        network = ["--plain-network"] if part == "step" else []
        sides["plain"] = [*worker, "--precision", "fp32", "--implementation", "plain", *network]
    return sides


def environment(malloc, threads, cache):
    """For both sides: no setting of an allocator but the one that is measured. What Python compiles it keeps in `cache` and not
    beside the reference; without, PyTorch would take seconds to start each time."""
    taken = {"PYTHONDONTWRITEBYTECODE"}.union(*ALLOCATORS.values())
    kept = {name: value for name, value in os.environ.items() if name not in taken}
    own = {"OMP_NUM_THREADS": str(threads), "PYTHONPYCACHEPREFIX": cache}
    return {**kept, **own, **ALLOCATORS[malloc]}


def needed_memory(sizes):
    """Bytes that the reference takes at most: copies of weights and momentum by rate, and activations."""
    state = 2 * 4 * sizes.get("classes", 0) * sizes.get("dim", 512)
    return int(state * (2 + 2 * sizes.get("rate", 0))) + ((3 << 30) if "network" in sizes else (1 << 28))


def summary(side):
    """What the measurements of a side come to."""
    first, medians = side["results"][0], [result["median_ms"] for result in side["results"]]
    made = {
        "side": side["side"],
        "malloc": side["malloc"],
        "ms": medians,
        "median_ms": statistics.median(medians),
        "min_ms": min(result["min_ms"] for result in side["results"]),
        "peak_bytes": max((result["peak_bytes"] or 0 for result in side["results"]), default=0) or None,
    }
    return {**made, **{key: first[key] for key in ("arithmetic", "torch") if key in first}}


def ratios(sides):
    """How many times as long one side takes as another, pair by pair; sides with as many measurements."""
    by = {(side["side"], side["malloc"]): side["ms"] for side in sides}

    def ratio(over, under):
        each = [a / b for a, b in zip(by[over], by[under])]
        names = {"over": over[0], "over_malloc": over[1], "under": under[0], "under_malloc": under[1]}
        return {**names, "ratio": statistics.median(each), "ratios": each}

    found = []
    for side, malloc in by:
        if side in ("ours_fp32", "ours_bf16"):
            found.append(ratio(("reference", malloc), (side, malloc)))
            # As each is started: by a launcher that sets nothing, by an agent that sets the allocator.
            if malloc == "tuned" and ("reference", "default") in by:
                found.append(ratio(("reference", "default"), (side, malloc)))
        elif side == "plain":
            found.append(ratio((side, malloc), ("reference", malloc)))
    return found


def measure_row(args, name, part, sizes, folder, cache, put):
    """All pairs of a row; `put` gets it after each."""
    mallocs = ["default", "tuned"] if args.malloc == "both" else [args.malloc]
    made = commands(args, folder, part, sizes)
    sides = [
        {"side": side, "malloc": malloc, "command": command, "results": []}
        for malloc in mallocs
        for side, command in made.items()
    ]
    for pair in range(1, args.pairs + 1):
        for side in sides if pair % 2 else reversed(sides):
            try:
                result = results.run(side["command"], environment(side["malloc"], args.threads, cache))
            except Failed as error:
                raise Failed(f"{TITLES[side['side']]}, {side['malloc']} malloc: {error}") from None
            if result["torch_threads"] != args.threads:
                raise Failed(f"{TITLES[side['side']]} used {result['torch_threads']} threads, not {args.threads}")
            side["results"].append(result)
        made = [summary(side) for side in sides]
        put({"part": part, "sizes": sizes, "pairs": pair, "sides": made, "ratios": ratios(made)})
        say(f"{name}: pair {pair} of {args.pairs}: {progress(sides)}")


def progress(sides):
    """The pair that was just made."""
    parts, malloc, reference = [], None, None
    for side in sides:
        if side["malloc"] != malloc:
            malloc = side["malloc"]
            parts.append(f"{malloc} malloc")
        ms = side["results"][-1]["median_ms"]
        reference = ms if side["side"] == "reference" else reference
        times = "" if side["side"] == "reference" else f" (x{reference / ms:.2f})"
        parts.append(f"{TITLES[side['side']]} {number(ms)} ms{times}")
    return "; ".join(parts)


def found(row, over, under):
    """The ratio of two sides, each (side, malloc); empty where they were not both measured."""
    for entry in row["ratios"]:
        if over == (entry["over"], entry["over_malloc"]) and under == (entry["under"], entry["under_malloc"]):
            return f"{entry['ratio']:.2f}"
    return ""


def cell(row, side, malloc):
    """Milliseconds, and images a second where there are images."""
    for entry in row["sides"]:
        if (entry["side"], entry["malloc"]) == (side, malloc):
            a_second = row["sizes"]["batch"] * 1e3 / entry["median_ms"] if "network" in row["sizes"] else None
            return number(entry["median_ms"]) + (f" ({number(a_second)}/s)" if a_second else "")
    return ""


def label(name, row):
    sizes = row["sizes"]
    passes = "forward and backward" if sizes.get("train") else "inference"
    words = {
        "head": "head, {classes:,} classes, rate {rate:g}, D {dim}, B {batch}",
        "step": "whole step, {network}, {classes:,} classes, rate {rate:g}, B {batch}",
        "backbone": "{network}, B {batch}, {passes}",
    }
    return f"`{name}`: " + words[row["part"]].format(**sizes, passes=passes)


def document(machine, rows):
    """The table, in Markdown, of the rows that there are."""
    rows = {name: rows[name] for name in all_rows() if name in rows}
    if not rows:
        return "Nothing was measured.\n"
    of = sorted({(row["worker"]["version"], row["worker"]["commit"], row["date"]) for row in rows.values()})
    torch = sorted({side["torch"] for row in rows.values() for side in row["sides"] if "torch" in side})
    reference = sorted({row["reference"] for row in rows.values()})
    counts = sorted({f"{row['pairs']} pairs of {row['steps']} steps, {row['threads']} threads" for row in rows.values()})
    text = (
        "# Beside the reference\n\n"
        f"{results.machine_line(machine)}. "
        f"{'; '.join(f'{version}, commit {commit}, {date}' for version, commit, date in of)}. "
        f"The reference (arcface_torch, commit {', '.join(reference)}) with PyTorch {', '.join(torch)} on the CPU.\n\n"
        f"Milliseconds of a step: medians over processes that ran in turn ({'; '.join(counts)}). A ratio is the median over the "
        "pairs, above 1 where ours is faster. The reference's arithmetic is always fp32. \"Plain\" is our own head in the "
        "reference's form, in whole steps with our trainer in fp32. What the reference adds to a step for several processes "
        "is left out of it.\n\n"
        "```sh\nscripts/python.sh bench/compare_reference.py --reference DIR --output FILE.json\n```\n"
    )
    for malloc, title in [
        ("default", "The allocator as it is"),
        ("tuned", "An allocator that keeps freed memory and uses large pages, for all sides"),
    ]:
        lines = []
        for name, row in rows.items():
            if any(side["malloc"] == malloc for side in row["sides"]):
                line = [label(name, row), cell(row, "reference", malloc)]
                for side in ("ours_fp32", "ours_bf16"):
                    line += [cell(row, side, malloc), found(row, ("reference", malloc), (side, malloc))]
                line += [cell(row, "plain", malloc), found(row, ("plain", malloc), ("reference", malloc))]
                lines.append(line)
        head = ["", "reference", "ours, fp32", "ratio", "ours, bf16", "ratio", "plain", "plain / reference"]
        text += f"\n## {title}\n\n{results.table(head, lines)}" if lines else ""
    lines = []
    for name, row in rows.items():
        started = [found(row, ("reference", "default"), (side, "tuned")) for side in ("ours_fp32", "ours_bf16")]
        if any(started):
            lines.append([label(name, row), *started])
    if lines:
        text += (
            "\n## As each is started\n\n"
            "The reference by a launcher that sets nothing, ours by an agent that sets the allocator of its ranks.\n\n"
            + results.table(["", "ratio, ours fp32", "ratio, ours bf16"], lines)
        )
    return text + memory_table(rows)


def memory_table(rows):
    lines = []
    for name, row in rows.items():
        peaks = {(side["side"], side["malloc"]): side["peak_bytes"] for side in row["sides"]}
        lines.append([label(name, row)])
        for side in TITLES:
            both = [megabytes(peaks.get((side, malloc))) for malloc in ("default", "tuned") if (side, malloc) in peaks]
            lines[-1].append(" / ".join(both))
    return (
        "\n## Memory\n\nMost that a process grew by, MB, allocator as it is / tuned. Heads and whole steps with weights and "
        "optimizer state, networks alone without weights and gradients, ours of tensors alone.\n\n"
        + results.table(["", *TITLES.values()], lines)
    )


def is_measured(row, of, pairs, worker):
    """True if a row is whole, of these sizes and settings, and of this very program."""
    return (
        row is not None
        and row["pairs"] == pairs
        and row["worker"]["sha256"] == worker["sha256"]
        and all(row.get(key) == value for key, value in of.items())
    )


def say(line):
    print(f"compare_reference: {line}", file=sys.stderr, flush=True)


def compare(args):
    """The exit code."""
    rows = all_rows()
    wanted = {name: rows[name] for name in results.chosen(rows, args.rows)}
    if args.list:
        for name, (part, sizes) in wanted.items():
            print(label(name, {"part": part, "sizes": sizes}).replace("`", ""))
        return 0
    folder = reference_folder(args.reference)
    ours = results.program(args.worker)
    args.worker = os.path.abspath(args.worker)
    if importlib.util.find_spec("torch") is None:
        raise Unusable("PyTorch is missing (scripts/setup.sh python, and run this with scripts/python.sh)")
    saved = results.Results(args.output, document)
    if results.is_noisy():
        say(f"something else computes here (load {os.getloadavg()[0]:.1f}): the times will say more about that")
    asked = [args.pairs, args.malloc, args.bf16, args.no_plain]
    fixed = {"reference": results.commit(folder), "steps": args.steps, "threads": args.threads, "asked": asked}
    code = 0
    try:
        with tempfile.TemporaryDirectory(prefix="arcface-bench-") as cache:
            for name, (part, sizes) in wanted.items():
                sizes = {size: getattr(args, size, None) or value for size, value in sizes.items()}
                of = {**fixed, "sizes": sizes}
                if not args.again and is_measured(saved.rows.get(name), of, args.pairs, ours):
                    say(f"{name}: measured already")
                    continue
                free, needed = results.memory("MemAvailable"), needed_memory(sizes)
                if free < needed:
                    say(f"{name}: left out: it needs {needed / 1e9:.0f} GB of memory and {free / 1e9:.0f} GB are free")
                    code = 1
                    continue
                row = {**of, "worker": ours, "date": results.today()}
                try:
                    measure_row(args, name, part, sizes, folder, cache, lambda made: saved.put(name, {**row, **made}))
                except Failed as error:
                    say(f"{name}: {error}")
                    code = 1
    except Interrupted:
        say("stopped; what was measured stays")
        code = 130
    print(document(saved.machine, saved.rows), end="")
    return code


def main():
    args = arguments()
    return results.exit_code(lambda: compare(args), say)


if __name__ == "__main__":
    sys.exit(main())
