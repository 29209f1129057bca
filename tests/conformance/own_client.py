"""Closed-loop load of our own client: `own_client.py URL CONCURRENCY`; prints requests per second and median."""

import asyncio
import statistics
import sys
import time

import numpy as np

from utune_deploy.serving.client import AsyncClient

WARM, MEASURED = 1.0, 5.0


async def main() -> None:
    url, concurrency = sys.argv[1], int(sys.argv[2])
    tasks = ("pets", "cars", "flowers")
    spent: list[float] = []
    start = time.perf_counter()

    async def ask(client: AsyncClient, number: int) -> None:
        row = np.random.default_rng(number).random((3, 8, 8), np.float32)
        while (at := time.perf_counter()) < start + WARM + MEASURED:
            await client.ask(row, task=tasks[number % len(tasks)])
            if at > start + WARM:
                spent.append(time.perf_counter() - at)

    async with AsyncClient(url, model="tiny") as client:
        await asyncio.gather(*(ask(client, number) for number in range(concurrency)))
    print(f"{len(spent) / MEASURED:.0f}/s, p50 {statistics.median(spent) * 1e3:.2f} ms")


asyncio.run(main())
