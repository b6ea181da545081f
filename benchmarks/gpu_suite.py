"""The measurement suite: tests, tuning, benchmarks and profiles of one machine, by one command, in a given time.

    python -m benchmarks.gpu_suite [--sections NAME...] [--budget 540] [--out gpu-results] [--device cpu]

The most important measurements come first. Each section has a share of the time and writes its findings as it goes, so
that OUT/results.json is valid at any moment. A section that fails, crashes or hangs does not keep the next one from
running. In the end a report is written and a short table printed.

Exit code 0: the suite is done; 1: a result of this package was wrong, failed or crashed; 2: the device does not exist,
or --resume found results of another machine or commit; 130: interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from resnet_kernels.analysis.results import Results, Row, Section, best_peer, load
from resnet_kernels.backends import extension

from . import events, ncu
from .sections import Options, static_facts

ROOT = Path(__file__).parent.parent

# Seconds reserved for the report at the end.
RESERVED = 15.0
# Seconds by which a section's process may exceed its budget. It stops by itself, but not in the middle of a provider.
GRACE = 10.0
# A section that crashed or hung is started again, and continues after the row to blame, at most this often.
MOST_RESTARTS = 8
# The files tests/test_NAME.py of the section "tests", the most important first.
TESTS = (
    "sm90",
    "cuda",
    "triton",
    "triton_training",
    "triton_reductions",
    "tape",
    "graphs",
    "tuning",
    "models",
    "training",
    "contract",
    "extension",
    "suite",
    "blocks",
)


class Outcome(NamedTuple):
    """status: "ok", "failed", "skipped" or "cut"."""

    status: str
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A section and its share of the time on a GPU and on a CPU. 0 on a CPU: it is skipped, for the given reason."""

    name: str
    gpu: float
    cpu: float
    why_not_on_cpu: str = ""


PLANS = (
    Plan("facts", 15, 20),
    Plan("build", 60, 60),
    Plan("tests", 110, 0, "`make test` runs the tests that need no GPU"),
    Plan("sanitizer", 40, 0, "compute-sanitizer checks kernels on NVIDIA GPUs"),
    Plan("tuning", 70, 25),
    Plan("primitives", 25, 15),
    Plan("blocks", 35, 35),
    Plan("layers", 8, 15),
    Plan("inference", 120, 150),
    Plan("training", 35, 80),
    Plan("accuracy", 20, 30),
    Plan("profile", 22, 0, "ncu reads NVIDIA GPUs"),
)
NAMES = [plan.name for plan in PLANS]


