"""What the client of `utune-deploy load` takes itself.

    python bench/load_floor.py -o bench/results/load/floor.json

Loads stand-ins that answer at once with a reply that was written before, each in a process of its own: the latency is
the client's and that of a server which does nothing, the processor time is the client's alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import time
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from utune_deploy.deploy.bench.machine import load_now, read_machine
from utune_deploy.deploy.load.rows import draw_rows
from utune_deploy.deploy.load.run import load
from utune_deploy.deploy.load.step import CLOSED, Settings, Step
from utune_deploy.deploy.load.target import Target
from utune_deploy.deploy.load.traffic import write_traffic
from utune_deploy.serving.client.address import parse
from utune_deploy.serving.client.calls import ModelFacts

REPLY = json.dumps(
    {"outputs": [{"name": "logits", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}}]}
).encode()  # fmt: skip


class Instant(asyncio.Protocol):
    """Writes the same reply whenever a whole request was read."""

    def connection_made(self, transport: Any) -> None:
        """Keep the way back."""
        self.transport, self.buffer = transport, b""
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(REPLY) + 8}\r\n"
        head += f"Inference-Header-Content-Length: {len(REPLY)}\r\n\r\n"
        self.reply = head.encode() + REPLY + bytes(8)

    def data_received(self, data: bytes) -> None:
        """Answer every request that is complete."""
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        length = int(head.partition(b"Content-Length: ")[2].split(b"\r\n")[0]) if found else 0
        if found and len(body) >= length:
            self.buffer = body[length:]
            self.transport.write(self.reply)


def _stand_in(front: str, ports: Any) -> None:
    """Run a stand-in and say its port."""

    async def http() -> None:
        server = await asyncio.get_running_loop().create_server(Instant, "127.0.0.1", 0)
        ports.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    async def grpc() -> None:
        import grpc
        from tritonclient.grpc import service_pb2

        message = service_pb2.ModelInferResponse(raw_output_contents=[bytes(8)])
        message.outputs.add(name="logits", datatype="FP32", shape=[1, 2])
        reply = message.SerializeToString()

        async def infer(request: bytes, context: Any) -> bytes:
            return reply

        handlers = {"ModelInfer": grpc.unary_unary_rpc_method_handler(infer)}
        server = grpc.aio.server()
        service = "inference.GRPCInferenceService"
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        ports.put(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        await server.wait_for_termination()

    asyncio.run(http() if front == "http" else grpc())


def floor(seconds: float) -> dict[str, Any]:
    """Latency and throughput against servers that do nothing, and the client's processor time per request."""
    found = {}
    print("| stand-in | p50, ms | p99, ms | answers/s | client's processor, us per request |")
    print("|---|---|---|---|---|")
    spawn = multiprocessing.get_context("spawn")
    for front in ("http", "grpc"):
        ports = spawn.Queue()
        process = spawn.Process(target=_stand_in, args=(front, ports))
        process.start()
        try:
            address = parse(f"{front}://127.0.0.1:{ports.get(timeout=60)}")
            target = Target(
                address, "stand-in", ModelFacts(8, {"images": ("FP32", (3, 32, 32))}), ()
            )
            traffic = write_traffic(
                target, draw_rows(target, 0), batch=1, mix="uniform", encoding="binary", seed=0, source="drawn"
            )  # fmt: skip
            for callers in (1, 8):
                settings = Settings(warmup_s=0.5, seconds=seconds)
                began = time.process_time()
                (step,) = load(target, traffic, [Step(CLOSED, callers)], settings).steps
                spent = time.process_time() - began
                assert step.latency is not None
                # The warm-up's requests are not counted, and its time is not either.
                share = settings.seconds / (settings.seconds + settings.warmup_s)
                own_us = 1e6 * spent * share / step.latency.samples
                name = f"{front}, callers {callers}"
                found[name] = {
                    "p50 ms": step.latency.p50_ms, "p99 ms": step.latency.p99_ms,
                    "answers per second": step.answered_per_second, "client us per request": own_us,
                }  # fmt: skip
                cells = (f"{value:.3g}" for value in found[name].values())
                print(f"| {' | '.join([name, *cells])} |", flush=True)
        finally:
            process.terminate()
            process.join()
    return {"floor": found}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=6.0, help="Of each measurement.")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    facts = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": asdict(read_machine()),
        "seconds": options.seconds,
        "load before": load_now(),
    }
    result = {**floor(options.seconds), **facts, "load after": load_now()}
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
