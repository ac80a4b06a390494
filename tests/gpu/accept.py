"""Proves a build of the ArcFace cluster on a GPU: numbers against the CPU, training, checkpoints, kernels, speed.

Every check runs the shipped executables, as a user would. The CPU of the same build is what a GPU is held against: that it has
the reference's numbers is proven by `make golden`. The result is one JSON object: the machine, and by check whether it passed,
its figures, its commands and its seconds. Exit code 0 if all passed, 1 if one failed, 2 if nothing could be checked.

With --device cpu the same script holds the CPU against itself: that proves the script, and no GPU.
"""

import argparse
import contextlib
import datetime
import json
import math
import os
import platform
import random
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Relative L2 of embeddings: the same arithmetic in another order of sums; bf16 has 8 bits.
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
# Of the first loss, and of any loss after it: steps carry a difference on, at this job's rate tenfold in some five of them.
FIRST_LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 3e-3}
# Of the first loss, where looks are changed on the device; unchanged ones have to be farther from it.
CHANGED_TOLERANCE = 1e-4
LOSS_TOLERANCE = {"fp32": 1e-2, "bf16": 3e-2}
NETWORKS = ["r18", "r50", "mbf", "vit_t"]
SIDE = 112
ACCURACY = 0.80


class Refused(Exception):
    """Nothing can be checked on this machine."""


class Failed(Exception):
    """A check did not pass."""


# --- safetensors ------------------------------------------------------------------------------------------------


def write_tensor(path, name, shape, values):
    body = struct.pack(f"<{len(values)}f", *values)
    head = json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": [0, len(body)]}}).encode()
    head += b" " * (-len(head) % 8)
    path.write_bytes(struct.pack("<Q", len(head)) + head + body)


def read_tensor(path, name):
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    entry = json.loads(data[8 : 8 + length])[name]
    if entry["dtype"] != "F32":
        raise Failed(f"{path.name}: {name} is {entry['dtype']}")
    begin, end = (8 + length + at for at in entry["data_offsets"])
    return struct.unpack(f"<{(end - begin) // 4}f", data[begin:end])


def distance(ours, expected):
    """Relative L2."""
    if len(ours) != len(expected) or not all(map(math.isfinite, ours)):
        return math.inf
    norm = math.sqrt(sum(x * x for x in expected))
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(ours, expected))) / max(norm, 1e-12)


# --- the machine ------------------------------------------------------------------------------------------------


def libraries():
    """Folders of libtorch and of the CUDA libraries that its wheel comes with."""
    if os.environ.get("LIBTORCH"):
        return [str(Path(os.environ["LIBTORCH"]) / "lib")]
    script = "import os, torch; print(os.path.dirname(torch.__file__)); print(torch.__version__)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if found.returncode != 0:
        raise Refused("no libtorch: LIBTORCH is not set, and Python has no torch\nhint: pip install torch==2.11.0")
    folder, version = found.stdout.split()
    if not version.startswith("2.11.0"):
        raise Refused(f"libtorch is {version}, and the build is for 2.11.0\nhint: pip install torch==2.11.0")
    folders = [Path(folder) / "lib"]
    folders += sorted((Path(folder).parent / "nvidia").glob("*/lib"))
    return [str(folder) for folder in folders]


def command_output(command):
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None


def machine(arguments):
    about = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": "cpu",
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "commit": command_output(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]),
    }
    if arguments.device == "cuda":
        query = "--query-gpu=name,driver_version,memory.total,uuid"
        gpus = command_output(["nvidia-smi", query, "--format=csv,noheader"])
        if not gpus:
            raise Refused("nvidia-smi finds no GPU\nhint: --device cpu tries the script itself")
        name, driver, memory, uuid = (part.strip() for part in gpus.splitlines()[0].split(","))
        about.update(device=name, driver=driver, memory=memory, uuid=uuid, gpus=len(gpus.splitlines()))
    return about


# --- running ----------------------------------------------------------------------------------------------------


