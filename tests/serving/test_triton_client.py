"""Triton's own HTTP client, unmodified, sync and async: everything it can ask of this server."""

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tritonclient.http as sync_client
import tritonclient.http.aio as async_client
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from tests.serving.conftest import KINDS
from tests.serving.process import InferenceServer

ARRAYS: dict[str, Any] = {
    "BOOL": np.array([True, False, True]),
    "UINT8": np.array([0, 255], np.uint8),
    "UINT16": np.array([0, 65535], np.uint16),
    "UINT32": np.array([0, 2**32 - 1], np.uint32),
    "UINT64": np.array([0, 2**64 - 1], np.uint64),
    "INT8": np.array([-128, 127], np.int8),
    "INT16": np.array([-(2**15), 2**15 - 1], np.int16),
    "INT32": np.array([-(2**31), 2**31 - 1], np.int32),
    "INT64": np.array([-(2**63), 2**63 - 1], np.int64),
    "FP16": np.array([1.5, -2.5, np.inf], np.float16),
    "FP32": np.array([1.5, -0.0, np.nan, -np.inf], np.float32),
    "FP64": np.array([1e300, 5e-324], np.float64),
    "BF16": np.array([1.5, -2.0], ml_dtypes.bfloat16),
    "BYTES": np.array(["é".encode(), b"", b"a\0b", b"x" * 300], np.object_),
}


@pytest.fixture
def client(shared: InferenceServer) -> Iterator[sync_client.InferenceServerClient]:
    with sync_client.InferenceServerClient(shared.address, concurrency=4) as made:
        yield made


def simple_inputs(module: Any, *, binary: bool) -> list[Any]:
    inputs = []
    for name, start in (("INPUT0", 0), ("INPUT1", 100)):
        tensor = module.InferInput(name, [2, 16], "INT32")
        tensor.set_data_from_numpy(np.arange(start, start + 32, dtype=np.int32).reshape(2, 16), binary_data=binary)
        inputs.append(tensor)
    return inputs


def check_simple(result: Any) -> None:
    first, second = np.arange(32).reshape(2, 16), np.arange(100, 132).reshape(2, 16)
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), first + second)
    np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), first - second)


