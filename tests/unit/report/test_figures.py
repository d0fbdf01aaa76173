"""Figures: the numbers in them, the same bytes every time, and what teacher and students look at."""

import io
import json
import shutil
from pathlib import Path

import evaluate_models
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from grace.distill import relational_cka
from grace.report import speed
from grace.report.entropy import binned, entropy_error, entropy_numbers
from grace.report.figures import attention as looking
from grace.report.figures import write as figures
from grace.report.figures.roofline import work
from grace.report.figures.style import place_labels, save, style, title_of
from grace.results.read import TEACHER, Results, Row, read_results


@pytest.fixture(scope="module")
def with_models(results_folder, tmp_path_factory):
    """The fake experiment with three real, random models in it."""
    folder = tmp_path_factory.mktemp("models") / "fake"
    shutil.copytree(results_folder, folder)
    for seed, below in enumerate(("teacher", "students/baseline/bf16/seed0", "students/grace/int4/seed0")):
        evaluate_models.model(seed=seed).save_pretrained(folder / below / "model")
        evaluate_models.processor().save_pretrained(folder / below / "model")
    return read_results(folder)


def test_figures_are_the_same_bytes_twice(tmp_path, results):
    for turn in ("a", "b"):
        (tmp_path / turn).mkdir()
        with style() as plt:
            save(figures.entropy(results, plt), tmp_path / turn, "entropy")
    for ending in ("svg", "png"):
        first, second = ((tmp_path / turn / f"entropy.{ending}").read_bytes() for turn in ("a", "b"))
        assert first == second, ending
    assert title_of((tmp_path / "a" / "entropy.svg").read_text()).startswith(
        "An unsure teacher errs more often: Pearson r"
    )
    assert "<dc:date>" not in (tmp_path / "a" / "entropy.svg").read_text()
    assert Image.open(tmp_path / "a" / "entropy.png").size[0] > 600


def test_entropy_numbers_are_the_formulas(results):
    data = pd.concat(
        pd.read_parquet(results.folder / f"teacher/predictions/{name}.parquet") for name in results.benchmarks
    )
    found = entropy_numbers(results)
    assert found["questions"] == len(data) == 240
    assert found["r"] == pytest.approx(data["entropy"].corr(1 - data["score"]))
    bins = binned(entropy_error(results))
    assert bins["count"].tolist() == [24] * 10
    images = data["image_id"].unique()
    without = [(part := data[data["image_id"] != name])["entropy"].corr(1 - part["score"]) for name in images]
    jackknife = np.sqrt((len(images) - 1) * np.var(without))
    assert found["stderr"] == pytest.approx(jackknife, rel=0.25)
    assert found["r2"] == pytest.approx(bins["entropy"].corr(bins["error"]) ** 2)


def test_titles_say_what_the_data_says(results):
    with style() as plt:
        assert "An unsure teacher errs more often" in figures.entropy(results, plt).get_suptitle()
        assert "1.24 × its throughput" in speed.pareto(results, plt).get_suptitle().replace("\n", " ")
        assert (
            speed.roofline(results, plt).get_suptitle().startswith("cpu-int4 against the dense GEMM: 1.50 × at M = 1")
        )
        assert figures.training(results, plt).get_suptitle().startswith("GRACE int4: CKA rises from")


def test_titles_follow_the_data(tmp_path, results_folder):
    """Shuffled entropies say nothing; a GRACE that answers as the baseline does is within noise."""
    folder = tmp_path / "other"
    shutil.copytree(results_folder, folder)
    for path in (folder / "teacher/predictions").glob("*.parquet"):
        frame = pd.read_parquet(path)
        frame.assign(entropy=np.random.default_rng(5).permutation(frame["entropy"])).to_parquet(path)
    for seed in (0, 1):
        shutil.rmtree(folder / f"students/grace/int4/seed{seed}/predictions")
        shutil.copytree(
            folder / f"students/baseline/bf16/seed{seed}/predictions",
            folder / f"students/grace/int4/seed{seed}/predictions",
        )
    other = read_results(folder)
    with style() as plt:
        assert "Entropy says nothing sure" in figures.entropy(other, plt).get_suptitle()
        assert "within noise" in speed.pareto(other, plt).get_suptitle()


