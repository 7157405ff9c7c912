from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kinegraph.errors import CheckpointError
from kinegraph.models import build_model
from kinegraph.models.checkpoint import (
    Checkpoint,
    build_from_checkpoint,
    load_pretrained,
    read_checkpoint,
    write_checkpoint,
)
from kinegraph.models.encryption import decrypt, encrypt
from kinegraph.skeleton.graph import STRATEGIES
from kinegraph.skeleton.layouts import LAYOUTS, Layout
from kinegraph.spec import ModelSpec

TRAINING: dict[str, Any] = {
    **{"epoch": 1, "step": 2, "global_step": 7, "seed": 4, "world_size": 1, "seconds": 1.5, "totals": [0.0, 0]},
    **{"optimizer": {"state": {}}, "schedule": {"epoch": 1}, "best": None, "fingerprint": {"shape": [1]}},
}


def make_model(layout: str = "coco", num_classes: int = 3, **options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(ModelSpec(graph_layout=layout, **options), LAYOUTS[layout], num_classes).eval()


def make_checkpoint(layout: str = "coco", **options: Any) -> Checkpoint:
    weights = make_model(layout, **options).state_dict()
    return Checkpoint(
        dict(weights),
        ModelSpec(graph_layout=layout, **options),
        LAYOUTS[layout],
        3,
        label_map={"sit": 0, "stand": 1, "walk": 2},
        pipeline={"version": 1},
        metrics={"val_acc": 0.5},
        spec={"train": {"num_epochs": 2}},
        training={**TRAINING},
        temperature=1.7,
    )


def test_written_checkpoint_reads_back(tmp_path: Path) -> None:
    written = make_checkpoint()
    write_checkpoint(tmp_path / "model.pth", written)
    read = read_checkpoint(tmp_path / "model.pth")
    assert not read.is_foreign and read.class_names == ["sit", "stand", "walk"]
    assert (read.options, read.layout, read.pipeline) == (written.options, written.layout, written.pipeline)
    assert read.metrics == written.metrics and read.training == written.training
    assert read.temperature == written.temperature != 1.0
    x = torch.randn(2, 3, 5, 17, 1)
    assert torch.equal(build_from_checkpoint(read, "model.pth")(x), make_model()(x))


def test_file_has_the_form_of_a_lightning_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model.pth", make_checkpoint())
    content = torch.load(tmp_path / "model.pth", weights_only=True)
    assert content["global_step"] == 7 and "pytorch-lightning_version" in content
    assert len(content["state_dict"]) == 172 and all(name.startswith("model.") for name in content["state_dict"])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("layout", ["nvidia", "openpose", "ntu-rgb+d"])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_foreign_weights_tell_their_options(tmp_path: Path, layout: str, strategy: str, prefix: str) -> None:
    model = make_model(layout, 5, graph_strategy=strategy, input_channels=2)
    weights = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "tao.pth")
    read = read_checkpoint(tmp_path / "tao.pth")
    assert read.is_foreign and read.num_classes == 5
    assert (read.layout.name, read.options.input_channels) == (layout, 2)
    assert read.options.graph_strategy == strategy or torch.equal(model.A, build_from_checkpoint(read, "tao.pth").A)
    x = torch.randn(1, 2, 6, LAYOUTS[layout].num_joints, 1)
    with torch.no_grad():
        assert torch.equal(build_from_checkpoint(read, "tao.pth")(x), model(x))


def test_foreign_without_edge_importance_and_bare_state_dict(tmp_path: Path) -> None:
    model = make_model(edge_importance_weighting=False)
    torch.save(OrderedDict(model.state_dict()), tmp_path / "bare.pth")
    read = read_checkpoint(tmp_path / "bare.pth")
    assert not read.options.edge_importance_weighting and len(read.state_dict) == 162


def test_foreign_label_map_in_hyper_parameters(tmp_path: Path) -> None:
    content = {
        "state_dict": make_model().state_dict(),
        "hyper_parameters": {"experiment_spec": {"dataset": {"label_map": {"b": 1, "a": 0, "c": 2}}}},
    }
    torch.save(content, tmp_path / "tao.pth")
    assert read_checkpoint(tmp_path / "tao.pth").class_names == ["a", "b", "c"]


