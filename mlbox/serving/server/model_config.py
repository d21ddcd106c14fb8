"""A model's `config.pbtxt`: what it may say, what follows when it says nothing, and what `/config` answers. Pure.

Field names are those of Triton's model_config.proto. What this server acts on is checked; what it only passes on
(dynamic_batching, parameters, ...) is kept as it stands; what would change answers and is not supported is refused.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from mlbox.errors import Invalid
from mlbox.serving.server import pbtxt
from mlbox.serving.server.signature import ANY, Signature, TensorSpec

DEFAULT_MAX_BATCH = 32
"""The batch size told for a model whose first dimensions are all free and whose config says nothing. Larger requests
are taken as well: nobody set a limit."""

# fmt: off
_KNOWN = (
    "name", "platform", "backend", "runtime", "version_policy", "max_batch_size", "input", "output", "batch_input",
    "batch_output", "optimization", "dynamic_batching", "sequence_batching", "ensemble_scheduling", "instance_group",
    "default_model_filename", "cc_model_filenames", "metric_tags", "parameters", "model_warmup", "model_operations",
    "model_transaction_policy", "model_repository_agents", "response_cache", "model_metrics",
)
_LISTS = frozenset({
    "input", "output", "batch_input", "batch_output", "instance_group", "model_warmup", "dims", "versions",
    "preferred_batch_size", "gpus", "profile", "control", "agents",
})
# fmt: on
_MAPS = frozenset({"parameters", "cc_model_filenames", "metric_tags", "inputs", "priority_queue_policy"})
_REFUSED = ("ensemble_scheduling", "sequence_batching", "batch_input", "batch_output", "cc_model_filenames")
_DATATYPES = {"STRING": "BYTES"}
"""Where model_config.proto calls a datatype (TYPE_STRING) otherwise than the protocol does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionPolicy:
    """Which versions are served: the `latest` so many, or just `versions`, or all (both None)."""

    latest: int | None = 1
    versions: frozenset[int] | None = None

    def as_json(self) -> dict[str, object]:
        if self.versions is not None:
            return {"specific": {"versions": sorted(self.versions)}}
        return {"all": {}} if self.latest is None else {"latest": {"num_versions": self.latest}}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What `config.pbtxt` said. `fields` is the whole message; the rest is what this server acts on.

    `max_batch_size` is None where nothing was said; `gpu` is `require` or `never` where the instance groups say so.
    """

    fields: Mapping[str, Any] = field(default_factory=dict[str, Any])
    version_policy: VersionPolicy = VersionPolicy()
    max_batch_size: int | None = None
    instances: int | None = None
    gpu: str | None = None


def read(text: str, name: str) -> ModelConfig:
    """The config in `text` for the model called `name`. Raises Invalid."""
    try:
        fields = cast(dict[str, Any], _normal(pbtxt.parse(text)))
    except pbtxt.BadText as error:
        raise Invalid(f"config.pbtxt: {error}") from error
    for key in fields:
        if key not in _KNOWN:
            near = difflib.get_close_matches(key, _KNOWN, n=1)
            raise Invalid(f"config.pbtxt: unknown field '{key}'" + (f": did you mean '{near[0]}'?" if near else ""))
    _refuse_unsupported(fields, name)
    groups = _messages(fields, "instance_group")
    return ModelConfig(
        fields=fields,
        version_policy=_version_policy(fields.get("version_policy")),
        max_batch_size=_count(fields, "max_batch_size", 0) if "max_batch_size" in fields else None,
        instances=sum(_count(group, "count", 1, default=1) for group in groups) or None,
        gpu=_gpu(groups),
    )


def signature(config: ModelConfig, name: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Signature:
    """The model's face: what the ONNX file says, narrowed by its config. Raises Invalid where they disagree."""
    tensors = [*inputs, *outputs]
    max_batch = config.max_batch_size
    if max_batch is None:
        batchable = bool(inputs) and all(spec.shape and spec.shape[0] == ANY for spec in tensors)
        batchable = batchable and not _dims_name_the_batch(config, tensors)
        max_batch = DEFAULT_MAX_BATCH if batchable else 0
    elif max_batch > 0:
        for spec in tensors:
            if spec.shape is not None and (not spec.shape or spec.shape[0] != ANY):
                raise Invalid(
                    f"config.pbtxt: max_batch_size is {max_batch}, but the first dimension of '{spec.name}' is not "
                    f"free (its shape is {list(spec.shape)}): export it with a free one or set max_batch_size: 0"
                )
    return Signature(
        model=name,
        inputs={spec.name: spec for spec in _narrowed(inputs, _messages(config.fields, "input"), "input", max_batch)},
        outputs={
            spec.name: spec for spec in _narrowed(outputs, _messages(config.fields, "output"), "output", max_batch)
        },
        max_batch=max_batch,
        batch_limit=config.max_batch_size or None,
    )


