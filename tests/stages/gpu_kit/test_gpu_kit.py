"""What a bundle carries for a GPU machine: commands that the tools understand, a repository that the server takes."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from hstu.config import HSTUConfig
from hstu.signature import MAX_BATCH, entry, entry_names, profile_shapes
from serving.engine import check_feeds, open_engine
from stages.gpu_kit.commands import PROFILES, golden_feeds, write_commands
from stages.gpu_kit.model_repository import server_config, write_model_repository
from tests.models import TINY
from tests.stages.bundles import CONFIG, write_artifacts

# model_config.proto of Triton Inference Server as a descriptor, out of the package tritonclient 2.73.0 (BSD-3-Clause)
SCHEMA = Path(__file__).parents[1] / "data" / "triton_model_config.binpb"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_artifacts(tmp_path_factory.mktemp("artifacts"))
    write_commands(folder)
    write_model_repository(folder)
    return folder


@pytest.fixture(scope="module")
def model_config() -> type[Any]:
    """The message class ModelConfig of the server's published schema."""
    file = descriptor_pb2.FileDescriptorProto.FromString(SCHEMA.read_bytes())
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))


@pytest.mark.parametrize("kind", ["onnx", "tensorrt"])
def test_the_servers_schema_takes_every_config(bundle: Path, model_config: type[Any], kind: str) -> None:
    for name in entry_names(CONFIG):
        text = (bundle / "model_repository" / kind / f"hstu_{name}" / "config.pbtxt").read_text()
        config = text_format.Parse(text, model_config())
        signature = entry(CONFIG, name)
        assert config.max_batch_size == MAX_BATCH
        assert [tensor.name for tensor in config.input] == [spec.name for spec in signature.inputs]
        assert [tensor.name for tensor in config.output] == [spec.name for spec in signature.outputs]
        for tensor, spec in zip((*config.input, *config.output), (*signature.inputs, *signature.outputs), strict=True):
            plain = len(spec.shape) == 1
            assert list(tensor.dims) == ([1] if plain else [s if isinstance(s, int) else -1 for s in spec.shape[1:]])
            assert tensor.HasField("reshape") is plain
        assert config.dynamic_batching.max_queue_delay_microseconds == 2000
        assert list(config.instance_group[0].profile) == ([] if kind == "onnx" else ["0", "1", "2"])


def test_the_schema_refuses_what_it_does_not_know(model_config: type[Any]) -> None:
    text = server_config(TINY, "rank", "onnx")
    assert "task_scores" in text
    for planted in (text.replace("max_batch_size", "max_batchsize"), text.replace("TYPE_FP32", "FP32"), text + "x: 1"):
        with pytest.raises(text_format.ParseError):
            text_format.Parse(planted, model_config())


def test_the_onnx_repository_serves_as_it_stands(bundle: Path) -> None:
    version = bundle / "model_repository" / "onnx" / "hstu_retrieve" / "1"
    for path in (bundle / "engines" / "fp32" / "weights.bin", version / "weights.bin"):
        assert path.stat().st_nlink == 1  # ONNX refuses weights that have a second link
    import onnxruntime

    session = onnxruntime.InferenceSession(version / "model.onnx", providers=["CPUExecutionProvider"])
    feeds = golden_feeds(np.load(bundle / "golden" / "inputs.npz"), CONFIG, "retrieve")
    assert session.run(None, feeds)[0].shape == (6, CONFIG.embedding_dim)
    assert not (bundle / "model_repository" / "tensorrt" / "hstu_retrieve" / "1").exists()


def test_golden_inputs_fit_one_profile_and_have_the_golden_answers(bundle: Path) -> None:
    golden = np.load(bundle / "golden" / "inputs.npz")
    outputs = np.load(bundle / "golden" / "outputs.npz")
    engine = open_engine(bundle / "engines" / "fp32", threads=1)
    for name in entry_names(CONFIG):
        feeds = golden_feeds(golden, CONFIG, name)
        check_feeds(CONFIG, name, feeds)
        assert feeds["item_ids"].shape[1] == CONFIG.max_history
        answers = engine.run(name, feeds)
        assert np.abs(answers["user_embedding"] - outputs["retrieve/user_embedding"]).max() < 1e-5
    engine.close()


