"""A gRPC client made from the Open Inference Protocol's own .proto: `oip_client.py PROTO FOLDER`."""

import sys
from pathlib import Path

import grpc
import numpy as np
from grpc_tools import protoc

PROTO, FOLDER = Path(sys.argv[1]), Path(sys.argv[2])
made = protoc.main(
    [
        "protoc",
        f"-I{PROTO.parent}",
        f"--python_out={FOLDER}",
        f"--grpc_python_out={FOLDER}",
        str(PROTO),
    ]
)
assert made == 0
sys.path.insert(0, str(FOLDER))
import open_inference_grpc_pb2 as messages  # noqa: E402
import open_inference_grpc_pb2_grpc as rpc  # noqa: E402

LEFT, RIGHT = np.arange(16, dtype=np.int32)[None], np.ones((1, 16), np.int32)


def request(raw):
    asked = messages.ModelInferRequest(model_name="simple", id="seven")
    for name, array in (("INPUT0", LEFT), ("INPUT1", RIGHT)):
        tensor = asked.inputs.add(name=name, datatype="INT32", shape=array.shape)
        if raw:
            asked.raw_input_contents.append(array.tobytes())
        else:
            tensor.contents.int_contents.extend(array.ravel().tolist())
    return asked


def right(answer):
    arrays = [np.frombuffer(content, np.int32) for content in answer.raw_output_contents]
    return (
        answer.id == "seven"
        and [output.name for output in answer.outputs] == ["OUTPUT0", "OUTPUT1"]
        and (arrays[0] == (LEFT + RIGHT).ravel()).all()
        and (arrays[1] == (LEFT - RIGHT).ravel()).all()
    )


def refused(ask, code):
    try:
        ask()
    except grpc.RpcError as error:
        return error.code() == code
    return False


with grpc.insecure_channel("127.0.0.1:8001") as channel:
    stub = rpc.GRPCInferenceServiceStub(channel)
    wrong = request(True)
    wrong.inputs[0].datatype = "FP32"
    metadata = stub.ModelMetadata(messages.ModelMetadataRequest(name="simple"))
    answers = {
        "ServerLive": stub.ServerLive(messages.ServerLiveRequest()).live,
        "ServerReady": stub.ServerReady(messages.ServerReadyRequest()).ready,
        "ModelReady": stub.ModelReady(messages.ModelReadyRequest(name="simple")).ready,
        "ServerMetadata": bool(stub.ServerMetadata(messages.ServerMetadataRequest()).name),
        "ModelMetadata": [list(tensor.shape) for tensor in metadata.inputs] == [[-1, 16]] * 2,
        "ModelInfer raw": right(stub.ModelInfer(request(True))),
        "ModelInfer typed": right(stub.ModelInfer(request(False))),
        "ModelInfer of a wrong type": refused(
            lambda: stub.ModelInfer(wrong), grpc.StatusCode.INVALID_ARGUMENT
        ),
        "ModelMetadata of nobody": refused(
            lambda: stub.ModelMetadata(messages.ModelMetadataRequest(name="nobody")),
            grpc.StatusCode.NOT_FOUND,
        ),
    }
for name, good in answers.items():
    print("PASS" if good else "FAIL", name)
