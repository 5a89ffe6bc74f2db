"""How far an answer may stand from eager PyTorch in fp32, per precision: the one table every gate and test reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """The limits of one precision.

    max_abs_error: of any element of user_embedding, top_scores and task_scores, on any input; of cache_rows relative
    to the largest of them where that exceeds one;
    min_cosine: of every single user embedding with its fp32 counterpart; min_mean_cosine: of all held-out users
    on average; min_top10_overlap: mean share of the fp32 top 10 that is found, over the held-out users;
    max_quality_loss: relative loss of HR@10 and NDCG@10 there.
    """

    max_abs_error: float
    min_cosine: float
    min_mean_cosine: float
    min_top10_overlap: float
    max_quality_loss: float


TOLERANCES: Mapping[str, Tolerance] = MappingProxyType(
    {
        # Reordered sums of fp32: what ONNX Runtime, OpenVINO and PyTorch differ by among themselves.
        "fp32": Tolerance(
            max_abs_error=1e-5,
            min_cosine=0.999999,
            min_mean_cosine=0.999999,
            min_top10_overlap=0.9999,
            max_quality_loss=1e-4,
        ),
        "fp16": Tolerance(
            max_abs_error=5e-3,
            min_cosine=0.9999,
            min_mean_cosine=0.9999,
            min_top10_overlap=0.98,
            max_quality_loss=0.005,
        ),
        # 8 bits of mantissa: a probability may move by some hundredths.
        "bf16": Tolerance(
            max_abs_error=6e-2,
            min_cosine=0.998,
            min_mean_cosine=0.9995,
            min_top10_overlap=0.95,
            max_quality_loss=0.005,
        ),
        "int8": Tolerance(
            max_abs_error=1e-1,
            min_cosine=0.98,
            min_mean_cosine=0.995,
            min_top10_overlap=0.90,
            max_quality_loss=0.005,
        ),
    }
)
