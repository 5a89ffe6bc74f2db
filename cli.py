"""The command line: one command per stage of the compiler, and the commands that use what they make.

Every command stands in a module of `commands/`, without any logic: it reads its options, calls one function and shows
what that returns. `commands/pipeline.py` is the main path.

Exit codes: 0 ok · 1 a bug · 2 bad parameters, input or usage · 3 a missing device, library or version ·
4 a corrupt or mismatched artifact · 5 a gate failed.
"""

from __future__ import annotations

import os
import sys

from commands import devices, machine, pipeline, serving, shipping
from commands.app import app
from hstu.errors import CompilerError

PANELS = (pipeline, serving, devices, shipping, machine)  # importing them registered their commands, in this order
INTERRUPTED = 130  # 128 + SIGINT


def main() -> None:
    """Run the command line; errors of ours become one message and their exit code."""
    try:
        app()
    except CompilerError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    except SystemExit as ended:
        if ended.code == INTERRUPTED:  # what Typer makes of Ctrl-C
            sys.stderr.write("interrupted; nothing half-written was left\n")
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


if __name__ == "__main__":
    main()
