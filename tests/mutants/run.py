"""Insert bugs into copies of the scripts, one at a time, and check that a test fails.

    python tests/mutants/run.py                  all mutants, two at a time
    python tests/mutants/run.py ppo grpo         those of these scripts
    python tests/mutants/run.py --changed main   those of scripts that differ from this revision
    python tests/mutants/run.py --csv benchmarks/mutants.csv        write the results to a CSV,
                                                 which keeps its rows of other scripts
    python tests/mutants/run.py --passed         do not first run the tests without a bug

Each script has a .toml file with its mutants. A mutant has the bug in words, its source, a piece of
the script that occurs once (`line`), what replaces it (`broken`), and the tests that should fail.
For benchmarks/ablations.py it also has the flags with which CartPole can show the bug (`cartpole`;
false if it cannot) or the sums can (`sums`).

All these tests, slow or not, must pass without a bug. A mutant is caught if one of them then fails.
A copy that cannot be imported, or that hangs, does not count as caught. The exit code is 1 if a
mutant survives.

With --changed, a script counts as changed if its own file, its .toml file, a test file that its
mutants name or a file that all tests share differs from the revision.
"""

import argparse
import csv
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# Each mutant's tests run in a fork of a process that has loaded what they all need, as loading
# takes longer than most of these tests.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([
    "pytest", "torch", "torch._dynamo", "torch.distributed.fsdp", "gymnasium", "tyro",
    "torch.distributed.checkpoint.state_dict", "transformers"])
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in conftest.py: read when torch is loaded
COLUMNS = ["script", "line", "bug", "caught_by", "seconds"]


def other_rows(path, scripts):
    """Return the rows of a CSV file of results that are not those of these scripts."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["script"] not in scripts]


def load(scripts=()):
    """Return the mutants as dicts; `script` and the line number `at` are added."""
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


def changed_scripts(mutants, revision):
    """Return the scripts whose file, mutants or tests differ from a git revision."""
    command = ["git", "diff", "--name-only", revision, "--"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"--changed {revision}: {done.stderr.strip()}")
    changed = set(done.stdout.split())
    tests = [name for name in changed if name.startswith("tests/") and name.endswith(".py")]
    if any(not Path(name).name.startswith("test_") for name in tests):
        return {mutant["script"] for mutant in mutants}  # all tests use such a file
    return {mutant["script"] for mutant in mutants if changed & files_of(mutant)}


def files_of(mutant):
    """Return the files on which the outcome of a mutant depends."""
    script = mutant["script"]
    tests = {f"tests/{test.split('::')[0]}" for test in mutant["tests"]}
    return {f"{script}.py", f"tests/mutants/{script}.toml", *tests}


def copy(folder):
    """Copy the project's scripts and tests into a new folder."""
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "requirements.txt"]:
        shutil.copy(path, folder)


def pytest(folder, tests, processes=0):
    """Run tests in the folder. Return the exit status and the name of the first that failed."""
    process = SERVER.Process(target=pytest_here, args=(folder, tests, processes))
    process.start()
    process.join(600)
    if process.is_alive():
        process.kill()
        return None, "hangs"
    output = Path(folder, "output").read_text()
    failed = re.search(r"^FAILED tests/(.*?)( - |$)", output, re.MULTILINE)
    if failed and process.exitcode:  # not always 1, as the process may crash when it exits
        return 1, failed[1]
    status = process.exitcode if process.exitcode != 1 else None  # a crash, no test failed
    return status, output.strip()[-300:]


def pytest_here(folder, tests, processes):
    """Run pytest in this process, with output to a file; exit with its status."""
    os.chdir(folder)
    os.environ["PYTHONDONTWRITEBYTECODE"], sys.dont_write_bytecode = "1", True
    with open("output", "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from pytest import main  # by now loaded

    # -m "" also selects slow tests
    sys.exit(main(["-q", "-x", "-p", "no:cacheprovider", "-m", "", "-n", str(processes),
                   *(f"tests/{test}" for test in tests)]))


def run(mutant):
    """Return a row of the CSV; caught_by is empty if no test failed."""
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
    parser.add_argument("--changed", metavar="REVISION", help="only scripts that differ from it")
    parser.add_argument("--csv", type=Path, help="write the results to this file")
    parser.add_argument("--passed", action="store_true", help="skip the run without a bug")
    args = parser.parse_args()
    start, mutants = time.perf_counter(), load(args.scripts)
    unknown = set(args.scripts) - {mutant["script"] for mutant in mutants}
    if unknown:
        parser.error(f"no such script: {', '.join(sorted(unknown))}; write ppo for ppo.py")
    if args.csv and not args.csv.parent.is_dir():
        parser.error(f"--csv {args.csv}: no such folder")
    if args.changed:
        scripts = changed_scripts(mutants, args.changed)
        mutants = [mutant for mutant in mutants if mutant["script"] in scripts]
    if mutants and not args.passed:
        with tempfile.TemporaryDirectory() as folder:
            copy(Path(folder))
            status, name = pytest(folder, sorted({test for m in mutants for test in m["tests"]}), 2)
        if status != 0:
            sys.exit(f"before anything is broken: {name}")
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(run, mutants))
    caught = sum(bool(row["caught_by"]) for row in rows)
    if args.csv:
        rows += other_rows(args.csv, {mutant["script"] for mutant in mutants})
        rows.sort(key=lambda row: row["script"])
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    print(f"{len(mutants)} inserted bugs, {caught} caught, in {time.perf_counter() - start:.0f} s")
    sys.exit(caught < len(mutants))


if __name__ == "__main__":
    main()