def blocks(bundle: Path) -> list[list[str]]:
    text = (bundle / "GPU.md").read_text()
    return [shlex.split(block.replace("\\\n", " ")) for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)]


def test_every_command_names_files_that_are_there(bundle: Path) -> None:
    trtexec = [words for words in blocks(bundle) if words[0] == "trtexec"]
    polygraphy = [words for words in blocks(bundle) if words[0] == "polygraphy"]
    assert len(trtexec) == len(polygraphy) == 2 * len(entry_names(CONFIG))
    for words in trtexec:
        assert "--noTF32" in words
        assert not {"--fp16", "--int8", "--best"} & set(words)
        model = next(word for word in words if word.startswith("--onnx=")).partition("=")[2]
        assert (bundle / model).is_file()
        profiles = trtexec_profiles(words)
        assert len(profiles) == len(PROFILES)
        name = model.rpartition("/")[2].partition(".")[0]
        for profile, shapes in zip(PROFILES, profiles, strict=True):
            wanted = profile_shapes(CONFIG, name, profile)  # type: ignore[arg-type]
            for which, kind in enumerate(("--minShapes", "--optShapes", "--maxShapes")):
                assert shapes[kind] == {tensor: sizes[which] for tensor, sizes in wanted.items()}
        assert any(f"lengths:{MAX_BATCH}" in word for word in words)


def trtexec_profiles(words: list[str]) -> list[dict[str, dict[str, tuple[int, ...]]]]:
    """What trtexec reads: after `--profile=N` its shapes and nothing between; none of them anywhere else."""
    profiles: list[dict[str, dict[str, tuple[int, ...]]]] = []
    place = 0
    while place < len(words):
        word = words[place]
        assert not re.match("--(min|opt|max)Shapes=", word), f"{word} behind no --profile"
        place += 1
        if word.startswith("--profile="):
            assert word == f"--profile={len(profiles)}"
            profiles.append({})
            while place < len(words) and (found := re.match("(--(?:min|opt|max)Shapes)=(.*)", words[place])):
                assert found[1] not in profiles[-1], f"{words[place]} once more"
                pairs = (pair.split(":") for pair in found[2].split(","))
                profiles[-1][found[1]] = {name: tuple(map(int, sizes.split("x"))) for name, sizes in pairs}
                place += 1
            assert len(profiles[-1]) == 3
    return profiles


def test_shapes_behind_no_profile_are_found() -> None:
    good = ["trtexec", "--profile=0", "--minShapes=a:1", "--optShapes=a:2", "--maxShapes=a:3x4"]
    assert trtexec_profiles(good)[0]["--maxShapes"] == {"a": (3, 4)}
    for bad in ([*good, "--minShapes=a:1"], [good[0], *good[2:]], [*good[:2], "--noTF32", *good[2:]]):
        with pytest.raises(AssertionError):
            trtexec_profiles(bad)


def test_polygraphy_understands_its_command(bundle: Path) -> None:
    """It parses every option, loads the golden inputs and runs ONNX Runtime; TensorRT alone is left out here."""
    words = next(words for words in blocks(bundle) if words[0] == "polygraphy")
    assert words.count("--trt-min-shapes") == len(PROFILES)
    words[0] = str(Path(sys.executable).parent / "polygraphy")
    words.remove("--trt")
    end = words.index("--trt-outputs")
    done = subprocess.run(words[:end], capture_output=True, text=True, cwd=bundle, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "user_embedding" in done.stdout


def test_the_config_is_the_same_text_every_time(bundle: Path) -> None:
    config = HSTUConfig.from_pretrained(bundle)
    first = [server_config(config, name, "tensorrt") for name in entry_names(config)]
    assert first == [server_config(config, name, "tensorrt") for name in entry_names(config)]
