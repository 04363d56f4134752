"""Fuzzes in processes of their own, so that a crash or a hang is told with its input.

`python -m tests.fuzz.run` runs FUZZ_EXAMPLES inputs (`make fuzz FUZZ_EXAMPLES=200000`) over all
targets, in JOBS processes, and writes what it finds to the folder of FUZZ_FINDINGS.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

CPU_SECONDS: Final = 10.0  # of one input
STUCK_S: Final = 120.0  # without a new input: it hangs where no signal is heard
NAP_S: Final = 0.2  # between looks at a worker
WORKER: Final = ["-m", "tests.fuzz.run", "--work"]
AT_ONCE: Final = 2000  # inputs of one hypothesis test, which remembers all of them


@dataclass(slots=True)
class Report:
    """What came of the inputs of one target; a finding is a message and the file of its input."""

    target: str
    inputs: int = 0
    refused: int = 0
    seconds: float = 0.0
    findings: list[str] = field(default_factory=list)


class TookTooLongError(BaseException):
    """An input took over ten seconds; no `except Exception` may keep it."""


def fuzz(target: Any, count: int, seed: int, folder: Path, findings: Path) -> Report:
    """Run `count` inputs of the target in this process; the one under way is kept in `folder`."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    from hrm.errors import HrmError
    from tests.fuzz.mutations import content_of, examples
    from tests.fuzz.targets_hrm import check_message

    report, bases = Report(target.name), target.bases()
    started_s = time.process_time()
    failed: dict[str, bytes] = {}

    def body(example: Any) -> None:
        content = content_of(example, bases, target.dump)
        (folder / "input").write_bytes(content)
        report.inputs += 1
        with TemporaryDirectory(dir=folder) as own:
            # Again and again: raised where exceptions are dropped, as in a destructor, one is not heard.
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS, CPU_SECONDS)
            try:
                target.use(content, Path(own))
            except HrmError as error:
                check_message(error)
                report.refused += 1
            except TookTooLongError as error:
                failed["content"] = content
                raise AssertionError(f"took over {CPU_SECONDS:.0f} s") from error
            except BaseException:
                failed["content"] = content
                raise
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)

    def take_too_long(*_: object) -> None:
        raise TookTooLongError

    signal.signal(signal.SIGPROF, take_too_long)
    while report.inputs < count and len(report.findings) < 3:
        some = min(AT_ONCE, count - report.inputs)
        test = given(examples(len(bases), has_values=target.has_values))(body)
        test = settings(
            max_examples=some,
            database=None,
            deadline=None,
            derandomize=False,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example],
            report_multiple_bugs=False,
            phases=(Phase.generate, Phase.shrink),
        )(seeded(seed + report.inputs)(test))
        try:
            test()
        except BaseException as error:  # hypothesis has shrunk it: the last one run is the least
            if isinstance(error, KeyboardInterrupt):
                raise
            said = f"{type(error).__name__}: {str(error)[:300]}"
            report.findings.append(told(target.name, said, failed.get("content", b""), findings))
    report.seconds = time.process_time() - started_s
    return report


def told(target: str, said: str, content: bytes, findings: Path) -> str:
    """Keep an input that failed; returns the message that names its file."""
    findings.mkdir(parents=True, exist_ok=True)
    path = findings / f"{target}-{sha256(content).hexdigest()[:12]}"
    path.write_bytes(content)
    return f"{target}: {said}\n  input: {path} ({len(content)} bytes)"


def work(names: Sequence[str], count: int, seed: int, folder: Path, findings: Path) -> None:
    """Run inputs over the targets, and print a report of each as a line of JSON."""
    import faulthandler

    from tests.fuzz.targets import NAMES_OF_HRM, all_targets, targets_of_hrm

    faulthandler.enable()
    there = targets_of_hrm() if set(names) <= set(NAMES_OF_HRM) else all_targets()
    targets = [there[name] for name in names]
    whole = sum(target.share for target in targets)
    for target in targets:
        (folder / "target").write_text(target.name)
        report = fuzz(target, round(count * target.share / whole), seed, folder, findings)
        print(json.dumps(asdict(report)), flush=True)


