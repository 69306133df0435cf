"""The pytest plugin as a project that has guardserve installed meets it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from guardserve.audit.invariance import batch_variance

pytest_plugins = ["pytester"]

MODELS = """
    import torch
    from torch import nn
    from guardserve import example_input

    @example_input(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    def good():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        model(torch.randn(64, 4))
        return model.eval()

    def forgetful():
        return good().train()

    forgetful.example_input = good.example_input

    def dependent():
        model = good()
        model[1] = nn.BatchNorm1d(8, track_running_stats=False).eval()
        return model

    dependent.example_input = good.example_input
"""


def run(pytester: pytest.Pytester, test: str, *, apart: bool = False) -> pytest.RunResult:
    """Run a test file beside the models in a pytest of its own, which may be in a process of its own."""
    pytester.makepyfile(shop=MODELS)
    pytester.makepyfile(test_shop=test)
    start = pytester.runpytest_subprocess if apart else pytester.runpytest_inprocess
    return start("-p", "no:cacheprovider", "--strict-markers")


def test_one_line_checks_a_model(pytester: pytest.Pytester) -> None:
    """The marker audits the model and compares batch sizes, whether it is named, built or given."""
    result = run(
        pytester,
        """
        import pytest
        import shop

        @pytest.mark.guardserve("shop:good")
        def test_by_name(): ...

        @pytest.mark.guardserve(model=shop.good)
        def test_by_factory(): ...

        @pytest.mark.guardserve(shop.good(), shop.good.example_input, sizes=(1, 3))
        def test_by_module(): ...
        """,
        apart=True,
    )
    result.assert_outcomes(passed=3)


def test_a_model_left_in_training_mode_fails_with_the_rule_and_the_remedy(pytester: pytest.Pytester) -> None:
    """The message is the audit's: code, place, what was seen, what to do."""
    result = run(
        pytester,
        """
        import pytest

        @pytest.mark.guardserve("shop:forgetful")
        def test_it(): ...
        """,
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*not safe to serve*", "*BN001*", "*eval()*"])


def test_dependence_on_the_batch_shows_sample_difference_tolerance_and_layer(pytester: pytest.Pytester) -> None:
    """The fixture says which sample is worst, by how much, what was allowed, and where it begins."""
    result = run(
        pytester,
        """
        import shop

        def test_it(assert_batch_invariant):
            assert_batch_invariant(shop.dependent(), shop.good.example_input, sizes=(2, 7))

        def test_single(assert_batch_invariant):
            assert_batch_invariant(shop.dependent(), shop.good.example_input)

        def test_good(assert_batch_invariant, assert_no_hazards):
            assert_no_hazards(shop.good(), shop.good.example_input)
            assert_batch_invariant(shop.good(), shop.good.example_input)
        """,
    )
    result.assert_outcomes(failed=2, passed=1)
    result.stdout.fnmatch_lines(
        [
            "*in a batch of 2 instead of 7, sample *: output changes by * (tolerance 0.01); it begins in 1*",
            "*it fails at batch size 1: ValueError: Expected more than 1 value per channel*",
        ]
    )


def test_the_marker_without_an_example_says_so(pytester: pytest.Pytester) -> None:
    """There is no guessing at shapes."""
    result = run(
        pytester,
        """
        import pytest
        from torch import nn

        @pytest.mark.guardserve(nn.BatchNorm1d(3).eval())
        def test_it(): ...
        """,
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*needs an example*"])


class MeanOverBatch(nn.Module):
    """Subtracts the mean of the batch, in a child whose output differs first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.centre = Centre()
        self.last = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        y: torch.Tensor = self.last(self.centre(self.first(x)))
        return y


class Centre(nn.Module):
    """Subtracts the mean of the batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Centre."""
        return x - x.mean(0)


def test_the_layer_where_dependence_starts_is_named_and_the_model_is_left_alone() -> None:
    """Any mixing of rows is found, not only by BatchNorm, and the flags come back."""
    torch.manual_seed(0)
    model = MeanOverBatch()
    variance = batch_variance(model, torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    assert variance is not None
    assert variance.module == "centre"
    assert (variance.size, variance.whole) in ((1, 7), (2, 7))
    assert variance.difference is not None
    assert variance.difference.part > variance.difference.tolerance
    assert all(module.training for module in model.modules())


def test_a_tolerance_may_be_given_and_sizes_must_differ() -> None:
    """A caller who knows the model may allow more, or less."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    assert batch_variance(model, torch.randn(4, 3)) is None
    assert batch_variance(MeanOverBatch(), torch.randn(4, 3), rtol=1e9) is None
    with pytest.raises(ValueError, match=r"sizes=\(3, 3\): give at least two different"):
        batch_variance(model, torch.randn(4, 3), sizes=(3, 3))


class Impure(nn.Module):
    """Counts its calls, draws random numbers, and fails at one size."""

    def __init__(self, noise: float = 0.0, only: int = 0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.calls: list[int] = []
        self.noise = noise
        self.only = only

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise, and leave traces."""
        self.calls.append(len(x))
        self.norm.get_buffer("running_mean").add_(1)
        if len(x) == self.only:
            raise ValueError("not this one")
        y: torch.Tensor = self.norm(x)
        return y + self.noise * torch.randn_like(y)


def test_the_users_model_and_random_numbers_are_left_alone() -> None:
    """A copy is run, from the same state for each size, so that what a model remembers is no variance."""
    model, state = Impure(), torch.get_rng_state()
    assert batch_variance(model, torch.randn(4, 3, generator=torch.Generator().manual_seed(0))) is None
    variance = batch_variance(Impure(only=2), torch.ones(4, 3))
    assert variance is not None
    assert str(variance) == "it fails at batch size 2: ValueError: not this one"
    assert not model.calls
    assert model.norm.running_mean is not None
    assert bool((model.norm.running_mean == 0).all())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_random_output_is_told_as_such() -> None:
    """Chance is not taken for the batch."""
    variance = batch_variance(Impure(noise=1.0), torch.randn(4, 3))
    assert variance is not None
    assert variance.random
    assert "with another seed, in eval mode too" in str(variance)


def test_a_model_that_cannot_be_copied_is_not_run() -> None:
    """Rather than altered."""

    class Refusing(Impure):
        def __deepcopy__(self, memo: object) -> Refusing:
            raise TypeError("one is enough")

    model = Refusing()
    with pytest.raises(ValueError, match=r"Refusing was not run: it cannot be copied \(TypeError: one is enough\)"):
        batch_variance(model, torch.randn(4, 3))
    assert not model.calls
