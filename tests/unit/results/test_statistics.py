"""The statistics against independent formulas, brute force and simulation."""

import itertools

import numpy as np
import pytest
from scipy import stats

from grace.errors import GraceError
from grace.results.paired import compare, holm, mcnemar, minimum_detectable_difference, paired_bootstrap, swap_test
from grace.results.statistics import Scores, estimate


def scores(values, images=None, seeds=None) -> Scores:
    values = np.atleast_2d(np.asarray(values, dtype=float))
    images = np.arange(values.shape[1]) if images is None else np.asarray(images)
    return Scores(values, images, tuple(range(len(values))) if seeds is None else seeds)


def test_one_seed_without_shared_images_is_the_textbook_error():
    x = np.random.default_rng(0).integers(0, 2, 500) * 100.0
    found = estimate([scores(x)])
    assert found.value == pytest.approx(x.mean())
    assert found.stderr == pytest.approx(x.std(ddof=1) / np.sqrt(500))


def test_clustered_error_is_the_sandwich_of_a_regression_on_a_constant():
    random = np.random.default_rng(1)
    images = random.integers(0, 60, 300)
    x = random.normal(size=300) + random.normal(size=60)[images]
    ones, residual = np.ones((300, 1)), x - x.mean()
    bread = np.linalg.inv(ones.T @ ones)
    meat = sum(np.outer(s, s) for s in (ones[images == g].T @ residual[images == g] for g in np.unique(images)))
    groups = len(np.unique(images))
    expected = np.sqrt((bread @ meat @ bread)[0, 0] * groups / (groups - 1))
    assert estimate([scores(x, images)]).stderr == pytest.approx(expected)


def test_seeds_and_questions_combine_to_the_two_way_random_effects_variance():
    """Equal to (MS_seeds + MS_questions - MS_residual) / (S Q), computed here from the analysis of variance."""
    random = np.random.default_rng(2)
    x = random.normal(size=(4, 200)) + 2 * random.normal(size=(4, 1)) + random.normal(size=(1, 200))
    seeds, questions = x.shape
    by_seed, by_question = x.mean(1, keepdims=True), x.mean(0, keepdims=True)
    ms_seeds = questions * ((by_seed - x.mean()) ** 2).sum() / (seeds - 1)
    ms_questions = seeds * ((by_question - x.mean()) ** 2).sum() / (questions - 1)
    residual = x - by_seed - by_question + x.mean()
    ms_residual = (residual**2).sum() / ((seeds - 1) * (questions - 1))
    expected = (ms_seeds + ms_questions - ms_residual) / (seeds * questions)
    assert estimate([scores(x)]).stderr ** 2 == pytest.approx(expected, rel=1e-9)


def test_error_matches_the_spread_over_repeated_experiments():
    """Both parts random: 400 experiments of 3 seeds x 150 questions on 75 images, each drawn anew."""
    random = np.random.default_rng(3)
    images = np.repeat(np.arange(75), 2)
    values, variances = [], []
    for _ in range(400):
        n_images = random.normal(0, 4, 75)[images]
        x = random.normal(0, 1, (3, 1)) + n_images + random.normal(0, 6, (3, 150))
        found = estimate([scores(x, images)])
        values.append(found.value)
        variances.append(found.stderr**2)
    # never below the questions' share, so somewhat above the truth on average
    assert np.var(values, ddof=1) * 0.85 < np.mean(variances) < np.var(values, ddof=1) * 1.35


def test_average_of_benchmarks_adds_independent_errors_and_sees_shared_images():
    random = np.random.default_rng(4)
    x, y = random.normal(size=400), random.normal(size=100)
    apart = estimate([scores(x, np.arange(400)), scores(y, np.arange(1000, 1100))])
    alone = [x.std(ddof=1) / 20, y.std(ddof=1) / 10]
    assert apart.stderr == pytest.approx(np.hypot(*alone) / 2, rel=0.01)
    same = estimate([scores(x), scores(x)])
    assert same.stderr == pytest.approx(alone[0])  # the same questions twice say nothing new


def test_one_image_generalises_to_nothing():
    assert estimate([scores([0, 100, 100], images=[7, 7, 7])]).stderr == float("inf")


def test_mcnemar_is_the_binomial_test():
    for gained, lost in [*itertools.product(range(8), range(8)), (130, 90), (3000, 2900)]:
        differences = np.array([1] * gained + [-1] * lost + [0] * 5)
        expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
        assert mcnemar(differences) == pytest.approx(expected), (gained, lost)


def test_clustered_mcnemar_is_the_enumeration_of_all_swaps():
    differences = np.array([3, -1, 2, 0, 1, 1, -2, 1])
    observed = abs(differences.sum())
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=8)
    ]
    expected = np.mean([s >= observed for s in sums])
    assert mcnemar(differences) == pytest.approx(expected)


