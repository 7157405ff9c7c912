from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinegraph.actions import dataset_convert
from kinegraph.data import convert, json_stream
from kinegraph.data.convert import cut_windows, plan_windows
from kinegraph.data.formats import read_deepstream
from kinegraph.data.json_stream import read_list
from kinegraph.errors import DataError, SpecError, StorageError
from kinegraph.run import Result
from reference import convert_plain

NUM_JOINTS = 3


def make_person(object_id: Any, seed: int = 0, num_joints: int = NUM_JOINTS, missing: float = 0.2) -> dict[str, Any]:
    random = np.random.default_rng(seed)

    def draw_pose() -> list[float]:
        pose = np.round(random.normal(0, 700, (num_joints, 4)), 3)
        pose[:, 3] = np.where(random.random(num_joints) < missing, 0, 0.9)
        return [float(number) for number in pose.ravel()]

    return {"object_id": object_id, "pose25d": draw_pose(), "pose3d": draw_pose()}


def make_entry(frame: Any, people: list[Any], source: Any = 0) -> dict[str, Any]:
    timestamp_ns = 1_700_000_000_000_000_000 + (frame if isinstance(frame, int) else 0) * 33_333_333
    batch = {"batch_id": source, "frame_num": frame, "ntp_timestamp": timestamp_ns, "objects": people}
    return {"num_frames_in_batch": 4, "batches": [batch]}


def make_recording(frames: list[int], object_id: int = 0, source: int = 0) -> list[dict[str, Any]]:
    return [make_entry(frame, [make_person(object_id, seed=frame)], source) for frame in frames]


def run_conversion(folder: Path, recording: Any, **options: Any) -> Result:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recording.json"
    text = recording if isinstance(recording, bytes) else json.dumps(recording).encode()
    path.write_bytes(text)
    defaults = {
        "num_joints": NUM_JOINTS,
        "sequence_length": 8,
        "sequence_length_min": 3,
        "sequence_length_max": 10,
    }
    section = {"data": str(path), "results_dir": str(folder / "out"), **defaults, **options}
    return dataset_convert({"dataset_convert": section})


def list_arrays(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.npy")} - {"data.npy"}


def test_golden_arrays_are_reproduced_bit_for_bit(shared: Path, tmp_path: Path) -> None:
    expected = np.load(shared / "golden" / "dataset_convert_expected.npz")
    compared = 0
    for setting in sorted({name.rpartition("/")[0] for name in expected.files}):
        pose_type, overlap = setting.split("/")
        folder = tmp_path / setting
        section = {
            "data": str(shared / "golden" / "bodypose3d.json"),
            "results_dir": str(folder),
            "pose_type": pose_type,
            "sequence_overlap": float(overlap),
            "sequence_length_max": 30,
            "sequence_length_min": 7,
            "sequence_length": 16,
        }
        dataset_convert({"dataset_convert": section})
        assert list_arrays(folder) == {"object_0.npy", "object_1.npy"}
        for name in ("object_0", "object_1"):
            array = np.load(folder / f"{name}.npy")
            wanted = expected[f"{setting}/{name}"]
            assert array.dtype == np.float32
            np.testing.assert_array_equal(array, wanted, strict=True)
            compared += 1
    assert compared == len(expected.files) == 18


def test_golden_arrays_agree_with_the_plain_restatement(shared: Path) -> None:
    recording = json.loads((shared / "golden" / "bodypose3d.json").read_text())
    expected = np.load(shared / "golden" / "dataset_convert_expected.npz")
    options = {
        "num_joints": 34,
        "input_width": 1920,
        "input_height": 1080,
        "focal_length": 1200.0,
        "sequence_length_max": 30,
        "sequence_length_min": 7,
        "sequence_length": 16,
        "split_gaps": False,
    }
    compared = 0
    for pose_type in ("3dbp", "25dbp", "2dbp"):
        for overlap in (0.25, 0.5, 1.0):
            plain = convert_plain.convert(recording, options | {"pose_type": pose_type, "sequence_overlap": overlap})
            for name, (_, array, _) in plain.items():
                wanted = expected[f"{pose_type}/{overlap}/{name.removesuffix('.npy')}"]
                np.testing.assert_array_equal(array, wanted, strict=True)
                compared += 1
    assert compared == 18


@st.composite
def draw_recordings(draw: st.DrawFn) -> tuple[list[Any], int]:
    num_joints = draw(st.integers(1, 4))
    seed = draw(st.integers(0, 2**32 - 1))
    missing = draw(st.sampled_from([0.0, 0.3, 0.9]))
    people = draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 11)), min_size=1, max_size=3, unique=True))
    seen = [draw(st.lists(st.booleans(), min_size=12, max_size=40)) for _ in people]
    recording = []
    for frame in range(max(map(len, seen))):
        batches: dict[int, Any] = {}
        for (source, object_id), present in zip(people, seen, strict=True):
            if frame < len(present) and present[frame]:
                person = make_person(object_id, hash((seed, frame, source, object_id)) % 2**32, num_joints, missing)
                entry = batches.setdefault(source, make_entry(frame, [], source))
                entry["batches"][0]["objects"].append(person)
        batch_list = [entry["batches"][0] for entry in batches.values()]
        recording.append({"num_frames_in_batch": len(people), "batches": batch_list})
    return recording, num_joints


