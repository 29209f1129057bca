"""What the models do that other people's suites ask for, in NumPy alone.

The embedded server calls this directly, and a Python-backend model of real Triton carries a copy of the file, so
that both answer with the same code. Configurations are in the fields of Triton's `ModelConfig`.
"""

import itertools

import numpy as np

STRING = "TYPE_STRING"


def _tensor(name, kind, *dims, **more):
    return {"name": name, "data_type": kind, "dims": list(dims), **more}


def _add_sub(kind, dims=(16,)):
    return {
        "max_batch_size": 8,
        "input": [_tensor(f"INPUT{i}", kind, *dims) for i in range(2)],
        "output": [_tensor(f"OUTPUT{i}", kind, *dims) for i in range(2)],
        "parameters": {"does": {"string_value": "add_sub"}},
    }


def _identity(kind, *dims, count=1, batch=8, **more):
    return {
        "max_batch_size": batch,
        "input": [_tensor(f"INPUT{i}", kind, *dims) for i in range(count)],
        "output": [_tensor(f"OUTPUT{i}", kind, *dims) for i in range(count)],
        "parameters": {"does": {"string_value": "identity"}},
        **more,
    }


def _sequence(does):
    return {
        "max_batch_size": 8,
        "input": [_tensor("INPUT", "TYPE_INT32", 1)],
        "output": [_tensor("OUTPUT", "TYPE_INT32", 1)],
        "sequence_batching": {"max_sequence_idle_microseconds": 10_000_000, "direct": {}},
        "parameters": {"does": {"string_value": does}},
    }


def _required(*optional):
    """Four inputs at most, of which the first answers; those that are optional may be left out."""
    return {
        "max_batch_size": 0,
        "input": [
            _tensor(f"INPUT{i}", "TYPE_FP32", -1, **({"optional": True} if i in optional else {}))
            for i in range(4 if optional == (3,) else 3)
        ],
        "output": [_tensor("OUTPUT0", "TYPE_FP32", 1)],
        "parameters": {"does": {"string_value": "first"}},
    }


EXAMPLES = {
    "simple": _add_sub("TYPE_INT32"),
    "simple_int8": _add_sub("TYPE_INT8"),
    "simple_string": _add_sub(STRING),
    "simple_identity": _identity(STRING, -1),
    "simple_sequence": _sequence("start"),
    "simple_dyna_sequence": _sequence("dyna"),
    "repeat_int32": {
        "max_batch_size": 0,
        "input": [
            _tensor("IN", "TYPE_INT32", -1),
            _tensor("DELAY", "TYPE_UINT32", -1),
            _tensor("WAIT", "TYPE_UINT32", 1),
        ],
        "output": [_tensor("OUT", "TYPE_INT32", 1), _tensor("IDX", "TYPE_UINT32", 1)],
        "model_transaction_policy": {"decoupled": True},
        "parameters": {"does": {"string_value": "repeat"}},
    },
}
"""The seven that the clients' HTTP examples and tests count."""

EXAMPLES_GRPC = {**EXAMPLES, "simple_string_dyna_sequence": _sequence("accumulate")}
"""The eight of gRPC's."""

RAW = {
    "onnx_zero_1_float32": _identity("TYPE_FP32", -1),
    "onnx_zero_1_float16": _identity("TYPE_FP16", -1, -1),
    "onnx_zero_3_float32": _identity("TYPE_FP32", -1, count=3),
    "onnx_zero_1_object": _identity(STRING, -1),
    "onnx_zero_1_object_1_element": _identity(STRING, 1),
    "onnx_zero_1_float32_queue": _identity(
        "TYPE_FP32",
        -1,
        dynamic_batching={
            "max_queue_delay_microseconds": 1_000_000,
            "preferred_batch_size": [8],
            "default_queue_policy": {"max_queue_size": 1},
        },
    ),
}

VALIDATION = {
    "input_all_required": _required(),
    "input_optional": _required(3),
    "input_all_optional": _required(0, 1, 2),
    "pt_identity": _identity("TYPE_FP32", 8),
    "graphdef_object_int32_int32": _add_sub(STRING),
}


