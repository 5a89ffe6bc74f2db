"""TensorRT's preflight and profiles: each difference is named before anything is loaded; shapes meet their profile."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hstu.artifact import sha256_file
from hstu.errors import ArtifactError, InputError, MissingBackendError, UsageError
from hstu.signature import MAX_BATCH, dynamic_ranges, entry_names, profile_ranges, profile_shapes
from serving.engine import EngineSpec
from serving.engines.tensorrt import preflight
from serving.engines.tensorrt_facts import BuildFacts, Device, EntryFacts, differences, read_facts, require_same
from serving.engines.tensorrt_shapes import choose_profile
from tests.models import TINY

H200 = Device(name="NVIDIA H200", sm="9.0", cuda="13.0", driver_cuda="13.0")
PROFILES = ("single", "batch", "long")


@pytest.fixture
def facts(tmp_path: Path) -> BuildFacts:
    """An engine folder with one file in place of an engine, as built with TensorRT 11.4.0 on an H200."""
    plan = tmp_path / "retrieve.plan"
    plan.write_bytes(b"a plan" * 100)
    one = EntryFacts(
        file=plan.name, sha256=sha256_file(plan), bytes=600, onnx="retrieve.onnx", warnings={}, memory={}, layers={},
        profiles=tuple({"name": p, "shapes": profile_shapes(TINY, "retrieve", p)} for p in PROFILES),  # type: ignore[arg-type]
    )  # fmt: skip
    found = BuildFacts(
        product="TensorRT", module="tensorrt", version="11.4.0", executed=True, device=H200,
        settings={"hardware_compatibility": "none", "version_compatible": False}, entries={"retrieve": one},
    )  # fmt: skip
    found.write(tmp_path)
    return found


def told(facts: BuildFacts, folder: Path, version: str | None = "11.4.0", device: Device | None = H200) -> list[str]:
    return [str(one) for one in differences(facts, folder, version=version, device=device)]


def test_the_same_machine_differs_in_nothing(facts: BuildFacts, tmp_path: Path) -> None:
    assert read_facts(tmp_path).device == H200
    assert told(read_facts(tmp_path), tmp_path) == []
    require_same(facts, tmp_path, version="11.4.0", device=replace(H200, name="NVIDIA GH200", driver_cuda="13.1"))


def test_each_difference_is_named_exactly(facts: BuildFacts, tmp_path: Path) -> None:
    assert told(facts, tmp_path, "10.9.0") == ["TensorRT version: built 11.4.0, here 10.9.0"]
    other = Device(name="NVIDIA A100", sm="8.0", cuda="12.4", driver_cuda="12.4")
    assert told(facts, tmp_path, device=other) == [
        "compute capability: built 9.0 (NVIDIA H200), here 8.0 (NVIDIA A100)",
        "CUDA: built with 13.0, here a driver for CUDA 12.4",
    ]
    assert told(facts, tmp_path, None, None) == [
        "TensorRT: built 11.4.0, here not installed",
        "GPU: built NVIDIA H200, here none",
    ]
    with pytest.raises(ArtifactError, match=r"here 8\.0") as caught:
        require_same(facts, tmp_path, version="11.4.0", device=other)
    assert "rebuild" in str(caught.value)
    with pytest.raises(MissingBackendError, match="not installed"):
        require_same(facts, tmp_path, version=None, device=None)


@pytest.mark.parametrize(
    ("settings", "version", "sm", "runs"),
    [
        ({"hardware_compatibility": "ampere_plus"}, "11.4.0", "8.6", True),
        ({"hardware_compatibility": "ampere_plus"}, "11.4.0", "7.5", False),
        ({"hardware_compatibility": "same_compute_capability"}, "11.4.0", "9.0", True),
        ({"hardware_compatibility": "same_compute_capability"}, "11.4.0", "10.0", False),
        ({"version_compatible": True}, "11.10.0", "9.0", True),
        ({"version_compatible": True}, "11.3.9", "9.0", False),
        ({"version_compatible": True}, "12.0.0", "9.0", False),
    ],
)
def test_compatibility_levels(
    facts: BuildFacts, tmp_path: Path, settings: dict[str, Any], version: str, sm: str, runs: bool
) -> None:
    there = replace(facts, settings={**facts.settings, **settings})
    assert (told(there, tmp_path, version, replace(H200, sm=sm)) == []) is runs


def test_files_that_are_not_what_was_built(facts: BuildFacts, tmp_path: Path) -> None:
    plan = tmp_path / "retrieve.plan"
    plan.write_bytes(plan.read_bytes()[:-1])
    assert told(facts, tmp_path) == ["retrieve.plan: built 600 bytes, here 599 bytes"]
    plan.write_bytes(b"b plan" * 100)
    assert "SHA-256" in told(facts, tmp_path)[0]
    plan.unlink()
    with_plugin = replace(facts, plugins={"libhstu.so": "0" * 64})
    assert [line.partition(":")[0] for line in told(with_plugin, tmp_path)] == ["retrieve.plan", "plugin libhstu.so"]


@pytest.mark.parametrize("text", ["", "{}", '{"device": 3}'])
def test_a_broken_build_json_is_an_artifact_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "build.json").write_text(text)
    with pytest.raises(ArtifactError, match="does not say what it was built with"):
        read_facts(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_preflight_says_so(facts: BuildFacts, tmp_path: Path) -> None:
    spec = EngineSpec(backend="tensorrt", precision="fp16", entries={}, executed=True)
    with pytest.raises(MissingBackendError, match="GPU: built NVIDIA H200, here none"):
        preflight(tmp_path, spec)
    with pytest.raises(UsageError, match="not tied to a GPU"):
        preflight(tmp_path, replace(spec, backend="onnxruntime"))
    values = json.loads((tmp_path / "build.json").read_text())
    assert values["executed"] is True


def test_requests_meet_the_first_profile_that_holds_them() -> None:
    profiles = [profile_shapes(TINY, "retrieve", name) for name in PROFILES]  # type: ignore[arg-type]

    def chosen(users: int, length: int) -> int:
        shapes = {name: (users, length) if len(limits[0]) == 2 else (users,) for name, limits in profiles[0].items()}
        return choose_profile("retrieve", profiles, shapes)

    longest = TINY.max_history
    assert [chosen(1, longest), chosen(1, 1), chosen(3, 1), chosen(3, longest // 2), chosen(3, longest // 2 + 1)] == [
        0, 0, 1, 1, 2,
    ]  # fmt: skip
    with pytest.raises(InputError, match="no profile of the engine holds these shapes") as caught:
        chosen(MAX_BATCH + 1, 5)
    assert f"item_ids [{MAX_BATCH + 1}, 5]" in str(caught.value)
    assert f"profile 2 takes item_ids [1, {longest // 2 + 1}] to [{MAX_BATCH}, {longest}]" in str(caught.value)


@pytest.mark.parametrize("longest", [1, 2, 3, 61])
def test_batch_and_long_hold_every_shape(longest: int) -> None:
    config = replace(TINY, max_history=longest)
    every = dynamic_ranges(config)
    for letter, (low, _, high) in every.items():
        spans = [profile_ranges(config, name)[letter] for name in ("batch", "long")]
        assert min(span[0] for span in spans) == low
        assert max(span[2] for span in spans) == high
        assert all(a <= b <= c for a, b, c in spans)
        assert spans[1][0] <= spans[0][2] + 1  # no gap
    for name in entry_names(config):
        assert set(profile_shapes(config, name, "all")) == set(profile_shapes(config, name, "single"))
