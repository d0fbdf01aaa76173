"""Every file of grace/distill/objectives: against formulas written out in fp64, and against the rules of the folder."""

import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy

from grace.config import objectives as config
from grace.config.schema import Recipe
from grace.distill import confidence_gate, distillation_loss_from_hidden, load_objective, objective_names
from grace.distill import objectives as folder
from grace.errors import GraceError

TOKENS, VOCABULARY, WIDTH, T = 9, 17, 6, 3.0
CONSTANTS = dict(temperature=T, alpha=0.5, beta_dkd=4.0)
NAMES = objective_names()


def logits(seed: int, scale: float = 2.0, dtype=torch.float64) -> torch.Tensor:
    return (scale * torch.randn(TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(seed))).to(dtype)


LABELS = torch.arange(TOKENS) * 5 % VOCABULARY


def naive(name: str, student: torch.Tensor, teacher: torch.Tensor) -> list[float]:
    """Token by token from probabilities themselves."""
    losses = []
    for s, t, label in zip(student.tolist(), teacher.tolist(), LABELS.tolist(), strict=True):
        p, q = ([math.exp(x / T) / sum(math.exp(y / T) for y in row) for x in row] for row in (t, s))

        def kl(a, b):
            return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

        if name == "plain":
            loss = kl(p, q)
        elif name == "reverse_kl":
            loss = kl(q, p)
        elif name == "jensen_shannon":
            middle = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
            loss = kl(p, middle) / 2 + kl(q, middle) / 2
        elif name == "dist":
            loss = 1 - float(torch.corrcoef(torch.tensor([p, q], dtype=torch.float64))[0, 1])
        else:
            rest = [j for j in range(VOCABULARY) if j != label]
            others = [[row[j] / (1 - row[label]) for j in rest] for row in (p, q)]
            tckd = kl((p[label], 1 - p[label]), (q[label], 1 - q[label]))
            at_one = [math.exp(x) / sum(map(math.exp, t)) for x in t]
            gate = math.exp(sum(x * math.log(x) for x in at_one) / math.log(VOCABULARY))
            loss = gate * (0.5 * tckd + 4.0 * kl(*others))
        losses.append(T**2 * loss)
    return losses


@pytest.mark.parametrize("name", ["gated", "plain", "reverse_kl", "jensen_shannon", "dist"])
@pytest.mark.parametrize("scale", [0.1, 2.0, 8.0])
def test_values(name, scale):
    student, teacher = logits(0, scale), logits(1, scale)
    want = torch.tensor(naive(name, student, teacher), dtype=torch.float64)
    objective = load_objective(name, CONSTANTS)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-4)):
        teacher_row = teacher.to(dtype)
        got = objective(student.to(dtype).requires_grad_(), teacher_row, LABELS, confidence_gate(teacher_row))
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=1e-7 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_rules_of_the_folder(name):
    check_rules(load_objective(name, CONSTANTS))


def check_rules(objective):
    """A loss per token that depends on its row alone, never negative, least at the teacher, with a true gradient."""
    student, teacher = logits(2).requires_grad_(), logits(3)
    gates = confidence_gate(teacher)
    losses = objective(student, teacher, LABELS, gates)
    rows = [objective(*(x[i : i + 1] for x in (student, teacher, LABELS, gates))) for i in range(TOKENS)]
    torch.testing.assert_close(torch.cat(rows), losses)
    assert torch.autograd.gradcheck(lambda s: objective(s, teacher, LABELS, gates).sum(), student)
    same = teacher.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(same, teacher, LABELS, gates).sum(), same)
    assert gradient.abs().max() < 1e-9 and (losses > 0).all()
    for shift in (500.0, -1e4):  # of logits far apart
        far = (teacher + shift * (torch.arange(VOCABULARY) == 4)).requires_grad_()
        (gradient,) = torch.autograd.grad(objective(far, teacher, LABELS, gates).sum(), far)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", NAMES)
def test_close_to_the_teacher_it_keeps_its_digits(name):
    objective = load_objective(name, CONSTANTS)
    teacher = logits(4, dtype=torch.float32)
    student = teacher + 1e-3 * logits(5, 1.0, torch.float32)
    gates = confidence_gate(teacher)
    got = objective(student.requires_grad_(), teacher, LABELS, gates).sum()
    want = objective(student.double(), teacher.double(), LABELS, gates.double()).sum()
    assert float(got) == pytest.approx(float(want), rel=2e-3)


def test_a_row_without_differences_has_no_correlation():
    dist = load_objective("dist", CONSTANTS)
    teacher = torch.full((TOKENS, VOCABULARY), 0.7)
    student = logits(0, dtype=torch.float32).requires_grad_()
    losses = dist(student, teacher, LABELS)
    (gradient,) = torch.autograd.grad(losses.sum(), student)
    assert (losses == 0).all() and (gradient == 0).all()


@pytest.mark.parametrize("mixture", [0.2, 0.5])
def test_mixture_of_jensen_shannon(mixture):
    loss = load_objective("jensen_shannon", CONSTANTS | dict(mixture=mixture))
    student, teacher = logits(0).requires_grad_(), logits(1)
    p, q = (teacher / T).softmax(1), (student / T).softmax(1)
    m = mixture * p + (1 - mixture) * q
    want = T**2 * (mixture * (p * (p / m).log()).sum(1) + (1 - mixture) * (q * (q / m).log()).sum(1))
    torch.testing.assert_close(loss(student, teacher, LABELS), want)
    with pytest.raises(GraceError, match="mixture is 1"):
        load_objective("jensen_shannon", CONSTANTS | dict(mixture=1))(student, teacher, LABELS)