def test_foreign_options_object_is_read_without_its_code(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    options = OmegaConf.create({"dataset": {"num_classes": 3, "label_map": {"a": 0}}, "lr": 0.1, "steps": [1, None]})
    torch.save({"state_dict": make_model().state_dict(), "hyper_parameters": options}, tmp_path / "tao.pth")
    assert read_checkpoint(tmp_path / "tao.pth").num_classes == 3


def test_foreign_structured_options_are_read(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    options = OmegaConf.structured(VendorOptions)
    torch.save({"state_dict": make_model().state_dict(), "hyper_parameters": options}, tmp_path / "tao.pth")
    content = (tmp_path / "tao.pth").read_bytes()
    own_name = VendorOptions.__module__.encode()
    assert own_name in content
    with pytest.raises(CheckpointError, match="VendorOptions"):
        read_checkpoint(tmp_path / "tao.pth")


def test_label_map_in_an_options_object(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    options = OmegaConf.create({"dataset": {"label_map": {"b": 1, "a": 0, "c": 2}}})
    content = {"state_dict": make_model().state_dict(), "hyper_parameters": {"experiment_spec": options}}
    torch.save(content, tmp_path / "tao.pth")
    assert read_checkpoint(tmp_path / "tao.pth").class_names == ["a", "b", "c"]


@dataclass
class VendorOptions:
    steps: list[int] = field(default_factory=list)
    name: str = "x"


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


def test_code_in_a_checkpoint_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "hyper_parameters": RunsCode()}, tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(RunsCode(), protocol=2))
    for name in ("evil.pth", "plain.pth"):
        with pytest.raises(CheckpointError, match=r"posix\.system"):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_other_objects_are_refused_by_type(tmp_path: Path) -> None:
    torch.save({"state_dict": make_model().state_dict(), "extra": Path("x")}, tmp_path / "tao.pth")
    with pytest.raises(CheckpointError, match=r"object of type pathlib\."):
        read_checkpoint(tmp_path / "tao.pth")


@pytest.mark.parametrize(
    "content", [{"state_dict": io.BytesIO(b"x")}, {"state_dict": b"x", "state_dict_encrypted": True}]
)
def test_checkpoint_encrypted_by_the_original_is_named(tmp_path: Path, content: dict[str, Any]) -> None:
    torch.save(content, tmp_path / "tao.pth")
    with pytest.raises(CheckpointError, match="encrypted by the original"):
        read_checkpoint(tmp_path / "tao.pth")


def test_archive_that_unpacks_to_more_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10_000_000)
    with pytest.raises(CheckpointError, match="unpacks"):
        read_checkpoint(tmp_path / "bomb.pth")


@pytest.mark.parametrize("kept", [0, 10, 1000, 0.5, 0.99])
def test_cut_file_is_a_clear_error(tmp_path: Path, kept: float) -> None:
    write_checkpoint(tmp_path / "model.pth", make_checkpoint())
    content = (tmp_path / "model.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: int(kept * len(content)) if kept < 1 else int(kept)])
    with pytest.raises(CheckpointError, match=r"cut\.pth"):
        read_checkpoint(tmp_path / "cut.pth")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ([1, 2], "a list"),
        ({"state_dict": {"A": torch.zeros(3, 4, 4)}}, "fcn.weight"),
        ({"state_dict": {}}, "no tensors"),
        ({"state_dict": {"model.x": torch.zeros(1)}, "kinegraph": {"format_version": 99}}, "99"),
        ({"state_dict": {"model.x": torch.zeros(1)}, "kinegraph": {"format_version": 1}}, "damaged"),
    ],
)
def test_wrong_content_is_a_clear_error(tmp_path: Path, content: Any, named: str) -> None:
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=named):
        read_checkpoint(tmp_path / "model.pth")


def test_misshapen_tensor_is_named(tmp_path: Path) -> None:
    weights = make_model().state_dict()
    weights["st_gcn_networks.2.tcn.2.weight"] = torch.zeros(1, 2)
    torch.save({"state_dict": weights}, tmp_path / "tao.pth")
    with pytest.raises(CheckpointError, match=r"st_gcn_networks\.2\.tcn\.2\.weight"):
        build_from_checkpoint(read_checkpoint(tmp_path / "tao.pth"), "tao.pth")


def test_pretrained_head_of_another_size_starts_new() -> None:
    model = make_model(num_classes=7)
    fresh_head = model.fcn.weight.clone()
    messages = load_pretrained(model, make_checkpoint(), "given.pth")
    assert len(messages) == 1 and "3 classes" in messages[0] and "7" in messages[0]
    assert torch.equal(model.fcn.weight, fresh_head)
    assert torch.equal(model.data_bn.weight, make_model().data_bn.weight)


def test_pretrained_on_another_graph_is_refused() -> None:
    with pytest.raises(CheckpointError, match="layout coco"):
        load_pretrained(make_model("openpose"), make_checkpoint(), "given.pth")
    with pytest.raises(CheckpointError, match="strategy spatial"):
        load_pretrained(make_model(graph_strategy="uniform"), make_checkpoint(), "given.pth")


