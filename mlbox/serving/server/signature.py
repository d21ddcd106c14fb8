"""What a model takes and gives, and whether a request fits it. Pure. Errors read as Triton's do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlbox.errors import Invalid
from mlbox.serving.server.tensors import Array, Datatype

ANY = -1
"""A dimension of any size."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output. `shape` includes the batch dimension; None where the model leaves even the rank open."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...] | None

    def metadata(self) -> dict[str, object]:
        """As model metadata tells it."""
        return {"name": self.name, "datatype": self.datatype.name, "shape": list(self.shape or ())}


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """One model version's face. `max_batch` is 0 where the first dimension is not a batch.

    `batch_limit` is the batch size beyond which a request is refused: what `config.pbtxt` said, else None.
    """

    model: str
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    max_batch: int
    batch_limit: int | None = None


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named tensor on its way in or out."""

    name: str
    datatype: Datatype
    array: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestedOutput:
    """An output that a client asked for. `classes` > 0: the names of so many largest values instead of all values."""

    name: str
    binary: bool = False
    classes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class InferRequest:
    """One inference, whichever wire it came on. `outputs` is never empty.

    `timeout_s` is how long the client is willing to wait, None for as long as the server allows.
    """

    id: str | None
    inputs: Mapping[str, Tensor]
    outputs: Sequence[RequestedOutput]
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class InferResponse:
    """The answer to one inference; `outputs` in the order they were asked for."""

    model: str
    version: int
    id: str | None
    outputs: Sequence[Tensor]


def check(request: InferRequest, signature: Signature) -> int:
    """The request's batch size (1 for a model without batches). Raises Invalid for whatever does not fit."""
    model = signature.model
    for tensor in request.inputs.values():
        if tensor.name not in signature.inputs:
            known = ", ".join(signature.inputs)
            raise Invalid(f"unexpected inference input '{tensor.name}' for model '{model}': its inputs are {known}")
    missing = [name for name in signature.inputs if name not in request.inputs]
    if missing:
        raise Invalid(
            f"expected {len(signature.inputs)} inputs but got {len(request.inputs)} inputs for model '{model}'. "
            f"Got input(s) [{_quoted(request.inputs)}], but missing required input(s) [{_quoted(missing)}]. "
            f"Please provide all required input(s)."
        )
    for output in request.outputs:
        if output.name not in signature.outputs:
            known = ", ".join(signature.outputs)
            raise Invalid(f"unexpected inference output '{output.name}' for model '{model}': its outputs are {known}")
    for name, spec in signature.inputs.items():
        _check_tensor(request.inputs[name], spec, model)
    return _batch_size(request, signature)


def _check_tensor(tensor: Tensor, spec: TensorSpec, model: str) -> None:
    if tensor.datatype is not spec.datatype:
        raise Invalid(
            f"inference input '{spec.name}' data-type is '{tensor.datatype.name}', but model '{model}' expects "
            f"'{spec.datatype.name}'"
        )
    if spec.shape is None:
        return
    shape = tensor.array.shape
    if len(shape) != len(spec.shape) or any(
        want not in (ANY, got) for want, got in zip(spec.shape, shape, strict=True)
    ):
        raise Invalid(
            f"unexpected shape for input '{spec.name}' for model '{model}'. Expected {_dims(spec.shape)}, got "
            f"{_dims(shape)}"
        )


def _batch_size(request: InferRequest, signature: Signature) -> int:
    if signature.max_batch == 0:
        return 1
    sizes = {name: tensor.array.shape[0] for name, tensor in request.inputs.items()}
    if not sizes:
        return 1
    first = next(iter(sizes.values()))
    for name, size in sizes.items():
        if size != first:
            raise Invalid(
                f"input '{name}' batch size does not match other inputs for '{signature.model}': {size} and {first}"
            )
    if signature.batch_limit is not None and first > signature.batch_limit:
        raise Invalid(
            f"inference request batch-size must be <= {signature.batch_limit} for '{signature.model}', got {first}"
        )
    return first


def _dims(shape: Sequence[int]) -> str:
    return "[" + ",".join(map(str, shape)) + "]"


def _quoted(names: Sequence[str] | Mapping[str, object]) -> str:
    return ",".join(f"'{name}'" for name in names)