class Accept:
    def __init__(self, arguments, folder):
        self.device = arguments.device
        self.quick = arguments.quick
        self.reference = arguments.reference and arguments.reference.resolve()
        self.folder = folder
        self.worker = arguments.bin / "arcface-worker"
        self.coordinator = arguments.bin / "arcface-coordinator"
        for program in (self.worker, self.coordinator):
            if not program.is_file():
                raise Refused(f"{program} is not there\nhint: make build, or --bin DIR")
        self.environment = dict(os.environ)
        if self.device == "cuda":
            folders = libraries() + [self.environment.get("LD_LIBRARY_PATH", "")]
            self.environment["LD_LIBRARY_PATH"] = ":".join(filter(None, folders))
        self.environment.setdefault("XDG_CACHE_HOME", str(folder / "cache"))
        self.commands = []

    def note(self, command):
        """A command as anybody would type it."""
        text = shlex.join(command)
        # Folders before those that they may lie in.
        for path, name in [(sys.executable, "python3"), (self.reference, "DIR"), (self.folder, "."), (self.worker.parent, ""), (ROOT, "")]:
            if path is not None:
                text = text.replace(f"{path}/" if name == "" else str(path), name)
        self.commands.append(text)

    def run(self, *command, timeout=300):
        """Standard output of a command that has to succeed."""
        command = [str(part) for part in command]
        self.note(command)
        try:
            done = subprocess.run(
                command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            raise Failed(f"{self.commands[-1]}: no end after {timeout} s") from None
        if done.returncode != 0:
            last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-3:]
            raise Failed(f"{self.commands[-1]}: exit code {done.returncode}: {' | '.join(last)}")
        return done.stdout

    def bench(self, *arguments, timeout=300):
        return json.loads(self.run(self.worker, "bench", *arguments, "--output", "json", timeout=timeout))

    def job(self, name, precision="fp32", *, steps=20, rate=1.0, model="", data="", more=""):
        """A job file that is the same for every device but for its output."""
        text = f"""output = "{name}"
[job]
name = "{name}"
world_size = 1
[model]
network = "tiny"
embedding_size = 128
{model}
[head]
num_classes = 200
sample_rate = {rate}
[data]
rec = "synthetic"
num_image = {32 * steps}
num_workers = 2
{data}
[train]
batch_size = 32
num_epoch = 1
lr = 0.002
frequent = 1
precision = "{precision}"
{more}
"""
        path = self.folder / f"{name}.toml"
        path.write_text(text)
        return path

    def train(self, job, device, timeout=300, says=()):
        """Trains a job alone on this machine; its losses by step. Its rank has to log all that it `says`."""
        self.run(self.coordinator, "run", job, "--nodes", 1, "--slots", 1, "--device", device, timeout=timeout)
        log = (self.folder / job.stem / "rank-0.log").read_text()
        for words in says:
            if words not in log:
                raise Failed(f"{job.stem}: its rank does not say {words!r}")
        return losses(self.folder / job.stem)


