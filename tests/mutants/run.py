"""Break the scripts one line at a time, and see that the tests notice.

    python tests/mutants/run.py                  all mutants, two at a time
    python tests/mutants/run.py ppo grpo         those of these scripts
    python tests/mutants/run.py --csv benchmarks/mutants.csv        and keep what came of them
    python tests/mutants/run.py --passed         where pytest has just passed

The .toml file of a script lists its mutants: the bug; where it comes from; a piece of its text that
occurs once, and what stands there instead; the tests that should notice; and for
benchmarks/ablations.py with which flags CartPole can show it (`cartpole`; false: it cannot) or the
sums (`sums`). All the tests named must pass on the scripts as they are. A mutant is caught where
one then fails: a copy that no longer imports, or hangs, is not. Exit code 1 where one survives.
"""

import argparse
import csv
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# Each mutant's tests run in a fork of a process that has loaded what they all need: most of them
# take less time than that.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([
    "pytest", "torch", "torch._dynamo", "torch.distributed.fsdp", "gymnasium", "tyro",
    "torch.distributed.checkpoint.state_dict", "transformers"])
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in conftest.py: read when torch is loaded
COLUMNS = ["script", "line", "bug", "caught_by", "seconds"]


def load(scripts=()):
    """The mutants as dicts, `script` and the number of their `at` line added."""
    mutants = []
    for path in sorted(HERE.glob("*.toml")):
        if scripts and path.stem not in scripts:
            continue
        source = (ROOT / f"{path.stem}.py").read_text()
        for mutant in tomllib.loads(path.read_text())["mutant"]:
            if source.count(mutant["line"]) != 1:
                sys.exit(f"{path.name}: {mutant['line']!r} occurs {source.count(mutant['line'])} "
                         "times, not once")
            at = source[:source.index(mutant["line"])].count("\n") + 1
            mutants.append(mutant | {"script": path.stem, "at": at})
    return mutants


def copy(folder):
    """The project's scripts and tests, as they are, in a new folder."""
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "requirements.txt"]:
        shutil.copy(path, folder)


def pytest(folder, tests, processes=0):
    """(exit status, name of the first test that failed) of these tests in the folder."""
    process = SERVER.Process(target=pytest_here, args=(folder, tests, processes))
    process.start()
    process.join(600)
    if process.is_alive():
        process.kill()
        return None, "hangs"
    output = Path(folder, "output").read_text()
    failed = re.search(r"^FAILED tests/(.*?)( - |$)", output, re.MULTILINE)
    if failed and process.exitcode:  # 1, or another if the process then broke down at its exit
        return 1, failed[1]
    status = process.exitcode if process.exitcode != 1 else None  # 1: it broke off, no test failed
    return status, output.strip()[-300:]


def pytest_here(folder, tests, processes):
    """The process of one such call: its output goes to a file, its end is pytest's."""
    os.chdir(folder)
    os.environ["PYTHONDONTWRITEBYTECODE"], sys.dont_write_bytecode = "1", True
    with open("output", "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from pytest import main  # by now loaded

    sys.exit(main(["-q", "-x", "-p", "no:cacheprovider", "-n", str(processes),
                   *(f"tests/{test}" for test in tests)]))


def run(mutant):
    """A row of the CSV; caught_by is empty where no test failed."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        copy(Path(folder))
        path = Path(folder, f"{mutant['script']}.py")
        path.write_text(path.read_text().replace(mutant["line"], mutant["broken"]))
        status, name = pytest(folder, mutant["tests"])
    caught_by, seconds = name if status == 1 else "", time.perf_counter() - start
    print(f"{mutant['script']}.py:{mutant['at']} {mutant['bug']}: "
          f"{caught_by or f'SURVIVED (status {status}): {name}'}", flush=True)
    values = [mutant["script"], mutant["at"], mutant["bug"], caught_by, round(seconds, 1)]
    return dict(zip(COLUMNS, values))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scripts", nargs="*", help="default: all")
    parser.add_argument("--csv", type=Path, help="a file for the rows")
    parser.add_argument("--passed", action="store_true", help="do not first run the tests unbroken")
    args = parser.parse_args()
    start, mutants = time.perf_counter(), load(args.scripts)
    if not args.passed:
        with tempfile.TemporaryDirectory() as folder:
            copy(Path(folder))
            status, name = pytest(folder, sorted({test for m in mutants for test in m["tests"]}), 2)
        if status != 0:
            sys.exit(f"before anything is broken: {name}")
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(run, mutants))
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    caught = sum(bool(row["caught_by"]) for row in rows)
    print(f"{len(rows)} known bugs, {caught} caught, in {time.perf_counter() - start:.0f} s")
    sys.exit(caught < len(rows))


if __name__ == "__main__":
    main()
