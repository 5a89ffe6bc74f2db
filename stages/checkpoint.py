"""checkpoint: a trained HSTU, wherever it comes from, in the one form that every later stage reads.

The artifact is a Hugging Face style folder (`config.json`, `model.safetensors`) with `vocabulary.json`,
`calibration.npz` and `evaluation.npz` in the model's own ids, and `checkpoint.json`, which says what it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hstu.artifact import Artifact, encode_json
from stages.checkpoint_params import CheckpointParams
from stages.contract import Outcome, Stage


def run(params: CheckpointParams, inputs: Mapping[str, Artifact], folder: Path) -> Outcome:
    """Write the artifact's files into `folder`; see `stages.checkpoint_sources` for what each source raises."""
    from hstu.checkpoints.huggingface import save_pretrained
    from hstu.evaluation import ranking_quality, task_quality
    from stages import checkpoint_sources as sources

    data = inputs["prepare-data"]
    if params.source == "reference":
        trained = sources.train_reference(params, data)
    elif params.source == "meta":
        trained = sources.read_meta(params)
    else:
        trained = sources.read_huggingface(params)
    model = trained.model
    splits = sources.histories_for(params, trained, data)
    save_pretrained(model, folder)
    trained.vocabulary.save(folder / "vocabulary.json")
    splits.calibration.save(folder / "calibration.npz")
    splits.evaluation.save(folder / "evaluation.npz")
    metrics = {"num_parameters": sum(parameter.numel() for parameter in model.parameters()), **trained.metrics}
    if (splits.evaluation.target_item > 0).any():
        metrics |= ranking_quality(model, splits.evaluation)
        metrics |= task_quality(model, splits.evaluation) if model.config.tasks else {}
    details = {
        "source": params.source,
        "histories": splits.source,
        "calibration_histories": len(splits.calibration),
        "evaluation_histories": len(splits.evaluation),
        "metrics": metrics,
        **trained.details,
    }
    (folder / "checkpoint.json").write_bytes(encode_json(details))
    sources.tell(params.source, metrics)
    return Outcome(metrics=metrics, platform=trained.platform)


STAGE = Stage(
    name="checkpoint",
    summary="Take a trained HSTU (Meta's format, Hugging Face's, or trained here) into the one form later stages read.",
    params=CheckpointParams,
    needs=("prepare-data",),
    toolchain=("torch", "safetensors", "numpy"),
    run=run,
)
