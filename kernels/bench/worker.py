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
from kernels.bench.cases import checks
from kernels.bench.machine import GPU, Interpreter, Machine, Shelf
from kernels.bench.tasks import clean, plan
from kernels.cutlass import SOURCES, library_name
from kernels.errors import KernelError

RESERVE_S = 8.0  # a task is not begun when less is left


def open_machine(given: argparse.Namespace) -> Machine:
    """The machine asked for; KernelError where it is not here."""
    if given.interpret:
        return Interpreter(("fp32", "fp16"), (32,))
    if not torch.cuda.is_available():
        raise KernelError("there is no GPU here", fix="run on a machine with one, or with --interpret for the checks")
    return GPU(given.kernels)


def rehearse(given: argparse.Namespace) -> int:
    """0 when all that the tasks need is there and fits: every task is named, and every check's launch prepared."""
    try:
        shelf = Shelf(given.kernels, given.sm)
    except KernelError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    faults: list[str] = []
    for case in checks(shelf.kernels()):
        try:
            for launch in case.make(shelf.device, 1).launches:
                shelf.prepare(launch)
        except KernelError as error:
            faults.append(str(error))
    if given.cutlass is not None:
        there = {source.name: (given.cutlass / library_name(source)).is_file() for source in SOURCES.values()}
        faults += [f"{given.cutlass}: no library of today's {name}" for name, found in there.items() if not found]
    for task in plan(shelf, cutlass=given.cutlass):
        sys.stdout.write(" ".join(task.key) + "\n")
    for fault in faults:
        sys.stderr.write(f"missing: {fault}\n")
    return 1 if faults else 0


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
            put(key=task.key, stall_s=task.stall_s)
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