def watch(names: Sequence[str], count: int, seed: int, findings: Path) -> list[Report]:
    """Run inputs over the targets in another process; its end or silence is a finding, too."""
    with TemporaryDirectory(prefix="hrm-fuzz-") as made:
        folder = Path(made)
        arguments = [",".join(names), str(count), str(seed), made, str(findings)]
        # Made-up names of models are asked of no server.
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with (folder / "out").open("w+") as out, (folder / "errors").open("w+") as errors:
            process = subprocess.Popen(
                [sys.executable, *WORKER, *arguments], stdout=out, stderr=errors, env=environment
            )
            said = _wait(process, folder)
            out.seek(0)
            reports = [Report(**json.loads(line)) for line in out if line.startswith("{")]
            if said:
                errors.seek(0)
                target = (folder / "target").read_text() if (folder / "target").exists() else "?"
                content = (folder / "input").read_bytes() if (folder / "input").exists() else b""
                said = f"{said}; {' '.join(errors.read()[-1500:].split())}"
                reports.append(Report(target, findings=[told(target, said, content, findings)]))
    return reports


def _wait(process: "subprocess.Popen[bytes]", folder: Path) -> str:
    """Wait for the worker; says what went wrong if it crashed or came to no end.

    Time in which this process or the worker is paused (Ctrl-Z, a suspended machine) does not count.
    """
    path, last_ns, waited_s = folder / "input", 0, 0.0
    try:
        while (code := process.poll()) is None:
            time.sleep(NAP_S)
            waited_s += 0.0 if _is_paused(process) else NAP_S
            written_ns = path.stat().st_mtime_ns if path.exists() else 0
            if written_ns != last_ns:
                last_ns, waited_s = written_ns, 0.0
            elif waited_s > STUCK_S:
                return f"no end after {STUCK_S:.0f} s"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    return "" if code == 0 else f"the process ended with {code}"


def _is_paused(process: "subprocess.Popen[bytes]") -> bool:
    """Whether a signal has stopped a process that has not been told to go on."""
    try:
        return os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # it has ended
        return False


def main() -> None:
    """Run many inputs over every target; exit code 1 if there was a finding."""
    from concurrent.futures import ThreadPoolExecutor

    from tests.fuzz.targets import all_targets

    count, jobs = int(os.environ.get("FUZZ_EXAMPLES", "20000")), int(os.environ.get("JOBS", "2"))
    seed = int(os.environ.get("FUZZ_SEED", "0")) * 10**9
    findings = Path(os.environ.get("FUZZ_FINDINGS", "fuzz-findings")).absolute()
    targets = all_targets()
    chosen = os.environ.get("FUZZ_TARGETS", ",".join(targets)).split(",")
    whole = sum(targets[name].share for name in chosen)
    total = Report("all targets")

    def run(name: str) -> list[Report]:
        return watch([name], max(1, round(count * targets[name].share / whole)), seed, findings)

    with ThreadPoolExecutor(jobs) as pool:
        for reports in pool.map(run, chosen):
            for report in reports:
                show(report)
                total.inputs += report.inputs
                total.refused += report.refused
                total.seconds += report.seconds
                total.findings += report.findings
    show(total)
    sys.exit(1 if total.findings else 0)


def show(report: Report) -> None:
    """Print a report as a line, and its findings below."""
    print(
        f"{report.target:18} {report.inputs:8,} inputs  {report.refused:8,} refused"
        f"  {report.seconds:7.1f} s  {len(report.findings)} findings",
        *report.findings,
        sep="\n",
        flush=True,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        names, count, seed, folder, findings = sys.argv[2:]
        work(names.split(","), int(count), int(seed), Path(folder), Path(findings))
    else:
        main()