@st.composite
def draw_options(draw: st.DrawFn) -> dict[str, Any]:
    length = draw(st.integers(1, 12))
    return {
        "pose_type": draw(st.sampled_from(["3dbp", "25dbp", "2dbp"])),
        "input_width": draw(st.integers(1, 4000)),
        "input_height": draw(st.integers(1, 4000)),
        "focal_length": draw(st.floats(0.5, 5000)),
        "sequence_length": length,
        "sequence_length_max": length + draw(st.integers(0, 5)),
        "sequence_length_min": draw(st.integers(1, 14)),
        "sequence_overlap": draw(st.floats(1 / length, 1)),
        "split_gaps": draw(st.booleans()),
    }


@settings(deadline=None, max_examples=80)
@given(draw_recordings(), draw_options(), st.sampled_from([1, 3000, 64 << 20]))
def test_random_recordings_agree_with_the_plain_restatement(
    drawn: tuple[list[Any], int], options: dict[str, Any], block_bytes: int
) -> None:
    recording, num_joints = drawn
    options = {**options, "num_joints": num_joints}
    # 1 / length may round so that length times it is just below 1
    if int(options["sequence_length"] * options["sequence_overlap"]) < 1:
        options["sequence_overlap"] = 1.0
    plain = convert_plain.convert(recording, options)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "BLOCK_BYTES", block_bytes)
        patch.setattr(json_stream, "PIECE_BYTES", 500)
        folder = Path(name)
        if not plain:
            with pytest.raises(DataError, match="sequence_length_min"):
                run_conversion(folder, recording, **options)
            return
        run_conversion(folder, recording, **options)
        out = folder / "out"
        assert list_arrays(out) == set(plain)
        index = json.loads((out / "index.json").read_text())
        merged = np.load(out / "data.npy")
        described: list[dict[str, Any]] = []
        for file_name, ((source, object_id), array, about) in plain.items():
            np.testing.assert_array_equal(np.load(out / file_name), array, strict=True)
            for file_row, window in enumerate(about):
                place = {"row": len(described), "file": file_name, "file_row": file_row}
                described.append({**place, "source": source, "object": object_id, **window})
        np.testing.assert_array_equal(merged, np.concatenate([array for _, array, _ in plain.values()]), strict=True)
        assert index["windows"] == described
        assert index["shape"] == list(merged.shape)


