"""What one writes without this toolkit: FastAPI in front of a pipeline of transformers, on the merged checkpoint.

python benchmarks/classify_peer.py FOLDER PORT THREADS
"""

import io
import sys

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from PIL import Image
from transformers import pipeline


def main() -> None:
    """Serve until it is stopped."""
    task, folder, port, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(threads)
    classify = pipeline(task, model=folder, device="cpu", top_k=5)
    app = FastAPI()

    @app.get("/ready")
    async def ready() -> None:
        """Says that it answers."""

    @app.post("/predict")
    async def predict(request: Request) -> object:
        """Labels of an image, or of the text in `inputs`."""
        body = await request.body()
        if request.headers["content-type"] == "application/json":
            return await run_in_threadpool(classify, (await request.json())["inputs"])
        return await run_in_threadpool(classify, Image.open(io.BytesIO(body)))

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main()
