"""The parameters of the checkpoint stage, and which of them go together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hstu.errors import ParameterError
from stages.parameters import require

_MAY_BE_ZERO = ("seed", "max_generated", "reference_gap_buckets")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointParams:
    """Where the model comes from; see params.yaml. What starts with `reference_` shapes the model trained here."""

    source: Literal["reference", "meta", "huggingface"]
    path: str | None = field(metadata={"path": True})
    num_heads: int | None
    max_generated: int
    event_log: Literal["auto", "prepared", "none"]
    calibration_histories: int
    evaluation_histories: int
    seed: int
    reference_embedding_dim: int
    reference_num_layers: int
    reference_num_heads: int
    reference_qk_dim: int
    reference_v_dim: int
    reference_max_history: int
    reference_gap_buckets: int
    reference_head_dim: int
    reference_epochs: int
    reference_batch_size: int
    reference_learning_rate: float
    reference_dropout: float
    reference_temperature: float
    reference_negatives: int
    reference_threads: int

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value, low = getattr(self, name), 0 if name in _MAY_BE_ZERO else 1
            if isinstance(value, int):
                require(value >= low, f"checkpoint.{name}: out of range", got=value, expected=f">= {low}")
        for name, high in (("reference_learning_rate", 1.0), ("reference_temperature", 10.0)):
            value = getattr(self, name)
            require(0 < value <= high, f"checkpoint.{name}: out of range", got=value, expected=f"above 0, up to {high}")
        dropout = self.reference_dropout
        require(0 <= dropout < 1, "checkpoint.reference_dropout: out of range", got=dropout, expected="0, or below 1")
        if self.source == "reference":
            self._check_reference()
        else:
            what = "a file of Meta's trainer" if self.source == "meta" else "a folder with config.json"
            require(self.path is not None, f"checkpoint.path: no {self.source} checkpoint", got="null", expected=what)
        if self.source == "meta" and self.num_heads is None:
            raise ParameterError(
                "checkpoint.num_heads: a file of Meta's trainer does not tell it",
                expected="the number of heads that the model was trained with",
                fix="-S checkpoint.num_heads=H",
            )

    def _check_reference(self) -> None:
        if self.path is not None or self.num_heads is not None:
            raise ParameterError(
                "checkpoint: path and num_heads belong to a checkpoint from elsewhere",
                got=f"source reference, path {self.path}, num_heads {self.num_heads}",
                expected="both null (the model trained here has reference_num_heads)",
                fix="-S checkpoint.source=meta, or huggingface",
            )
        what = "checkpoint.event_log: the reference model is trained on the prepared log"
        require(self.event_log != "none", what, got="none", expected="auto or prepared")
