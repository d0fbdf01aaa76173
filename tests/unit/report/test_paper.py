"""The paper's names for recipes and benchmarks, and where its numbers stand beside ours."""

import pytest
from fake_results import experiment

from grace.config.load import load_experiment
from grace.config.schema import Recipe
from grace.report.paper import canonical, label, paper_beside, paper_numbers, role, roles, seed_range, what_was_run
from grace.results.read import Row


def test_the_papers_numbers_stand_beside_its_own_models_alone(tables):
    for name, table in tables.items():
        if name != "claims":  # models that were made here: the paper is quoted for its claims
            assert not any(cell.paper for line in table.lines for cell in line.cells), name
    llava, qwen = (load_experiment(f"workflow/experiments/{name}.yaml") for name in ("llava15_7b", "qwen2vl_2b"))
    assert paper_beside(llava, "2", "rtn", "int4", "GQA") == 61.2
    assert paper_beside(llava, "2", "baseline", "bf16", "GQA") == 62.0  # of its Table 1
    assert paper_beside(llava, "3", "teacher", "bf16", "ScienceQA") is None  # that table is Qwen2-VL's
    assert paper_beside(qwen, "3", "teacher", "bf16", "ScienceQA") == 83.3
    assert paper_beside(qwen, "3", "teacher", "bf16", "GQA") is None
    assert paper_beside(qwen, "1", "teacher", "bf16", "GQA") is None
    assert paper_beside(qwen, "3", "gdkd+ib", "bf16", "MMBench") == 76.8
    assert paper_beside(qwen, "4", "kd", "int8", "ScienceQA") == 76.3
    assert paper_beside(llava, "2", "grace", "int8", "MME") is None


@pytest.mark.parametrize(
    ("name", "changes", "shown"),
    [
        ("llava15_7b", {}, "teacher rtn finetune grace"),
        ("llava15_7b", {"teacher": {"pretrained": "/models/teacher"}}, ""),
        ("llava15_7b", {"student": {"pretrained": "/hub/models--llava-hf--llava-1.5-7b-hf/snapshots/0a1b"}},
            "teacher rtn finetune grace"),
        ("llava15_7b", {"student": {"pretrained": "llava-hf/bakLlava-v1-hf"}}, ""),
        ("llava15_7b", {"evaluation": {"limit": 100}}, ""),
        ("llava15_7b", {"evaluation": {"max_new_tokens": 4}}, ""),
        ("llava15_7b", {"data": {"sources": [{"path": "data/mine.json"}]}}, "teacher rtn"),
        ("llava15_7b", {"finetune": {"epochs": 1}}, "teacher rtn"),
        ("llava15_7b", {"finetune": {"epochs": None, "steps": 100}}, "teacher rtn"),
        ("llava15_7b", {"method": {"tau": 1.0}}, "teacher rtn finetune"),
        ("llava15_7b", {"method": {"omega_warmup": 0.2}}, "teacher rtn finetune grace"),
        ("llava15_7b", {"recipes": {"grace": {"kd": "gated", "rcka": True, "controller": True,
            "method": {"omega": 1.0}}}}, "teacher rtn finetune"),
        ("llava15_7b", {"quantization": {"group_size": 64}}, "teacher"),
        ("llava15_7b", {"quantization": {"scale_lr_factor": 20}}, "teacher rtn"),
        ("qwen3vl_2b", {}, "teacher grace"),
        ("qwen3vl_2b", {"finetune": {"epochs": 3}}, "teacher"),
    ],
)  # fmt: skip
def test_the_papers_numbers_need_its_models_questions_and_training(name, changes, shown):
    def merged(below, above):
        both = below.keys() & above.keys()
        deep = {
            key: merged(below[key], above[key])
            for key in both
            if isinstance(above[key], dict) and isinstance(below[key], dict)
        }
        return {**below, **above, **deep}

    shipped = load_experiment(f"workflow/experiments/{name}.yaml").model_dump(mode="json")
    experiment = load_experiment(merged(shipped, changes))
    cells = {
        "teacher": ("1", "teacher", "bf16"), "rtn": ("2", "rtn", "int4"), "finetune": ("2", "none", "int4"),
        "grace": ("2", "grace", "int4"),
    }  # fmt: skip
    benchmark = "SEED-Bench" if name == "qwen3vl_2b" else "VQAv2"
    found = [which for which, (*cell,) in cells.items() if paper_beside(experiment, *cell, benchmark) is not None]
    assert found == shown.split()


def test_roles():
    config = experiment()
    run = {name for runs in config.runs for name in runs.recipes}
    named = {name: role(recipe) for name, recipe in config.recipes.items() if name in run}
    assert named == {
        "rtn": "rtn", "awq": "awq", "qat": "none", "kd": "kd", "gdkd": "gdkd", "rcka": "rcka", "ib": "ib",
        "grace": "grace",
    }  # fmt: skip
    assert role(Recipe(kd="gated", controller=True)) == "gdkd+ib"
    assert role(Recipe(kd="plain", rcka=True, controller=True)) == "rcka+ib"
    assert role(Recipe(kd="plain", rcka=True)) == "kd+rcka"
    later = {"rtn-later": Recipe(post_training="rtn", start="qat/bf16"), **config.recipes}
    runs = [config.runs[0].model_copy(update={"recipes": ["rtn-later", "rtn"]})]
    found = roles(config.model_copy(update={"recipes": later, "runs": runs}))
    assert (found["rtn"], found["rtn-later"]) == ("rtn", "variant")  # the paper rounds the baseline


def test_names_for_people():
    config = experiment()
    assert label(config, Row("qat", "bf16")) == "Fine-tuning" and label(config, Row("qat", "int4")) == "QAT"
    assert seed_range((0, 1, 2)) == "seeds 0-2" and seed_range((3,)) == "seed 3" and seed_range((0, 2)) == "seeds 0, 2"
    assert what_was_run(config, (0,)) == "demo models, not LLaVA-1.5, on demo images; seed 0"
    assert (
        canonical("scienceqa-img") == "ScienceQA" and canonical("SQA") == "ScienceQA" and canonical("mmb") == "MMBench"
    )
    assert canonical("seed-bench") == "SEED-Bench" and canonical("colour") == "colour"


def test_paper_numbers_are_whole():
    numbers = paper_numbers()
    assert len(numbers) == 162 and not numbers.duplicated(["source", "table", "row", "precision", "benchmark"]).any()
