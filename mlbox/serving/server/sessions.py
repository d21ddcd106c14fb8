"""onnxruntime: loads a model from a path onto a device, and runs it. The only importer of onnxruntime. Blocking."""

import contextlib
import ctypes
import io
import logging
import math
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime  # pyright: ignore[reportMissingTypeStubs]

from mlbox.serving.server.signature import ANY, TensorSpec
from mlbox.serving.server.tensors import BF16, BYTES, DATATYPES, Array

log = logging.getLogger(__name__)
ort: Any = onnxruntime
"""It has no types; what comes out of it is given one at once."""

_ONNX_TYPES = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "float": "FP32",
    "double": "FP64",
    "bfloat16": BF16,
    "string": BYTES,
}
_ONNX_BFLOAT16 = 16
"""TensorProto.BFLOAT16 (onnx.proto)."""
_SILENT = 4
"""ORT_LOGGING_LEVEL_FATAL: what fails is raised as well, and a client's bad request is no news for the log."""
_PREFIX = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")
_DEVICE_TROUBLE = re.compile(r"CUDA|CUDNN|CUBLAS|allocate memory|out of memory", re.IGNORECASE)
_WARM_UP_ELEMENTS_MAX = 1 << 28
"""Inputs that would be larger are not warmed up with; only a hostile model has them."""

ort.set_default_logger_severity(_SILENT)


class LoadFailed(Exception):
    """The model cannot be served; the message says why, for the person who made it."""


class RunFailed(Exception):
    """onnxruntime refused the run: the input does not suit the model."""


class RunStopped(Exception):
    """The run was ended before it was done."""


class DeviceFailed(Exception):
    """The GPU could not do it: its memory is taken, or it is in trouble. The input is not to blame."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSettings:
    """How models are loaded. `gpu` is `prefer`, `require` or `never`; `threads` those of one CPU inference."""

    gpu: str = "prefer"
    threads: int = 1
    gpu_mem_limit: int | None = None
    """Bytes of onnxruntime's arena on the GPU; None: no limit. cuDNN and cuBLAS come on top."""
    load_timeout_s: float = 300.0
    warm_up_timeout_s: float = 30.0


class Stop:
    """Ends one run from another thread."""

    def __init__(self) -> None:
        self.options = ort.RunOptions()
        self.options.log_severity_level = _SILENT
        self.requested = False

    def set(self) -> None:
        self.requested = True
        self.options.terminate = True


class Session:
    """A loaded model. `run` may be called from several threads at once.

    `device` is `cpu` or `cuda:0`; `note` says what is not as asked (runs on the CPU although there is a GPU).
    """

    def __init__(self, inner: Any, device: str, note: str | None) -> None:
        """Raises LoadFailed for inputs and outputs of types that the protocol has no word for."""
        self._inner: Any = inner
        self.device = device
        self.note = note
        try:
            self.inputs = tuple(_spec(item, "input") for item in inner.get_inputs())
            self.outputs = tuple(_spec(item, "output") for item in inner.get_outputs())
        except UnicodeDecodeError as error:
            raise LoadFailed("a name in it is not UTF-8") from error
        self._datatypes = {spec.name: spec.datatype.name for spec in (*self.inputs, *self.outputs)}
        # numpy has no bfloat16: such models speak through OrtValues, which cost more.
        self._through_values = BF16 in self._datatypes.values()

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str], stop: Stop) -> list[Array]:
        """The values of `outputs`, in order. Raises RunFailed, RunStopped, DeviceFailed."""
        try:
            if self._through_values:
                return self._run_values(feeds, outputs, stop)
            return cast(list[Array], self._inner.run(list(outputs), dict(feeds), stop.options))
        except Exception as error:  # onnxruntime's errors have no common base but this
            if stop.requested:
                raise RunStopped from error
            if self.device != "cpu" and _DEVICE_TROUBLE.search(str(error)):
                raise DeviceFailed(_plain(error)) from error
            raise RunFailed(_plain(error)) from error

    def close(self) -> None:
        """Free the model's memory; no run may be under way."""
        self._inner = None

    def _run_values(self, feeds: Mapping[str, Array], outputs: Sequence[str], stop: Stop) -> list[Array]:
        values = {
            name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _ONNX_BFLOAT16)
            if self._datatypes[name] == BF16
            else ort.OrtValue.ortvalue_from_numpy(array)
            for name, array in feeds.items()
        }
        results = self._inner.run_with_ort_values(list(outputs), values, stop.options)
        return [
            _bfloat16(value) if self._datatypes[name] == BF16 else value.numpy()
            for name, value in zip(outputs, results, strict=True)
        ]


def load(path: Path, settings: SessionSettings, *, gpu: str) -> Session:
    """Load `path` onto a GPU or the CPU as `gpu` says (prefer, require, never), and warm it up. Raises LoadFailed."""
    note = None
    if gpu != "never":
        problem = cuda_problem()
        if problem is None:
            try:
                return _warmed_up(_load(path, settings, cuda=True), settings)
            except LoadFailed as error:
                problem = str(error)
            note = f"runs on the CPU: {problem}"
            log.warning("%s could not be loaded onto the GPU: %s", path.name, problem)
        if gpu == "require":
            raise LoadFailed(f"it requires a GPU: {problem}")
    session = _load(path, settings, cuda=False)
    session.note = note
    return _warmed_up(session, settings)


