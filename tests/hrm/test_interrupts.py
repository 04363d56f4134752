"""Signals that come where what is raised is lost: in imports, in `__del__`, before a command begins, after its end."""

import os
import subprocess
import sys
from textwrap import dedent

import pytest

SIGNAL = "os.kill(os.getpid(), signal.SIGINT)"
COMMAND = """
import os, signal, sys, time
import click
from hrm.cli.program import run_program

@click.command()
def command():
    {body}
    time.sleep(20)
    print("went on")

run_program(command, "test", [])
"""


def ended(script: str, folder) -> tuple[int, str, str]:
    """Exit code, output and standard error of a Python script."""
    command = [sys.executable, "-c", dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=folder, env=os.environ)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("after", ["pass", "time.sleep(20)"], ids=["a short import", "one that takes long"])
def test_an_import_that_catches_whatever_is_raised_does_not_keep_a_command_from_ending(tmp_path, after):
    body = f"""
        import os, signal, time
        try:
            {SIGNAL}
            time.sleep(0.05)
            {after}
        except BaseException:
            pass
    """
    (tmp_path / "catching.py").write_text(dedent(body))
    assert ended(COMMAND.format(body="import catching"), tmp_path) == (130, "", "\ninterrupted\n")


def test_a_second_signal_ends_an_import_at_once(tmp_path):
    (tmp_path / "twice.py").write_text(f"import os, signal\n{SIGNAL}\n{SIGNAL}\nprint('imported', flush=True)\n")
    assert ended(COMMAND.format(body="import twice"), tmp_path) == (130, "", "\ninterrupted\n")


LOST = {
    "__del__": f"type('Dying', (), {{'__del__': lambda self: {SIGNAL}}})()",
    "a callback of the garbage collector": f"""import gc
    def once(*_):
        gc.callbacks.remove(once)
        {SIGNAL}
    gc.callbacks.append(once)
    gc.collect()""",
}


@pytest.mark.parametrize("where", LOST)
def test_what_python_ignores_is_raised_once_more(tmp_path, where):
    assert ended(COMMAND.format(body=LOST[where]), tmp_path) == (130, "", "\ninterrupted\n")


def test_what_else_python_ignores_is_still_told(tmp_path):
    code, out, err = ended(
        COMMAND.format(body="type('Dying', (), {'__del__': lambda self: 1 / 0})(); return"), tmp_path
    )
    assert (code, out) == (0, "")
    assert "ZeroDivisionError" in err


@pytest.mark.parametrize("program", ["hrm", "executor"])
def test_before_its_modules_are_imported_a_signal_ends_a_program_in_one_line(tmp_path, program):
    script = f"""
        import os, signal, sys
        import moe_hrm
        class Finder:
            def find_spec(self, name, *_):
                if name == "{program}.cli":
                    {SIGNAL}
        sys.meta_path.insert(0, Finder())
        moe_hrm.{program}()
    """
    assert ended(script, tmp_path) == (130, "", "\ninterrupted\n")


def test_once_all_is_done_a_signal_ends_a_program_in_one_line(tmp_path):
    script = f"""
        import atexit, os, signal, sys
        import moe_hrm
        sys.argv = ["hrm", "--version"]
        atexit.register(lambda: {SIGNAL})
        moe_hrm.hrm()
    """
    code, out, err = ended(script, tmp_path)
    assert (code, err) == (130, "\ninterrupted\n")
    assert out.startswith("hrm, version")


def test_after_a_signal_threads_are_left_as_they_are(tmp_path):
    """What is to be done at exit is done, but Python does not end its threads and modules."""
    script = """
        import atexit, sys
        import hrm.cli, moe_hrm
        class Module:
            def __del__(self):
                print("unwound", flush=True)
        kept = Module()
        def main():
            atexit.register(print, "cleaned up")
            sys.exit(CODE)
        hrm.cli.main = main
        moe_hrm.hrm()
    """
    assert ended(script.replace("CODE", "130"), tmp_path)[:2] == (130, "cleaned up\n")
    assert ended(script.replace("CODE", "2"), tmp_path)[:2] == (2, "cleaned up\nunwound\n")


def test_an_ignored_interrupt_stays_ignored(tmp_path):
    script = f"""
        import os, signal, sys
        import moe_hrm
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.argv = ["hrm", "--version"]
        {SIGNAL}
        moe_hrm.hrm()
        {SIGNAL}
    """
    assert ended(script, tmp_path)[0] == 0


def test_processes_that_search_leave_an_interrupt_to_the_one_that_started_them():
    """From their first instruction on: it is held back when they begin, also with the first that is ever started."""
    script = """
        import re, signal
        from contextlib import ExitStack
        from multiprocessing import active_children
        from pathlib import Path
        from hrm.analysis.rows import _divided, in_processes
        if __name__ == "__main__":
            with in_processes(2), ExitStack() as stack:
                _divided([None, None], stack)
                for child in active_children():
                    status = Path(f"/proc/{child.pid}/status").read_text()
                    print(int(re.search(r"SigBlk:\\s*(\\w+)", status)[1], 16) >> (signal.SIGINT - 1) & 1)
            print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())))
    """
    code, out, _ = ended(script, None)
    assert (code, out) == (0, "1\n1\n[]\n")
