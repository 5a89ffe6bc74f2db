"""Meta's checkpoint files: what is read from them, and what each kind of bad file is answered with."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hstu.checkpoints.meta_research import load_meta_research
from hstu.errors import InputError
from hstu.model import History, l2_normalize
from tests.meta_research import PUBLIC_CONFIGS, SMALL, meta_weights, write_meta_checkpoint

ITEMS = "module._embedding_module._item_emb.weight"
UVQK = "module._hstu._attention_layers.1._uvqk"


def load(path: Path, num_heads: int = 2, max_generated: int = 10) -> Any:
    return load_meta_research(path, num_heads=num_heads, max_generated=max_generated)


def refused(path: Path, **arguments: int) -> str:
    with pytest.raises(InputError) as caught:
        load(path, **arguments)
    assert caught.value.exit_code == 2
    return str(caught.value)


def with_weights(path: Path, **changes: Tensor | None) -> Path:
    """A file whose tensors of these endings are replaced (None: removed); new names are added."""
    weights = meta_weights()
    for ending, value in changes.items():
        name = next((known for known in weights if known.endswith(ending)), ending)
        if value is None:
            del weights[name]
        else:
            weights[name] = value
    return write_meta_checkpoint(path, weights=weights)


@pytest.mark.parametrize(
    "name",
    ["ml-1m", "ml-1m-large"]
    + [pytest.param(n, marks=pytest.mark.slow) for n in PUBLIC_CONFIGS if not n.startswith("ml-1m")],
)
def test_every_public_config_is_read(name: str, tmp_path: Path) -> None:
    shape = PUBLIC_CONFIGS[name]
    checkpoint = load(write_meta_checkpoint(tmp_path / "checkpoint.pt", shape, epoch=7), num_heads=shape.num_heads)
    config = checkpoint.model.config
    assert checkpoint.epoch == 7
    assert (config.num_items, config.embedding_dim) == (shape.item_rows - 1, shape.embedding_dim)
    assert (config.num_layers, config.num_heads) == (shape.num_layers, shape.num_heads)
    assert (config.qk_dim, config.v_dim) == (shape.head_dim, shape.head_dim)
    assert (config.max_length, config.max_history) == (shape.max_length, shape.max_length - 11)
    assert (config.num_actions, config.num_gap_buckets, config.tasks) == (0, 0, ())
    assert config.absent_query_time == "zero"
    ids = torch.randint(1, config.num_items, (1, config.max_history))
    times = torch.arange(config.max_history).unsqueeze(0) * 1000
    length = torch.tensor([config.max_history])
    embedding, _, _ = checkpoint.model.retrieve(
        History(item_ids=ids, timestamps=times, lengths=length, query_time=times[:, -1] + 60)
    )
    assert torch.isfinite(embedding).all()


def test_the_six_public_configs_at_a_smaller_corpus(tmp_path: Path) -> None:
    for name, shape in PUBLIC_CONFIGS.items():
        scaled = type(shape)(**{f: getattr(shape, f) for f in shape.__slots__} | {"item_rows": 101})
        config = load(write_meta_checkpoint(tmp_path / name, scaled), num_heads=shape.num_heads).model.config
        assert (config.num_items, config.num_layers, config.qk_dim) == (100, shape.num_layers, shape.head_dim), name


def test_weights_keep_their_bits(tmp_path: Path) -> None:
    weights = meta_weights()
    state = load(write_meta_checkpoint(tmp_path / "c.pt", weights=weights)).model.state_dict()
    assert torch.equal(state["item_embedding.weight"], weights[ITEMS])
    assert torch.equal(state["layers.1.uvqk.weight"].T, weights[UVQK])
    assert sum(v.numel() for v in state.values()) == sum(v.numel() for n, v in weights.items() if "_mask" not in n)


def test_keys_without_the_prefix_are_read_too(tmp_path: Path) -> None:
    bare = load(write_meta_checkpoint(tmp_path / "bare.pt", weights=meta_weights(prefix=""))).model.state_dict()
    wrapped = load(write_meta_checkpoint(tmp_path / "wrapped.pt")).model.state_dict()
    assert all(torch.equal(bare[name], wrapped[name]) for name in wrapped)


def test_qk_and_v_may_differ_in_width(tmp_path: Path) -> None:
    weights = meta_weights()
    for index in (0, 1):
        weights[f"module._hstu._attention_layers.{index}._uvqk"] = torch.randn(12, 2 * 12 + 2 * 8)
    config = load(write_meta_checkpoint(tmp_path / "c.pt", weights=weights)).model.config
    assert (config.v_dim, config.qk_dim) == (6, 4)


def test_metas_own_answers(oracle: Path) -> None:
    """The oracle's file through the loader: Meta's user embeddings and top 50."""
    model = load(oracle / "checkpoint.pt", num_heads=1).model
    golden = np.load(oracle / "golden.npz")
    lengths, times = torch.tensor(golden["past_lengths"]), torch.tensor(golden["timestamps"])
    embedding, top, scores = model.retrieve(
        History(
            item_ids=torch.tensor(golden["past_ids"])[:, : model.config.max_history],
            timestamps=times[:, : model.config.max_history],
            lengths=lengths,
            query_time=times.gather(1, lengths.unsqueeze(1)).squeeze(1),
        )
    )
    assert np.abs(embedding.numpy() - golden["user_embeddings"]).max() <= 1e-5
    assert np.abs(scores[:, :50].numpy() - golden["top50_scores"]).max() <= 1e-5
    all_scores = (embedding @ l2_normalize(model.item_embedding.weight).T).numpy()
    expected = np.take_along_axis(all_scores, golden["top50_item_ids"], axis=1)
    assert np.abs(expected - scores[:, :50].numpy()).max() <= 1e-6  # the same items, but for ties
    assert (top[:, :50].numpy() == golden["top50_item_ids"]).mean() > 0.99


def test_every_wrong_tensor_is_listed(tmp_path: Path) -> None:
    message = refused(
        with_weights(
            tmp_path / "c.pt",
            **{
                "1._uvqk": None,
                "0._o.bias": torch.zeros(13),
                "1._rel_attn_bias._ts_w": torch.zeros(128),
                "0._o.weight": torch.zeros(12, 12, dtype=torch.int64),
                "module._extra": torch.zeros(2),
            },
        )
    )
    assert "missing module._hstu._attention_layers.1._uvqk [12, 48]" in message
    assert "wrong shape of module._hstu._attention_layers.0._o.bias: [13], expected [12]" in message
    assert "wrong shape of module._hstu._attention_layers.1._rel_attn_bias._ts_w: [128], expected [129]" in message
    assert "wrong type of module._hstu._attention_layers.0._o.weight: int64" in message
    assert "extra module._extra float32 [2]" in message


@pytest.mark.parametrize("name", list(meta_weights()))
def test_any_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    weights = meta_weights()
    del weights[name]
    assert f"missing {name} " in refused(write_meta_checkpoint(tmp_path / "c.pt", weights=weights))


@pytest.mark.parametrize("name", list(meta_weights()))
def test_any_tensor_of_another_rank_is_named(name: str, tmp_path: Path) -> None:
    message = refused(write_meta_checkpoint(tmp_path / "c.pt", weights=meta_weights() | {name: torch.zeros(2, 2, 2)}))
    assert f" of {name}: " in message
    assert message.count("wrong") == 1  # the others are right


def test_a_missing_layer_is_named(tmp_path: Path) -> None:
    weights = {name.replace("layers.1.", "layers.2."): value for name, value in meta_weights().items()}
    message = refused(write_meta_checkpoint(tmp_path / "c.pt", weights=weights))
    assert "missing module._hstu._attention_layers.1._o.bias" in message
    assert "extra module._hstu._attention_layers.2._o.bias" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(value: float, tmp_path: Path) -> None:
    weights = meta_weights()
    weights[UVQK][3, 4] = value
    weights[ITEMS][7, 0] = value
    message = refused(write_meta_checkpoint(tmp_path / "c.pt", weights=weights))
    assert f"{UVQK}: 1 of 576, the first at [3, 4]" in message
    assert f"{ITEMS}: 1 of 492, the first at [7, 0]" in message


def test_another_mask_is_refused(tmp_path: Path) -> None:
    path = with_weights(tmp_path / "c.pt", _attn_mask=torch.zeros(31, 31, dtype=torch.bool))
    assert "attention mask" in refused(path)


def test_heads_that_do_not_divide_the_widths(tmp_path: Path) -> None:
    message = refused(write_meta_checkpoint(tmp_path / "c.pt"), num_heads=5)
    assert "num_heads one of 1, 2, 3, 4, 6, 12" in message


def test_no_room_for_a_history(tmp_path: Path) -> None:
    assert "no room for a history" in refused(write_meta_checkpoint(tmp_path / "c.pt"), max_generated=30)
    assert load(write_meta_checkpoint(tmp_path / "c.pt"), max_generated=29).model.config.max_history == 1


class RunsCode:
    """Unpickled by the ordinary unpickler, this creates a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.witness),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["epoch", "model_state_dict", "optimizer_state_dict"])
