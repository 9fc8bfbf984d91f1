"""The three losses of a HyperSolver fit and their gradients, seen through the public function."""

import copy

import pytest
import torch

from deqsolvers import DEQ, HyperSolver, LossWeights, fit_hypersolver
from deqsolvers.hypersolver.losses import unroll
from deqsolvers.hypersolver.network import AlphaBetaNetwork
from deqsolvers.hypersolver.targets import Teacher
from tests.deqsolvers.maps import TanhMap, normal

SIZE = 8
LOSSES = {
    "convergence": LossWeights(convergence=0.1, initializer=0, alpha=0),
    "initializer": LossWeights(convergence=0, initializer=0.1, alpha=0),
    "alpha": LossWeights(convergence=0, initializer=0, alpha=0.01),
}


def untrained() -> HyperSolver:
    torch.manual_seed(0)
    return HyperSolver.for_vectors(SIZE, memory=2, width=16).double()


def loss_and_gradient(hyper: HyperSolver, weights: LossWeights) -> tuple[float, HyperSolver]:
    """The loss before the first update, and a copy that holds the gradient that it took."""
    trained = copy.deepcopy(hyper)
    deq = DEQ(TanhMap(SIZE), tol=1e-12)
    (epoch,) = fit_hypersolver(
        trained,
        deq,
        [normal(4, SIZE)],
        epochs=1,
        steps=4,
        weights=weights,
        teacher_tol=1e-12,
        teacher_steps=200,
    )
    return epoch.loss, trained


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "name", ["initializer.layers.0.weight", "network.read.weight", "network.mix.0.weight"]
)
def test_gradients_of_each_loss_by_finite_differences(loss: str, name: str) -> None:
    hyper = untrained()
    with torch.no_grad():
        hyper.network.read.weight.normal_(0, 0.02)
    _, trained = loss_and_gradient(hyper, LOSSES[loss])
    gradients = dict(trained.named_parameters())
    total = torch.stack([p.grad.norm() for p in trained.parameters() if p.grad is not None]).norm()
    assert total < 1, "the gradient must not have been clipped"
    gradient = gradients[name].grad
    if loss == "initializer" and name.startswith("network"):
        assert gradient is None or (gradient == 0).all()
        return
    assert gradient is not None
    place = tuple(int(i) for i in torch.unravel_index(gradient.abs().argmax(), gradient.shape))
    assert gradient[place].abs() > 0
    parameter = dict(hyper.named_parameters())[name]
    values = []
    for shift in (1e-5, -1e-5):
        with torch.no_grad():
            parameter[place] += shift
        values.append(loss_and_gradient(hyper, LOSSES[loss])[0])
        with torch.no_grad():
            parameter[place] -= shift
    slope = (values[0] - values[1]) / 2e-5
    assert slope == pytest.approx(float(gradient[place]), rel=1e-3)


def test_the_three_losses_are_what_the_paper_says() -> None:
    """Recomputed for plain iteration, which an untrained HyperSolver is."""
    hyper = untrained()
    deq = DEQ(TanhMap(SIZE), tol=1e-12)
    x, steps = normal(4, SIZE), 4
    with torch.no_grad():
        target = DEQ(deq.f, tol=1e-13, max_steps=200).solve(x).z
        scale = target.norm(dim=1)
        z, distances, mixed = hyper.start(x), [], []
        for _ in range(steps + 1):
            distances.append(((z - target).norm(dim=1) / scale).mean())
            fz = deq.f(z, x)
            mixed.append(((fz - z).norm(dim=1) / scale).mean())
            z = fz
    ramp = torch.arange(1, steps + 1) / (steps * (steps + 1) / 2)
    expected = {
        "convergence": 0.1 * float((ramp * torch.stack(distances[1:])).sum()),
        "initializer": 0.1 * float(distances[0]),
        "alpha": 0.01 * float(sum(mixed[:steps])),
    }
    for loss, value in expected.items():
        assert loss_and_gradient(hyper, LOSSES[loss])[0] == pytest.approx(value, rel=1e-6), loss


def test_the_alpha_loss_is_that_of_the_mixed_residuals() -> None:
    """sum_i alpha_i g_i without beta and without what a preconditioner makes of it."""
    alphas, beta = {1: [1.0], 2: [-0.4, 1.4], 3: [0.2, -0.5, 1.3]}, 0.7

    class Fixed(AlphaBetaNetwork):
        def forward(self, series: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            alpha = torch.tensor(alphas[series.shape[1]], dtype=series.dtype)
            return alpha.expand(len(series), -1), series.new_full((len(series), 1), beta)

    hyper = untrained()
    hyper.network = Fixed(SIZE, memory=2).double()
    hyper.preconditioner = torch.nn.Linear(SIZE, SIZE).double()
    deq, x, steps = DEQ(TanhMap(SIZE), tol=1e-12), normal(4, SIZE), 4
    with torch.no_grad():
        target = Teacher(deq, tol=1e-12, max_steps=200).target(x)
        found = unroll(hyper, deq, target, steps)
        for step in range(steps):
            states = found.states[max(0, step - 2) : step + 1]
            residuals = [deq.f(z, x) - z for z in states]
            mixed = sum(a * g for a, g in zip(alphas[len(states)], residuals, strict=True))
            expected = mixed.norm(dim=1) / target.goal.norm(dim=1)  # type: ignore[union-attr]
            torch.testing.assert_close(found.mixed[step], expected)
