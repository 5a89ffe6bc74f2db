"""vLLM in this process, on a bundle's model folder: user embeddings, retrieval and slates.

vLLM runs one kind of work in an engine: pooling (user embeddings, sampled and beam slates) or generation (greedy
slates). Each engine is made when it is first asked for; two engines of one process share the embedding tables, which
are nearly all of a recommender's weights. A runtime may be called from any thread: one call runs at a time, since
an engine batches the requests of a call and not those of several.
"""

from __future__ import annotations

import os
import tempfile
import threading
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from hstu.checkpoints.huggingface import WEIGHTS
from hstu.config import HSTUConfig
from hstu.data.histories import Histories
from hstu.errors import ArtifactError, InputError
from hstu.model import l2_normalize
from serving.engine import check_feeds
from serving.slate import Slate, Slates, stack_slates
from serving.vllm_plugin import BLOCK_SIZE

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.inputs.engine import EmbedsInput

Array = npt.NDArray[Any]
Runner = Literal["pooling", "generate"]

# What this process sets for vLLM unless the user has set it: everything in this process and on this machine.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs here, without a second process
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the slate constraint is a logits processor of the first runner
    "VLLM_CACHE_ROOT": str(Path(tempfile.gettempdir()) / "hstu-vllm-cache"),
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


_in_use: list[LLM] = []  # the engines of this process


def _close(engines: dict[Runner, LLM]) -> None:
    """Free the engines' weights and pages; what the engines of a process share goes with the last of them."""
    from vllm.v1.engine.core_client import InprocClient

    while engines:
        engine = engines.popitem()[1]
        _in_use.remove(engine)
        client = engine.llm_engine.engine_core
        if _in_use and isinstance(client, InprocClient):
            # vLLM has one set of process groups in a process, and an engine that goes, by its own shutdown or as
            # garbage, ends them for all: only what is this engine's own may go.
            client._finalizer.detach()
            client.engine_core.model_executor.shutdown()
        else:
            client.shutdown()


def _longest_history_bytes(config: HSTUConfig) -> int:
    """What the pages of one history of N events take, in float32, with two pages to spare."""
    per_event = config.num_layers * config.num_heads * (config.qk_dim + config.v_dim) * 4
    return (config.max_length + 3 * BLOCK_SIZE) * per_event