def as_json(config: ModelConfig, face: Signature, *, instances: int, device: str) -> dict[str, Any]:
    """The answer of `/config`: the file's fields, completed; `dims` leave the batch dimension out."""
    kind = "KIND_CPU" if device == "cpu" else "KIND_GPU"
    given = {entry["name"]: entry for key in ("input", "output") for entry in _messages(config.fields, key)}

    def tensor(spec: TensorSpec) -> dict[str, Any]:
        shape = list(spec.shape or ())
        kind = {"BYTES": "STRING"}.get(spec.datatype.name, spec.datatype.name)
        dims = shape[1:] if face.max_batch else shape
        return given.get(spec.name, {}) | {"name": spec.name, "data_type": f"TYPE_{kind}", "dims": dims}

    return {
        "instance_group": [{"name": f"{face.model}_0", "kind": kind, "count": instances}],
        **config.fields,
        "name": face.model,
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "default_model_filename": "model.onnx",
        "version_policy": config.version_policy.as_json(),
        "max_batch_size": face.max_batch,
        "input": [tensor(spec) for spec in face.inputs.values()],
        "output": [tensor(spec) for spec in face.outputs.values()],
        "parameters": {**config.fields.get("parameters", {}), "device": {"string_value": device}},
    }


def _refuse_unsupported(fields: Mapping[str, Any], name: str) -> None:
    expected = {
        "name": (name,),
        "platform": ("onnxruntime_onnx", ""),
        "backend": ("onnxruntime", ""),
        "default_model_filename": ("model.onnx", ""),
    }
    for key, values in expected.items():
        if fields.get(key, values[0]) not in values:
            raise Invalid(f"config.pbtxt: {key} is {fields[key]!r}, which must be {values[0]!r} here")
    for key in _REFUSED:
        if fields.get(key):
            raise Invalid(f"config.pbtxt: {key} is not supported")
    for key in ("input", "output"):
        for entry in _messages(fields, key):
            if not isinstance(entry.get("name"), str):
                raise Invalid(f"config.pbtxt: an {key} has no name")
            if "reshape" in entry:
                raise Invalid(f"config.pbtxt: reshape of {key} '{entry['name']}' is not supported")


def _version_policy(value: object) -> VersionPolicy:
    if value is None:
        return VersionPolicy()
    choice = cast(dict[str, Any], value) if isinstance(value, dict) else {}
    match list(choice.items()):
        case [("all", dict())]:
            return VersionPolicy(latest=None)
        case [("latest", dict())]:
            return VersionPolicy(latest=_count(choice["latest"], "num_versions", 1, default=1))
        case [("specific", {"versions": [*numbers]})] if all(
            isinstance(number, int) and number > 0 for number in cast(list[object], numbers)
        ):
            return VersionPolicy(latest=None, versions=frozenset(cast(list[int], numbers)))
        case _:
            raise Invalid("config.pbtxt: version_policy is one of latest { num_versions: 1 }, all {}, specific { ... }")