def test_joint_zero_is_subtracted_even_where_it_was_not_found(tmp_path: Path) -> None:
    pose = [100.0, 50.0, 10.0, 0.0, 700.0, 650.0, 610.0, 1.0]
    recording = [make_entry(0, [{"object_id": 5, "pose3d": pose}])]
    run_conversion(tmp_path, recording, num_joints=2, sequence_length_min=1, focal_length=600.0)
    array = np.load(tmp_path / "out" / "object_5.npy")
    assert array.shape == (1, 3, 10, 2, 1)
    assert array[0, :, 0, :, 0].tolist() == [[0, 1], [0, 1], [0, 1]]
    assert not array[0, :, 1:].any()


def test_a_stride_of_zero_and_too_long_windows_are_told_together(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        run_conversion(tmp_path, make_recording([0, 1]), sequence_length=11, sequence_overlap=0.05)
    places = {problem.where for problem in caught.value.problems}
    assert places == {"dataset_convert.sequence_overlap", "dataset_convert.sequence_length"}
    assert not (tmp_path / "out").exists()


def test_pure_functions_refuse_what_would_loop_or_overflow() -> None:
    with pytest.raises(ValueError, match="stride of 0"):
        plan_windows(20, 8, 0, 3)
    poses = np.zeros((3, 20, 2), dtype=np.float32)
    with pytest.raises(ValueError, match="window of 8 frames, expected at most 7"):
        cut_windows(poses, plan_windows(20, 8, 4, 3), 7)


def test_gaps_are_closed_with_a_warning_or_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recording = make_recording([*range(6), *range(9, 13), *range(2, 4)])
    caplog.set_level(logging.INFO, logger="kinegraph")
    closed = run_conversion(tmp_path / "closed", recording)
    assert closed.metrics["num_gaps"] == 2
    assert "2 gaps in 1 of 1 tracks" in caplog.text
    assert "split_gaps=true" in caplog.text
    windows = json.loads(Path(closed.files["index"]).read_text())["windows"]
    assert [(row["first_frame"], row["last_frame"], row["num_frames"]) for row in windows] == [
        (0, 10, 8),
        (4, 3, 8),
        (11, 3, 4),
    ]
    split = run_conversion(tmp_path / "split", recording, split_gaps=True)
    windows = json.loads(Path(split.files["index"]).read_text())["windows"]
    assert [(row["first_frame"], row["last_frame"], row["num_frames"]) for row in windows] == [
        (0, 5, 6),
        (9, 12, 4),
    ]


def test_a_recording_without_gaps_gives_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="kinegraph")
    result = run_conversion(tmp_path, make_recording(list(range(12))))
    assert result.metrics == {"num_windows": 3, "num_tracks": 1, "num_short_tracks": 0, "num_gaps": 0}
    assert not caplog.records


def test_equal_ids_of_two_sources_stay_apart(tmp_path: Path) -> None:
    recording = [
        *make_recording(list(range(5)), 7, source=0),
        *make_recording(list(range(10, 14)), 7, source=3),
    ]
    result = run_conversion(tmp_path, recording)
    assert list_arrays(tmp_path / "out") == {"source_0_object_7.npy", "source_3_object_7.npy"}
    windows = json.loads(Path(result.files["index"]).read_text())["windows"]
    assert [(row["source"], row["object"], row["first_frame"]) for row in windows] == [(0, 7, 0), (3, 7, 10)]


def test_short_tracks_are_named_and_a_recording_of_them_alone_is_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="kinegraph")
    result = run_conversion(tmp_path / "one", [*make_recording([0, 1], 4), *make_recording([0, 1, 2], 9)])
    assert list_arrays(tmp_path / "one" / "out") == {"object_9.npy"}
    assert result.metrics["num_short_tracks"] == 1
    assert "1 of 2 people are in no window (fewer than 3 frames): object 4." in caplog.text
    for name, recording in (("short", make_recording([0, 1], 4)), ("empty", [])):
        with pytest.raises(DataError, match="sequence_length_min=3"):
            run_conversion(tmp_path / name, recording)


def test_arrays_of_an_earlier_run_are_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="kinegraph")
    run_conversion(tmp_path, make_recording([0, 1, 2], 4))
    assert "earlier run" not in caplog.text
    run_conversion(tmp_path, make_recording([0, 1, 2], 5))
    assert "still holds arrays of an earlier run (object_4.npy, 1 in all)" in caplog.text


