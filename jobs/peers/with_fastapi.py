"""FastAPI on Uvicorn, with a queue that makes batches."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import uvicorn
from fastapi import FastAPI, UploadFile

from jobs.peers.common import BATCH, WAIT_SECONDS, PeerOptions, decoded, load


def build(options: PeerOptions) -> FastAPI:
    """Return the application."""
    spec, answers = load(options)
    api = FastAPI()
    threads, model = ThreadPoolExecutor(2), ThreadPoolExecutor(1)
    queue: asyncio.Queue[tuple[np.ndarray, asyncio.Future[dict[str, float]]]] = asyncio.Queue()

    async def batches() -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await queue.get()]
            until = time.monotonic() + WAIT_SECONDS
            while len(batch) < BATCH and (left := until - time.monotonic()) > 0:
                try:
                    batch.append(await asyncio.wait_for(queue.get(), left))
                except TimeoutError:
                    break
            found = await loop.run_in_executor(model, answers, [pixels for pixels, _ in batch])
            for (_, future), answer in zip(batch, found, strict=True):
                future.set_result(answer)

    @api.post("/predict")
    async def predict(request: UploadFile) -> dict[str, float]:
        loop = asyncio.get_running_loop()
        if not hasattr(api.state, "batches"):
            api.state.batches = asyncio.ensure_future(batches())
        pixels_SS = await loop.run_in_executor(threads, decoded, await request.read(), spec)
        future: asyncio.Future[dict[str, float]] = loop.create_future()
        await queue.put((pixels_SS, future))
        return await future

    return api


if __name__ == "__main__":
    given = PeerOptions.from_command()
    uvicorn.run(build(given), port=given.port, log_level="warning")