def test_own_layout_travels_in_the_checkpoint(tmp_path: Path) -> None:
    layout = Layout.from_dict({**LAYOUTS["coco"].to_dict(), "name": "mine"})
    options = SimpleNamespace(**vars(ModelSpec()) | {"graph_strategy": "spatial"})
    weights = build_model(options, layout, 3).state_dict()
    checkpoint = Checkpoint(dict(weights), ModelSpec(graph_layout="mine.yaml"), layout, 3)
    write_checkpoint(tmp_path / "model.pth", checkpoint)
    assert read_checkpoint(tmp_path / "model.pth").layout == layout


def test_encryption_round_trip_and_tampering() -> None:
    secret = encrypt(b"weights", "right")
    assert decrypt(secret, "right", "file") == b"weights" and b"weights" not in secret
    assert encrypt(b"weights", "right") != secret
    with pytest.raises(CheckpointError, match="wrong key"):
        decrypt(secret, "wrong", "file")
    with pytest.raises(CheckpointError, match="no key"):
        decrypt(secret, "", "file")
    tampered = [bytearray(secret) for _ in range(3)]
    for content, place in zip(tampered, (10, 30, -1), strict=True):
        content[place] ^= 1
        with pytest.raises(CheckpointError, match="changed file"):
            decrypt(bytes(content), "right", "file")
    with pytest.raises(CheckpointError, match="version"):
        decrypt(secret[:7] + b"\x09" + secret[8:], "right", "file")


def test_foreign_graph_that_no_layout_has(tmp_path: Path) -> None:
    edges = ((0, 1), (1, 2), (2, 3))
    bones = ((1, 0), (2, 1), (3, 2))
    layout = Layout("snake", ("a", "b", "c", "d"), edges, bones, (), 0)
    model = build_model(ModelSpec(), layout, 2).eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "tao.pth")
    read = read_checkpoint(tmp_path / "tao.pth")
    assert (read.layout.name, read.layout.num_joints) == ("unknown", 4)
    assert {frozenset(edge) for edge in read.layout.edges} == {frozenset(edge) for edge in edges}
    x = torch.randn(2, 3, 5, 4, 1)
    with torch.no_grad():
        assert torch.equal(build_from_checkpoint(read, "tao.pth")(x), model(x))


def test_foreign_graph_in_pieces_is_a_clear_error(tmp_path: Path) -> None:
    weights = make_model().state_dict()
    weights["A"] = torch.eye(17).repeat(3, 1, 1)
    torch.save({"state_dict": weights}, tmp_path / "tao.pth")
    with pytest.raises(CheckpointError, match="hang together"):
        read_checkpoint(tmp_path / "tao.pth")


def save_foreign(path: Path, **changes: torch.Tensor) -> Path:
    torch.save({"state_dict": {**make_model().state_dict(), **changes}}, path)
    return path


@pytest.mark.parametrize(
    ("tensor", "named"),
    [
        (torch.ones(1).expand(1, 20_000, 20_000), "larger than what the file holds"),
        (torch.ones(17).as_strided((3, 17, 17), (0, 1, 0)), "larger than what the file holds"),
        (torch.zeros(1, 1025, 1025), "1024 joints"),
        (torch.zeros(17, 4, 4), "16 subsets"),
        (torch.zeros(3, 4, 5), "shape"),
        (torch.zeros(17), "shape"),
        (torch.zeros(3, 0, 0), "shape"),
        (torch.zeros(3, 17, 17).to_sparse(), "_rebuild_sparse_tensor"),
    ],
)
def test_foreign_graph_out_of_range_is_refused(tmp_path: Path, tensor: torch.Tensor, named: str) -> None:
    path = save_foreign(tmp_path / "tao.pth", A=tensor)
    assert path.stat().st_size < 20_000_000
    with pytest.raises(CheckpointError, match=named):
        read_checkpoint(path)


def test_one_storage_seen_many_times_is_refused(tmp_path: Path) -> None:
    block = torch.zeros(1_000_000)
    save_foreign(tmp_path / "tao.pth", **{f"x{number}": block[number:] for number in range(50)})
    with pytest.raises(CheckpointError, match="larger than what the file holds"):
        read_checkpoint(tmp_path / "tao.pth")


