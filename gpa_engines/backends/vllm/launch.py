"""Starts one of vLLM's processes: `python -I -S launch.py OUTPUT PYTHON ARGUMENTS...`.

It ties the process to its parent, sends what it prints to the file OUTPUT, or to standard error where that is "-", and
becomes `PYTHON ARGUMENTS...`. It runs by path, before anything else is there, so it uses the standard library only.

vLLM's engine process does not notice that its parent is gone, and would keep its memory for ever; of the workers that
it starts in turn, each ends with it. Libraries print to standard output, which belongs to the program that uses us.
"""

import ctypes
import os
import signal
import sys


def main() -> None:
    output, *command = sys.argv[1:]
    if sys.platform.startswith("linux"):
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2); stays across execv
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() == 1:
            sys.exit("the process that wanted this one is gone")
    target = 2 if output == "-" else os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