def test_a_file_that_wants_to_run_code_is_refused_and_runs_nothing(zipped: bool, place: str, tmp_path: Path) -> None:
    path, witness = tmp_path / "c.pt", tmp_path / "witness"
    values = {"epoch": 1, "model_state_dict": meta_weights(), "optimizer_state_dict": {}} | {place: RunsCode(witness)}
    torch.save(values, path, _use_new_zipfile_serialization=zipped)
    message = refused(path)
    assert "Nothing in it was executed" in message
    assert "posix.mkdir" in message
    assert not witness.exists()


def test_a_plain_pickle_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    path, witness = tmp_path / "c.pt", tmp_path / "witness"
    path.write_bytes(pickle.dumps({"model_state_dict": RunsCode(witness)}))
    refused(path)
    assert not witness.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_files_are_refused(zipped: bool, tmp_path: Path) -> None:
    whole = tmp_path / "whole.pt"
    torch.save({"epoch": 1, "model_state_dict": meta_weights()}, whole, _use_new_zipfile_serialization=zipped)
    data = whole.read_bytes()
    for size in (0, 1, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "c.pt").write_bytes(data[:size])
        assert "cannot be read as a checkpoint" in refused(tmp_path / "c.pt"), size


def test_a_flipped_byte_in_the_weights_is_noticed(tmp_path: Path) -> None:
    path = write_meta_checkpoint(tmp_path / "c.pt")
    data = bytearray(path.read_bytes())
    data[data.find(meta_weights()[ITEMS].numpy().tobytes()) + 1000] ^= 1
    path.write_bytes(bytes(data))
    assert "check sum" in refused(path)