class Calls:
    """Pickled as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Calls(bytearray, 3 * 10**9), "bytearray"),
        (Calls(torch.FloatTensor, 10**9), "FloatTensor"),
        (Calls(torch.UntypedStorage, 3 * 10**9), "UntypedStorage"),
        (b"x", r"_codecs\.encode"),
    ],
)
def test_calls_that_allocate_are_refused(tmp_path: Path, value: Any, named: str, archive: bool) -> None:
    content = {"state_dict": make_model().state_dict(), "x": value}
    torch.save(content, tmp_path / "tao.pth", _use_new_zipfile_serialization=archive)
    with pytest.raises(CheckpointError, match=named):
        read_checkpoint(tmp_path / "tao.pth")


def test_long_or_copying_pickles_are_refused(tmp_path: Path) -> None:
    for extra in ("x" * 5_000_000, [list(range(100_000)), [torch.Size((1,)) for _ in range(20_000)]]):
        torch.save({"state_dict": make_model().state_dict(), "x": extra}, tmp_path / "tao.pth")
        with pytest.raises(CheckpointError, match="its description"):
            read_checkpoint(tmp_path / "tao.pth")


def test_files_of_old_torch_are_read(tmp_path: Path) -> None:
    model = make_model()
    content = {"state_dict": model.state_dict(), "parameter": next(model.parameters())}
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    read = read_checkpoint(tmp_path / "old.pth")
    x = torch.randn(1, 3, 6, 17, 1)
    with torch.no_grad():
        assert torch.equal(build_from_checkpoint(read, "old.pth")(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_another_precision_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make_model("nvidia")
    weights = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in model.state_dict().items()
    }
    torch.save({"state_dict": weights}, tmp_path / "tao.pth")
    read = read_checkpoint(tmp_path / "tao.pth")
    assert read.layout.name == "nvidia"
    assert {value.dtype for value in read.state_dict.values()} == {torch.float32, torch.int64}
    assert torch.equal(read.state_dict["A"], model.get_buffer("A"))
    assert load_pretrained(make_model("nvidia"), read, "tao.pth") == []
    x = torch.randn(1, 3, 6, 34, 1)
    with torch.no_grad():
        torch.testing.assert_close(build_from_checkpoint(read, "tao.pth")(x), model(x), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ["fcn.weight", "st_gcn_networks.0.gcn.conv.weight"])
@pytest.mark.parametrize("shape", [(), (3,), (0, 256, 1, 1)])
def test_foreign_weights_without_axes_are_named(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        read_checkpoint(save_foreign(tmp_path / "tao.pth", **{name: torch.zeros(shape)}))


def test_dense_foreign_graph_is_read(tmp_path: Path) -> None:
    read = read_checkpoint(save_foreign(tmp_path / "tao.pth", A=torch.ones(1, 60, 60)))
    assert len(read.layout.edges) == 60 * 59 // 2
    assert read.layout.edges == tuple((i, j) for i in range(60) for j in range(i))


def write_changed(path: Path, **changes: Any) -> Path:
    write_checkpoint(path, make_checkpoint())
    content = torch.load(path, weights_only=True)
    content["kinegraph"].update(changes)
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    "changes",
    [
        *({"num_classes": value} for value in (2.0, True, "3", None, 0, -1, 10**12)),
        *({"label_map": value} for value in ([1], {"a": 0}, {"a": 0, "b": 1, "c": 1}, {0: 0, 1: 1, 2: 2})),
        {"label_map": {"a": 0.0, "b": 1.0, "c": 2.0}},
        {"layout": LAYOUTS["nvidia"].to_dict()},
        {"metrics": None},
        {"spec": []},
        {"pipeline": 3},
        {"versions": "1"},
        *({"temperature": value} for value in (0, -1.0, True, "1", None, float("nan"), float("inf"), 1e30)),
        {"training": [1]},
        {"training": {**TRAINING, "optimizer": None}},
        *({"training": {name: value for name, value in TRAINING.items() if name != left_out}} for left_out in TRAINING),
    ],
)
def test_damaged_description_is_a_clear_error(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="damaged description"):
        read_checkpoint(write_changed(tmp_path / "model.pth", **changes))


def test_format_version_of_any_type_is_a_clear_error(tmp_path: Path) -> None:
    nested: Any = []
    for _ in range(60):
        nested = [nested, nested]
    with pytest.raises(CheckpointError, match="format version"):
        read_checkpoint(write_changed(tmp_path / "model.pth", format_version=nested))


def test_options_larger_than_the_tensors_are_refused_before_building(tmp_path: Path) -> None:
    checkpoint = make_checkpoint()
    checkpoint.num_classes = 10**12
    with pytest.raises(CheckpointError, match=r"fcn\.weight"):
        build_from_checkpoint(checkpoint, "model.pth")
    path = write_changed(tmp_path / "model.pth", model={**vars(ModelSpec(graph_layout="coco")), "input_channels": 8})
    with pytest.raises(CheckpointError, match=r"data_bn\.weight|conv\.weight"):
        build_from_checkpoint(read_checkpoint(path), "model.pth")
