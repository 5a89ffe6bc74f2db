"""How build-engine makes one engine: lower, write, compile, gate; and for int8 widen until the gate is passed."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hstu.artifact import Artifact, encode_json
from hstu.config import HSTUConfig
from hstu.data.histories import Histories
from hstu.errors import GateError
from hstu.signature import EntryName, entry_names
from serving.engine import EngineSpec, open_engine
from serving.engines.torch import open_torch_engine
from stages.contract import say
from stages.engine_speed import SpeedUp, measure_speed_up
from stages.engine_targets import TARGETS, Target
from stages.precision.recipe import WIDE, Recipe, lower_entry, write_models
from stages.precision.sensitivity import modules_by_sensitivity
from stages.quality import BATCH, gate
from stages.tensorrt.engine import compile_entries

if TYPE_CHECKING:
    from stages.build_engine import BuildEngineParams


class EngineBuild:
    """One engine being made from the artifacts of surgery and checkpoint."""

    def __init__(
        self,
        params: BuildEngineParams,
        target: Target,
        surgery: Artifact,
        checkpoint: Artifact,
        calibration: Histories,
        evaluation: Histories,
    ) -> None:
        self.params, self.target, self.source, self.checkpoint = params, target, surgery.path, checkpoint
        self.calibration, self.evaluation = calibration, evaluation
        self.config = HSTUConfig.from_pretrained(surgery.path)

    def widening_until_good(self, recipe: Recipe, folder: Path) -> tuple[EngineSpec, dict[str, Any], dict[str, Any]]:
        """The engine is in `folder` and has passed its gate; its spec, its figures, and what is in recipe.json, such
        as what had to stay wide for that.

        An int8 engine that fails is built again with the most sensitive module left wide as well, at most
        `int8_widen_at_most` times; then, as any other precision at once, GateError.
        """
        sensitivity: dict[str, float] = {}
        first = len(recipe.int8_keep_wide)
        while True:
            for file in folder.iterdir():
                file.unlink()  # not written over: a closed engine may still have it mapped
            facts = self.write_models(recipe, folder, self.target)
            spec = self.compile(folder, self.target) if self.target.executed else None
            try:
                figures = self.gate(recipe, folder)
            except GateError as error:
                widened = len(recipe.int8_keep_wide) - first
                if self.params.precision != "int8" or widened >= self.params.int8_widen_at_most:
                    raise
                sensitivity = sensitivity or modules_by_sensitivity(self.source, self.config, recipe, self.calibration)
                left = [module for module in sensitivity if module not in recipe.int8_keep_wide]
                if len(left) < 2:
                    raise  # with the last one wide too it would not be int8
                say(f"build-engine: int8 fails ({error.got}); leaving {left[0]} wide as well")
                recipe = replace(recipe, int8_keep_wide=(*recipe.int8_keep_wide, left[0]))
            else:
                break
        spec = spec or self.compile(folder, self.target)
        if self.params.precision == "int8":
            self.require_faster(recipe, folder)
        facts |= self.calibration_facts() | ({"sensitivity": sensitivity} if sensitivity else {})
        (folder / "recipe.json").write_bytes(encode_json(facts))
        return spec, figures, facts

    def write_models(self, recipe: Recipe, folder: Path, target: Target) -> dict[str, Any]:
        """`folder` holds config.json, one .onnx file per entry and weights.bin; returns what recipe.json says."""
        shutil.copyfile(self.source / "config.json", folder / "config.json")
        models: dict[EntryName, Any] = {}
        entries: dict[str, Any] = {}
        for name in entry_names(self.config):
            models[name], entries[name] = lower_entry(
                self.source, name, self.config, recipe, self.calibration, emulated=not target.native_bf16
            )
        write_models(models, folder)
        return {"recipe": asdict(recipe), "wide": WIDE, "entries": entries}

    def compile(self, folder: Path, target: Target, *, kernels: Path | None = None) -> EngineSpec:
        """`folder` is an engine: engine.json names the file of every entry, compiled where the backend does that.

        Our kernels are taken from another engine of this backend, if one is given, and compiled otherwise.
        """
        files: dict[str, str] = {name: f"{name}.onnx" for name in entry_names(self.config)}
        if target.builder is not None:
            files = compile_entries(
                target.builder,
                folder,
                self.config,
                self.params.build_settings,
                timing_caches=None if self.params.timing_caches is None else Path(self.params.timing_caches),
            )
        if kernels is not None:
            for file in kernels.glob("*.so"):
                shutil.copyfile(file, folder / file.name)
        elif target.add_files is not None:
            target.add_files(folder)
        spec = EngineSpec(
            backend=target.backend, precision=self.params.precision, entries=files, executed=target.executed
        )
        (folder / "engine.json").write_bytes(encode_json(asdict(spec)))
        return spec

    def gate(self, recipe: Recipe, folder: Path) -> dict[str, Any]:
        """The figures of the engine; GateError when they are not good enough.

        What cannot run here is judged by its graphs, on ONNX Runtime.
        """
        with tempfile.TemporaryDirectory() as scratch:
            if not self.target.executed:
                folder = Path(scratch)
                self.write_models(recipe, folder, TARGETS["onnxruntime"])
                self.compile(folder, TARGETS["onnxruntime"])
            engine = open_engine(folder)
            try:
                figures = gate(engine, open_torch_engine(self.checkpoint.path), self.evaluation, self.params.limits)
            finally:
                engine.close()
        overlap, lowest = figures["top10_overlap"], figures["embedding_cosine"]["min"]
        quality = f", HR@10 {figures['hr_at_10']['engine']:.4f}" if "hr_at_10" in figures else ""
        passed = f"lowest cosine {lowest:.6f}, top-10 overlap {overlap:.4f}{quality}"
        say(f"build-engine: {self.params.precision} passes: {passed}")
        return figures

    def require_faster(self, recipe: Recipe, folder: Path) -> None:
        """GateError when the int8 engine in `folder` is slower than one of the type around its int8 would be, for one
        user and for many at once, on one thread.

        Said, and not written down: timings differ from run to run, and an artifact is the same bytes each time.
        """
        if self.params.int8_force or not self.target.executed:
            why = "build-engine.int8_force" if self.params.int8_force else f"{self.target.product} does not run here"
            say(f"build-engine: int8 is not timed ({why})")
            return
        with tempfile.TemporaryDirectory() as scratch:
            wider = Path(scratch)
            self.write_models(replace(recipe, precision=recipe.around), wider, self.target)
            self.compile(wider, self.target, kernels=folder)
            narrow, wide = (open_engine(path, threads=1) for path in (folder, wider))
            found: list[SpeedUp] = []
            try:
                for users in (1, BATCH):
                    found.append(measure_speed_up(narrow, wide, self.evaluation, users=users))
                    say(f"build-engine: int8, beside {recipe.around} on one thread: {found[-1]}")
                    if not found[-1].is_slower:
                        return
            finally:
                narrow.close()
                wide.close()
            raise GateError(
                f"the int8 engine on {self.target.product} is slower than a {recipe.around} engine, and less exact",
                got="; ".join(map(str, found)),
                expected="1x or more within one of the 95 % confidence intervals",
                fix=f"use the {recipe.around} engine, or keep this one all the same: -S build-engine.int8_force=true",
            )

    def calibration_facts(self) -> dict[str, Any]:
        """Which histories the scales come from; a foreign checkpoint without a log has drawn ones, and that is said."""
        details = json.loads(self.checkpoint.file("checkpoint.json").read_text())
        source = details.get("histories", "unknown")
        return {"calibration": {"histories": len(self.calibration), "source": source}}