def test_few_questions_make_no_entropy_figure_of_nan(tmp_path, results_folder):
    """A bin whose questions are all about one image has no standard error; one image alone has no correlation's."""
    folder = tmp_path / "few"
    shutil.copytree(results_folder, folder)
    files = list((folder / "teacher/predictions").glob("*.parquet"))

    def about(images: list[int]) -> Results:
        for path in files:
            frame = pd.read_parquet(path).head(12)
            right = [1, 1, 1, 0, 1, 1, 0, 1, 0, 0, 1, 0]
            frame.assign(image_id=images, entropy=np.arange(12) / 12, score=right).to_parquet(path)
        return read_results(folder)

    assert entropy_numbers(about([0] * 12)) is None
    few = about([0] * 6 + [1, 2, 3, 4, 5, 6])
    assert np.isinf(binned(entropy_error(few))["stderr"]).any() and np.isfinite(entropy_numbers(few)["stderr"])
    with style() as plt:
        figures.entropy(few, plt).canvas.draw()


def test_labels_cover_neither_bubbles_nor_each_other():
    """Three bubbles in a row, close together."""
    with style() as plt:
        _, axis = plt.subplots(figsize=(7, 4))
        points = [(1.0, 1.0), (1.1, 1.02), (1.2, 1.0), (3.0, 3.0)]
        axis.scatter(*zip(*points, strict=True))
        axis.margins(0.3)
        place_labels(axis, points, ["Baseline bf16\n0.9 MiB"] * 4, [10.0] * 4)
        boxes = [text.get_window_extent() for text in axis.texts]
    assert len(boxes) == 4
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_the_roof_is_the_floor_turned_over(results):
    data = work(results.kernel)
    row = data.iloc[0]
    assert row["packed"] == pytest.approx(2 * row["m"] * 64 * 64 / 10.0 / 1e3)
    assert (data["packed"] / data["roof"]).tolist() == pytest.approx(data["floor_share"].tolist())
    assert row["intensity"] == pytest.approx(2 * 64 * 64 / (64 * 32 + 2 * 64 * 2 + 2 * 128))


def test_a_spotlight_is_bright_where_a_model_looks():
    image = Image.fromarray(np.full((40, 60, 3), 200, np.uint8))
    drawn = looking.spotlight(image, np.array([0.1, 0.7, 0.1, 0.1]))
    assert drawn.shape == (40, 60) and drawn.min() >= 0 and drawn.max() <= 1
    assert drawn[:20, 30:].min() > drawn[20:].max() and drawn[:20, 30:].min() > drawn[:20, :30].max()


def test_one_brightness_is_one_attention():
    image, values = Image.new("RGB", (96, 96), "white"), np.arange(9) / 45
    one, hundredth = looking.spotlight(image, values), looking.spotlight(image, values * 0.01)
    assert one.max() > hundredth.max() and np.ptp(hundredth) < 0.01
    assert looking.spotlight(image, values, most=values.max()).max() == 1


def test_points_above_the_roof_are_not_to_be_trusted(tmp_path, results_folder):
    folder = shutil.copytree(results_folder, tmp_path / "busy")
    table = pd.read_csv(folder / "bench/kernel.csv")
    table.loc[0, "floor_share"] = 37.26
    table.to_csv(folder / "bench/kernel.csv", index=False)
    with style() as plt:
        said = " ".join(speed.roofline(read_results(folder), plt).get_suptitle().split())
    assert said.startswith("NOT TO BE TRUSTED") and "37.26 times the measured roof" in said


def test_losses_of_different_units_have_panels_of_their_own(results):
    with style() as plt:
        figure = figures.training(results, plt)
        panels = {axis.get_title(loc="left"): axis.get_legend_handles_labels()[1] for axis in figure.axes}
    assert not set(panels["KL to the teacher (nats)"]) & set(panels["gated decoupled KD (nats)"])
    assert "GRACE int4" in panels["gated decoupled KD (nats)"]
    legends = [axis.get_legend() for axis in figure.axes if axis.get_legend()]
    assert len(legends) == 1 and "GRACE int4" in {text.get_text() for text in legends[0].get_texts()}


def test_labels_are_drawn_as_they_are(tmp_path, results_folder):
    """Dollar signs are no formula, and nothing fails on them."""
    folder = shutil.copytree(results_folder, tmp_path / "odd")
    path = folder / "config/experiment.json"
    config = json.loads(path.read_text())
    config["recipes"]["grace"]["label"] = "a$b$_[x]{\\frac <script>"
    path.write_text(json.dumps(config))
    odd = read_results(folder)
    with style() as plt:
        for name in ("pareto", "training", "entropy"):
            figure = {**figures.DRAWN, **speed.FIGURES}[name](odd, plt)
            save(figure, tmp_path, name)
            texts = [
                text for text in figure.findobj(match=lambda it: hasattr(it, "get_text")) if "script" in text.get_text()
            ]
            assert all(r"\$" in text.get_text() for text in texts)
    assert "a$b$_[x]{\\frac <script> int4" in title_of((tmp_path / "pareto.svg").read_text())


