"""Run programs that stand in files, each in a process of its own that has torch and transformers already.

Reads lines `program<TAB>folder<TAB>output` from stdin; runs the program in the folder with all it prints going to the
output, and answers with its exit status. Nothing has been computed here before a program starts, so that the process
which it gets has no threads to lose.
"""

from __future__ import annotations

import faulthandler
import os
import runpy
import sys
import traceback

import torch
import transformers  # noqa: F401

SECONDS = 120


def run(program: str, folder: str, output: str) -> int:
    """Run one program in this process; return its exit status."""
    os.chdir(folder)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout, sys.stderr, sys.argv = os.fdopen(1, "w"), os.fdopen(2, "w"), [program]
    sys.path[0] = folder
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    torch.set_num_threads(1)
    try:
        runpy.run_path(program, run_name="__main__")
        status = 0
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def main() -> None:
    """Serve until stdin ends."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(run(*line.rstrip("\n").split("\t")))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