def losses(output):
    lines = (output / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    # After a recovery a step may be there twice: the later one counts.
    return {record["step"]: record["loss"] for record in records if record["kind"] == "metrics"}


def differences(ours, expected):
    """Of the losses of two trainings, as shares of themselves."""
    if ours.keys() != expected.keys() or not ours:
        raise Failed(f"steps {sorted(ours)[:3]}.. and {sorted(expected)[:3]}..")
    each = [abs(ours[step] - expected[step]) / max(abs(expected[step]), 1e-3) for step in sorted(ours)]
    return {"first loss": each[0], "worst loss": max(each)}


def compare_losses(ours, expected, precision, changed=False):
    figures = differences(ours, expected)
    limits = {"first loss": FIRST_LOSS_TOLERANCE[precision], "worst loss": LOSS_TOLERANCE[precision]}
    if changed:
        # A grey level of a changed image may be the next one.
        limits["first loss"] = max(limits["first loss"], CHANGED_TOLERANCE)
    for name, limit in limits.items():
        if not figures[name] <= limit:
            raise Failed(f"{precision}: {name} differs by {figures[name]:.1e} of itself, more than {limit:.0e}")
    return figures


# --- the checks -------------------------------------------------------------------------------------------------


def embeddings(accept):
    """Networks with the weights of the golden rule, against the CPU."""
    random.seed(7)
    count = 2 if accept.quick else 8
    values = [random.uniform(-1, 1) for _ in range(count * 3 * SIDE * SIDE)]
    write_tensor(accept.folder / "images.safetensors", "input", [count, 3, SIDE, SIDE], values)
    figures = {}
    for network in NETWORKS[:1] if accept.quick else NETWORKS:
        weights = accept.folder / f"{network}.safetensors"
        accept.run(accept.worker, "import", "--fill", "golden", "--network", network, "-o", weights)

        def infer(device, precision):
            out = accept.folder / f"{network}_{device}_{precision}.safetensors"
            accept.run(
                accept.worker, "infer", "--network", network, "--weights", weights, "--precision", precision,
                "--device", device, "--tensor", "images.safetensors", "--out", out,
            )  # fmt: skip
            return read_tensor(out, "embedding")

        expected = infer("cpu", "fp32")
        for precision, tolerance in TOLERANCE.items():
            found = distance(infer(accept.device, precision), expected)
            figures[f"{network} {precision}"] = found
            if not found <= tolerance:
                raise Failed(f"{network} {precision}: {found:.1e}, more than {tolerance:.0e}")
    return figures


def training(accept):
    """Losses of a short training, head and optimizer with it, against the CPU's."""
    adamw = 'optimizer = "adamw"\nweight_decay = 0.05'
    changed = {"data": 'augment = "dali"'}
    # By name: what the job has, whose losses on the CPU are its own, and precisions.
    cases = {
        "whole": ({}, "whole", ["fp32", "bf16"]),
        "sampled": ({"rate": 0.3}, "sampled", ["fp32"]),
        "accumulated": ({"more": "gradient_acc = 2"}, "accumulated", ["fp32"]),
        "adamw": ({"more": adamw}, "adamw", ["fp32"]),
        "changed": (changed, "changed", ["fp32", "bf16"]),
        "changed_graphs": ({**changed, "more": "cuda_graph = true"}, "changed", ["fp32"]),
        "graphs": ({"more": "cuda_graph = true"}, "whole", ["fp32", "bf16"]),
        "accumulated_graphs": ({"more": "gradient_acc = 2\ncuda_graph = true"}, "accumulated", ["fp32"]),
        "recomputed_graphs": (
            {"more": "cuda_graph = true", "model": "gradient_checkpointing = true"}, "whole", ["fp32"],
        ),
    }  # fmt: skip
    figures, failed, on_cpu = {}, [], {}
    for name, (case, same, precisions) in cases.items():
        if same not in on_cpu:
            on_cpu[same] = accept.train(accept.job(f"{same}_cpu", **case), "cpu")
            if same == "changed" and differences(on_cpu[same], on_cpu["whole"])["first loss"] < 10 * CHANGED_TOLERANCE:
                raise Failed("changed looks do not change the loss: nothing would be proved")
        # What cannot be recorded runs all the same.
        graphs = "graphs" in name and accept.device == "cuda"
        for precision in precisions[:1] if accept.quick else precisions:
            job = accept.job(f"{name}_{accept.device}_{precision}", precision, **case)
            ours = accept.train(job, accept.device, says=["runs as CUDA graphs"] if graphs else [])
            figures[f"{name} {precision}"] = differences(ours, on_cpu[same])
            try:
                compare_losses(ours, on_cpu[same], precision, changed=same == "changed")
            except Failed as problem:
                failed.append(f"{name}: {problem}")
        if accept.quick:
            break
    if failed:
        raise Failed("; ".join(failed) + f" (all: {figures})")
    return figures


def learning(accept):
    """A training that has to recognise people that it never saw."""
    identities, images, epochs = (20, 10, 1) if accept.quick else (200, 40, 4)
    accept.run(
        accept.worker, "data", "synth", "--identities", identities, "--images-per-identity", images, "--pairs", 500,
        "--output", "faces",
    )  # fmt: skip
    job = accept.folder / "learning.toml"
    job.write_text(f"""output = "learning"
[job]
world_size = 1
[model]
network = "tiny"
[head]
margin_list = [1.0, 0.3, 0.0]
scale = 32.0
[data]
rec = "faces"
num_workers = 4
[train]
batch_size = 32
num_epoch = {epochs}
lr = 0.05
[eval]
val_targets = ["synth"]
""")
    if accept.device == "cuda":
        # It finds the GPU by itself.
        accept.train(job, "auto", timeout=420, says=["computes on "])
    else:
        accept.train(job, "cpu", timeout=420)
    records = [json.loads(line) for line in (accept.folder / "learning/metrics.jsonl").read_text().splitlines()]
    accuracy = [record["accuracy"] for record in records if record["kind"] == "evaluation"][-1]
    speeds = [record["samples_per_second"] for record in records if record["kind"] == "metrics"]
    if not accept.quick and accuracy < ACCURACY:
        raise Failed(f"accuracy {accuracy:.3f}, less than {ACCURACY}")
    return {"accuracy": accuracy, "samples_per_second": sorted(speeds)[len(speeds) // 2]}


def checkpoints(accept):
    """One job that goes from the CPU to the GPU and back, against one that stays on the CPU."""
    steps = 30
    more = "[checkpoint]\nevery_steps = 5"
    expected = accept.train(accept.job("stays", steps=steps, more=more), "cpu")
    moves = accept.job("moves", steps=steps, more=more)
    address = accept.folder / "address"
    log = (accept.folder / "serve.log").open("w")
    serve = [accept.coordinator, "serve", "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]
    serve += ["--store", "embedded:store", "--address-file", address]
    processes = []

    def start(*command):
        command = [str(part) for part in command]
        accept.note(command)
        process = subprocess.Popen(command, cwd=accept.folder, env=accept.environment, stdout=log, stderr=log)
        processes.append(process)
        return process

    def wait(what, seen, limit=120):
        end = time.monotonic() + limit
        while not seen():
            if time.monotonic() > end:
                raise Failed(f"no {what} within {limit} s")
            time.sleep(0.02)

    def stop(process):
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()

    try:
        start(*serve)
        wait("address", lambda: address.exists() and address.read_text().strip())
        at = dict(line.split("=", 1) for line in address.read_text().split())["grpc"]
        job = None
        stages = ["cpu", accept.device, "cpu"]
        for stage, device in enumerate(stages):
            worker = start(
                accept.worker, "--join", at, "--device", device, "--node-id", f"stage-{stage}", "--memory-root", "none"
            )
            if job is None:
                job = json.loads(
                    accept.run(accept.coordinator, "submit", moves, "--coordinator", at, "--output", "json")
                )["id"]

            def status():
                text = accept.run(accept.coordinator, "job", job, "--coordinator", at, "--output", "json")
                accept.commands.pop()
                return json.loads(text)

            last = stage == len(stages) - 1
            goal = steps if last else (stage + 1) * steps // 3
            wait(
                f"step {goal} on {device}",
                lambda: (status()["state"] == "succeeded")
                if last
                else (status().get("checkpoint_step") or 0) >= goal,
            )
            stop(worker)
        ours = losses(accept.folder / "moves")
    finally:
        for process in reversed(processes):
            if process.poll() is None:
                stop(process)
        log.close()
    return compare_losses(ours, expected, "fp32")


def nccl(accept):
    """The operations between ranks at world size 1."""
    if accept.device != "cuda":
        result = accept.bench("collective", "--ranks", 1, "--mib", 16, "--repetitions", 3)
    else:
        result = accept.bench("collective", "--backend", "nccl", "--ranks", 1, "--mib", 256)
    return {key: value for key, value in result.items() if isinstance(value, (int, float, dict))}


def sanitizer(accept):
    """Our kernels under compute-sanitizer: no access out of bounds."""
    if accept.device != "cuda":
        return {"not on a CPU": True}
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        raise Failed("compute-sanitizer is not installed\nhint: it comes with CUDA's toolkit")
    figures = {}
    for name, rate in [("whole", 1.0), ("sampled", 0.3)]:
        begin = time.monotonic()
        accept.run(
            tool, "--error-exitcode", 9, accept.worker, "bench", "head", "--device", "cuda", "--classes", 3001,
            "--dim", 96, "--batch", 33, "--rate", rate, "--repetitions", 2,
        )  # fmt: skip
        figures[f"{name}, seconds"] = time.monotonic() - begin
    # Batch norms in a network; the convolutions are not ours.
    begin = time.monotonic()
    accept.run(
        tool, "--error-exitcode", 9, "--kernel-regex", "kns=norm_", accept.worker, "bench", "step", "--device", "cuda",
        "--network", "tiny", "--batch", 9, "--classes", 300, "--precision", "bf16", "--repetitions", 2,
    )  # fmt: skip
    figures["batch norms, seconds"] = time.monotonic() - begin
    return figures


def speed(accept):
    """Head and training step, synthetic input; the plain head beside ours."""
    device = ["--device", accept.device]
    small = accept.quick or accept.device == "cpu"
    head = ["head", *device, "--classes", 2000 if small else 250_000, "--batch", 64 if small else 1024]
    figures = {}
    for rate in [1.0, 0.1]:
        name = f"head, 2M classes over 8 GPUs, rate {rate}" if not small else f"head, small, rate {rate}"
        pair = accept.bench(
            *head, "--rate", rate, "--precision", "bf16", "--against", "plain", "--repetitions", 1 if small else 5
        )
        keys = ("ratio", "ours_ms", "plain_ms", "ours_peak_bytes", "plain_peak_bytes")
        figures[name] = {key: pair[key] for key in keys}
    steps = {"tiny b8": []} if small else {"r50 b128": [], "r50 b128 as graphs": ["--cuda-graph"], "r100 b128": []}
    if not small:
        # Pieces of the way back, as a rank of several has them.
        steps["r50 b128 of 8 as graphs"] = ["--cuda-graph", "--world", 8]
    for name, more in steps.items():
        network, batch = name.split()[:2]
        step = accept.bench(
            "step", *device, "--network", network, "--batch", batch.removeprefix("b"), "--classes", 10_000,
            "--precision", "bf16", "--repetitions", 2 if small else 30, *more,
        )  # fmt: skip
        if step["cuda_graph"] != ("--cuda-graph" in more):
            raise Failed(f"step {name}: cuda_graph is {step['cuda_graph']}")
        keys = ("median_ms", "min_ms", "variation", "samples_per_second", "peak_bytes")
        figures[f"step {name} bf16"] = {key: step[key] for key in keys}
    table = ["table", *device, "--repetitions", 1 if small else 10]
    figures["table"] = accept.bench(*table, *(["--scale", 0.001, "--tiny"] if small else []), timeout=400)
    return figures


def reference(accept):
    """The reference's own modules in PyTorch and ours, in turn, on the same sizes and device."""
    small = accept.quick or accept.device == "cpu"
    side = [sys.executable, "-s", ROOT / "bench/reference_side.py", "--reference", accept.reference]
    side += ["--device", accept.device, "--repetitions", 2 if small else 20]
    precision = ["--precision", "fp32" if accept.device == "cpu" else "bf16"]
    head = ["head", "--classes", 2000 if small else 250_000, "--dim", 512, "--batch", 64 if small else 1024]
    rows = {f"head, rate {rate}": [*head, "--rate", rate] for rate in (1.0, 0.1)}
    for network, batch in [("mbf", 4)] if small else [("r50", 128), ("r100", 128)]:
        rows[f"step {network} b{batch}"] = ["step", "--network", network, "--batch", batch, "--classes", 10_000]
    figures = {}
    for name, row in rows.items():
        pairs = []
        for _ in range(1 if small else 2):
            theirs = json.loads(accept.run(*side, *row).splitlines()[-1])
            ours = accept.bench(*row, "--device", accept.device, *precision, "--repetitions", 2 if small else 20)
            pairs.append((theirs, ours))
        ratios = sorted(theirs["median_ms"] / ours["median_ms"] for theirs, ours in pairs)
        figures[name] = {
            "ratios": ratios,
            "reference_ms": [theirs["median_ms"] for theirs, _ in pairs],
            "ours_ms": [ours["median_ms"] for _, ours in pairs],
            "reference_peak_bytes": max(theirs["peak_bytes"] for theirs, _ in pairs),
            "ours_peak_bytes": max(ours["peak_bytes"] for _, ours in pairs),
        }
    for cosines, name in [(1, "products of a head, ms"), (2, "with the cosines twice, as ours, ms")]:
        alone = json.loads(accept.run(*side, "products", *head[1:], "--cosines", cosines).splitlines()[-1])
        figures[name] = alone["median_ms"]
    return figures


CHECKS = [embeddings, training, checkpoints, nccl, sanitizer, learning, speed, reference]


def main():
    parser = argparse.ArgumentParser(prog="accept.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--bin", type=Path, default=ROOT / "target/release", help="folder of the executables")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--output", type=Path, default=Path("accept.json"), help="where the result goes")
    parser.add_argument("--only", action="append", choices=[check.__name__ for check in CHECKS], help="repeatable")
    parser.add_argument("--reference", type=Path, help="arcface_torch of an InsightFace checkout, to run beside ours")
    parser.add_argument("--quick", action="store_true", help="sizes that prove the script, not the build")
    arguments = parser.parse_args()
    arguments.bin = arguments.bin.resolve()
    with tempfile.TemporaryDirectory(prefix="arcface-accept-") as scratch:
        try:
            about = machine(arguments)
            accept = Accept(arguments, Path(scratch))
        except Refused as refused:
            print(f"error: {refused}", file=sys.stderr)
            return 2
        result = {**about, "quick": arguments.quick, "checks": []}
        chosen = [check for check in CHECKS if not arguments.only or check.__name__ in arguments.only]
        if arguments.reference is None and reference in chosen:
            chosen.remove(reference)
            print("without --reference DIR nothing is run beside ours", file=sys.stderr)
        for number, check in enumerate(chosen, 1):
            print(f"[{number}/{len(chosen)}] {check.__name__}", file=sys.stderr, flush=True)
            begin, accept.commands = time.monotonic(), []
            record = {"name": check.__name__, "what": check.__doc__, "passed": True}
            try:
                record["figures"] = check(accept)
            except (Failed, KeyError, ValueError, OSError) as problem:
                record.update(passed=False, problem=f"{problem}" or repr(problem))
                print(f"    failed: {record['problem']}", file=sys.stderr, flush=True)
            record.update(seconds=round(time.monotonic() - begin, 1), commands=accept.commands)
            result["checks"].append(record)
            result["passed"] = all(check["passed"] for check in result["checks"])
            # After every check: a machine may be taken away.
            arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{'passed' if result['passed'] else 'failed'}: {arguments.output}")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