def test_damaged_files_never_end_in_a_traceback(tmp_path: Path) -> None:
    """Random damage is answered with InputError or, where nothing that counts was hit, with the model."""
    rng = np.random.default_rng(0)
    path = tmp_path / "c.pt"
    for zipped in (True, False):
        values = {"epoch": 1, "model_state_dict": meta_weights(), "optimizer_state_dict": {}}
        torch.save(values, path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        for _ in range(150):
            data = bytearray(whole)
            for position in rng.integers(0, min(len(data), 4000), size=3):  # where the structure is
                data[position] = rng.integers(0, 256)
            path.write_bytes(bytes(data))
            try:
                load(path)
            except InputError:
                continue


@pytest.mark.parametrize("value", [[1, 2], {}, {"model_state_dict": {}}, {"weights": torch.zeros(2)}, torch.zeros(3)])
def test_other_contents_are_refused(value: object, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "c.pt")
    assert "not a checkpoint of Meta's trainer" in refused(tmp_path / "c.pt")


def test_the_ranker_is_told_apart(tmp_path: Path) -> None:
    weights = {"_hstu_transducer._stu_module._stu_layers.0._uvqk_weight": torch.zeros(4, 4)}
    assert "DLRMv3" in refused(write_meta_checkpoint(tmp_path / "c.pt", weights=weights))


def test_nobody_is_told_to_drop_the_restrictions(tmp_path: Path) -> None:
    for content in (b"# a text", b"\x80\x04\x95", pickle.dumps(RunsCode(tmp_path / "witness")), b"PK\x03\x04"):
        (tmp_path / "c.pt").write_bytes(content)
        assert "weights_only" not in refused(tmp_path / "c.pt")


def test_no_such_file(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "absent.pt")
    assert "no such file" in refused(tmp_path)


def test_the_small_helper_is_the_format_of_the_oracle(oracle: Path) -> None:
    """The files these tests write have the names, order, types and shapes of a file in Meta's format."""
    theirs = torch.load(oracle / "checkpoint.pt", weights_only=True)["model_state_dict"]
    ours = meta_weights(PUBLIC_CONFIGS["ml-1m"])
    assert [(n, v.dtype, v.shape) for n, v in ours.items()] == [(n, v.dtype, v.shape) for n, v in theirs.items()]
    assert list(meta_weights(SMALL)) == list(theirs)