@pytest.mark.parametrize("lost, gained", [(1, 0), (4, 0), (5, 0), (5, 1), (6, 0), (40, 20)])
def test_an_average_is_no_more_certain_than_its_flips_allow(lost, gained):
    """Flips on one of two benchmarks of 500 questions: the average knows no more than the benchmark's exact test."""
    values = np.full(1000, 100.0)
    a = [scores(values[:500], np.arange(500)), scores(values[:500], np.arange(500, 1000))]
    values[:lost] = 0
    b = [scores(values[:500], a[0].images), a[1]]
    values = np.full(500, 100.0)
    values[lost : lost + gained] = 0
    a[0] = scores(values, a[0].images)
    exact = stats.binomtest(lost, lost + gained).pvalue
    found = compare(b, a).p_questions
    assert found >= exact - 1e-9 and (found == pytest.approx(exact) or lost + gained > 6)


def test_swapping_unequal_differences_is_the_enumeration_of_all_swaps():
    random = np.random.default_rng(15)
    for differences in (random.normal(size=10), np.array([1 / 3, 1 / 3, 2 / 3, -1 / 3, 1.0, 2 / 3])):
        sums = [abs(np.dot(signs, differences)) for signs in itertools.product((1, -1), repeat=len(differences))]
        expected = np.mean(np.array(sums) >= abs(differences.sum()) - 1e-9)
        assert swap_test(differences) == pytest.approx(expected, rel=0.005)
    many = random.normal(0.02, 1, 40_000)
    z = many.sum() / np.sqrt((many**2).sum())
    assert swap_test(many) == pytest.approx(2 * stats.norm.sf(z), rel=0.05)
    assert swap_test(np.full(500, 1.0)) < 1e-50 and swap_test(np.zeros(4)) == 1


def test_bootstrap_finds_the_error_of_a_mean():
    random = np.random.default_rng(5)
    images = np.repeat(np.arange(200), 3)
    x = (random.normal(size=200)[images] + random.normal(size=600))[None]
    stderr, p = paired_bootstrap([scores(x, images)])
    assert stderr == pytest.approx(estimate([scores(x, images)]).stderr, rel=0.08)
    assert p == pytest.approx(2 * stats.t.sf(abs(x.mean()) / stderr, 199), rel=0.05)
    assert paired_bootstrap([scores(x, images)]) == (stderr, p)  # same draws


def test_bootstrap_of_identical_models():
    assert paired_bootstrap([scores(np.zeros(50))]) == (0.0, 1.0)


def test_a_constant_difference_proves_no_more_than_swapping_sides_could():
    assert paired_bootstrap([scores(np.full(1, 5.0))])[1] == 1.0
    assert paired_bootstrap([scores(np.full(6, 5.0))])[1] == pytest.approx(2.0**-5)
    found = compare([scores(np.full((3, 4), 7.5))], [scores(np.full((3, 4), 5.0))])
    assert (found.difference, found.stderr, found.p) == (2.5, 0.0, pytest.approx(2.0**-3))


@pytest.mark.parametrize("n_images, most", [(5, 0.1), (10, 0.08), (60, 0.07)])
def test_bootstrap_keeps_its_level_with_few_images(n_images, most):
    random = np.random.default_rng(n_images)
    images = np.repeat(np.arange(n_images), 2)
    rejected = 0
    for _ in range(600):
        x = random.normal(size=n_images)[images] + random.normal(size=2 * n_images)
        rejected += paired_bootstrap([scores(x, images)], replicates=400)[1] < 0.05
    assert rejected / 600 < most


def test_mcnemar_keeps_its_level_when_questions_share_images():
    """A test of single questions, as if they were independent, does not."""
    random = np.random.default_rng(11)
    images = np.repeat(np.arange(60), 4)
    clustered = single = 0
    for _ in range(500):
        a, b = (random.normal(0, 1.5, 60)[images] + random.normal(size=240) > 0 for _ in range(2))
        clustered += compare([scores(100.0 * a, images)], [scores(100.0 * b, images)]).p < 0.05
        single += stats.binomtest((a & ~b).sum(), (a ^ b).sum()).pvalue < 0.05
    assert clustered / 500 < 0.08 < single / 500


@pytest.mark.parametrize("seeds, spread, most", [(3, 0.0, 0.06), (3, 3.0, 0.075), (5, 3.0, 0.075)])
def test_intervals_cover_the_method_over_its_seeds(seeds, spread, most):
    """Truth 0; seeds shift a whole model, questions of an image move together. Misses in 5% are what is promised."""
    random = np.random.default_rng(12)
    images = np.repeat(np.arange(60), 2)
    missed = 0
    for _ in range(600):
        x = 20 * random.normal(size=60)[images] + spread * random.normal(size=(seeds, 1))
        found = estimate([scores(x + 10 * random.normal(size=(seeds, 120)), images)])
        missed += abs(found.value) > found.half_width()
    assert missed / 600 < most


def test_two_seeds_of_equal_models_leave_the_questions_error():
    x = 100 * np.random.default_rng(0).integers(0, 2, (1, 40))
    assert estimate([scores(np.vstack([x, x]))]).stderr == pytest.approx(estimate([scores(x)]).stderr)
    assert estimate([scores(np.full((3, 40), 100.0))]).stderr == 0


