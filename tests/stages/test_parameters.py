"""Parameters: every mistake gets one message that names what is known and what was probably meant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from hstu.errors import ParameterError
from stages.parameters import load_params, parse_yaml, read_params, require


@dataclass(frozen=True, kw_only=True, slots=True)
class Params:
    steps: int
    rate: float
    name: str
    flag: bool
    kind: Literal["fp32", "int8"]
    level: Literal[1, 2]
    engines: tuple[str, ...]
    span: tuple[int, float]
    path: str | None
    threads: Literal["auto"] | int
    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        require(self.steps >= 1, "toy.steps: out of range", got=self.steps, expected=">= 1")


GOOD: dict[str, Any] = {
    "steps": 3,
    "rate": 0.5,
    "name": "x",
    "flag": True,
    "kind": "int8",
    "level": 2,
    "engines": ["fp32"],
    "span": [1, 2.5],
    "path": None,
    "threads": "auto",
    "weights": {"a": 1},
}


def load(**changes: Any) -> Params:
    return load_params(Params, {**GOOD, **changes}, section="toy")


def test_good_values_keep_their_types() -> None:
    params = load(rate=1, threads=4, path="p")
    assert (params.rate, type(params.rate), params.threads, params.path) == (1.0, float, 4, "p")
    assert (params.engines, params.span, params.weights) == (("fp32",), (1, 2.5), {"a": 1.0})


def test_unknown_names_the_known_and_the_one_meant() -> None:
    with pytest.raises(ParameterError, match="toy: unknown parameter 'stpes', 'zzz'") as caught:
        load(stpes=1, zzz=2)
    assert caught.value.expected == ", ".join(GOOD)
    assert caught.value.fix == "did you mean 'steps'?"
    assert caught.value.exit_code == 2


def test_missing_names_all_of_them() -> None:
    with pytest.raises(ParameterError, match="toy: missing parameter rate, flag") as caught:
        load_params(Params, {k: v for k, v in GOOD.items() if k not in ("rate", "flag")}, section="toy")
    assert all(name in str(caught.value.expected) for name in GOOD)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 1.0), ("steps", "1"), ("steps", True), ("steps", None), ("steps", [1]),
        ("rate", "1e-3"), ("rate", True), ("rate", None), ("rate", float("nan")), ("rate", float("inf")),
        ("rate", 10**400), ("name", 5), ("name", None), ("name", {"a": 1}), ("flag", 1), ("flag", "yes"),
        ("flag", None), ("kind", "fp64"), ("kind", None), ("kind", ["int8"]), ("level", 3), ("level", "1"),
        ("level", 1.0), ("level", True), ("engines", "fp32"), ("engines", None),
        ("engines", [1]), ("engines", {"fp32": 1}),
        ("span", [1]), ("span", [1, 2, 3]), ("span", ["1", 2]), ("path", 3), ("path", ["x"]),
        ("threads", "all"), ("threads", 1.5), ("threads", None), ("weights", [1]), ("weights", {"a": "x"}),
        ("weights", {1: 1}),
    ],
)  # fmt: skip
def test_wrong_types_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ParameterError) as caught:
        load(**{key: value})
    assert f"toy.{key}" in caught.value.what
    assert caught.value.expected


def test_choices_are_named() -> None:
    with pytest.raises(ParameterError) as caught:
        load(kind="int")
    assert (caught.value.expected, caught.value.fix) == ("fp32, int8", "did you mean 'int8'?")
    with pytest.raises(ParameterError) as caught:
        load(threads="atuo")
    assert caught.value.expected == "auto or a whole number"
    with pytest.raises(ParameterError) as caught:
        load(engines="fp32")
    assert caught.value.fix == "write [fp32]"


def test_out_of_range_says_both() -> None:
    with pytest.raises(ParameterError) as caught:
        load(steps=0)
    assert (caught.value.got, caught.value.expected) == (0, ">= 1")


def test_a_type_that_yaml_cannot_give_is_a_bug() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Odd:
        where: Path

    with pytest.raises(TypeError, match="cannot be of type"):
        load_params(Odd, {"where": "x"}, section="odd")


TEXT = """\
# comment
toy:
  steps: 3
  rate: 1e-3
other: {}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(TEXT)
    return path


def test_reads_a_file_and_overrides(file: Path) -> None:
    assert read_params(file) == {"toy": {"steps": 3, "rate": 0.001}, "other": {}}
    changed = read_params(file, ["toy.steps=5", "toy.rate=[a, 2]", "toy.steps=7"])
    assert changed["toy"] == {"steps": 7, "rate": ["a", 2]}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("5e-5", 5e-5), ("-1E+2", -100.0), ("1.5e3", 1500.0), ("1.0", 1.0), ("3", 3), ("0.5", 0.5),
        ("1e", "1e"), ("e5", "e5"), ("1e-3x", "1e-3x"), ('"1e-3"', "1e-3"), ("", None), ("a=b", "a=b"),
    ],
)  # fmt: skip
def test_numbers_read_as_dvc_reads_them(file: Path, text: str, value: Any) -> None:
    got = read_params(file, [f"toy.rate={text}"])["toy"]["rate"]
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize(
    ("override", "what", "fix"),
    [
        ("toy.steps", "malformed", None),
        ("steps=3", "malformed", None),
        ("=3", "malformed", None),
        ("toi.steps=3", "unknown section 'toi'", "did you mean 'toy'?"),
        ("toy.step=3", "unknown parameter 'step'", "did you mean 'steps'?"),
        ("toy.steps.more=3", "unknown parameter 'steps.more'", "did you mean 'steps'?"),
        ("other.x=3", "unknown parameter 'x'", None),
        ("toy.steps=[1", "not YAML", "put it in quotes"),
        ("toy.steps={a: 1, a: 2}", "stands twice", "put it in quotes"),
    ],
)
def test_bad_overrides(file: Path, override: str, what: str, fix: str | None) -> None:
    with pytest.raises(ParameterError) as caught:
        read_params(file, [override])
    assert what in caught.value.what
    assert caught.value.fix == fix


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "not a params file"),
        (b"- a\n", "not a params file"),
        (b"toy: 3\n", "the section 'toy' is not a mapping"),
        (b"toy:\n", "the section 'toy' is not a mapping"),
        (b"1: {}\n", "the section 1 is not a mapping"),
        (b"toy: {steps: 1\n", "cannot be read"),
        (b"toy: {steps: 1, steps: 2}\n", "'steps' stands twice"),
        (b"toy: {steps: 1}\ntoy: {steps: 2}\n", "'toy' stands twice"),
        (b"toy: !!python/object/apply:os.system [id]\n", "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"toy: {a: [&x [1], *y]}\n", "cannot be read"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, what: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(ParameterError) as caught:
        read_params(path)
    assert what in caught.value.what


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="No such file") as caught:
        read_params(tmp_path / "params.yaml")
    assert "--params" in str(caught.value.fix)


def test_merge_keys_still_work() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, x: 2}") == {"a": {"x": 1}, "b": {"x": 2}}
    with pytest.raises(yaml.YAMLError):
        parse_yaml("a: {x: 1, x: 1}")