def states(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    return (
        random(TOKENS, WIDTH).requires_grad_(), random(VOCABULARY, WIDTH).requires_grad_(),
        random(TOKENS, WIDTH + 2), random(VOCABULARY, WIDTH + 2), LABELS,
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("workspace", [None, 1, 2000])
def test_from_hidden_states_in_chunks(name, workspace):
    """The autograd path equals the loss of whole logits however rows are cut, gradients of states and head included."""
    objective = load_objective(name, CONSTANTS)
    hidden, head, teacher_hidden, teacher_head, labels = states()
    student, teacher = hidden @ head.T, teacher_hidden @ teacher_head.T
    ce = cross_entropy(student, labels, reduction="sum")
    gates = confidence_gate(teacher)
    kd = objective(student, teacher, labels, gates).sum()
    want = torch.autograd.grad(0.3 * ce + 0.7 * kd, (hidden, head))
    for given in (None, gates):
        got = distillation_loss_from_hidden(
            *states(), mode=objective, ce_weight=0.3, kd_weight=0.7, workspace=workspace, gates=given
        )
        torch.testing.assert_close(got["loss"], 0.3 * ce + 0.7 * kd)
        assert float(got["kd_sum"]) == pytest.approx(float(kd))
        assert float(got["gate_sum"]) == pytest.approx(float(gates.sum()) if objective.gated else TOKENS)
        tensors = states()
        loss = distillation_loss_from_hidden(
            *tensors, mode=objective, ce_weight=0.3, kd_weight=0.7, workspace=workspace, gates=given
        )["loss"]
        for gradient, wanted in zip(torch.autograd.grad(loss, tensors[:2]), want, strict=True):
            torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("name", ["gated", "plain"])
def test_the_fused_path_equals_autograd(name):
    fused, general = (
        distillation_loss_from_hidden(*states(), mode=mode, **CONSTANTS, ce_weight=0.3, kd_weight=0.7)
        for mode in (name, load_objective(name, CONSTANTS))
    )
    for key, value in general.items():
        torch.testing.assert_close(fused[key], value)


@pytest.mark.parametrize("name", NAMES)
def test_it_never_holds_all_logits(name):
    """The largest tensor that autograd keeps is a chunk, not tokens x vocabulary."""
    largest = 0

    def note(tensor):
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        distillation_loss_from_hidden(*states(), mode=load_objective(name, CONSTANTS), workspace=1)
    assert VOCABULARY <= largest <= max(2 * VOCABULARY, VOCABULARY * WIDTH) < TOKENS * VOCABULARY


def test_a_label_outside_is_nan_where_nobody_looked(monkeypatch):
    monkeypatch.setattr("grace.distill.from_hidden.check_labels", lambda *_: None)
    tensors = (*states()[:4], LABELS.clone().index_fill_(0, torch.tensor([2]), VOCABULARY))
    got = distillation_loss_from_hidden(*tensors, mode=load_objective("reverse_kl", CONSTANTS))
    assert got["loss"].isnan() and got["ce_sum"].isnan()


def test_refusals(monkeypatch, tmp_path):
    with pytest.raises(GraceError, match=r"no objective `hinton`; there are .*gated, .*plain"):
        load_objective("hinton", CONSTANTS)
    with pytest.raises(GraceError, match="`reverse_kl` needs `temperature`"):
        load_objective("reverse_kl", {})
    objective = load_objective("reverse_kl", CONSTANTS)
    student = logits(0).requires_grad_()
    for change, says in (
        (lambda s, t, y: (s - t).square().mean(), r"one loss per token, \[9\], .*; it returned \[\]"),
        (lambda s, t, y: (s - t).detach().sum(1), "without a gradient"),
    ):
        wrong = folder.TokenLoss(objective.name, change, {}, False)
        with pytest.raises(GraceError, match=says):
            wrong(student, logits(1), LABELS)


def test_the_documented_example(monkeypatch, tmp_path):
    """The file of docs/extending.md is found by its name, keeps the rules and trains, and its recipe is valid."""
    page = (Path(__file__).parents[3] / "docs/extending.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page.split("## An objective")[1].split("\n## ")[0], re.DOTALL)
    (tmp_path / "skewed_kl.py").write_text(code)
    monkeypatch.setattr(folder, "__path__", [*folder.__path__, str(tmp_path)])
    monkeypatch.setattr(config, "FOLDER", tmp_path)
    (recipe,) = yaml.safe_load(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])["recipes"].values()
    recipe = Recipe(**recipe)
    assert "skewed_kl" in objective_names() and recipe.constants == {"skew": 0.2}
    objective = load_objective(recipe.kd, CONSTANTS | recipe.constants)
    check_rules(objective)
    *tensors, labels = states()
    optimiser = torch.optim.Adam(tensors[:2], lr=0.1)
    losses = []
    for _ in range(20):
        step = distillation_loss_from_hidden(*tensors, labels, mode=objective, ce_weight=0.0, workspace=1)
        optimiser.zero_grad()
        step["loss"].backward()
        optimiser.step()
        losses.append(float(step["kd_sum"]))
    assert losses[-1] < 0.5 * losses[0]


def test_the_config_reads_constants_from_the_files_text():
    assert config.objective_constants("jensen_shannon") == ["mixture"]
    assert config.objective_constants("gated") == ["alpha", "beta_dkd"]
