"""One suite over everything that carries a network out, for both kinds of model files."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import kinegraph.backends
from kinegraph.actions import export, inference
from kinegraph.backends import ALIASES, BACKENDS, choose_backend, open_backend
from kinegraph.backends.model_file import ModelFile
from kinegraph.data.pipeline import InputPipeline
from kinegraph.errors import CheckpointError, DataError, UserError
from kinegraph.model_description import ModelDescription
from kinegraph.models import build_model
from kinegraph.models.checkpoint import Checkpoint, build_from_checkpoint, write_checkpoint
from kinegraph.models.folded import INPUT, FoldedNetwork, TemporalConvolutionLayer
from kinegraph.models.folded_torch import FoldedModel
from kinegraph.onnx_graph import write_clip_form
from kinegraph.runtime import Predictor, load
from kinegraph.skeleton.layouts import LAYOUTS
from kinegraph.spec import ModelSpec
from kinegraph.threads import count_cores, count_threads
from model_files import (
    CLASS_NAMES,
    LABEL_MAP,
    find_exported,
    find_model,
    find_shared_folder,
    make_checkpoint,
    make_clips,
)

NETWORKS: dict[str, dict[str, Any]] = {
    "ST-GCN": {},
    "EF-GCN": {"model_type": "EF-GCN", "depth": 1},
    "EF-GCN causal": {"model_type": "EF-GCN", "depth": 1, "temporal_padding": "causal"},
    "MB-GCN": {"model_type": "MB-GCN", "depth": 1},
    "MB-GCN causal": {"model_type": "MB-GCN", "depth": 1, "temporal_padding": "causal"},
    "ST-GCN++": {"model_type": "ST-GCN++", "depth": 1, "width": 0.5},
    "ST-GCN++ causal": {"model_type": "ST-GCN++", "depth": 1, "width": 0.5, "temporal_padding": "causal"},
}
SHAPES = ((1, 1, 1), (3, 7, 1), (2, 13, 3))
"""(clips, frames, people)"""


def find_absence(backend: str) -> str:
    """Why a backend cannot be tested here; empty: it can."""
    if backend == "native":
        native = pytest.importorskip("kinegraph.native")
        return native.explain_absence()
    if backend == "tensorrt" and not torch.cuda.is_available():
        return "there is no GPU"
    return "" if backend == "torch" or importlib.util.find_spec(backend) else f"{backend} is not installed"


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> str:
    absence = find_absence(request.param)
    if absence:
        pytest.skip(absence)
    return str(request.param)


@cache
def make_network(name: str) -> Checkpoint:
    """A network whose normalisations have seen data, so that logits do not vanish."""
    if name == "ST-GCN":
        return make_checkpoint()
    torch.manual_seed(0)
    options = ModelSpec(graph_layout="coco", **NETWORKS[name])
    model = build_model(options, LAYOUTS["coco"], len(CLASS_NAMES))
    for module in model.modules():
        if hasattr(module, "momentum"):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.from_numpy(make_clips(16, seed=5)))
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    return replace(make_checkpoint(), state_dict=weights, options=options)


@cache
def find_file(name: str, kind: str) -> Path:
    if name == "ST-GCN":
        return find_model() if kind == "pth" else find_exported()
    path = find_shared_folder() / f"{name}.pth"
    write_checkpoint(path, make_network(name))
    if kind == "pth":
        return path
    spec = {"results_dir": str(path.parent / name), "export": {"checkpoint": str(path)}}
    return Path(export(spec).files["onnx"])


@cache
def find_predictor(name: str, kind: str, backend: str) -> Predictor:
    return load(find_file(name, kind), backend)


@cache
def find_trained(name: str) -> torch.nn.Module:
    return build_from_checkpoint(make_network(name), name)


@torch.no_grad()
def compute_expected(name: str, clips: np.ndarray) -> np.ndarray:
    """Logits of the network as it was trained."""
    return find_trained(name)(torch.from_numpy(clips)).numpy()


def assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.shape == expected.shape
    assert got.dtype == np.float32
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["pth", "onnx"])
@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_those_of_the_trained_network(backend: str, name: str, kind: str) -> None:
    predictor = find_predictor(name, kind, backend)
    for clips, frames, people in SHAPES:
        array = make_clips(clips, frames=frames, people=people)
        array[-1, :, (frames + 1) // 2 :] = 0
        if people > 1:
            array[0, ..., -1] = 0
        assert_close(predictor.logits(array), compute_expected(name, array))


@pytest.mark.parametrize("kind", ["pth", "onnx"])
@pytest.mark.parametrize("name", NETWORKS)
def test_clips_of_zeros(backend: str, name: str, kind: str) -> None:
    array = make_clips(2, frames=9, people=2)
    array[1] = 0
    assert_close(find_predictor(name, kind, backend).logits(array), compute_expected(name, array))


@pytest.mark.parametrize("kind", ["pth", "onnx"])
def test_a_prediction_is_the_same(backend: str, kind: str) -> None:
    clips = make_clips(23)
    predictor = find_predictor("ST-GCN", kind, backend)
    got, expected = predictor.predict(clips, batch_size=7), load(find_model(), "torch").predict(clips)
    assert set(expected.class_names) == set(CLASS_NAMES), "every class must occur, or the comparison says little"
    assert got.class_names == expected.class_names
    np.testing.assert_allclose(got.probabilities, expected.probabilities, atol=1e-4)
    assert predictor.label_map == LABEL_MAP
    assert predictor.layout == LAYOUTS["coco"]
    assert predictor.pipeline == InputPipeline(3, 17)
    assert predictor.metadata["model_name"] == "test_model"


@pytest.mark.parametrize("kind", ["pth", "onnx"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda clips: clips[:, :2], "2 channels"),
        (lambda clips: clips[:, :, :, :16], "16 joints"),
        (lambda clips: clips[:, :, :0], "at least one frame"),
        (lambda clips: np.where(clips > 1, np.nan, clips), "NaN"),
    ],
)
def test_clips_that_do_not_fit_are_refused(backend: str, kind: str, change: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        find_predictor("ST-GCN", kind, backend).predict(change(make_clips(4)))


def test_any_number_of_threads_answers_alike(backend: str) -> None:
    clips = make_clips(3)
    before = torch.get_num_threads()
    for threads in (1, 2):
        predictor = load(find_file("EF-GCN", "onnx"), backend, threads=threads)
        assert_close(predictor.logits(clips), compute_expected("EF-GCN", clips))
    assert torch.get_num_threads() == before
    with pytest.raises(UserError, match="threads: got -1, expected 1 to 1024"):
        load(find_file("EF-GCN", "onnx"), backend, threads=-1)


def test_several_threads_may_ask_at_once(backend: str) -> None:
    predictor = find_predictor("EF-GCN", "onnx", backend)
    arrays = [make_clips(2, seed=seed, frames=20 + seed) for seed in range(4)]
    answers: dict[int, list[np.ndarray]] = {i: [] for i in range(4)}

    def ask(i: int) -> None:
        for _ in range(5):
            answers[i].append(predictor.logits(arrays[i]))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        assert len(answers[i]) == 5
        for answer in answers[i]:
            assert_close(answer, compute_expected("EF-GCN", arrays[i]))


def test_an_answer_stays_when_the_next_one_comes(backend: str) -> None:
    predictor = find_predictor("ST-GCN", "onnx", backend)
    first = predictor.backend.compute(make_clips(2, seed=1), "input")
    kept = first.copy()
    predictor.backend.compute(make_clips(2, seed=2), "input")
    np.testing.assert_array_equal(first, kept)


def test_gpu_is_refused_where_there_is_none(backend: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="device: got 'cuda', expected cpu"):
        load(find_model(), backend, device="cuda")


def write_foreign_onnx(path: Path, shape: list[int | str]) -> Path:
    """Logits are the means over T, V, M of the first two channels, without metadata."""
    constants = [
        onnx.numpy_helper.from_array(np.array([value], np.int64), name)
        for name, value in (("start", 0), ("stop", 2), ("axis", 1))
    ]
    nodes = [
        onnx.helper.make_node("Slice", ["clips", "start", "stop", "axis"], ["two"]),
        onnx.helper.make_node("ReduceMean", ["two"], ["mean"], axes=[2, 3, 4], keepdims=0),
    ]
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, sizes)
        for name, sizes in (("clips", shape), ("mean", [shape[0], 2]))
    ]
    graph = onnx.helper.make_graph(nodes, "means", values[:1], values[1:], constants)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8), path)
    return path


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "tensorrt"])
@pytest.mark.parametrize("shape", [["n", 3, "t", 17, "m"], [4, 3, 8, 17, 1]])
def test_foreign_onnx_file_with_free_and_fixed_axes(tmp_path: Path, name: str, shape: list[int | str]) -> None:
    if find_absence(name):
        pytest.skip(find_absence(name))
    predictor = load(write_foreign_onnx(tmp_path / "m.onnx", shape), name)
    clips = make_clips(10)
    np.testing.assert_allclose(predictor.logits(clips, 7), clips[:, :2].mean((2, 3, 4)), rtol=1e-4, atol=1e-5)
    assert predictor.class_names == ["class_0", "class_1"]
    if shape[2] == 8:
        with pytest.raises(DataError, match=r"6 frames in shape .* expected 8 frames, fixed in the model"):
            predictor.logits(make_clips(1, frames=6))


@pytest.mark.parametrize("name", ["torch", "native"])
def test_foreign_onnx_file_is_left_to_programs_that_run_any_graph(tmp_path: Path, name: str) -> None:
    if find_absence(name):
        pytest.skip(find_absence(name))
    path = write_foreign_onnx(tmp_path / "m.onnx", ["n", 3, "t", 17, "m"])
    with pytest.raises(CheckpointError, match=r"without a folded network.*Use the backend onnxruntime"):
        load(path, name)
    assert choose_backend(ModelFile(path, "onnx"), "") == "onnxruntime"


class Unfoldable(torch.nn.Module):
    def __init__(self, *_: Any) -> None:
        super().__init__()
        self.fcn = torch.nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fcn(x.mean(dim=(2, 3, 4))[:, :, None, None]).flatten(1)


def test_a_network_that_cannot_be_folded_is_left_to_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr("kinegraph.models.find_network", lambda _: Unfoldable)
    torch.manual_seed(0)
    weights = Unfoldable().state_dict()
    write_checkpoint(tmp_path / "m.pth", replace(make_checkpoint(), state_dict=weights))
    assert choose_backend(ModelFile(tmp_path / "m.pth", "torch"), "") == "torch"
    clips = make_clips(3)
    expected = clips.mean((2, 3, 4)) @ weights["fcn.weight"][:, :, 0, 0].numpy().T + weights["fcn.bias"].numpy()
    if backend == "torch":
        np.testing.assert_allclose(load(tmp_path / "m.pth", backend).logits(clips), expected, atol=1e-5)
    else:
        with pytest.raises(CheckpointError, match=r"cannot be folded.*Use the backend torch"):
            load(tmp_path / "m.pth", backend)


@pytest.mark.parametrize("kind", ["pth", "onnx"])
def test_auto_takes_the_fastest_that_is_there(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = ModelFile(find_file("ST-GCN", kind), "torch" if kind == "pth" else "onnx")
    monkeypatch.setattr(kinegraph.backends, "_has_native_kernels", lambda: True)
    assert choose_backend(file, "") == choose_backend(file, "cpu") == "native"
    monkeypatch.setattr(kinegraph.backends, "_has_native_kernels", lambda: False)
    assert choose_backend(file, "") == "onnxruntime"
    monkeypatch.setattr(kinegraph.backends, "is_installed", lambda package: package == "tensorrt")
    assert choose_backend(file, "cuda") == ("torch" if kind == "pth" else "tensorrt")


@pytest.mark.parametrize("name", ["openvino", "tensorrt"])
def test_a_missing_package_is_named_with_the_way_to_get_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda package, *_: None)
    with pytest.raises(UserError, match=rf"pip install 'kinegraph\[{name}\]'"):
        open_backend(ModelFile(find_model(), "torch"), name, "", 1)


def test_tensorrt_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kinegraph.backends.tensorrt_backend.is_installed", lambda _: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for device, got in (("", "no GPU that PyTorch finds"), ("cuda", "no GPU"), ("cpu", "'cpu'")):
        with pytest.raises(UserError, match=f"device: got {got}.*expected an NVIDIA GPU"):
            open_backend(ModelFile(find_model(), "torch"), "tensorrt", device, 1)


def test_names_of_backends() -> None:
    assert ALIASES == {"onnx": "onnxruntime"}
    assert type(load(find_exported(), "onnx").backend) is type(load(find_exported(), "onnxruntime").backend)
    with pytest.raises(UserError, match="Did you mean 'openvino'"):
        load(find_model(), "openvinno")


@pytest.mark.parametrize("action_backend", ["torch", "onnxruntime"])
def test_actions_use_the_backend_of_the_spec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action_backend: str
) -> None:
    np.save(tmp_path / "clips.npy", make_clips(5))
    asked = []
    open_one = kinegraph.backends.open_backend
    monkeypatch.setattr("kinegraph.runtime.open_backend", lambda *given: asked.append(given[1:]) or open_one(*given))
    own = {"checkpoint": str(find_model()), "test_dataset": {"data_path": str(tmp_path / "clips.npy")}}
    own |= {"backend": action_backend, "threads": 1}
    inference({"results_dir": str(tmp_path), "inference": own})
    assert asked == [(action_backend, "", 1)]


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


SIBLINGS = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def make_machine(root: Path, cgroup: dict[str, str]) -> Path:
    """Four cores of two threads each."""
    return write_tree(root, {SIBLINGS.format(cpu): f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)} | cgroup)


@pytest.mark.parametrize(
    ("cpus", "cgroup", "expected"),
    [
        ({0, 1, 2, 3, 4, 5, 6, 7}, {}, 4),
        ({0, 4}, {}, 1),
        ({0, 1, 4}, {}, 2),
        (set(range(8)), {"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, 4),
        (set(range(8)), {"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "250000 100000"}, 2),
        (set(range(8)), {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        (
            set(range(8)),
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/x\n1:name=systemd:/x",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "300000",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000",
            },
            3,
        ),
        (set(range(8)), {"proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/cpu.max": "nonsense"}, 4),
    ],
)
def test_cores_that_a_process_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpus: set[int], cgroup: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: cpus)
    assert count_cores(make_machine(tmp_path, cgroup)) == expected


def test_threads_are_those_asked_for_else_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert count_threads(5) == 5
    assert count_threads() == 3
    for value in ("", "0", "many", "-1"):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert count_threads() == count_cores() >= 1


def write_one_layer(path: Path, taps: int) -> FoldedNetwork:
    """An ONNX file of one temporal convolution, two channels, five joints."""
    weight = np.full((taps, 2, 2), 1 / taps, np.float32)
    layer = TemporalConvolutionLayer("one", (INPUT,), weight=weight, bias=np.zeros(2, np.float32))
    network = FoldedNetwork(2, 5, (layer,), np.eye(2, dtype=np.float32), np.zeros(2, np.float32))
    path.write_bytes(write_clip_form(network, 18, ModelDescription(2, pipeline=InputPipeline(2, 5)).to_metadata()))
    return network


def test_auto_leaves_what_the_kernels_cannot_hold_to_others(tmp_path: Path) -> None:
    """A temporal convolution of more taps than the kernels allow: the answer is torch's, not an error."""
    path = tmp_path / "model.onnx"
    network = write_one_layer(path, taps=1025)
    x = np.random.default_rng(0).normal(size=(1, 2, 7, 5, 1)).astype(np.float32)
    with torch.no_grad():
        expected = FoldedModel(network)(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(load(path, backend="auto").logits(x), expected, atol=1e-5)
    with pytest.raises(CheckpointError, match="one that the native kernels hold"):
        load(path, backend="native")


def test_more_threads_than_the_kernels_use_are_no_error(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write_one_layer(path, taps=1)
    assert load(path, backend="native", threads=300).logits(np.ones((1, 2, 3, 5, 1))).shape == (1, 2)


FREED_ELSEWHERE = """
    import os, signal, sys, threading
    import numpy as np
    from kinegraph.runtime import load
    models = [load(sys.argv[1], backend="openvino")]
    models[0].logits(np.ones((1, 2, 3, 5, 1)))
    thread = threading.Thread(target=models.clear)
    thread.start()
    thread.join()
    signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
    os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_a_model_freed_in_another_thread_leaves_signals_alone(tmp_path: Path) -> None:
    """OpenVINO's plugin replaces the signal stack of the thread that loads it: freed elsewhere, it left it unmapped."""
    if find_absence("openvino"):
        pytest.skip(find_absence("openvino"))
    path = tmp_path / "model.onnx"
    write_one_layer(path, taps=1)
    command = [sys.executable, "-c", textwrap.dedent(FREED_ELSEWHERE), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


def test_weights_in_other_files_are_refused(tmp_path: Path) -> None:
    """Some runtimes would look for them in the working folder, others beside the model."""
    path = tmp_path / "model.onnx"
    write_one_layer(path, taps=1)
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    with pytest.raises(CheckpointError, match="weights in other files"):
        load(path, backend="openvino").logits(np.ones((1, 2, 3, 5, 1)))
