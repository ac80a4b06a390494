"""What the programs in this folder share: on what machine and of which program results hold, and a file of them that is
whole at any moment. Knows nothing of what is measured."""

import datetime
import fnmatch
import hashlib
import json
import os
import platform
import re
import signal
import subprocess

# What makes products fast, of a processor's flags.
FEATURES = ["avx2", "avx512f", "avx512_bf16", "amx_bf16"]
# What a commit must not have changes of for a program to be its.
SOURCES = ["Cargo.lock", "Cargo.toml", "proto", "traces", "worker"]


class Unusable(Exception):
    """What is wrong with the arguments or their files, in a line."""


class Failed(Exception):
    """A measurement that gave no result, and what it said."""


class Interrupted(Exception):
    """Somebody wants the program to end."""


class Interruption:
    """Whether it came, and whether it waits: a process that has just been started is nobody's until its name is kept."""

    came = False
    waits = False

    @classmethod
    def let_in(cls):
        """It waits no longer."""
        cls.waits = False
        if cls.came:
            raise Interrupted


def until_interrupted():
    """Ctrl-C and SIGTERM end a measurement in order, also where a shell started this program with signals ignored."""

    def end(number, frame):
        Interruption.came = True
        if not Interruption.waits:
            raise Interrupted

    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)


def exit_code(work, say):
    """Of `work`, which gives its own; what ends it before is told with `say`."""
    until_interrupted()
    try:
        return work()
    except Unusable as error:
        say(error)
        return 2
    except Interrupted:
        say("stopped; what was measured stays, and the next run goes on from there")
        return 130


def chosen(rows, patterns):
    """Names of the rows that any of the patterns fits, in their order; of all without patterns."""
    for pattern in patterns:
        if not fnmatch.filter(rows, pattern):
            raise Unusable(f"there is no row {pattern} here (--list names them)")
    return [name for name in rows if not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def read(path):
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError:
        return ""


def field(text, name):
    """Of a file in /proc with a `name: value` a line."""
    found = re.search(rf"^{re.escape(name)}\s*:\s*(.*)$", text, re.MULTILINE)
    return found.group(1).strip() if found else ""


def memory(name):
    """A size in /proc/meminfo, in bytes; 0 where it is not told."""
    return int((field(read("/proc/meminfo"), name).split() or ["0"])[0]) * 1024


def machine():
    cpu = read("/proc/cpuinfo")
    flags = field(cpu, "flags").split()
    pages = re.search(r"\[(\w+)\]", read("/sys/kernel/mm/transparent_hugepage/enabled"))
    return {
        "processor": field(cpu, "model name") or platform.machine(),
        "family": [field(cpu, name) for name in ("cpu family", "model", "stepping")],
        "cores": cores(),
        "features": [name for name in FEATURES if name in flags],
        "memory_gib": round(memory("MemTotal") / 2**30),
        "huge_pages": pages.group(1) if pages else "unknown",
        "libc": " ".join(platform.libc_ver()),
    }


def cores():
    return len(os.sched_getaffinity(0))


def machine_line(machine):
    """For people."""
    features = ", ".join(machine["features"]) or "no vector extension of note"
    return (
        f"{machine['processor']}, {machine['cores']} cores ({features}), {machine['memory_gib']} GiB of memory, "
        f"transparent huge pages \"{machine['huge_pages']}\""
    )


def is_noisy():
    """True where others compute: then times say more about them."""
    return os.getloadavg()[0] > 0.5 * cores()


def program(path, option="--worker"):
    """Which program is measured: its version, the commit of the checkout that it lies in, and its digest, by which a
    row is known to be of this very program."""
    if not (os.path.isfile(path) and os.access(path, os.X_OK)):
        raise Unusable(f"there is no program {path} (make build; {option} names another one)")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    try:
        said = subprocess.run([path, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except OSError as error:
        raise Unusable(f"{path} does not start: {error.strerror}") from None
    if said.returncode != 0 or not said.stdout.startswith("arcface-worker"):
        raise Unusable(f"{path} is not an arcface-worker")
    return {"version": said.stdout.strip(), "commit": commit(path), "sha256": digest.hexdigest()[:16]}


def commit(path):
    """Of the checkout that a file or folder lies in, with a mark if that has other sources; "unknown" outside of one."""
    folder = os.path.realpath(path)
    folder = folder if os.path.isdir(folder) else os.path.dirname(folder)

    def git(*arguments):
        command = ["git", "--no-optional-locks", "-C", folder, *arguments]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        sources = [f":/{source}" for source in SOURCES]
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *sources)
    except OSError:  # no git
        return "unknown"
    return f"{head} with changes" if head and changed else head or "unknown"


def today():
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")


def run(command, environment=None):
    """The JSON that a command prints."""
    printed = output(command, environment)
    try:
        return json.loads(printed)
    except ValueError:
        raise Failed(f"it printed no JSON: {printed[:80]!r}") from None


def output(command, environment=None):
    """What a command prints."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    Interruption.waits = True
    try:
        with subprocess.Popen(command, **streams, text=True, env=environment) as process:
            try:
                Interruption.let_in()
                printed, errors = process.communicate()
            except Interrupted:
                # It may have started others, which it ends then.
                process.terminate()
                process.communicate()
                raise
    finally:
        Interruption.waits = False
    if process.returncode != 0:
        said = [line for line in errors.splitlines() if line.strip() and not line.startswith("hint:")]
        how = f"signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
        raise Failed(f"{how}: {said[-1].strip() if said else 'it said nothing'}")
    return printed


class Results:
    """Measured rows by name in a JSON file, and a table of them in the .md beside it. Both are written anew after each
    measurement, and whole, so that nothing is lost by stopping. Rows of another machine do not stay."""

    def __init__(self, path, table):
        self.path, self.table, self.rows = path, table, {}
        self.machine = machine()
        if path is None or not os.path.exists(path):
            return
        try:
            old = json.loads(read(path))
            rows, of = dict(old["rows"]), old["machine"]
        except (ValueError, KeyError, TypeError):
            raise Unusable(f"{path} exists and is not a file of results") from None
        if of == self.machine:
            self.rows = rows

    def put(self, name, row):
        self.rows[name] = row
        if self.path is not None:
            write(self.path, json.dumps({"machine": self.machine, "rows": self.rows}, indent=1) + "\n")
            write(os.path.splitext(self.path)[0] + ".md", self.table(self.machine, self.rows))


def write(path, text):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    partial = f"{path}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(partial, path)


def number(value):
    """With three digits that say something, for people."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def megabytes(value):
    return "" if value is None else f"{value / 1e6:,.0f}"


def table(head, lines):
    """In Markdown; nothing without lines."""
    rows = [head, ["---"] * len(head), *lines]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows) if lines else ""
