"""Real Triton's side of `behaviour.py`: a model of its Python backend, copied beside it."""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import behaviour
import triton_python_backend_utils as triton


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        """The model's own configuration where a load overrides it by a part."""
        path = Path(__file__).with_name("config.json")
        own = json.loads(path.read_text())
        found = config.as_dict()
        if not found["max_batch_size"]:
            config.set_max_batch_size(own["max_batch_size"])
        for tensor in own["input"]:
            config.add_input(tensor)
        for tensor in own["output"]:
            config.add_output(tensor)
        return config

    def initialize(self, args):
        own = json.loads(Path(__file__).with_name("config.json").read_text())
        self._names = [tensor["name"] for tensor in own["input"]]
        self._does = behaviour.Behaviour(own)

    def execute(self, requests):
        delay = self._does.config["parameters"].get("execute_delay_ms")
        time.sleep(int(delay["string_value"]) / 1e3 if delay else 0)
        if self._does.does == "repeat":
            for request in requests:
                sender = request.get_response_sender()
                for pause, outputs in self._does.repeat(self._inputs(request)):
                    time.sleep(pause)
                    sender.send(self._response(outputs))
                sender.send(flags=triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            return None
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        flags = request.flags()
        try:
            outputs = self._does.answer(
                self._inputs(request),
                request.correlation_id(),
                bool(flags & triton.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START),
                bool(flags & triton.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END),
            )
        except ValueError as error:
            return triton.InferenceResponse(error=triton.TritonError(str(error)))
        return self._response(outputs)

    def _inputs(self, request):
        found = ((name, triton.get_input_tensor_by_name(request, name)) for name in self._names)
        return {name: tensor.as_numpy() for name, tensor in found if tensor is not None}

    @staticmethod
    def _response(outputs):
        return triton.InferenceResponse(
            output_tensors=[triton.Tensor(name, array) for name, array in outputs.items()]
        )