def _gpu(groups: Sequence[Mapping[str, Any]]) -> str | None:
    kinds = {group.get("kind", "KIND_AUTO") for group in groups}
    if not kinds <= {"KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL"}:
        raise Invalid("config.pbtxt: the kind of an instance_group is KIND_AUTO, KIND_GPU or KIND_CPU")
    if kinds == {"KIND_GPU"}:
        return "require"
    return "never" if kinds == {"KIND_CPU"} else None


def _dims_name_the_batch(config: ModelConfig, tensors: Sequence[TensorSpec]) -> bool:
    """Whether the file gives as many dims as the model has, so that the first one is no batch for it."""
    ranks = {spec.name: len(spec.shape or ()) for spec in tensors}
    entries = [*_messages(config.fields, "input"), *_messages(config.fields, "output")]
    return any(
        isinstance(dims := entry.get("dims"), list) and len(cast(list[object], dims)) == ranks.get(entry["name"])
        for entry in entries
    )


def _narrowed(
    specs: Sequence[TensorSpec], entries: Sequence[Mapping[str, Any]], key: str, max_batch: int
) -> list[TensorSpec]:
    """The ONNX file's tensors with the dimensions that the config fixes."""
    by_name = {spec.name: spec for spec in specs}
    for entry in entries:
        name = entry["name"]
        spec = by_name.get(name)
        if spec is None:
            raise Invalid(f"config.pbtxt: the model has no {key} '{name}': it has {', '.join(by_name) or 'none'}")
        kind = str(entry.get("data_type", f"TYPE_{spec.datatype.name}")).removeprefix("TYPE_")
        if _DATATYPES.get(kind, kind) != spec.datatype.name:
            raise Invalid(f"config.pbtxt: {key} '{name}' is TYPE_{kind} there and {spec.datatype.name} in the model")
        if "dims" in entry:
            by_name[name] = TensorSpec(name, spec.datatype, _shape(entry["dims"], spec, key, max_batch))
    return list(by_name.values())


def _shape(dims: object, spec: TensorSpec, key: str, max_batch: int) -> tuple[int, ...]:
    sizes = cast(list[object], dims)
    if not isinstance(dims, list) or not all(isinstance(size, int) and size >= ANY for size in sizes):
        raise Invalid(f"config.pbtxt: the dims of {key} '{spec.name}' must be whole numbers")
    shape = (*((ANY,) if max_batch else ()), *cast(list[int], sizes))
    fits = spec.shape is None or (
        len(shape) == len(spec.shape)
        and all(there in (ANY, here) for there, here in zip(spec.shape, shape, strict=True))
    )
    if not fits:
        raise Invalid(
            f"config.pbtxt: the dims of {key} '{spec.name}' mean shape {list(shape)}, the model has "
            f"{list(spec.shape or ())}"
        )
    return shape


def _messages(fields: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    entries: object = fields.get(key, [])
    items = cast(list[object], entries)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in items):
        raise Invalid(f"config.pbtxt: {key} is a list of messages: {key} [ {{ ... }} ]")
    return cast(list[dict[str, Any]], items)


def _count(fields: Mapping[str, Any], key: str, least: int, *, default: int = 0) -> int:
    value: object = fields.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
        raise Invalid(f"config.pbtxt: {key} must be a whole number from {least}, not {value!r}")
    return value


def _normal(value: Any, key: str = "") -> Any:
    """What model_config.proto calls repeated as lists, its maps as dicts, and Words as plain strings."""
    if key in _MAPS:
        entries = cast(list[Any], value) if isinstance(value, list) else [value]
        if not all(isinstance(entry, dict) and "key" in entry for entry in entries):
            raise Invalid(f"config.pbtxt: {key} is a map: {key} {{ key: ... value: ... }}")
        return {str(entry["key"]): _normal(entry.get("value", {})) for entry in entries}
    if key in _LISTS and not isinstance(value, list):
        return [_normal(value)]
    if isinstance(value, list):
        return [_normal(item) for item in cast(list[Any], value)]
    if isinstance(value, dict):
        return {name: _normal(item, name) for name, item in cast(dict[str, Any], value).items()}
    return str(value) if isinstance(value, pbtxt.Word) else value