@cache
def cuda_problem() -> str | None:
    """Why CUDA cannot be used in this process; None when it can. Asked once: drivers do not come and go.

    `get_available_providers()` only tells how onnxruntime was built. The driver itself says whether there is a
    device, and asking it makes no context.
    """
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return "this onnxruntime was built without CUDA"
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver"
    count = ctypes.c_int(0)
    if (error := driver.cuInit(0)) != 0:
        return f"the NVIDIA driver cannot be used (cuInit: error {error})"
    if (error := driver.cuDeviceGetCount(ctypes.byref(count))) != 0 or count.value == 0:
        return "no GPU is visible to CUDA"
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find; get_providers() tells in the end
        ort.preload_dlls()
    return None


def _load(path: Path, settings: SessionSettings, *, cuda: bool) -> Session:
    options = ort.SessionOptions()
    options.log_severity_level = _SILENT
    options.intra_op_num_threads = settings.threads
    # Spinning costs a whole core at 150 requests/s for 0.2 ms. onnxruntime's global pool, which would be shared by
    # all sessions, spins whatever these say (measured with 1.31), so that each session has its own threads.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    providers: list[Any] = ["CPUExecutionProvider"]
    if cuda:
        providers.insert(0, ("CUDAExecutionProvider", _cuda_options(settings)))
    overdue = threading.Timer(settings.load_timeout_s, options.set_load_cancellation_flag, (True,))
    overdue.daemon = True
    overdue.start()
    began = time.monotonic()
    try:
        inner = ort.InferenceSession(path, options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime's errors have no common base; mutated files raise UnicodeDecodeError too
        if time.monotonic() - began >= settings.load_timeout_s:
            raise LoadFailed(f"it was not loaded within {settings.load_timeout_s:g} s") from error
        raise LoadFailed(_plain(error).replace(str(path), path.name)) from error
    finally:
        overdue.cancel()
    if cuda and inner.get_providers()[0] != "CUDAExecutionProvider":
        raise LoadFailed("onnxruntime's CUDA provider did not start: its CUDA or cuDNN libraries are missing")
    return Session(inner, "cuda:0" if cuda else "cpu", None)


def _cuda_options(settings: SessionSettings) -> dict[str, str]:
    options = {
        "device_id": "0",
        # EXHAUSTIVE tries every algorithm anew for each new shape: 634 ms against 1.9 ms (PaddleX PR 5057).
        "cudnn_conv_algo_search": "HEURISTIC",
        # The default may take twice what it needs of a GPU that training shares (onnxruntime PR 15983).
        "arena_extend_strategy": "kSameAsRequested",
    }
    if settings.gpu_mem_limit is not None:
        options["gpu_mem_limit"] = str(settings.gpu_mem_limit)
    return options


def _warmed_up(session: Session, settings: SessionSettings) -> Session:
    """Run it once on zeros. Raises LoadFailed for a model that does not come to an end.

    A model may well refuse zeros, or a size of 1 (it wants an index in a range): that is logged, and it is served.
    """
    feeds = {spec.name: zeros for spec in session.inputs if (zeros := _zeros(spec)) is not None}
    if len(feeds) < len(session.inputs):
        return session
    stop = Stop()
    overdue = threading.Timer(settings.warm_up_timeout_s, stop.set)
    overdue.daemon = True
    overdue.start()
    try:
        session.run(feeds, [spec.name for spec in session.outputs], stop)
    except RunStopped as error:
        raise LoadFailed(
            f"its first run, on zeros, did not end within {settings.warm_up_timeout_s:g} s: does it loop for ever?"
        ) from error
    except DeviceFailed as error:
        raise LoadFailed(f"its first run failed on the GPU: {error}") from error
    except RunFailed as error:
        log.info("a model does not run on zeros and is served without a warm-up: %s", error)
    finally:
        overdue.cancel()
    return session


def _zeros(spec: TensorSpec) -> Array | None:
    if spec.shape is None:
        return None
    shape = [1 if size == ANY else size for size in spec.shape]
    if math.prod(shape) > _WARM_UP_ELEMENTS_MAX:
        return None
    return np.full(shape, "", np.object_) if spec.datatype.name == BYTES else np.zeros(shape, spec.datatype.storage)


def _spec(item: Any, role: str) -> TensorSpec:
    match = re.fullmatch(r"tensor\((\w+)\)", item.type)
    datatype = _ONNX_TYPES.get(match[1]) if match else None
    if datatype is None:
        hint = ": export it with zipmap=False" if item.type.startswith("seq(map") else ""
        raise LoadFailed(f"its {role} '{item.name}' is of type {item.type}, which cannot be served{hint}")
    # onnxruntime tells a scalar and a tensor of unknown rank alike, with an empty list.
    shape = tuple(size if isinstance(size, int) and size >= 0 else ANY for size in item.shape) or None
    return TensorSpec(item.name, DATATYPES[datatype], shape)


def _bfloat16(value: Any) -> Array:
    size = value.tensor_size_in_bytes()
    raw = ctypes.string_at(value.data_ptr(), size) if size else b""
    return np.frombuffer(raw, np.uint16).reshape(value.shape())


def _plain(error: BaseException) -> str:
    """An error of onnxruntime without its prefix, and short enough for a reason or an answer."""
    return _PREFIX.sub("", str(error))[:600] or type(error).__name__
