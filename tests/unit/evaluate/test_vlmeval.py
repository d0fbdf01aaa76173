"""The VLMEvalKit adapter against the contract of its classes: a stand-in checkout with just what the adapter calls.

`tests/harness/check_vlmeval.py` runs the same adapter on the real one.
"""

import base64
import hashlib
import json
import ssl
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
from evaluate_models import make_image, rows, write_benchmark, write_model

from grace.benchmarks.protocols import PROTOCOLS, spec
from grace.errors import GraceError
from grace.evaluate.commands import evaluate
from grace.results.predictions import read_rows

FILES = {
    "__init__.py": "import ssl\nssl._create_default_https_context = ssl._create_unverified_context\n",
    "smp.py": """
import hashlib, pathlib, pandas as pd
def load(path): return pd.read_csv(path, sep="\\t")
def dump(data, path): data.to_csv(path, sep="\\t", index=False)
def md5(path): return hashlib.md5(pathlib.Path(path).read_bytes()).hexdigest()
def get_intermediate_file_path(path, suffix): return path.replace(".tsv", suffix + ".tsv")
""",
    "vlm/__init__.py": "",
    "vlm/base.py": """
class BaseModel:
    INTERLEAVE = False
    def __init__(self): self.dump_image_func = None
    def set_dump_image(self, function): self.dump_image_func = function
    def message_to_promptimg(self, message, dataset=None):
        texts = [part["value"] for part in message if part["type"] == "text"]
        return "\\n".join(texts), [part["value"] for part in message if part["type"] == "image"][0]
    def generate(self, message, dataset=None): return self.generate_inner(message, dataset)
""",
    "inference.py": """
from vlmeval.smp import dump
def infer_data_job(model, work_dir, model_name, dataset):
    model.set_dump_image(dataset.dump_image)
    said = [model.generate(dataset.build_prompt(row), dataset.dataset_name) for _, row in dataset.data.iterrows()]
    answered = dataset.data.assign(prediction=said).drop(columns="image")
    dump(answered, f"{work_dir}/{model_name}_{dataset.dataset_name}.tsv")
""",
    "dataset/__init__.py": """
from vlmeval.dataset.image_base import ImageBaseDataset
from vlmeval.smp import dump, get_intermediate_file_path, load
class ImageYORNDataset(ImageBaseDataset):
    TYPE, DATASET_MD5 = "Y/N", {"POPE": "PINNED"}
    def load_data(self, name):
        import os
        return load(f"{os.environ['LMUData']}/{name}.tsv")
    def evaluate(self, path, model, nproc):
        assert model == "exact_matching"
        data = load(path)
        said = data["prediction"].fillna("").astype(str).str.lower()
        words = said.map(lambda text: "Yes" if "yes" in text else READING)
        dump(data.assign(extracted=words, score=words == data["answer"]), get_intermediate_file_path(path, "_auxmatch"))
SUPPORTED_DATASETS = ["POPE"]
def build_dataset(name): return ImageYORNDataset(name)
""",
    "dataset/image_base.py": """
import base64, os, pathlib
class ImageBaseDataset:
    DATASET_MD5 = {}
    def __init__(self, name): self.dataset_name, self.data = name, self.load_data(name)
    def dump_image(self, row):
        path = pathlib.Path(os.environ["LMUData"]) / f"{row['index']}.png"
        path.write_bytes(base64.b64decode(row["image"]))
        return [str(path)]
    def build_prompt(self, row):
        images = [{"type": "image", "value": path} for path in self.dump_image(row)]
        return [*images, {"type": "text", "value": row["question"]}]
""",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    table = pd.DataFrame(
        {
            "index": range(6), "image": [base64.b64encode(make_image(i // 2)).decode() for i in range(6)],
            "question": "is the bag red", "answer": ["Yes", "No"] * 3, "category": "random",
        }
    )  # fmt: skip
    write_model(tmp_path / "model")
    write_benchmark(tmp_path / "data/benchmarks/colour.parquet", rows(12))
    table.to_csv(tmp_path / "data/benchmarks/pope.tsv", sep="\t", index=False)
    pinned = hashlib.md5((tmp_path / "data/benchmarks/pope.tsv").read_bytes()).hexdigest()
    for name, text in FILES.items():
        path = tmp_path / "checkout/vlmeval" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("PINNED", pinned).replace("READING", "'Unknown'"))
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", tmp_path / "checkout", *command], check=True)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(PROTOCOLS["vlmevalkit"], "pope", replace(spec("vlmevalkit", "pope"), size=6))
    for name in ("LMUData", "PRED_FORMAT"):
        monkeypatch.setenv(name, "")
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "vlmeval"]:
        del sys.modules[name]


def run(folder, harness: str, *names: str) -> dict:
    evaluation = {
        "benchmarks": list(names), "batch": 4, "max_new_tokens": 3, "harness": harness,
        "vlmeval_checkout": str(folder / "checkout"),
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps({"family": "llava", "evaluation": evaluation}))
    evaluate(folder / "run.json", folder / "model", folder / "data", folder / harness)
    return json.loads((folder / harness / "manifest.json").read_text())


def test_the_demo_is_answered_as_under_lm_eval_and_certificates_stay_checked(folder):
    before = ssl._create_default_https_context
    manifest = run(folder, "vlmeval", "colour", "pope")
    assert ssl._create_default_https_context is before
    assert len(manifest["harness"]["version"]) == 40
    run(folder, "lm-eval", "colour")
    same = ["sample_id", "image_id", "group", "prediction", "extracted", "target", "score"]
    one, other = (read_rows(folder / harness / "colour.parquet") for harness in ("vlmeval", "lm-eval"))
    assert one[same].equals(other[same])
    pope = read_rows(folder / "vlmeval/pope.parquet")
    assert pope["image_id"].nunique() == 3 and (pope["group"] == "random").all()
    assert (pope["score"] == (pope["extracted"] == pope["target"])).all()


def test_a_score_that_is_not_vlmevalkits_is_an_error(folder):
    path = folder / "checkout/vlmeval/dataset/__init__.py"
    path.write_text(path.read_text().replace("'Unknown'", "'No'"))
    with pytest.raises(GraceError, match=r"row 1: VLMEvalKit scores '.*' 1, the protocol here 0; report it"):
        run(folder, "vlmeval", "pope")


def test_another_copy_of_a_data_set_is_refused(folder):
    table = folder / "data/benchmarks/pope.tsv"
    table.write_text(table.read_text() + "\n")
    with pytest.raises(GraceError, match=r"pope\.tsv: is not VLMEvalKit's copy of POPE \(md5 "):
        run(folder, "vlmeval", "pope")


def test_a_checkout_that_does_not_import_is_said_so(folder):
    (folder / "checkout/vlmeval/vlm/base.py").write_text("import no_such_package\n")
    with pytest.raises(GraceError, match=r"VLMEvalKit does not import here .*no_such_package.*envs/vlmeval\.txt"):
        run(folder, "vlmeval", "colour")
