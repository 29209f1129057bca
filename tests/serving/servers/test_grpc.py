"""gRPC as it comes off the wire: no message brings an error of ours, and a stream carries any number of answers."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2, service_pb2_grpc

from utune_deploy.serving.models import Asked, Fixed
from utune_deploy.serving.rejections import InvalidRequest
from utune_deploy.serving.servers.fronts import carrying
from utune_deploy.serving.tensors import OutputTensor, numbers


@pytest.fixture(scope="module")
def stub(embed, service):
    with embed(service) as addresses, grpc.insecure_channel(addresses.grpc) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


_NAMES = st.sampled_from(["images", "task", "logits", "score", "tiny", "pets", "1", "2", ""])
_PARAMETERS = st.dictionaries(
    st.sampled_from(["priority", "timeout", "classification", "shared_memory_region", "x"]),
    st.one_of(
        st.builds(service_pb2.InferParameter, int64_param=st.integers(-2, 5)),
        st.builds(service_pb2.InferParameter, string_param=st.text(max_size=3)),
        st.builds(service_pb2.InferParameter, bool_param=st.booleans()),
        st.builds(service_pb2.InferParameter),
    ),
    max_size=2,
)
_CONTENTS = st.one_of(
    st.builds(
        service_pb2.InferTensorContents,
        fp32_contents=st.lists(st.floats(width=32), max_size=4)
        | st.just([0.5] * 192)
        | st.just([float("nan")] * 192),
    ),
    st.builds(
        service_pb2.InferTensorContents,
        bytes_contents=st.lists(st.sampled_from([b"pets", b"", b"\xff"]), max_size=3),
    ),
)
_INPUTS = st.builds(
    service_pb2.ModelInferRequest.InferInputTensor,
    name=_NAMES,
    datatype=st.sampled_from(["FP32", "BYTES", "INT64", "BF16", ""]),
    shape=st.sampled_from([[1, 3, 8, 8], [1, 1], [1]])
    | st.lists(st.integers(-1, 9) | st.sampled_from([2**62, -(2**63)]), max_size=4),
    parameters=_PARAMETERS,
    contents=st.none() | _CONTENTS,
)
_OUTPUTS = st.builds(
    service_pb2.ModelInferRequest.InferRequestedOutputTensor, name=_NAMES, parameters=_PARAMETERS
)
_MESSAGES = st.builds(
    service_pb2.ModelInferRequest,
    model_name=_NAMES | st.just("tiny"),
    model_version=st.sampled_from(["", "1", "x"]),
    id=st.text(max_size=3),
    parameters=_PARAMETERS,
    inputs=st.lists(_INPUTS, max_size=3),
    outputs=st.lists(_OUTPUTS, max_size=2),
    raw_input_contents=st.lists(st.binary(max_size=12), max_size=3),
)


@settings(max_examples=300, deadline=None)
@given(message=_MESSAGES)
def test_no_message_brings_an_error_of_ours(stub, message):
    try:
        stub.ModelInfer(message, timeout=30)
    except grpc.RpcError as error:
        known = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
        assert error.code() in known, error  # noqa: PT017
    (part,) = stub.ModelStreamInfer(iter([message]), timeout=30)
    assert "mistake" not in part.error_message


class Countdown:
    """`COUNT` INT32 [1] brings as many answers; -1 brings an error after the first."""

    name = "countdown"
    versions = ("1",)
    ready = True

    def metadata(self, version: str) -> dict[str, Any]:
        return {"name": self.name, "versions": ["1"], "platform": "", "inputs": [], "outputs": []}

    def config(self, version: str) -> dict[str, Any]:
        return {"name": self.name, "model_transaction_policy": {"decoupled": True}}

    def statistics(self) -> list[dict[str, Any]]:
        return []

    async def infer(self, asked: Asked) -> list[OutputTensor]:
        raise InvalidRequest("only a stream carries these answers")

    async def stream(self, asked: Asked):
        (count,) = numbers(asked.inputs[0])
        for left in range(abs(count), 0, -1):
            await asyncio.sleep(0)
            yield [OutputTensor("LEFT", "INT32", np.array([left], np.int32))]
        if count < 0:
            raise InvalidRequest("a count below 0")


def _count(value: int) -> Any:
    asked = service_pb2.ModelInferRequest(model_name="countdown", id=str(value))
    asked.inputs.add(name="COUNT", datatype="INT32", shape=[1]).contents.int_contents.append(value)
    return asked


def test_a_decoupled_model_brings_any_number_of_answers():
    async def main() -> list[tuple[str, str, bool, int | None]]:
        async with (
            carrying(Fixed(Countdown())) as addresses,
            grpc.aio.insecure_channel(addresses.grpc) as channel,
        ):
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            with pytest.raises(grpc.RpcError):
                await stub.ModelInfer(_count(1))
            last = _count(1)
            last.parameters["triton_enable_empty_final_response"].bool_param = True
            stream = stub.ModelStreamInfer(iter([_count(2), _count(0), _count(-1), last]))
            return [
                (
                    part.infer_response.id,
                    part.error_message,
                    part.infer_response.parameters["triton_final_response"].bool_param,
                    np.frombuffer(part.infer_response.raw_output_contents[0], np.int32)[0]
                    if part.infer_response.outputs
                    else None,
                )
                async for part in stream
            ]

    assert asyncio.run(main()) == [
        ("2", "", False, 2),
        ("2", "", False, 1),
        ("-1", "", False, 1),
        ("-1", "a count below 0", False, None),
        ("1", "", False, 1),
        ("1", "", True, None),
    ]


@pytest.mark.parametrize(
    ("method", "asked", "said"),
    [
        ("TraceSetting", service_pb2.TraceSettingRequest(), "settings of traces are not offered"),
        ("LogSettings", service_pb2.LogSettingsRequest(), "settings of logs are not offered"),
    ],
)
def test_what_is_not_offered_is_said(stub, method, asked, said):
    with pytest.raises(grpc.RpcError) as refused:
        getattr(stub, method)(asked, timeout=10)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert said in refused.value.details()
