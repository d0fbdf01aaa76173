"""Ask llama.cpp about an image, as its users do: `ask_llama.py FOLDER IMAGE QUESTION` prints its chat answer as JSON.

In a process of its own, because llama.cpp aborts the process on a file that it cannot take.
"""

import base64
import json
import sys
from pathlib import Path

import xllamacpp


def main(folder: Path, image: Path, question: str) -> None:
    params = xllamacpp.CommonParams()
    params.model.path, params.mmproj.path = str(folder / "model-Q4_0.gguf"), str(folder / "mmproj-BF16.gguf")
    params.n_ctx, params.n_parallel, params.warmup, params.port = 1024, 1, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    url = "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    answer = server.handle_chat_completions(
        {
            "messages": [{"role": "user", "content": parts}],
            "temperature": 0,
            "max_tokens": 6,
            "logprobs": True,
            "top_logprobs": 5,
        }
    )
    print(json.dumps(answer if isinstance(answer, dict) else json.loads(answer)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