class TestSync:
    def test_the_server(self, client: Any, shared: InferenceServer) -> None:
        headers = shared.authorization
        assert client.is_server_live(headers=headers)
        assert client.is_server_ready(headers=headers)
        assert client.get_server_metadata(headers=headers)["name"] == "mlbox"

    def test_without_a_token_it_hears_why(self, client: Any) -> None:
        with pytest.raises(InferenceServerException, match="Authorization"):
            client.get_server_metadata()

    def test_models(self, client: Any, shared: InferenceServer) -> None:
        headers = shared.authorization
        assert client.is_model_ready("simple", headers=headers)
        assert client.is_model_ready("simple", "1", headers=headers)
        assert not client.is_model_ready("simple", "9", headers=headers)
        assert client.get_model_metadata("simple", headers=headers)["versions"] == ["1"]
        assert client.get_model_config("simple", "1", headers=headers)["max_batch_size"] == 8
        index = client.get_model_repository_index(headers=headers)
        assert {"simple", "adder"} <= {row["name"] for row in index}
        assert client.get_inference_statistics("simple", headers=headers)["model_stats"][0]["name"] == "simple"
        assert client.get_inference_statistics(headers=headers)["model_stats"]
        with pytest.raises(InferenceServerException, match="Request for unknown model"):
            client.get_model_metadata("wrong_model", headers=headers)

    @pytest.mark.parametrize("binary_in", [True, False])
    @pytest.mark.parametrize("binary_out", [True, False])
    def test_infer(self, client: Any, shared: InferenceServer, binary_in: bool, binary_out: bool) -> None:
        outputs = [sync_client.InferRequestedOutput(name, binary_data=binary_out) for name in ("OUTPUT0", "OUTPUT1")]
        result = client.infer(
            "simple",
            simple_inputs(sync_client, binary=binary_in),
            outputs=outputs,
            request_id="my-id",
            headers=shared.authorization,
        )
        check_simple(result)
        assert result.get_response()["id"] == "my-id"
        assert result.get_response()["model_version"] == "1"

    def test_infer_without_naming_outputs(self, client: Any, shared: InferenceServer) -> None:
        check_simple(client.infer("simple", simple_inputs(sync_client, binary=True), headers=shared.authorization))

    @pytest.mark.parametrize("request_by", [None, "gzip", "deflate"])
    @pytest.mark.parametrize("response_by", [None, "gzip", "deflate"])
    def test_compression(
        self, client: Any, shared: InferenceServer, request_by: str | None, response_by: str | None
    ) -> None:
        result = client.infer(
            "simple",
            simple_inputs(sync_client, binary=True),
            headers=shared.authorization,
            request_compression_algorithm=request_by,
            response_compression_algorithm=response_by,
        )
        check_simple(result)

    def test_async_infer(self, client: Any, shared: InferenceServer) -> None:
        pending = [
            client.async_infer("simple", simple_inputs(sync_client, binary=True), headers=shared.authorization)
            for _ in range(20)
        ]
        for one in pending:
            check_simple(one.get_result())

    @pytest.mark.parametrize("kind", KINDS)
    def test_every_datatype(self, client: Any, shared: InferenceServer, kind: str) -> None:
        array = ARRAYS[kind]
        tensor = sync_client.InferInput("x", list(array.shape), kind)
        tensor.set_data_from_numpy(array)
        back = client.infer(f"identity_{kind}", [tensor], headers=shared.authorization).as_numpy("y")
        np.testing.assert_array_equal(back, array)
        if kind not in ("FP16", "BF16", "BYTES"):
            assert np_to_triton_dtype(array.dtype) == kind

    @pytest.mark.parametrize("kind", ["FP16", "BF16"])
    def test_sixteen_bit_floats_by_json_are_refused(self, client: Any, shared: InferenceServer, kind: str) -> None:
        tensor = sync_client.InferInput("x", [2], kind)
        tensor.set_data_from_numpy(ARRAYS[kind][:2])
        wish = [sync_client.InferRequestedOutput("y", binary_data=False)]
        with pytest.raises(InferenceServerException, match="via JSON is not supported"):
            client.infer(f"identity_{kind}", [tensor], outputs=wish, headers=shared.authorization)

    def test_classes(self, client: Any, shared: InferenceServer) -> None:
        wish = [sync_client.InferRequestedOutput("OUTPUT0", class_count=1)]
        result = client.infer(
            "simple", simple_inputs(sync_client, binary=True), outputs=wish, headers=shared.authorization
        )
        assert result.as_numpy("OUTPUT0").tolist() == [[b"130.000000:15"], [b"162.000000:15"]]

    def test_errors_of_an_inference(self, client: Any, shared: InferenceServer) -> None:
        inputs = simple_inputs(sync_client, binary=True)
        for change, text in (
            (lambda: client.infer("none", inputs, headers=shared.authorization), "Request for unknown model"),
            (lambda: client.infer("simple", inputs[:1], headers=shared.authorization), "expected 2 inputs but got 1"),
            (lambda: client.infer("adder", inputs, headers=shared.authorization), "unexpected inference input"),
        ):
            with pytest.raises(InferenceServerException, match=text):
                change()

    def test_load_and_unload(self, client: Any, shared: InferenceServer) -> None:
        headers = shared.authorization
        client.unload_model("adder", headers=headers)
        assert not client.is_model_ready("adder", headers=headers)
        rows = {row["name"]: row for row in client.get_model_repository_index(headers=headers)}
        assert (rows["adder"]["state"], rows["adder"]["reason"]) == ("UNAVAILABLE", "unloaded")
        client.load_model("adder", headers=headers)
        assert client.is_model_ready("adder", headers=headers)
        with pytest.raises(InferenceServerException, match="failed to load 'none'"):
            client.load_model("none", headers=headers)
        with pytest.raises(InferenceServerException, match="failed to load 'adder'"):
            client.load_model("adder", headers=headers, config='{"max_batch_size":"16"}')
        with pytest.raises(InferenceServerException, match="Request for unknown model"):
            client.unload_model("none", headers=headers)


class TestAsync:
    async def test_everything_once(self, shared: InferenceServer) -> None:
        headers = shared.authorization
        async with async_client.InferenceServerClient(shared.address) as client:
            assert await client.is_server_live(headers=headers)
            assert await client.is_server_ready(headers=headers)
            assert await client.is_model_ready("simple", headers=headers)
            assert (await client.get_server_metadata(headers=headers))["name"] == "mlbox"
            assert (await client.get_model_metadata("simple", headers=headers))["name"] == "simple"
            assert (await client.get_model_config("simple", headers=headers))["name"] == "simple"
            assert await client.get_model_repository_index(headers=headers)
            assert await client.get_inference_statistics(headers=headers)
            await client.unload_model("adder", headers=headers)
            await client.load_model("adder", headers=headers)
            for request_by in (None, "gzip", "deflate"):
                result = await client.infer(
                    "simple",
                    simple_inputs(async_client, binary=True),
                    headers=headers,
                    request_compression_algorithm=request_by,
                    response_compression_algorithm=request_by,
                )
                check_simple(result)
            with pytest.raises(InferenceServerException, match="Request for unknown model"):
                await client.infer("none", [], headers=headers)