def _slow(**rules):
    """Two seconds for each call, whatever its rows."""
    return {
        "max_batch_size": 4,
        "input": [_tensor("INPUT0", "TYPE_FP32", 1)],
        "output": [_tensor("OUTPUT0", "TYPE_FP32", 1)],
        "parameters": {
            "does": {"string_value": "identity"},
            "execute_delay_ms": {"string_value": "2000"},
        },
        **rules,
    }


def _step(name, told):
    return {
        "model_name": name,
        "model_version": -1,
        "input_map": {"INPUT0": "ENSEMBLE_INPUT0"},
        "output_map": {"OUTPUT0": told},
    }


_TENTH = {"max_queue_delay_microseconds": 100_000}
QUEUES = {
    "default": _slow(),
    "dynamic": _slow(dynamic_batching=_TENTH),
    "max_queue_size": _slow(
        dynamic_batching={**_TENTH, "default_queue_policy": {"max_queue_size": 4}}
    ),
    "sequence_direct": _slow(
        sequence_batching={"direct": {**_TENTH, "minimum_slot_utilization": 1.0}}
    ),
    "sequence_oldest": _slow(
        sequence_batching={"oldest": {**_TENTH, "max_candidate_sequences": 4}}
    ),
    "default_composing": _slow(),
    "dynamic_composing": _slow(dynamic_batching=_TENTH),
    "ensemble": {
        "platform": "ensemble",
        "max_batch_size": 4,
        "input": [_tensor("ENSEMBLE_INPUT0", "TYPE_FP32", 1)],
        "output": [_tensor(f"ENSEMBLE_OUTPUT{i}", "TYPE_FP32", 1) for i in range(2)],
        "ensemble_scheduling": {
            "step": [
                _step("dynamic_composing", "ENSEMBLE_OUTPUT0"),
                _step("default_composing", "ENSEMBLE_OUTPUT1"),
            ]
        },
    },
}

SETS = {
    "queues": QUEUES,
    "http": EXAMPLES,
    "grpc": EXAMPLES_GRPC,
    "raw": RAW,
    "validation": VALIDATION,
}


class Behaviour:
    """One model: what it does, and its sequences' states."""

    def __init__(self, config):
        self.config = config
        self.does = config["parameters"]["does"]["string_value"]
        self._sums = {}

    def answer(self, inputs, sequence=0, start=False, end=False):
        """Outputs by name.

        Args:
            inputs: Arrays by name; strings are bytes in an object array.
            sequence: The correlation id; 0 or empty is none.
            start: Whether this begins the sequence.
            end: Whether this ends it.
        """
        if self.does == "identity":
            return {name.replace("IN", "OUT"): array for name, array in inputs.items()}
        if self.does == "first":
            array = inputs.get("INPUT0", np.zeros(1, np.float32))
            return {"OUTPUT0": array}
        if self.does == "add_sub":
            return self._add_sub(inputs["INPUT0"], inputs["INPUT1"])
        if not sequence:
            raise ValueError(
                f"inference request to model '{self.config['name']}' must specify a non-zero or non-empty "
                "correlation ID"
            )
        value = inputs["INPUT"]
        if self.does == "accumulate":
            value = value + (0 if start else self._sums.get(sequence, 0))
            self._sums[sequence] = value
        else:
            value = value + int(start)
        if end and self.does != "start":
            value = value + int(sequence)
        return {"OUTPUT": value.astype(np.int32)}

    @staticmethod
    def _add_sub(left, right):
        if left.dtype != object:
            return {"OUTPUT0": left + right, "OUTPUT1": left - right}
        a, b = left.astype(np.int32), right.astype(np.int32)
        write = np.vectorize(lambda number: str(number).encode(), otypes=[object])
        return {"OUTPUT0": write(a + b), "OUTPUT1": write(a - b)}

    @staticmethod
    def repeat(inputs):
        """Pairs of a pause in seconds and the outputs that follow it."""
        for place, value, delay in zip(itertools.count(), inputs["IN"], inputs["DELAY"]):
            yield (
                float(delay) / 1e3,
                {"OUT": np.array([value], np.int32), "IDX": np.array([place], np.uint32)},
            )
