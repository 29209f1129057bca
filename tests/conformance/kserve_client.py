"""KServe's own clients against a server of `simple`, in an environment with kserve: one line per question."""

import asyncio

import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig

LEFT, RIGHT = np.arange(16, dtype=np.int32)[None], np.ones((1, 16), np.int32)


def request(binary):
    inputs = []
    for name, array in (("INPUT0", LEFT), ("INPUT1", RIGHT)):
        made = InferInput(name=name, shape=list(array.shape), datatype="INT32")
        made.set_data_from_numpy(array, binary_data=binary)
        inputs.append(made)
    return InferRequest(model_name="simple", infer_inputs=inputs)


async def right(answer):
    outputs = {output.name: output.as_numpy() for output in (await answer).outputs}
    return (outputs["OUTPUT0"] == LEFT + RIGHT).all() and (outputs["OUTPUT1"] == LEFT - RIGHT).all()


async def refused(answer):
    try:
        await answer
    except Exception:
        return True
    return False


async def main():
    url = "http://127.0.0.1:8000"
    rest = InferenceRESTClient(RESTConfig(protocol="v2", timeout=10))
    rpc = InferenceGRPCClient("127.0.0.1:8001", timeout=10)
    unknown = InferRequest(model_name="nobody", infer_inputs=request(False).inputs)
    questions = {
        "rest live": rest.is_server_live(url),
        "rest ready": rest.is_server_ready(url),
        "rest model ready": rest.is_model_ready(url, "simple"),
        "rest infer json": right(rest.infer(url, request(False), model_name="simple")),
        "rest infer binary": right(rest.infer(url, request(True), model_name="simple")),
        "rest unknown model": refused(rest.infer(url, unknown, model_name="nobody")),
        "grpc live": rpc.is_server_live(),
        "grpc ready": rpc.is_server_ready(),
        "grpc model ready": rpc.is_model_ready("simple"),
        "grpc infer typed": right(rpc.infer(request(False))),
        "grpc infer raw": right(rpc.infer(request(True))),
        "grpc unknown model": refused(rpc.infer(unknown)),
    }
    for name, asked in questions.items():
        try:
            good = await asked
        except Exception as error:
            good = f"{type(error).__name__}: {error}"
        print("PASS" if good is True or good == np.True_ else "FAIL", name, good)
    await rest.close()
    await rpc.close()


asyncio.run(main())
