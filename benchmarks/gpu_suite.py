"""Everything that is to be known on one machine, in one command and a given time, most valuable first.

    python -m benchmarks.gpu_suite [--sections NAME...] [--budget 540] [--out gpu-results] [--device cpu]

Each section has a share of the time and writes what it finds as it goes: OUT/results.json is whole at any moment, and a
section that fails, crashes or hangs does not keep the next from running. Then a report, and a short table. Exit code 0:
done; 1: something of ours was wrong, failed or crashed; 2: there is no such device.
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

# Kept for the report at the end.
RESERVED = 15.0
# It stops by itself, but not in the middle of a provider.
GRACE = 10.0
# A section is started again where it left off after a crash or a hang, so often.
MOST_RESTARTS = 8
# Of tests, those that tell most first.
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
    """A section: its share of the time on a GPU and on a CPU (0: it has nothing to do there, for the reason)."""

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
    """out: folder of the results. resume: keep what is there of other sections. patience: seconds without a word after
    which a section hangs."""

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
        self.out = self.out.resolve()  # children run elsewhere
        self.out.mkdir(parents=True, exist_ok=True)
        self.events = self.out / "events.jsonl"
        self.events.unlink(missing_ok=True)
        self.results = Results(static_facts(self.device, self.commit) | {"budget": self.budget})
        if self.resume:
            self._resume()
        self.deadline = time.monotonic() + self.budget
        self._read = 0
        self._pending: Row | None = None
        self._within = self.patience
        self._ahead: subprocess.Popen | None = None

    def _resume(self) -> None:
        """Keep what an earlier call with this folder found. Raises ValueError unless it was of the same code, here."""
        path, new = self.out / "results.json", self.results.facts
        if not path.exists():
            return
        self.results = load(path)
        old = self.results.facts
        for name in ("device", "processor", "commit", "versions"):
            if old[name] != new[name]:
                raise ValueError(f"{path}: expected results of {name} {new[name]}, to go on with, got {old[name]}")
        # Sections read the ceilings there.
        self.events.write_text(json.dumps({"facts": old}) + "\n")

    # Processes

    def environment(self, **more: str) -> dict[str, str]:
        """Children find the package here, and the tables that the tuning section made."""
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        cache = str(self.out / "tuning")
        return os.environ | {"PYTHONPATH": paths, "RESNET_KERNELS_CACHE": cache, "PYTHONUNBUFFERED": "1"} | more

    @contextlib.contextmanager
    def process(self, command: list[str], **environment: str) -> Iterator[subprocess.Popen]:
        """A child with its output in OUT/log.txt; it and what it started are gone afterwards."""
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
        """Its exit code; None where the budget ended first. to_finish: seconds before, it is asked to finish."""
        try:
            return child.wait(max(1.0, budget - to_finish))
        except subprocess.TimeoutExpired:
            if to_finish:
                child.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(to_finish)
            return None

    def log_tail(self) -> str:
        lines = (self.out / "log.txt").read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else ""

    def module(self, name: str, budget: float) -> list[str]:
        """The command of a section's process."""
        options = json.dumps(dataclasses.asdict(self.options))
        command = [sys.executable, "-m", "benchmarks.sections", name, "--device", self.device, "--options", options]
        command += ["--events", str(self.events), "--budget", f"{budget:.1f}"]
        return command + (["--plugin", self.plugin] if self.plugin else [])

    # What sections tell

    def collect(self, section: str) -> bool:
        """Take over what was told since the last time, and save it. Returns whether anything was."""
        news, self._read = events.read(self.events, self._read)
        for event in news:
            self.results.facts |= event.get("facts", {})
            self.results.section(section).details |= event.get("details", {})
            if "begin" in event:
                self._pending = Row(**event["begin"]) if event["begin"] else None
                self._within = min(self.patience, event["within"] or self.patience)
            if "row" in event:
                self._add(Row(**event["row"]))
        # Saving takes a processor that on a small machine is being measured: only what is worth it.
        if any("begin" not in event for event in news):
            self.save()
        return bool(news)

    def _add(self, row: Row) -> None:
        def same(r: Row) -> bool:
            return (r.group, r.provider, r.mode) == (row.group, row.provider, row.mode)

        self.results.rows = [r for r in self.results.rows if not same(r)] + [row]

    def save(self) -> None:
        self.results.save(self.out / "results.json")

    def measuring(self, name: str, budget: float) -> Outcome:
        """A section of benchmarks/sections.py, started again behind whatever crashed or hung."""
        end = time.monotonic() + budget
        if self._ahead is not None and name != "facts":
            self.wait(self._ahead, budget / 2)  # it would compete for the processor
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
        """Until it ends or must be ended. Returns why it did not end well, or nothing."""
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
        told = [{"row": dataclasses.asdict(dataclasses.replace(row, status="failed", reason=reason))}]
        if row.provider == events.PREPARATION:
            told.append({"done": row.group})
        with self.events.open("a") as file:
            file.writelines(json.dumps(event) + "\n" for event in told)

    # Sections

    def run(self, plans: list[Plan]) -> None:
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
        return self.deadline - time.monotonic() - RESERVED

    def _run(self, plan: Plan, budget: float) -> None:
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
        except Exception as error:  # the next section has nothing to do with it
            outcome = Outcome("failed", f"{type(error).__name__}: {error}")
        finally:
            section.status, section.reason = outcome
            section.seconds = round(time.monotonic() - begun, 1)
            self.save()
        said = f": {section.reason}" if section.reason else ""
        self.console.print(f"    {section.status} after {section.seconds:.0f} s{said}", markup=False, highlight=False)

    @contextlib.contextmanager
    def compiling_ahead(self, plans: list[Plan]) -> Iterator[None]:
        """Meanwhile: what later sections launch is compiled on cores that building and testing leave idle."""
        names = {plan.name for plan in plans}
        needed = {"tuning", "inference", "profile"} & names
        if self.device != "cuda" or not needed or importlib.util.find_spec("triton") is None:
            yield
            return
        section = "ahead of tuning" if "tuning" in names else "ahead"
        with self.process(self.module(section, self.budget / 3)) as self._ahead:
            yield

    def build(self, budget: float) -> Outcome:
        module, reason = extension.load()
        if self.device == "cpu" and module is not None:
            return Outcome("skipped", "the extension is built")
        environment = {}
        if self.device == "cuda":
            import torch

            major, minor = torch.cuda.get_device_capability()
            # wgmma and tcgen05 are the a-variants'.
            environment["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}" + "a" * (major >= 9)
        with self.process([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], **environment) as child:
            code = self.wait(child, budget)
        if code is None:
            return Outcome("cut", "the budget ended")
        return Outcome("failed", self.log_tail()) if code else Outcome("ok")

    def tests(self, budget: float) -> Outcome:
        junit = self.out / "junit.xml"
        junit.unlink(missing_ok=True)
        files = [f"tests/test_{name}.py" for name in TESTS]
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *files, "-p", "no:cacheprovider"]
        command += [f"--junitxml={junit}", "--continue-on-collection-errors"]
        if importlib.util.find_spec("xdist"):
            command += ["-n", str(min(14, os.cpu_count() or 1))]
        with self.process(command) as child:
            # Interrupted, pytest still writes what it knows; with workers that hang it takes its time.
            code = self.wait(child, budget, to_finish=25.0)
        if not junit.exists():
            return Outcome("failed" if code is not None else "cut", f"no results of tests; {self.log_tail()}")
        details = junit_summary(junit)
        self.results.section("tests").details |= details
        said = f"{details['passed']} passed, {details['failed']} failed, {details['skipped']} skipped"
        return Outcome("cut" if code is None else "failed" if details["failed"] else "ok", said)

    def sanitizer(self, budget: float) -> Outcome:
        tool = shutil.which("compute-sanitizer")
        if tool is None:
            return Outcome("skipped", "compute-sanitizer is not on the PATH")
        found = {}
        for kind in ("memcheck", "racecheck"):
            log = self.out / f"{kind}.txt"
            command = [
                tool,
                "--tool",
                kind,
                "--error-exitcode",
                "9",
                "--report-api-errors",
                "no",
                "--log-file",
                str(log),
            ]
            # torch's own allocator hides what is out of bounds.
            with self.process(
                [*command, sys.executable, "-m", "benchmarks.smallest"], PYTORCH_NO_CUDA_MEMORY_CACHING="1"
            ) as child:
                code = self.wait(child, budget / 2)
            lines = log.read_text(errors="replace").splitlines() if log.exists() else []
            log.unlink(missing_ok=True)
            first = [line.strip("= ") for line in lines if "rror" in line or "nvalid" in line or "azard" in line][:4]
            told = "; ".join(first) or self.log_tail()
            found[kind] = "cut" if code is None else "clean" if code == 0 else f"exit code {code}: {told}"
        self.results.section("sanitizer").details |= found
        said = ", ".join(f"{kind}: {what}" for kind, what in found.items())
        # What racecheck says of asynchronous copies wants a second look: told, and no failure by itself.
        if "exit code" in found["memcheck"]:
            return Outcome("failed", said)
        return Outcome("cut" if "cut" in found.values() else "ok", said)

    def profile(self, budget: float) -> Outcome:
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
            return Outcome("cut" if code is None else "failed", f"nothing was read; {self.log_tail()}")
        return Outcome("ok" if code == 0 else "cut", f"{len(rows)} kernels")

    # The end

    def finish(self) -> None:
        """What never began is cut; then the report."""
        for section in self.results.sections:
            if section.status in ("waiting", "running"):
                section.status, section.reason = "cut", section.reason or "not reached"
        self.save()
        try:
            from resnet_kernels.analysis.report import report

            report(self.console, [self.out / "results.json"], self.out, png=False, fail_on_regression=False)
        except Exception as error:  # the results are saved: the table below is still to come
            self.console.print(f"no whole report: {error}", markup=False, highlight=False)
        self.events.unlink(missing_ok=True)
        self.console.print(summary(self.results))

    def wrong(self) -> bool:
        """Whether anything of ours is not as it should be."""
        ours = any(not r.peer and r.status in ("wrong", "failed") for r in self.results.rows)
        return ours or any(s.status == "failed" for s in self.results.sections)