@pytest.mark.parametrize("df", [2, 5, 30, 1000])
def test_detectable_difference_is_that_of_the_noncentral_t(df):
    power = stats.nct.sf(stats.t.isf(0.025, df), df, minimum_detectable_difference(1.0, df))
    assert power == pytest.approx(0.8, abs=0.04 if df < 5 else 0.006)


def test_tests_keep_their_level_when_seeds_differ():
    """Equal methods, seeds that shift the mean: a test over questions alone is wrong here, the table's is not."""
    random = np.random.default_rng(6)
    both = questions_only = 0
    for _ in range(300):
        hard = random.normal(0, 1, 300)

        def model(hard=hard):
            shift = random.normal(0, 0.35, (3, 1))
            return 100.0 * (hard + shift + random.normal(0, 1, (3, 300)) > 0)

        found = compare([scores(model())], [scores(model())])
        both += found.p < 0.05
        questions_only += found.p_questions < 0.05
    assert both / 300 < 0.08
    assert questions_only / 300 > 0.3


@pytest.mark.parametrize("seeds", [3, 5])
def test_small_levels_are_kept_when_a_few_seeds_agree_by_luck(seeds):
    """Equal methods whose seeds differ by five standard errors of the questions, at Holm's first level of 18 claims."""
    random, images, level = np.random.default_rng(13), np.arange(30), 0.05 / 18
    zero, hits, runs = Scores(np.zeros((seeds, 30)), images, tuple(range(seeds))), 0, 3000
    for _ in range(runs):
        noise = random.normal(size=(1, 30)) * 0.84 + random.normal(size=(seeds, 30)) * 0.95
        x = noise + random.normal(size=(seeds, 1)) * 5 / 30**0.5
        hits += compare([Scores(x, images, zero.seeds)], [zero]).p_seeds < level
    assert hits / runs < 2 * level


def test_no_p_is_below_the_t_test_over_seeds():
    random = np.random.default_rng(14)
    for seeds in (2, 3, 5):
        for _ in range(50):
            x = random.normal(2, 1, (1, 40)) + random.normal(0, random.choice([0.01, 0.1, 1.0]), (seeds, 40))
            found = compare([scores(x)], [scores(np.zeros((seeds, 40)))])
            assert found.p >= stats.ttest_1samp(x.mean(1), 0).pvalue * (1 - 1e-9)
            low, high = found.interval()
            assert (low > 0 or high < 0) <= (found.p_seeds < 0.05)


def test_a_real_difference_is_found_with_the_promised_power():
    random = np.random.default_rng(7)
    found = 0
    for _ in range(300):
        x = random.normal(0, 10, 100)
        difference = minimum_detectable_difference(10 / 10)
        found += compare([scores(x + difference)], [scores(np.zeros(100))]).p < 0.05
    assert 0.73 < found / 300 < 0.87


def test_pairing_by_seed_and_question_beats_not_pairing():
    random = np.random.default_rng(8)
    base = random.normal(0, 30, (1, 300)) + random.normal(0, 3, (3, 1)) + random.normal(0, 1, (3, 300))
    a, b = scores(base + 1), scores(base + random.normal(0, 1, (3, 300)))
    paired = compare([a], [b])
    assert paired.seeds == 3 and paired.stderr < 0.5 < estimate([a]).stderr
    assert paired.difference == pytest.approx(a.values.mean() - b.values.mean())


def test_only_common_seeds_are_compared():
    values = np.arange(12.0).reshape(3, 4)
    found = compare([scores(values, seeds=(0, 1, 2))], [scores(values[1:2] - 5, seeds=(1,))])
    assert found.difference == pytest.approx(5) and found.seeds == 1


def test_a_teacher_is_held_against_every_seed():
    random = np.random.default_rng(9)
    teacher = scores(100 * random.integers(0, 2, (1, 200)), seeds=("teacher",))
    student = scores(100 * random.integers(0, 2, (3, 200)))
    found = compare([teacher], [student])
    assert found.seeds == 3 and found.difference == pytest.approx(teacher.values.mean() - student.values.mean())
    assert found.gained + found.lost == (teacher.values != student.values).sum()


def test_identical_models_differ_by_nothing():
    x = scores(100 * np.random.default_rng(0).integers(0, 2, (3, 40)))
    found = compare([x], [x])
    assert (found.difference, found.p, found.gained, found.lost) == (0, 1, 0, 0)


def test_holm_against_its_definition():
    p = [0.01, 0.04, 0.03, 0.005]
    assert holm(p).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]).tolist() == []
    assert holm([0.9, 0.8]).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "build, said",
    [
        (lambda: Scores(np.zeros((2, 3)), np.arange(4), (0, 1)), "do not fit"),
        (lambda: Scores(np.zeros((1, 0)), np.arange(0)), "no scores"),
        (lambda: compare([scores(np.zeros(3))], [scores(np.zeros(4))]), "same questions"),
        (lambda: estimate([scores(np.zeros((1, 3))), scores(np.zeros((2, 3)))]), "different seeds"),
    ],
)
def test_wrong_shapes_are_named(build, said):
    with pytest.raises(GraceError, match=said):
        build()
