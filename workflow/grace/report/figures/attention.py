"""What teacher, baseline and GRACE student look at: attention over the image (Figure 3), visual-token similarity (5).

One test question is drawn, the first that the teacher answers right; the numbers in the titles are means over the
first IMAGES questions, so that they say more than one image can. Runs each model in fp32 with eager attention.
"""

import io
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from scipy import stats

from grace.errors import GraceError
from grace.report.figures.style import WIDE, headline, named, nothing, plain
from grace.report.paper import GRACE, row_role
from grace.results.read import BASELINE, TEACHER, Results, Row
from grace.results.statistics import ALPHA

IMAGES = 16
LAYERS = 5  # at most so many of a model's layers are drawn, evenly spread, the last always


@dataclass(frozen=True)
class Look:
    """What one model does with one question about one image.

    Attributes:
        attention: [layers, visual tokens] from the position that answers to each visual token, mean over heads.
        tokens: [visual tokens, d] output of the penultimate decoder layer.
        answer: the first token it would say.
    """

    attention: np.ndarray
    tokens: np.ndarray
    answer: str


def shown_models(results: Results) -> list[Row]:
    """Teacher, baseline and the GRACE student (INT4 where there is one), as far as their models are here."""
    ours = [row for row in results.rows() if row_role(results.experiment, row) == GRACE]
    ours.sort(key=lambda row: row.precision != "int4")
    return [
        row
        for row in (TEACHER, BASELINE, *ours[:1])
        if row in results.seeds and (_model(results, row) / "config.json").is_file()
    ]


def _model(results: Results, row: Row):
    return results.folder / row.folder(results.seeds[row][0]) / "model"


def _lacking(results: Results) -> str | None:
    """Why nothing can be drawn, if so."""
    rows = shown_models(results)
    if TEACHER not in rows or len(rows) < 2:
        return f"{results.folder.name}: the models of the teacher and of a student are not here"
    if results.questions_file(results.benchmarks[0]) is None:
        return (
            f"{results.folder.name}: no questions of {results.benchmarks[0]} with images in this pipeline's own layout "
            "are here"
        )
    return None


def questions(results: Results) -> pd.DataFrame:
    """The first questions, each about another image: id, question, answer, image bytes;
    first one the teacher has right.
    """
    benchmark = results.benchmarks[0]
    path = results.benchmark_path(benchmark)
    try:
        frame = pq.read_table(path, columns=["id", "image", "image_id", "question", "answer"]).to_pandas()
    except FileNotFoundError:
        raise GraceError(f"{path}: no such file; prepare the data first, or pull it with `dvc pull`") from None
    scores = results.predictions(TEACHER, results.seeds[TEACHER][0], benchmark).set_index("sample_id")["score"]
    frame = frame[frame["id"].isin(scores.index)].sort_values("id", kind="stable").drop_duplicates("image_id")
    right = frame["id"].map(scores) >= 1
    first = frame.index[right][:1] if right.any() else frame.index[:1]
    return pd.concat([frame.loc[first], frame.drop(first)]).head(IMAGES)


@lru_cache(maxsize=4)
def _looks(folder: str, asked: tuple[tuple[str, bytes], ...]) -> list[Look]:
    import torch
    from PIL import Image

    from grace.infer.prompt import build_prompts
    from grace.models import image_token_id, load_model, load_processor

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(folder, dtype=torch.float32, device=device, attention="eager")
    processor = load_processor(folder)
    found = []
    for question, encoded in asked:
        image = Image.open(io.BytesIO(encoded)).convert("RGB")
        inputs = {key: value.to(device) for key, value in build_prompts(processor, [(image, question)]).items()}
        with torch.inference_mode():
            out = model(**inputs, output_attentions=True, output_hidden_states=True, use_cache=False)
        visual = (inputs["input_ids"][0] == image_token_id(model)).nonzero()[:, 0]
        attention = torch.stack([layer[0, :, -1, visual].mean(0) for layer in out.attentions])
        answer = processor.tokenizer.decode(out.logits[0, -1].argmax().reshape(1), skip_special_tokens=False)
        found.append(Look(attention.cpu().numpy(), out.hidden_states[-2][0, visual].cpu().numpy(), answer.strip()))
    return found


def looks(results: Results, row: Row) -> list[Look]:
    """One `Look` per question of `questions`, from the row's first seed."""
    asked = questions(results)
    return _looks(
        str(_model(results, row)),
        tuple(zip(asked["question"], (image["bytes"] for image in asked["image"]), strict=True)),
    )


def cka(a: np.ndarray, b: np.ndarray) -> float:
    """Linear CKA of two sets of tokens [n, d_a] and [n, d_b], as training aligns it; nan where one does not vary."""
    import torch

    from grace.distill import relational_cka_sum

    loss, images, _ = relational_cka_sum([torch.from_numpy(a)], [torch.from_numpy(b)])
    return 1 - float(loss) if images else float("nan")


def _likeness(a: Look, b: Look) -> float:
    """Pearson r of where two models look, attention summed over layers."""
    return float(np.corrcoef(a.attention.sum(0), b.attention.sum(0))[0, 1])


def _compared(results: Results, rows: list[Row], measure) -> dict[Row, np.ndarray]:
    """`measure(teacher, student)` of every student, one value per question."""
    teacher = looks(results, TEACHER)
    return {
        row: np.array([measure(t, s) for t, s in zip(teacher, looks(results, row), strict=True)])
        for row in rows
        if row != TEACHER
    }