def test_without_measurements_a_figure_says_so(tmp_path, results_folder):
    folder = tmp_path / "bare"
    shutil.copytree(results_folder, folder)
    shutil.rmtree(folder / "bench")
    with style() as plt:
        drawn = speed.pareto(read_results(folder), plt)
        assert "decoding was not measured" in drawn.axes[0].texts[0].get_text()
        for draw in (speed.roofline, figures.attention, figures.similarity):  # the fake models have no weights
            assert draw(read_results(folder), plt).get_suptitle() == "Not drawn"


def test_every_figure_is_written(tmp_path, with_models):
    figures.write_figures(with_models, tmp_path / "figures")
    written = {path.name for path in (tmp_path / "figures").iterdir()}
    assert written == {f"{name}.{end}" for name in figures.NAMES for end in ("svg", "png")} | {
        "manifest.json",
        "environment.json",
    }


def test_attention_is_a_distribution_over_a_part_of_the_prompt(with_models):
    for row in (TEACHER, Row("baseline", "bf16"), Row("grace", "int4")):
        for look in looking.looks(with_models, row):
            assert look.attention.shape == (2, 4) and look.tokens.shape == (4, 32)
            assert (look.attention >= 0).all() and (look.attention.sum(1) < 1).all()


def test_the_teachers_right_answer_is_drawn_first_and_images_differ(with_models):
    asked = looking.questions(with_models)
    scores = with_models.predictions(TEACHER, 0, "colour").set_index("sample_id")["score"]
    assert scores[asked["id"].iloc[0]] == 1
    assert len(asked) == looking.IMAGES and asked["image_id"].is_unique


def test_titles_of_what_models_look_at_are_tested(results):
    base, ours = Row("baseline", "bf16"), Row("grace", "int4")
    noise = np.random.default_rng(0).normal(0, 0.01, 16)
    said = looking._finding(results, "attention", {base: 0.4 + noise, ours: 0.6 - noise})
    nearer = "GRACE int4's attention is nearer to the teacher's than the baseline's is"
    assert said == f"{nearer}: Baseline bf16 0.40, GRACE int4 0.60"
    assert "farther from" in looking._finding(results, "attention", {base: 0.6 + noise, ours: 0.4 - noise})
    even = noise - noise.mean()
    close = looking._finding(results, "attention", {base: 0.401 + even, ours: 0.404 + 0.9 * even})
    assert close.endswith("Baseline bf16 0.401, GRACE int4 0.404")
    assert "within noise" in looking._finding(results, "attention", {base: 0.4 + noise, ours: 0.4 - noise})


def test_cka_is_the_training_losss_own():
    a, b = torch.randn(9, 8, generator=torch.manual_seed(0)), torch.randn(9, 5, generator=torch.manual_seed(1))
    assert looking.cka(a.numpy(), b.numpy()) == pytest.approx(1 - relational_cka(b, a).item(), abs=1e-5)
    assert np.isnan(looking.cka(np.ones((9, 3)), b.numpy()))


def test_hidden_states_are_the_penultimate_layers_output(with_models):
    """Taken by a hook on that layer, for the first question."""
    folder = Path(with_models.folder / "teacher/model")
    from grace.infer.prompt import build_prompts
    from grace.models import load_model, load_processor

    asked = looking.questions(with_models)
    with Image.open(io.BytesIO(asked["image"].iloc[0]["bytes"])) as image:
        inputs = build_prompts(load_processor(folder), [(image.convert("RGB"), asked["question"].iloc[0])])
    model = load_model(folder, dtype=torch.float32)
    kept = []
    layers = model.model.language_model.layers
    layers[-2].register_forward_hook(lambda _, __, out: kept.append(out[0] if isinstance(out, tuple) else out))
    with torch.inference_mode():
        model(**inputs)
    visual = inputs["input_ids"][0] == model.config.image_token_id
    expected = kept[0].reshape(-1, 32)[visual]
    assert np.allclose(looking.looks(with_models, TEACHER)[0].tokens, expected.numpy(), atol=1e-4)