@dataclasses.dataclass
class Suite:
    """A run of the suite.

    out: folder of the results.
    budget: seconds for the whole run.
    patience: seconds without an event after which a section is regarded as hung.
    plugin: a module that adds to benchmarks.providers.PROVIDERS, or None.
    resume: keep the results of other sections in `out`.
    commit: the commit of this code; None: as git reports it.
    Raises ValueError if the results to resume are of another machine, commit or set of versions.
    """

    device: str
    out: Path
    budget: float
    patience: float
    options: Options
    plugin: str | None
    resume: bool
    commit: str | None
    console: Console

    def __post_init__(self) -> None:
        self.out = self.out.resolve()  # child processes run in another folder
        self.out.mkdir(parents=True, exist_ok=True)
        self.events = self.out / "events.jsonl"
        self.events.unlink(missing_ok=True)
        self.results = Results(static_facts(self.device, self.commit) | {"budget": self.budget})
        if self.resume:
            self._resume()
        self.deadline = time.monotonic() + self.budget
        self._read = 0  # offset in the events file up to which events were collected
        self._pending: Row | None = None  # the row that is being measured
        self._within = self.patience  # seconds without an event after which it is regarded as hung
        self._ahead: subprocess.Popen | None = None  # the process that compiles ahead

    def _resume(self) -> None:
        """Load the results of an earlier run. Raises ValueError unless they are of the same machine and code."""
        path, new = self.out / "results.json", self.results.facts
        if not path.exists():
            return
        self.results = load(path)
        old = self.results.facts
        for name in ("device", "processor", "commit", "versions"):
            if old[name] != new[name]:
                raise ValueError(
                    f"{path}: expected results of {name} {new[name]} to resume, got {old[name]}; name another --out"
                )
        # Sections read the machine's ceilings from the events.
        self.events.write_text(json.dumps({"facts": old}) + "\n")

    # Processes

    def environment(self, **more: str) -> dict[str, str]:
        """Return the environment of child processes: they import this package and use the tables of the tuning
        section."""
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        cache = str(self.out / "tuning")
        return os.environ | {"PYTHONPATH": paths, "RESNET_KERNELS_CACHE": cache, "PYTHONUNBUFFERED": "1"} | more

    @contextlib.contextmanager
    def process(self, command: list[str], **environment: str) -> Iterator[subprocess.Popen]:
        """Run a child process with its output in OUT/log.txt. On exit it and its own children are killed."""
        with (self.out / "log.txt").open("a") as log:
            log.write(f"\n$ {' '.join(command)}\n")
            log.flush()
            child = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env=self.environment(**environment),
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
            try:
                yield child
            finally:
                stop(child)

    def wait(self, child: subprocess.Popen, budget: float, to_finish: float = 0.0) -> int | None:
        """Return the child's exit code, or None if the budget ended first.

        to_finish: that many seconds before the budget ends the child gets SIGINT, so that it can finish.
        """
        try:
            return child.wait(max(1.0, budget - to_finish))
        except subprocess.TimeoutExpired:
            if to_finish:
                child.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(to_finish)
            return None

    def log_tail(self) -> str:
        """Return the last line of OUT/log.txt."""
        lines = (self.out / "log.txt").read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else ""

    def module(self, name: str, budget: float) -> list[str]:
        """Return the command of a section's process."""
        options = json.dumps(dataclasses.asdict(self.options))
        command = [sys.executable, "-m", "benchmarks.sections", name, "--device", self.device, "--options", options]
        command += ["--events", str(self.events), "--budget", f"{budget:.1f}"]
        return command + (["--plugin", self.plugin] if self.plugin else [])

    # Events of sections

    def collect(self, section: str) -> bool:
        """Add the events since the last call to the results, and save them. Returns whether there were any."""
        news, self._read = events.read(self.events, self._read)
        for event in news:
            self.results.facts |= event.get("facts", {})
            self.results.section(section).details |= event.get("details", {})
            if "begin" in event:
                self._pending = Row(**event["begin"]) if event["begin"] else None
                self._within = min(self.patience, event["within"] or self.patience)
            if "row" in event:
                self._add(Row(**event["row"]))
        # "begin" events alone are not worth saving: that takes time on a processor which may be measured just now.
        if any("begin" not in event for event in news):
            self.save()
        return bool(news)

    def _add(self, row: Row) -> None:
        """Add a row to the results, in place of an earlier one of the same group, provider and mode."""

        def same(r: Row) -> bool:
            return (r.group, r.provider, r.mode) == (row.group, row.provider, row.mode)

        self.results.rows = [r for r in self.results.rows if not same(r)] + [row]

    def save(self) -> None:
        self.results.save(self.out / "results.json")

    def measuring(self, name: str, budget: float) -> Outcome:
        """Run a section of benchmarks/sections.py. After a crash or hang it is started again behind the row to
        blame."""
        end = time.monotonic() + budget
        if self._ahead is not None and name != "facts":
            self.wait(self._ahead, budget / 2)  # compiling would compete with the section for the processor
            stop(self._ahead)
            self._ahead = None
        for _ in range(MOST_RESTARTS):
            self._pending, self._within = None, self.patience
            with self.process(self.module(name, end - time.monotonic())) as child:
                reason = self._watch(child, name, end)
            self.collect(name)
            if not reason:
                cut = sum(row.section == name and row.status == "cut" for row in self.results.rows)
                return Outcome("ok", f"rows cut: {cut}" if cut else "")
            if time.monotonic() >= end:
                during = f" during {self._pending.case}, {self._pending.provider}" if self._pending else ""
                return Outcome("cut", f"the budget ended{during}")
            if self._pending is None:
                return Outcome("failed", reason)
            self._blame(self._pending, reason)
            self.collect(name)
        return Outcome("failed", f"started {MOST_RESTARTS} times; last: {reason}")

    def _watch(self, child: subprocess.Popen, name: str, end: float) -> str:
        """Wait until the child ends, hangs or exceeds its budget. Returns the reason for a bad end, or ""."""
        heard = time.monotonic()
        while child.poll() is None:
            time.sleep(0.5)
            now = time.monotonic()
            if self.collect(name):
                heard = now
            if now - heard > self._within:
                return f"hung: no word for {self._within:.0f} s"
            if now > end + GRACE:
                return "the budget ended"
        return f"crashed: exit code {child.returncode}: {self.log_tail()}" if child.returncode else ""

    def _blame(self, row: Row, reason: str) -> None:
        """Record the row as failed, so that a new process of the section skips it."""
        written = [{"row": dataclasses.asdict(dataclasses.replace(row, status="failed", reason=reason))}]
        if row.provider == events.PREPARATION:
            written.append({"done": row.group})
        with self.events.open("a") as file:
            file.writelines(json.dumps(event) + "\n" for event in written)

    # Sections

    def run(self, plans: list[Plan]) -> None:
        """Run the sections in their order, then write the report."""
        names = [plan.name for plan in plans]
        kept = [section for section in self.results.sections if section.name not in names]
        self.results.sections = sorted([*kept, *map(Section, names)], key=lambda section: NAMES.index(section.name))
        self.results.rows = [row for row in self.results.rows if row.section not in names]
        self.save()
        with self.compiling_ahead(plans):
            for i, plan in enumerate(plans):
                weights = [p.gpu if self.device == "cuda" else p.cpu for p in plans[i:]]
                self._run(plan, self.left() * weights[0] / (sum(weights) or 1))
        self.finish()

    def left(self) -> float:
        """Return the seconds left for sections."""
        return self.deadline - time.monotonic() - RESERVED

    def _run(self, plan: Plan, budget: float) -> None:
        """Run a section and record how it ended."""
        section, begun = self.results.section(plan.name), time.monotonic()
        if self.device == "cpu" and not plan.cpu:
            section.status, section.reason = "skipped", plan.why_not_on_cpu
            return
        if budget < 1:
            section.status, section.reason = "cut", "no time was left"
            return
        section.status, section.budget = "running", round(budget, 1)
        self.save()
        self.console.print(f"{plan.name} ({budget:.0f} s) ...", highlight=False)
        outcome = Outcome("cut", "interrupted")
        try:
            special: dict[str, Callable[[float], Outcome]] = {
                "build": self.build,
                "tests": self.tests,
                "sanitizer": self.sanitizer,
                "profile": self.profile,
            }
            run = special.get(plan.name)
            outcome = run(budget) if run else self.measuring(plan.name, budget)
        except Exception as error:  # the failure of a section must not end the suite
            outcome = Outcome("failed", f"{type(error).__name__}: {error}")
        finally:
            section.status, section.reason = outcome
            section.seconds = round(time.monotonic() - begun, 1)
            self.save()
        reason = f": {section.reason}" if section.reason else ""
        self.console.print(f"    {section.status} after {section.seconds:.0f} s{reason}", markup=False, highlight=False)

    @contextlib.contextmanager
    def compiling_ahead(self, plans: list[Plan]) -> Iterator[None]:
        """Compile the kernels of later sections in a process beside the sections that build and test.

        Those sections leave cores idle. The first section that measures waits for this process, then stops it.
        """
        names = {plan.name for plan in plans}
        needed = {"tuning", "inference", "profile"} & names
        if self.device != "cuda" or not needed or importlib.util.find_spec("triton") is None:
            yield
            return
        section = "ahead of tuning" if "tuning" in names else "ahead"
        with self.process(self.module(section, self.budget / 3)) as self._ahead:
            yield

    def build(self, budget: float) -> Outcome:
        """Build the extension in place; on a CPU only if it is missing."""
        module, reason = extension.load()
        if self.device == "cpu" and module is not None:
            return Outcome("skipped", "the extension is built")
        environment = {}
        if self.device == "cuda":
            import torch

            major, minor = torch.cuda.get_device_capability()
            # wgmma and tcgen05 exist only in the "a" variants of an architecture.
            environment["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}" + "a" * (major >= 9)
        with self.process([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], **environment) as child:
            code = self.wait(child, budget)
        if code is None:
            return Outcome("cut", "the budget ended")
        return Outcome("failed", self.log_tail()) if code else Outcome("ok")

    def tests(self, budget: float) -> Outcome:
        """Run the tests marked "gpu" of the files in TESTS."""
        junit = self.out / "junit.xml"
        junit.unlink(missing_ok=True)
        files = [f"tests/test_{name}.py" for name in TESTS]
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *files, "-p", "no:cacheprovider"]
        command += [f"--junitxml={junit}", "--continue-on-collection-errors"]
        if importlib.util.find_spec("xdist"):
            command += ["-n", str(min(14, os.cpu_count() or 1))]
        with self.process(command) as child:
            # pytest writes its results when it is interrupted. With workers that hang this takes a while.
            code = self.wait(child, budget, to_finish=25.0)
        if not junit.exists():
            return Outcome("failed" if code is not None else "cut", f"no results of tests; {self.log_tail()}")
        details = junit_summary(junit)
        self.results.section("tests").details |= details
        counts = f"{details['passed']} passed, {details['failed']} failed, {details['skipped']} skipped"
        return Outcome("cut" if code is None else "failed" if details["failed"] else "ok", counts)

    def sanitizer(self, budget: float) -> Outcome:
        """Run benchmarks/smallest.py under compute-sanitizer's memcheck and racecheck."""
        tool = shutil.which("compute-sanitizer")
        if tool is None:
            return Outcome("skipped", "compute-sanitizer is not on the PATH")
        found = {}
        for kind in ("memcheck", "racecheck"):
            log = self.out / f"{kind}.txt"
            command = [tool, *f"--tool {kind} --error-exitcode 9 --report-api-errors no --log-file".split(), str(log)]
            command += [sys.executable, "-m", "benchmarks.smallest"]
            # torch's caching allocator would hide accesses out of bounds.
            with self.process(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1") as child:
                code = self.wait(child, budget / 2)
            lines = log.read_text(errors="replace").splitlines() if log.exists() else []
            log.unlink(missing_ok=True)
            first = [line.strip("= ") for line in lines if "rror" in line or "nvalid" in line or "azard" in line][:4]
            errors = "; ".join(first) or self.log_tail()
            found[kind] = "cut" if code is None else "clean" if code == 0 else f"exit code {code}: {errors}"
        self.results.section("sanitizer").details |= found
        findings = ", ".join(f"{kind}: {what}" for kind, what in found.items())
        # racecheck's findings on asynchronous copies need a second look. They are reported, but are no failure.
        if "exit code" in found["memcheck"]:
            return Outcome("failed", findings)
        return Outcome("cut" if "cut" in found.values() else "ok", findings)

    def profile(self, budget: float) -> Outcome:
        """Profile a frozen ResNet-50 with ncu."""
        tool = shutil.which("ncu")
        if tool is None:
            return Outcome("skipped", "ncu is not on the PATH")
        csv = self.out / "ncu.csv"
        csv.unlink(missing_ok=True)
        with self.process(ncu.command(tool, csv)) as child:
            code = self.wait(child, budget, to_finish=5.0)
        rows = ncu.rows(csv.read_text()) if csv.exists() else []
        for row in rows:
            self._add(row)
        if not rows:
            return Outcome("cut" if code is None else "failed", f"ncu wrote no kernels; {self.log_tail()}")
        return Outcome("ok" if code == 0 else "cut", f"{len(rows)} kernels")

    # The end

    def finish(self) -> None:
        """Mark sections that did not run as cut, write the report and print the summary."""
        for section in self.results.sections:
            if section.status in ("waiting", "running"):
                section.status, section.reason = "cut", section.reason or "not reached"
        self.save()
        try:
            from resnet_kernels.analysis.report import report

            report(self.console, [self.out / "results.json"], self.out, png=False, fail_on_regression=False)
        except Exception as error:  # the results are saved, and the table below is still printed
            self.console.print(f"the report is incomplete: {error}", markup=False, highlight=False)
        self.events.unlink(missing_ok=True)
        self.console.print(summary(self.results))

    def wrong(self) -> bool:
        """Return whether a result of this package is wrong or failed, or a section failed."""
        ours = any(not r.peer and r.status in ("wrong", "failed") for r in self.results.rows)
        return ours or any(s.status == "failed" for s in self.results.sections)


def stop(child: subprocess.Popen) -> None:
    """Kill a child process and its own children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def end_with_parent() -> None:
    """Called in a child process before it begins: let Linux kill it when this process ends, even if that is killed."""
    PR_SET_PDEATHSIG = 1
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def junit_summary(path: Path) -> dict[str, Any]:
    """Return the numbers of passed, failed and skipped tests in pytest's XML, and the first 20 failures."""
    cases = list(ElementTree.parse(path).iter("testcase"))
    bad = {}
    for case in cases:
        for kind in ("failure", "error"):
            for found in case.findall(kind):
                text = (found.get("message") or found.text or "").strip().splitlines()
                bad[f"{case.get('classname')}::{case.get('name')}"] = text[0][:300] if text else kind
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - skipped - len(bad)
    return {"passed": passed, "failed": len(bad), "skipped": skipped, "failures": dict(list(bad.items())[:20])}


def summary(results: Results) -> Table:
    """Return a table with a row per group: the fastest peer, this package's fastest provider, and the speed ratio."""
    table = Table("section", "case", "best peer, ms", "ours", "ms", "speed / best peer", "share of floor")
    for rows in results.groups().values():
        first, peer = rows[0], best_peer(rows)
        if first.section not in ("primitives", "blocks", "inference", "training"):
            continue
        ours = [r for r in rows if not r.peer]
        timed = [r for r in ours if r.seconds]
        best = min(timed, key=lambda r: r.seconds or 0.0, default=None)
        case = f"{first.case} {first.dtype} {first.batch}"
        bad = ", ".join(f"{r.provider} {r.status}" for r in ours if r.status in ("wrong", "failed"))
        against = f"{peer.provider} ({peer.mode}) {1e3 * (peer.seconds or 0):.3f}" if peer else "none"
        if best is None or best.seconds is None:
            table.add_row(first.section, case, against, bad or "not measured", "", "", "")
            continue
        name = f"{best.provider} ({best.mode})" + (f"; [red]{bad}[/]" if bad else "")
        ratio = f"{(peer.seconds or 0) / best.seconds:.2f}" if peer else ""
        share = best.share_of_floor
        table.add_row(
            first.section, case, against, name, f"{1e3 * best.seconds:.3f}", ratio, f"{share:.0%}" if share else ""
        )
    return table


def why_no_gpu() -> str | None:
    """Return why no GPU can be used, or None."""
    import torch

    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU-only build"
    return "torch sees no NVIDIA GPU"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("benchmarks.gpu_suite", description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--budget", type=float, default=540, help="most seconds for the whole run (default: 540)")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder (default: gpu-results)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--models", nargs="+", help="torchvision's names of models for inference and training")
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--batches", nargs="+", type=int, help="numbers of images")
    parser.add_argument("--providers", nargs="+", help="measure only these providers")
    parser.add_argument("--rounds", type=int, help="most rounds of timing")
    parser.add_argument("--full", action="store_true", help="measure every case; the default on a CPU is a few")
    parser.add_argument(
        "--patience", type=float, default=180, help="seconds without an event after which a section counts as hung"
    )
    parser.add_argument("--commit", help="the commit of this code, if git does not know it")
    parser.add_argument("--resume", action="store_true", help="keep the results of other sections in OUT")
    parser.add_argument("--plugin", help="a module that adds to benchmarks.providers.PROVIDERS")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 140)
    reason = why_no_gpu() if args.device == "cuda" else None
    if reason:
        message = f"{reason}: there is nothing to measure. With --device cpu the suite measures this CPU."
        Console(stderr=True).print(message, style="red", highlight=False, soft_wrap=True)
        return 2
    options = Options(args.models, args.dtypes, args.batches, args.providers, args.rounds, args.full)
    try:
        suite = Suite(
            args.device, args.out, args.budget, args.patience, options, args.plugin, args.resume, args.commit, console
        )
    except ValueError as error:
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        suite.run([plan for plan in PLANS if plan.name in args.sections])
    except KeyboardInterrupt:
        suite.finish()
        return 130
    return 1 if suite.wrong() else 0


if __name__ == "__main__":
    sys.exit(main())
