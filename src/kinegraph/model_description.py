"""What a model file says about itself, and how ONNX files store it: strict JSON in their metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from kinegraph.calibration import check_temperature
from kinegraph.data.pipeline import InputPipeline
from kinegraph.errors import CheckpointError, DataError, Problem
from kinegraph.skeleton.layouts import Layout
from kinegraph.storage import dump_json
from kinegraph.whole_numbers import check_whole_number

if TYPE_CHECKING:
    from kinegraph.models.checkpoint import Checkpoint

METADATA_PREFIX = "kinegraph."
METADATA_VERSION = 1
MAX_CLASSES = 1_000_000


@dataclass(frozen=True)
class ModelDescription:
    """What a model file says about itself. `layout`, `label_map` and `pipeline` are None where a foreign file does not.

    `metadata` holds plain data: `model` (its options), `model_name`, `metrics` and `versions`; empty for foreign ONNX.
    """

    num_classes: int
    label_map: dict[str, int] | None = None
    layout: Layout | None = None
    pipeline: InputPipeline | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    temperature: float = 1.0
    """What logits are divided by for probabilities; 1.0 for files of other tools."""

    @property
    def class_names(self) -> list[str]:
        """Names in label order; class_0, class_1, ... where there are none."""
        names = {label: name for name, label in (self.label_map or {}).items()}
        return [names.get(label, f"class_{label}") for label in range(self.num_classes)]

    def to_metadata(self) -> dict[str, str]:
        """The description as strict JSON strings, for the metadata of an ONNX file."""
        values = {
            "format_version": METADATA_VERSION,
            "num_classes": self.num_classes,
            "class_names": self.class_names,
            "label_map": self.label_map,
            "layout": self.layout.to_dict() if self.layout else None,
            "pipeline": self.pipeline.to_dict() if self.pipeline else None,
            "temperature": self.temperature,
            **self.metadata,
        }
        return {METADATA_PREFIX + key: dump_json(value) for key, value in values.items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], where: str) -> ModelDescription:
        """The opposite of `to_metadata`. Raises CheckpointError for what it would not have written."""
        try:
            own = {
                key.removeprefix(METADATA_PREFIX): json.loads(value)
                for key, value in metadata.items()
                if key.startswith(METADATA_PREFIX)
            }
            version = own.pop("format_version")
            if version != METADATA_VERSION:
                hint = "Update Kinegraph."
                raise CheckpointError(Problem(where, f"metadata version {version!r}", str(METADATA_VERSION), hint))
            # Class names follow from the label map; what runtimes need has readers of its own
            for key in ("class_names", "folded", "activation_ranges", "step"):
                own.pop(key, None)
            description = cls(
                check_whole_number(own.pop("num_classes"), "num_classes", 1, MAX_CLASSES),
                _check_label_map(own.pop("label_map", None)),
                None if own.get("layout") is None else Layout.from_dict(own["layout"], f"{where}: layout"),
                None if own.get("pipeline") is None else InputPipeline.from_dict(own["pipeline"], f"{where}: pipeline"),
                {key: value for key, value in own.items() if key not in ("layout", "pipeline", "temperature")},
                check_temperature(own.get("temperature", 1.0)),
            )
        except (KeyError, TypeError, ValueError, RecursionError, DataError) as error:
            got = f"damaged metadata ({type(error).__name__}: {error})"
            raise CheckpointError(
                Problem(where, got, "the entries that Kinegraph writes", "Export it again.")
            ) from None
        return description


def _check_label_map(value: Any) -> dict[str, int] | None:
    if value is not None and not (isinstance(value, dict) and all(type(label) is int for label in value.values())):
        raise TypeError("a label map that is not name -> number")
    return value


def describe_checkpoint(checkpoint: Checkpoint, where: str) -> ModelDescription:
    """What a .pth file says about its model. Raises DataError for an input pipeline that this version lacks."""
    options = asdict(checkpoint.options)
    options.pop("pretrained_model_path")
    if checkpoint.pipeline is None:
        pipeline = InputPipeline(checkpoint.options.input_channels, checkpoint.layout.num_joints)
    else:
        pipeline = InputPipeline.from_dict(checkpoint.pipeline, f"{where}: input pipeline")
    given = pipeline.output_channels, pipeline.num_joints
    expected = checkpoint.num_channels or checkpoint.options.input_channels, checkpoint.layout.num_joints
    if given != expected:
        got = f"{given[0]} channels of {given[1]} joints from the input pipeline"
        raise CheckpointError(Problem(where, got, f"{expected[0]} of {expected[1]}, as the network takes"))
    metadata = {
        "model": options,
        "model_name": checkpoint.spec.get("model_name", ""),
        "metrics": checkpoint.metrics,
        "versions": checkpoint.versions,
    }
    return ModelDescription(
        *(checkpoint.num_classes, checkpoint.label_map, checkpoint.layout, pipeline, metadata, checkpoint.temperature)
    )
