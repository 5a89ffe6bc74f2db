"""The child of the bench: takes up the tasks where the last child left them, and writes each result as it comes."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

from kernels.bench.__main__ import read
from kernels.bench.machine import GPU, Interpreter, Machine
from kernels.bench.tasks import clean, plan
from kernels.errors import KernelError

RESERVE_S = 8.0  # a task is not begun when less is left


def open_machine(given: argparse.Namespace) -> Machine:
    """The machine asked for; KernelError where it is not here."""
    if given.interpret:
        return Interpreter(("fp32", "fp16"), (32,))
    if not torch.cuda.is_available():
        raise KernelError("there is no GPU here", fix="run on a machine with one, or with --interpret for the checks")
    return GPU(given.kernels)


def work(given: argparse.Namespace, record: Path) -> int:
    """0 when all is done or the time is over, 2 where nothing can run, 3 after an error that spoils the device."""
    with record.open("a", encoding="utf-8", buffering=1) as lines:

        def put(**entry: Any) -> None:
            lines.write(json.dumps(entry) + "\n")
            lines.flush()

        try:
            machine = open_machine(given)
        except KernelError as error:
            sys.stderr.write(f"{error}\n")
            return 2
        _, found = read(record)
        put(device=machine.facts())
        for task in plan(machine, cutlass=given.cutlass, small=given.interpret):
            if task.key in found or (given.section and task.key[0] not in given.section):
                continue
            if given.only and not re.search(given.only, " ".join(task.key)):
                continue
            if time.time() > given.until - RESERVE_S:
                sys.stderr.write(f"bench: the time is over before {' '.join(task.key)}\n")
                return 0
            put(key=task.key)
            try:
                result = task.run(found)
            except (KernelError, RuntimeError, ValueError, TypeError, KeyError, OSError, AssertionError) as error:
                put(key=task.key, error=f"{type(error).__name__}: {error}")
                sys.stderr.write(f"bench: {' '.join(task.key)}: {error}\n")
                if not _alive(machine):
                    return 3
            else:
                put(key=task.key, result=result)
                found[task.key] = result
            clean()
    return 0


def _alive(machine: Machine) -> bool:
    """Whether the device still answers; an illegal access spoils it for the rest of the process."""
    try:
        torch.zeros(1, device=machine.device).add_(1)
        machine.wait()
    except RuntimeError:
        return False
    return True