def test_a_failure_while_writing_leaves_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = make_recording(list(range(12)))
    run_conversion(tmp_path, recording)
    before = (tmp_path / "out" / "object_0.npy").read_bytes()

    def fail(*_: Any) -> Any:
        raise RuntimeError("stopped")

    monkeypatch.setattr(convert, "cut_windows", fail)
    with pytest.raises(RuntimeError, match="stopped"):
        run_conversion(tmp_path, recording)
    assert not (tmp_path / "out" / "index.json").exists()
    assert (tmp_path / "out" / "object_0.npy").read_bytes() == before
    assert not list((tmp_path / "out").glob(".*.tmp"))


def test_too_little_space_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(StorageError, match="free space"):
        run_conversion(tmp_path, make_recording(list(range(12))))
    assert not (tmp_path / "out" / "data.npy").exists()


def test_numbers_too_large_for_float32_are_an_error(tmp_path: Path) -> None:
    recording = make_recording(list(range(5)))
    recording[2]["batches"][0]["objects"][0]["pose3d"] = [1e300, 0, 0, 1] * NUM_JOINTS
    recording[2]["batches"][0]["objects"][0]["pose3d"][4] = -1e300
    with pytest.raises(DataError, match="too large for float32"):
        run_conversion(tmp_path, recording)


def change_person(**changes: Any) -> list[Any]:
    recording = make_recording(list(range(5)))
    recording[2]["batches"][0]["objects"][0].update(changes)
    return recording


def drop_key(key: str) -> list[Any]:
    recording = make_recording(list(range(5)))
    batch = recording[2]["batches"][0]
    for holder in (recording[2], batch, batch["objects"][0]):
        holder.pop(key, None)
    return recording


def change_batch(**changes: Any) -> list[Any]:
    recording = make_recording(list(range(5)))
    recording[2]["batches"][0].update(changes)
    return recording


def encode(recording: Any) -> bytes:
    return json.dumps(recording).encode()