class VllmRuntime:
    """Answers histories from the folder's weights through vLLM; equal to eager PyTorch within float32 rounding."""

    def __init__(
        self,
        model_folder: Path,
        *,
        dtype: Literal["float32", "bfloat16"] = "float32",
        max_batch: int = 64,
        kv_cache_mib: int = 512,
        **engine_options: Any,
    ) -> None:
        """`max_batch` requests run at once; other options go to `vllm.LLM`.

        The pages of all requests take `kv_cache_mib`, or what the longest history takes if that is more.
        """
        self.folder = model_folder
        self.config = HSTUConfig.from_pretrained(model_folder)
        for name in (WEIGHTS, "tokenizer.json"):
            if not (model_folder / name).is_file():
                raise ArtifactError(
                    f"{model_folder}: there is no {name}", expected="a bundle's model folder", fix="run bundle again"
                )
        self._options: dict[str, Any] = {
            "dtype": dtype,
            "max_num_seqs": max_batch,
            "kv_cache_memory_bytes": max(kv_cache_mib << 20, _longest_history_bytes(self.config)),
            "enforce_eager": True,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        } | engine_options
        self._engines: dict[Runner, LLM] = {}
        self._finalizer = weakref.finalize(self, _close, self._engines)
        self._finalizer.atexit = False  # a process that ends frees it all at once
        self._items: torch.Tensor | None = None
        self._lock = threading.RLock()

    def embed(self, histories: Histories) -> Array:
        """User embeddings float32 [B, D], L2 norm 1."""
        if not len(histories):
            return np.zeros((0, self.config.embedding_dim), dtype=np.float32)
        from vllm import PoolingParams

        prompts = self._prompts(histories)
        with self._lock:
            outputs = self._run("pooling", prompts, [PoolingParams(task="embed")] * len(prompts))
        return torch.stack([output.outputs.data for output in outputs]).numpy()  # type: ignore[no-any-return]

    def retrieve(self, histories: Histories, k: int) -> tuple[Array, Array, Array]:
        """User embeddings float32 [B, D], the best `k` item ids int64 [B, k] of all items, their cosines [B, k]."""
        if not 1 <= k <= self.config.num_items:
            raise InputError("that many items cannot be retrieved", got=k, expected=f"1..{self.config.num_items}")
        embeddings = self.embed(histories)
        scores, columns = (torch.from_numpy(embeddings) @ self._item_table().T).topk(k)
        return embeddings, (columns + 1).numpy(), scores.numpy()

    def top_k(self, histories: Histories, k: int) -> tuple[Array, Array]:
        """The best `k` item ids int64 [B, k] of all items and their cosines float32 [B, k], best first."""
        return self.retrieve(histories, k)[1:]

    def greedy_slates(
        self, histories: Histories, num_items: int, *, exclude_history: bool = False, no_repeats: bool = True
    ) -> tuple[Array, Array]:
        """Item ids int64 [B, n] and cosines float32 [B, n]; as `serving.slate.greedy_slate`, which defines them."""
        slate = Slate(num_items=num_items, exclude_history=exclude_history, allow_repeats=not no_repeats)
        slates = self.slates(histories, slate)
        return slates.item_ids[:, 0].numpy(), slates.scores[:, 0].numpy()

    def slates(self, histories: Histories, slate: Slate) -> Slates:
        """The slates of every user; as `serving.slate.make_slates`, which defines them."""
        config = self.config
        seen = [ids.tolist() for ids in np.split(histories.item_ids, histories.offsets[1:-1])]
        slate.check(config, most_in_history=max((len(set(ids)) for ids in seen), default=0))
        if not len(histories):
            shape = (0, slate.width if slate.method == "beam" else 1, slate.num_items)
            totals = None if slate.method == "greedy" else torch.zeros(shape[:2])
            none = torch.zeros(shape)
            return Slates(item_ids=none.long(), scores=none, log_probabilities=totals)
        with self._lock:
            return self._generated(histories, slate) if slate.method == "greedy" else self._searched(histories, slate)

    def _generated(self, histories: Histories, slate: Slate) -> Slates:
        """Greedy slates by vLLM's own decoding: all users' next items in one step."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        extra: dict[str, Any] = {"exclude_history": slate.exclude_history, "allow_repeats": slate.allow_repeats}
        if slate.deny_items:
            extra["deny_items"] = list(slate.deny_items)
        if slate.allow_items is not None:
            extra["allow_items"] = list(slate.allow_items)
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=slate.num_items,
            logprobs=0,
            detokenize=False,
            ignore_eos=True,
            extra_args=extra,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,  # nothing here changes it; a deep copy for every user costs more than its decoding
        )
        prompts = self._prompts(histories)
        # vLLM ranks the chosen item by a function under torch.compile: seconds of C++ compiling for one comparison.
        with torch.compiler.set_stance("force_eager"):
            outputs = self._run("generate", prompts, [sampling] * len(prompts))
        slates = [output.outputs[0] for output in outputs]
        scores = [[step[item].logprob for item, step in zip(s.token_ids, s.logprobs, strict=True)] for s in slates]
        return Slates(
            item_ids=torch.tensor([list(one.token_ids) for one in slates]).unsqueeze(1),
            scores=torch.tensor(scores).unsqueeze(1),
            log_probabilities=None,
        )

    def _searched(self, histories: Histories, slate: Slate) -> Slates:
        """Sampled and beam slates by a search in the model's process, after each user's prefill."""
        from vllm import PoolingParams

        from serving.vllm_plugin.plain_json import decode_slates

        if self._options.get("tensor_parallel_size", 1) > 1:
            raise InputError("sampled and beam slates need one tensor-parallel rank", got="more", fix="ask for greedy")
        width = slate.width if slate.method == "beam" else 1
        params = []
        for user, items in enumerate(np.split(histories.item_ids, histories.offsets[1:-1])):
            options = asdict(replace(slate, seed=slate.seed + user))
            asked = {"k": width, "options": options, "history_items": items.tolist()}
            params.append(PoolingParams(task="plugin", skip_reading_prefix_cache=False, extra_kwargs={"slate": asked}))
        outputs = self._run("pooling", self._prompts(histories), params)
        return stack_slates([decode_slates(output.outputs.data) for output in outputs], width)

    def _run(self, runner: Runner, prompts: Sequence[EmbedsInput], params: Sequence[Any]) -> list[Any]:
        """vLLM's output of every prompt, in their order; nothing of them is left in the engine, whatever happens.

        The prompts are `_prompts`'s, which are checked: `LLM.generate` would check each again.
        """
        engine = self._engine(runner).llm_engine
        numbers: dict[str, int] = {}
        found: list[Any] = [None] * len(prompts)
        try:
            for number, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
                numbers[engine.add_request(str(number), prompt, one)] = number
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.finished:
                        found[int(output.request_id)] = output
        except BaseException:
            engine.abort_request(list(numbers), internal=True)
            raise
        return found

    def forget(self) -> None:
        """No page holds anything of an answer before: the next one is computed whole."""
        with self._lock:
            for engine in self._engines.values():
                engine.reset_prefix_cache()

    def close(self) -> None:
        """Release the engines' memory; the runtime must not be used after."""
        with self._lock:
            self._finalizer()

    def _engine(self, runner: Runner) -> LLM:
        if runner not in self._engines:
            for name, value in ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            # vLLM's CPU worker replaces this function for the whole process; other runtimes here still need it.
            set_num_threads = torch.set_num_threads
            options = self._options | ({"logprobs_mode": "processed_logits"} if runner == "generate" else {})
            try:
                with warnings.catch_warnings():
                    for message in ("`torch.distributed.reduce_op` is deprecated", "`torch.jit.script"):
                        warnings.filterwarnings("ignore", message)  # vLLM's and torch's own, at import
                    from vllm import LLM

                    self._engines[runner] = LLM(str(self.folder), runner=runner, **options)
                _in_use.append(self._engines[runner])
            finally:
                torch.set_num_threads = set_num_threads
        return self._engines[runner]

    def _prompts(self, histories: Histories) -> list[EmbedsInput]:
        """Prompts as vLLM's renderer would hand them to its engine, the items beside the records."""
        from vllm.inputs.engine import embeds_input

        from serving.vllm_plugin.records import records_from_histories

        check_feeds(self.config, "retrieve", histories.feeds(self.config))
        prompts = []
        for rows, items in zip(
            records_from_histories(histories, self.config),
            np.split(histories.item_ids, histories.offsets[1:-1]),
            strict=False,  # of no histories there is one empty part
        ):
            prompts.append(embeds_input(rows, prompt_token_ids=items.tolist(), is_token_ids=[False] * len(items)))
        return prompts

    def _item_table(self) -> torch.Tensor:
        """Normalised embeddings float32 [num_items, D] of the real items."""
        if self._items is None:
            from safetensors import safe_open

            with safe_open(self.folder / WEIGHTS, framework="pt") as weights:
                self._items = l2_normalize(weights.get_tensor("item_embedding.weight")[1:].float())
        return self._items
