"""`python tests/programs/ask_vllm.py FOLDER...`: ask vLLM's chat about the image beside each folder of a model.

Each FOLDER is one that `make_models.py` made (OUT/FAMILY/packed, .../plain, .../gptq). Prints one line a folder and
exits with 1 where an answer is not the student's. One process per folder is what vLLM likes. VLLM_CPU_INT4_W4A8=1 lets
a processor with AMX round activations to 8 bits, as vLLM does by itself.
"""

import base64
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_INT4_W4A8", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
from vllm import LLM, SamplingParams

TOLERANCE = 0.2  # of log-probabilities: vLLM computes in bf16, the student's were taken in fp32


def ask(folder: Path) -> bool:
    """Whether the answer is the student's, within rounding, and not the one about another image."""
    expected = json.loads((folder.parent / "expected.json").read_text())
    model = LLM(
        str(folder), dtype="bfloat16", max_model_len=512, enforce_eager=True, max_num_seqs=1, seed=0,
        limit_mm_per_prompt={"image": 1, "video": 0}, gpu_memory_utilization=0.3,
    )  # fmt: skip
    url = "data:image/png;base64," + base64.b64encode((folder.parent / "image.png").read_bytes()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": expected["question"]}]
    (done,) = model.chat([{"role": "user", "content": parts}], SamplingParams(temperature=0, max_tokens=8, logprobs=5))
    length, answer = len(done.prompt_token_ids), done.outputs[0]
    found = {token: entry.logprob for token, entry in answer.logprobs[0].items()}
    distance = max(abs(value - expected["first"][token]) for token, value in found.items())
    blind = max(abs(value - expected["other_image"][token]) for token, value in found.items())
    same = 0
    for ours, theirs in zip(expected["tokens"], answer.token_ids, strict=False):
        if ours != theirs:
            break
        same += 1
    print(
        f"{folder}: prompt {length} tokens (ours {expected['prompt_tokens']}), first {same} of "
        f"{len(expected['tokens'])} tokens equal, log-probabilities within {distance:.3f} "
        f"({blind:.3f} from another image's)"
    )
    return length == expected["prompt_tokens"] and distance < TOLERANCE < blind


if __name__ == "__main__":
    sys.exit(0 if all([ask(Path(name)) for name in sys.argv[1:]]) else 1)