POSE = [1.0] * (4 * NUM_JOINTS - 1)
BROKEN: dict[str, tuple[Any, list[str]]] = {
    "empty file": (b"", ["an empty file", "a JSON list"]),
    "not JSON": (b"object_id,x,y\n1,2,3\n", ["begins with 'object_id,x,y", "a JSON list"]),
    "an object": (b'{"batches": []}', ['begins with \'{"batches"', "a JSON list"]),
    "cut off in a number": (
        encode(make_recording([0, 1, 2]))[:-40],
        ["end of the file inside the list", "cut off"],
    ),
    "cut off between entries": (encode(make_recording([0, 1, 2]))[:-1], ["end of the file inside the list"]),
    "cut off at once": (b"[", ["byte ", "end of the file inside the list"]),
    "a syntax error": (
        encode(make_recording([0, 1, 2])).replace(b'"objects":', b'"objects"', 1),
        ["byte ", "JSON"],
    ),
    "text after the list": (encode(make_recording([0, 1, 2])) + b" x", ["trailing characters"]),
    "nan in small letters": (encode(change_person(pose3d=[*POSE, 0.125])).replace(b"0.125", b"nan"), ["nan"]),
    "nesting without end": (b"[" * 100_000, ["recursion limit"]),
    "an entry that is no object": ([3], ["[0]: got 3", "batches"]),
    "batches that are no list": ([{"batches": {}}], ["[0].batches: got a JSON object, expected a list"]),
    "objects that are an empty text": (change_batch(objects=""), ["batches[0].objects: got '', expected a list"]),
    "no batches": (drop_key("batches"), ["[2].batches: got nothing, expected"]),
    "no batch_id": (drop_key("batch_id"), ["[2].batches[0].batch_id: got nothing, expected"]),
    "no frame_num": (drop_key("frame_num"), ["[2].batches[0].frame_num: got nothing, expected"]),
    "no ntp_timestamp": (drop_key("ntp_timestamp"), ["[2].batches[0].ntp_timestamp: got nothing, expected"]),
    "no objects": (drop_key("objects"), ["[2].batches[0].objects: got nothing, expected"]),
    "no object_id": (drop_key("object_id"), ["[2].batches[0].objects[0].object_id: got nothing, expected"]),
    "no pose3d": (
        drop_key("pose3d"),
        ["[2].batches[0].objects[0].pose3d: got nothing, expected", "It has pose25d"],
    ),
    "an id that would leave the folder": (
        change_person(object_id="../../x"),
        ["objects[0].object_id: got '../../x'"],
    ),
    "an id with a fraction": (change_person(object_id=1.0), ["objects[0].object_id: got 1.0", "an integer"]),
    "an id without end": (change_person(object_id=10**30), ["objects[0].object_id: got 1000", "64 bits"]),
    "true as an id": (change_person(object_id=True), ["objects[0].object_id: got true"]),
    "a list as an id": (change_person(object_id=[1]), ["objects[0].object_id: got a JSON list"]),
    "a source that is text": (change_batch(batch_id="/etc"), ["batches[0].batch_id: got '/etc'"]),
    "a frame with a fraction": (change_batch(frame_num=2.5), ["batches[0].frame_num: got 2.5"]),
    "a time before the epoch": (change_batch(ntp_timestamp=-1), ["batches[0].ntp_timestamp: got -1"]),
    "objects that are null": (change_batch(objects=None), ["batches[0].objects: got null"]),
    "too few numbers": (
        change_person(pose3d=POSE),
        ["pose3d: got 11 numbers", "12 (x, y, z and confidence of 3"],
    ),
    "another number of joints": (change_person(pose3d=[1.0] * 68), ["got 68 numbers", "num_joints=17"]),
    "a number as text": (change_person(pose3d=[*POSE, "1.5"]), ["pose3d[11]: got '1.5', expected a number"]),
    "null as a number": (change_person(pose3d=[*POSE, None]), ["pose3d[11]: got null, expected a number"]),
    "true as a number": (change_person(pose3d=[*POSE, True]), ["pose3d[11]: got true, expected a number"]),
    "a number without end": (change_person(pose3d=[*POSE, 10**400]), ["pose3d[11]: got 1000", "a number"]),
    "a pose that is text": (
        change_person(pose3d="1 2 3"),
        ["pose3d: got '1 2 3', expected a list of 12 numbers"],
    ),
    "NaN": (
        change_person(pose3d=[*POSE[:4], float("nan"), *POSE[4:]]),
        ["NaN or infinity in frame 2, joint 1 (1 such"],
    ),
    "infinity as a confidence": (change_person(pose3d=[*POSE, float("inf")]), ["in frame 2, joint 2"]),
    "a person twice in a frame": (
        make_recording([0, 1, 2, 2, 3]),
        ["object 0: got frame 2 more than once", "tracker"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("piece_bytes", [64, 8 << 20])
def test_a_broken_recording_is_a_clear_error(
    name: str, piece_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_stream, "PIECE_BYTES", piece_bytes)
    recording, expected = BROKEN[name]
    with pytest.raises(DataError) as caught:
        run_conversion(tmp_path, recording)
    message = str(caught.value)
    assert len(caught.value.problems) == 1, message
    assert [part for part in [str(tmp_path / "recording.json"), *expected] if part not in message] == []
    assert list((tmp_path / "out").glob("*.npy")) == []
    assert len(BROKEN) == 39


def test_all_problems_are_told_together_each_once_with_a_limit(tmp_path: Path) -> None:
    recording = make_recording(list(range(50)))
    for entry in recording:
        entry["batches"][0]["objects"][0]["pose3d"] = POSE
    recording[7]["batches"][0]["objects"][0]["object_id"] = "x"
    with pytest.raises(DataError) as caught:
        run_conversion(tmp_path / "few", recording)
    assert [problem.got for problem in caught.value.problems] == ["11 numbers (and at 49 more places)", "'x'"]
    assert caught.value.problems[0].where.endswith("[0].batches[0].objects[0].pose3d")

    for number, entry in enumerate(recording):
        entry["batches"][0]["objects"][0]["object_id"] = f"name {number}"
    with pytest.raises(DataError) as caught:
        run_conversion(tmp_path / "many", recording)
    assert len(caught.value.problems) == 21
    assert caught.value.problems[-1].got == "31 more problems"


def test_a_missing_recording_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.json", tmp_path):
        with pytest.raises(DataError, match="a file that can be read"):
            read_deepstream(path, "pose3d", NUM_JOINTS)


def test_booleans_elsewhere_and_extra_keys_do_no_harm(tmp_path: Path) -> None:
    recording = make_recording(list(range(5)))
    for entry in recording:
        entry["batches"][0]["objects"][0] |= {"bbox": [1, 2, 3, 4], "tracked": True, "note": "}, {"}
    recording.insert(2, {"num_frames_in_batch": 2, "batches": []})
    plain, extended = (
        read_deepstream(write(tmp_path, recording), "pose3d", NUM_JOINTS)[0]
        for recording in (make_recording(list(range(5))), recording)
    )
    np.testing.assert_array_equal(plain.positions, extended.positions)
    np.testing.assert_array_equal(plain.frames, extended.frames)


def test_whole_numbers_and_large_ids_are_read(tmp_path: Path) -> None:
    person = {"object_id": 2**64 - 1, "pose3d": [1, -2, 3000, 1]}
    (track,) = read_deepstream(write(tmp_path, [make_entry(0, [person])]), "pose3d", 1)
    assert track.object_id == 2**64 - 1
    assert track.positions.tolist() == [[[1.0, -2.0, 3000.0]]]
    assert track.scores.tolist() == [[1.0]]
    assert track.timestamps_ns.tolist() == [1_700_000_000_000_000_000]


def write(folder: Path, recording: Any) -> Path:
    path = folder / "written.json"
    path.write_text(json.dumps(recording))
    return path


def test_reading_reports_progress_up_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "PIECE_BYTES", 1000)
    path = write(tmp_path, make_recording(list(range(20))))
    reports: list[tuple[int, int]] = []
    read_deepstream(path, "pose3d", NUM_JOINTS, lambda done, total: reports.append((done, total)))
    size = path.stat().st_size
    assert len(reports) > 5
    assert reports == sorted(reports)
    assert reports[-1] == (size, size)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text('ab"\\{}[],: é\n'),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", 'a"']), children),
    max_leaves=8,
)
DUMPS: list[Callable[[Any], str]] = [
    json.dumps,
    lambda value: json.dumps(value, indent=3),
    lambda value: json.dumps(value, separators=(",", ":"), ensure_ascii=False),
]


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.dictionaries(st.sampled_from(["a", "b"]), JSON_VALUES) | JSON_VALUES, max_size=12),
    st.sampled_from(DUMPS),
    st.integers(1, 80),
)
def test_reading_in_pieces_gives_what_reading_at_once_gives(
    values: list[Any], dump: Callable[[Any], str], piece_bytes: int
) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "PIECE_BYTES", piece_bytes)
        path = Path(name) / "list.json"
        path.write_text(dump(values), encoding="utf-8")
        pieces = list(read_list(path))
    assert [entry for piece in pieces for entry in piece.entries] == values
    firsts = [sum(len(piece.entries) for piece in pieces[:number]) for number in range(len(pieces))]
    assert [piece.first for piece in pieces] == firsts


def test_long_lists_are_really_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "PIECE_BYTES", 4000)
    path = write(tmp_path, make_recording(list(range(200))))
    pieces = list(read_list(path, ["pose25d"]))
    assert len(pieces) > 10
    people = [entry["batches"][0]["objects"][0] for piece in pieces for entry in piece.entries]
    assert len(people) == 200
    assert all(person["pose25d"] == [] and len(person["pose3d"]) == 4 * NUM_JOINTS for person in people)
