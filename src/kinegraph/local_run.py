"""A run whose spec holds URIs, made local: inputs come from the cache, results go to folders that are mirrored.

The action sees paths of this machine only. `Run.locations` keeps which URI each of them stands for.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from kinegraph.errors import KinegraphError
from kinegraph.mirror import Mirror
from kinegraph.remote import fetch, find_cache_folder, hash_location, is_remote, split_location
from kinegraph.run import LOCK_WAIT_S, LOGGER, Run, find_launched_rank
from kinegraph.spec import Spec
from kinegraph.spec_reading import find_results_dir, list_paths
from kinegraph.storage import lock_folder, make_folder

COMPANIONS: dict[str, tuple[str, ...]] = {"export.onnx_file": ("labels.txt",)}
"""What an action writes beside the file of an option."""
LARGE_FILE_BYTES = 100 << 20
FAILED_RUN_DELAYS_S = (1.0,)


@dataclass
class LocalResults:
    """Where a run writes. `locations`: path of this machine -> the URI that it stands for."""

    spec: Spec
    folder: Path
    location: str
    locations: dict[str, str] = field(default_factory=dict)
    mirrors: list[Mirror] = field(default_factory=list)

    def upload_all(self) -> None:
        """Upload what is not up yet. Raises StorageError."""
        for mirror in self.mirrors:
            mirror.upload_all()


@contextmanager
def open_results(spec: Spec, action: str) -> Iterator[LocalResults]:
    """The results folder of a run, and the spec with local output files; uploaded as they change where they are URIs.

    At the end everything is up, also after a failure, or a StorageError says which folder holds it.
    """
    location = find_results_dir(spec, action)
    assert location is not None, "read_spec demands a results folder"
    with ExitStack() as stack:
        results = LocalResults(spec, Path(location), location)
        if is_remote(location):
            results.folder = stack.enter_context(_stage(results, location, location))
        for key, uri in _list_outputs(spec, action).items():
            if uri.startswith(f"{location.rstrip('/')}/"):
                path = results.folder / uri[len(location.rstrip("/")) + 1 :]
            else:
                parent, name = split_location(uri)
                path = stack.enter_context(_stage(results, parent, uri, (name, *COMPANIONS.get(key, ())))) / name
                results.locations[str(path)] = uri
            results.spec = _replace_value(results.spec, key, str(path))
        yield results


def _list_outputs(spec: Spec, action: str) -> dict[str, str]:
    """Key -> URI of the single files that an action writes to a URI."""
    outputs = {
        key: location
        for key, location in list_paths(spec, action, "output").items()
        if is_remote(location) and not key.endswith("results_dir")
    }
    if action == "export" and is_remote(spec.export.checkpoint) and not spec.export.onnx_file:
        # Beside the checkpoint, as for a local one, and not in the cache
        outputs["export.onnx_file"] = str(re.sub(r"\.[^./]*$", "", spec.export.checkpoint)) + ".onnx"
    return outputs


@contextmanager
def _stage(results: LocalResults, uri: str, place: str, names: Sequence[str] = ()) -> Iterator[Path]:
    """A folder that is mirrored to a URI, with what is there already. `place` tells staging folders apart."""
    base = make_folder(find_cache_folder() / "results" / hash_location(place))
    folder = base / (PurePosixPath(uri).name.lstrip(".") or "results")
    is_first = find_launched_rank() == 0
    with lock_folder(base, LOCK_WAIT_S) if is_first else nullcontext():
        mirror = Mirror(folder, uri, base / "uploaded.json", LOGGER.warning, names)
        num_files = mirror.take_over(only_missing=not is_first)
        results.locations[str(folder)] = uri.rstrip("/")
        if not is_first:
            yield folder
            return
        if num_files:
            LOGGER.info("Took over %d files from %s.", num_files, uri)
        results.mirrors.append(mirror)
        mirror.start()
        try:
            yield folder
        except BaseException:
            mirror.close()
            try:
                mirror.upload_all(FAILED_RUN_DELAYS_S)
            except KinegraphError as second:
                LOGGER.error("%s", second)
            raise
        mirror.close()
        mirror.upload_all()


def fetch_inputs(run: Run, results: LocalResults) -> None:
    """Give the run local files for all inputs that are URIs. Raises UserError, StorageError."""
    for key, uri in list_paths(run.spec, run.action, "input").items():
        if not is_remote(uri):
            continue
        path = _find_in_results(uri, results) or fetch(uri, _Announcer(run, uri).show)
        run.locations[str(path)] = uri
        run.spec = _replace_value(run.spec, key, str(path))


def _find_in_results(uri: str, results: LocalResults) -> Path | None:
    """The file of the results folder that a URI names: a checkpoint to go on from must be known as the run's own."""
    prefix = f"{results.location.rstrip('/')}/"
    path = results.folder / uri.removeprefix(prefix)
    return path if uri.startswith(prefix) and path.is_file() else None


class _Announcer:
    """Says that a large file is loaded, and shows how far it is."""

    def __init__(self, run: Run, uri: str) -> None:
        self.run, self.uri, self.is_said = run, uri, False

    def show(self, done_bytes: int, total_bytes: int) -> None:
        if total_bytes < LARGE_FILE_BYTES:
            return
        if not self.is_said:
            self.run.info(f"Loading {self.uri} ({total_bytes / 1e9:.1f} GB).")
            self.is_said = True
        self.run.progress(done_bytes >> 20, total_bytes >> 20, f"Loading {split_location(self.uri)[1]} (MiB)")


def _replace_value(spec: Any, key: str, value: Any) -> Any:
    """The spec with another value of a dotted key."""
    name, _, rest = key.partition(".")
    new = _replace_value(getattr(spec, name), rest, value) if rest else value
    return dataclasses.replace(spec, **{name: new})
