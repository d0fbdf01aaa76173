"""vLLM for real: tiny models of every family in every form, the cards' own code, the server, the evaluation's engine.

VLLM_PYTHON=/tmp/vllm/bin/python .venv/bin/pytest -n 0 tests/programs

VLLM_PYTHON is the python of an environment that has vLLM; README.md beside this file says how to make one.
"""

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from chat_models import FAMILIES
from PIL import Image
from transformers import AutoModelForImageTextToText

from grace.arithmetic import SETTINGS

HERE = Path(__file__).parent
PYTHON = os.environ.get("VLLM_PYTHON", sys.executable)
MODELS = [(family, form) for family in FAMILIES for form in ("plain", "packed", "awq", "gptq")]
MODELS += [(f"{family}-wide", "packed") for family in FAMILIES]
MODELS += [(f"{family}-tied", "packed") for family in FAMILIES if "qwen" in family]
TOLERANCE = 0.2  # of log-probabilities, as in ask_vllm.py
# As docs/deploy.md has it for a processor, with a smaller cache; and nothing of what this package sets for itself
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in (*SETTINGS, "VLLM_PYTHON")} | {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_INT4_W4A8": "0", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING",
}  # fmt: skip


def _hindrance() -> str | None:
    """Why vLLM cannot be asked here."""
    if subprocess.run([PYTHON, "-c", "import vllm"], capture_output=True).returncode:
        return f"{PYTHON} does not import vllm; set VLLM_PYTHON to the python of an environment that has it"
    known = Path("/proc/cpuinfo")
    if torch.cuda.is_available() or (known.is_file() and " avx512f " in known.read_text()):
        return None
    return "this processor has no AVX-512, which vLLM's INT4 GEMMs on a CPU need"


HINDRANCE = _hindrance()
pytestmark = pytest.mark.skipif(HINDRANCE is not None, reason=str(HINDRANCE))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A function that makes one of make_models.py's models and gives its folder."""
    out = tmp_path_factory.mktemp("models")

    def made(model: str) -> Path:
        if not (out / model).is_dir():
            subprocess.run([sys.executable, HERE / "make_models.py", out, model], check=True, capture_output=True)
        return out / model

    return made


def run(arguments: list, at: Path, **more: str) -> subprocess.CompletedProcess:
    environment = ENVIRONMENT | more
    return subprocess.run(arguments, cwd=at, env=environment, capture_output=True, text=True, errors="replace")


@pytest.mark.parametrize(("model", "form"), MODELS)
def test_it_answers_as_the_student_does(folder, model, form, tmp_path):
    done = run([PYTHON, HERE / "ask_vllm.py", folder(model) / form], tmp_path)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has products of 8 bits")
def test_a_processor_has_no_product_of_8_bits_as_the_card_says(folder, tmp_path):
    done = run([PYTHON, HERE / "ask_vllm.py", folder("qwen2_vl-int8") / "packed"], tmp_path)
    assert done.returncode == 1 and "Failed to find a kernel" in done.stdout + done.stderr
    assert "no product of 8 bits" in (folder("qwen2_vl-int8") / "packed/README.md").read_text()


def transformers_answer(folder: Path, image: Path) -> str:
    """To the cards' question, without the processor's part for videos, which needs torchvision."""
    model = AutoModelForImageTextToText.from_pretrained(folder, device_map="cpu")
    processor = FAMILIES["qwen2_vl"]()[1]
    content = [{"type": "image", "image": Image.open(image)}, {"type": "text", "text": "What is in this image?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt"
    ).to(model.device, model.dtype)  # fmt: skip
    answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("form", ["packed", "awq", "gptq"])
def test_the_cards_code_gives_the_answer_of_transformers(folder, form, tmp_path):
    model = folder("qwen2_vl")  # whose answer is letters
    Image.open(model / "image.png").save(tmp_path / "image.jpg", quality=95)
    blocks = re.findall(r"```python\n(.*?)```", (model / form / "README.md").read_text(), re.DOTALL)
    code = next(block for block in blocks if "from vllm import" in block).replace("FOLDER", str(model / form))
    (tmp_path / "ask.py").write_text(code)
    done = run([PYTHON, "ask.py"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    begins = transformers_answer(model / "packed", tmp_path / "image.jpg")[:3]
    assert begins.isprintable() and begins in done.stdout, (begins, done.stdout[-1000:])


def test_its_server_answers_a_chat(folder, tmp_path):
    model = folder("llava-clip")
    expected = json.loads((model / "expected.json").read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = "data:image/png;base64," + base64.b64encode((model / "image.png").read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": expected["question"]}]
    request = {
        "model": "student", "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 8,
        "logprobs": True, "top_logprobs": 5, "return_tokens_as_token_ids": True,
    }  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", model / "packed", "--served-model-name",
             "student", "--max-model-len", "512", "--host", "127.0.0.1", "--port", str(port)],
            env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        until = time.monotonic() + 600
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                said = (tmp_path / "log").read_text()[-3000:]
                assert server.poll() is None and time.monotonic() < until, said
                time.sleep(1)
        asked = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(request).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        answer = json.load(urllib.request.urlopen(asked, timeout=300))
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)
    assert answer["usage"]["prompt_tokens"] == expected["prompt_tokens"]
    first = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    found = {int(entry["token"].removeprefix("token_id:")): entry["logprob"] for entry in first}
    assert max(abs(value - expected["first"][token]) for token, value in found.items()) < TOLERANCE


@pytest.mark.parametrize("model", ["llava-clip", "qwen3_vl"])
def test_the_evaluations_engine(folder, model, tmp_path):
    path = {"PYTHONPATH": str(HERE.parents[1] / "workflow")}
    needs = run(
        [PYTHON, "-c", "import grace.evaluate.engine_vllm, grace.evaluate.runner, grace.models"], tmp_path, **path
    )
    if needs.returncode:
        pytest.skip(f"{PYTHON} lacks this package's needs ({needs.stderr.strip().splitlines()[-1]})")
    more = path | SETTINGS | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}  # as `grace evaluate` starts it
    done = run([PYTHON, HERE / "ask_vllm_engine.py", folder(model) / "packed"], tmp_path, **more)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