def _finding(results: Results, what: str, compared: dict[Row, np.ndarray]) -> str:
    """Which student is more like the teacher, by a paired t test over the images, in words."""
    means = {row: float(np.nanmean(values)) for row, values in compared.items()}
    shown = {digits: [f"{mean:.{digits}f}" for mean in means.values()] for digits in (2, 3)}
    digits = 2 if len(set(shown[2])) == len(means) else 3  # as many as tell them apart, where three do
    said = ", ".join(f"{named(results, row)} {mean}" for row, mean in zip(means, shown[digits], strict=True))
    if len(compared) < 2:
        return f"{what} to the teacher: {said}"
    (before, after), ours = compared.values(), list(compared)[1]
    gap = (after - before)[np.isfinite(after - before)]
    if len(gap) < 2 or np.ptp(gap) == 0 or cast(Any, stats.ttest_1samp(gap, 0)).pvalue >= ALPHA:
        word = "as near to the teacher's as the baseline's is, within noise"
    else:
        word = f"{'nearer to' if gap.mean() > 0 else 'farther from'} the teacher's than the baseline's is"
    return f"{named(results, ours)}'s {what} is {word}: {said}"


def _image(asked: pd.DataFrame):
    from PIL import Image

    return Image.open(io.BytesIO(asked["image"].iloc[0]["bytes"])).convert("RGB")


def spotlight(image, values: np.ndarray, most: float = 1.0) -> np.ndarray:
    """The image in grey [height, width] 0 to 1, as bright as `values` [visual tokens] are of `most`; needs a square of
    tokens.

    Maps that stand side by side are drawn with the same `most`, so that equal brightness is equal attention.
    """
    side = round(len(values) ** 0.5)
    grey = np.asarray(image.convert("L"), dtype=float) / 255
    rows, columns = (np.arange(size) * side // size for size in grey.shape)
    light = (values / most).clip(0, 1).reshape(side, side)[np.ix_(rows, columns)]
    return (0.15 + 0.85 * light) * (0.25 + 0.75 * grey)


def attention(results: Results, plt):
    """Figure 3: attention from the answering position to the image, per layer and model, for one question."""
    if said := _lacking(results):
        return nothing(plt, said)
    rows, asked = shown_models(results), questions(results)
    each = {row: looks(results, row)[0] for row in rows}
    image = _image(asked)
    drawn = {row: np.unique(np.linspace(0, n - 1, min(n, LAYERS)).round().astype(int)) for row, n in
             ((row, len(look.attention)) for row, look in each.items())}  # fmt: skip
    most = max(float(look.attention[drawn[row]].max()) for row, look in each.items())
    wide = 1 + max(map(len, drawn.values()))
    size = min(1.5, WIDE / wide)
    shape = (max(size * wide, 5.0), (size + 0.35) * len(rows) + 0.9)
    figure, axes = plt.subplots(len(rows), wide, figsize=shape, squeeze=False)
    for line, (row, look) in zip(axes, each.items(), strict=True):
        line[0].imshow(image, interpolation="none")
        line[0].set_title(f"{plain(named(results, row))}\nanswers “{plain(look.answer)}”", fontsize=8)
        square = round(look.attention.shape[1] ** 0.5) ** 2 == look.attention.shape[1]
        for layer, axis in zip(drawn[row], line[1:], strict=False):
            values = look.attention[layer]
            if square:
                axis.imshow(spotlight(image, values, most), cmap="gray", vmin=0, vmax=1, interpolation="none")
            else:
                axis.imshow(values[None], cmap="gray", aspect="auto", vmin=0, vmax=most)
            axis.set_title(f"layer {layer + 1}\n{100 * values.sum():.0f}% on the image", fontsize=8)
    for axis in axes.flat:
        axis.axis("off")
    question = (
        f"mean r over {len(asked)} images, first seeds; drawn: “{asked['question'].iloc[0]}”, right: "
        f"{asked['answer'].iloc[0]}; white is {most:.1%} of the attention on one visual token, in every map"
    )
    finding = _finding(results, "attention", _compared(results, rows, _likeness))
    headline(figure, results, finding, question)
    return figure


def similarity(results: Results, plt):
    """Figure 5: cosine similarity between the visual tokens of one image, per model, and the CKA to the teacher's."""
    if said := _lacking(results):
        return nothing(plt, said)
    rows, asked = shown_models(results), questions(results)
    each = {row: looks(results, row)[0] for row in rows}
    figure, axes = plt.subplots(1, len(rows) + 1, figsize=(WIDE, 2.6), squeeze=False)
    axes[0, 0].imshow(_image(asked), interpolation="none")
    axes[0, 0].set_title("image\n", fontsize=8)
    axes[0, 0].axis("off")
    maps = {}
    for row, look in each.items():
        unit = look.tokens / np.linalg.norm(look.tokens, axis=1, keepdims=True)
        maps[row] = unit @ unit.T
    lowest = min(values.min() for values in maps.values())
    for axis, (row, look) in zip(axes[0, 1:], each.items(), strict=True):
        shown = axis.imshow(maps[row], cmap="gray_r", vmin=lowest, vmax=1, interpolation="none")
        own = "" if row == TEACHER else f"CKA {cka(each[TEACHER].tokens, look.tokens):.2f}"
        axis.set_title(f"{plain(named(results, row))}\n{own}", fontsize=8)
        axis.set_xlabel("visual token", fontsize=8)
        axis.locator_params(integer=True, nbins=5)
        axis.grid(False)
    figure.colorbar(shown, ax=list(axes[0, 1:]), shrink=0.8, label="cosine similarity")
    compared = _compared(results, rows, lambda teacher, student: cka(teacher.tokens, student.tokens))
    detail = f"mean CKA over {len(asked)} images, first seeds; drawn: one image's maps, darker is more alike"
    headline(figure, results, _finding(results, "map of visual tokens", compared), detail)
    return figure