def stop(child: subprocess.Popen) -> None:
    """A child and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def end_with_parent() -> None:
    """In a child, before it begins: it does not outlive this process, even if that is killed. Linux's prctl has it."""
    PR_SET_PDEATHSIG = 1
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def junit_summary(path: Path) -> dict[str, Any]:
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
    """Per thing computed: the best peer, ours, and how they compare."""
    table = Table("section", "case", "best peer", "ours", "ms", "x best peer", "share of floor")
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
    import torch

    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU-only build"
    return "torch sees no NVIDIA GPU"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.gpu_suite", description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--budget", type=float, default=540, help="seconds, at most (default: 540)")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder (default: gpu-results)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--models", nargs="+", help="torchvision's names, for inference and training")
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--providers", nargs="+", help="only these")
    parser.add_argument("--rounds", type=int, help="of timing, at most")
    parser.add_argument("--full", action="store_true", help="every case, where a CPU would take a few")
    parser.add_argument(
        "--patience", type=float, default=180, help="seconds without a word after which a section hangs"
    )
    parser.add_argument("--commit", help="of this code, where git does not tell")
    parser.add_argument("--resume", action="store_true", help="keep what OUT holds of other sections")
    parser.add_argument("--plugin", help="a module that adds to benchmarks.providers.PROVIDERS")
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 140)
    reason = why_no_gpu() if args.device == "cuda" else None
    if reason:
        message = f"{reason}: nothing to measure. --device cpu measures what makes sense on a CPU."
        Console(stderr=True).print(message, style="red", highlight=False)
        return 2
    options = Options(args.models, args.dtypes, args.batches, args.providers, args.rounds, args.full)
    try:
        suite = Suite(
            args.device, args.out, args.budget, args.patience, options, args.plugin, args.resume, args.commit, console
        )
    except ValueError as error:
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False)
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
