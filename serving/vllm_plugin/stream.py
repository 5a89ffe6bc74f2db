"""Slates from vLLM one step at a time, so that requests join and leave whenever they like."""

from __future__ import annotations

import time

import numpy as np
import torch
from vllm import SamplingParams

from hstu.data.histories import Histories
from serving.engine import Array
from serving.slate import check_slate
from serving.vllm_plugin.runtime import VllmRuntime


class SlateStream:
    """Greedy slates as `VllmRuntime.greedy_slates` makes them, continuously batched."""

    def __init__(self, runtime: VllmRuntime) -> None:
        self._runtime = runtime
        self._engine = runtime._engine("generate").llm_engine
        self._until: dict[int, float] = {}

    @property
    def running(self) -> bool:
        """Whether there is anything to do for `step`."""
        return bool(self._engine.has_unfinished_requests())

    def add(self, number: int, history: Histories, num_items: int, *, within_s: float) -> None:
        """A slate of `num_items` for the one history is under way; InputError when it cannot be made.

        It is given up when it is not done in time: nobody waits for it any more.
        """
        config = self._runtime.config
        check_slate(config.num_items, config.max_generated, num_items, 0, no_repeats=True)
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=num_items,
            logprobs=0,
            detokenize=False,
            ignore_eos=True,
            extra_args={"exclude_history": False, "allow_repeats": False},
        )
        self._engine.add_request(str(number), self._runtime._prompts(history)[0], sampling)
        self._until[number] = time.monotonic() + within_s

    def step(self) -> list[tuple[int, Array, Array]]:
        """What was finished by one step: number, item ids int64 [n], cosines float32 [n]."""
        now = time.monotonic()
        late = [number for number, until in self._until.items() if until < now]
        if late:
            self._engine.abort_request([str(number) for number in late])
            for number in late:
                del self._until[number]
        if not self.running:
            return []
        with torch.compiler.set_stance("force_eager"):
            outputs = self._engine.step()
        done = []
        for output in outputs:
            if output.finished and self._until.pop(int(output.request_id), None) is not None:
                slate = output.outputs[0]
                scores = [step[item].logprob for item, step in zip(slate.token_ids, slate.logprobs, strict=True)]
                done.append((int(output.request_id), np.array(slate.token_ids, np.int64), np.array(scores, np.float32)))
        return done
