"""What the implicit phase minimises, against its terms worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deqsolvers.progress import HostMask
from polypseg.config import make_config
from polypseg.losses import structure_loss
from polypseg.models import ImplicitModel, build_implicit_model
from polypseg.network_training import early_step
from polypseg.objective import Objective

SETTINGS = ["implicit.solver=picard", "implicit.max_steps=6", "implicit.tol=1e-6"]


def implicit_objective(name: str, *settings: str) -> tuple[Objective, ImplicitModel]:
    config = make_config(overrides=[f"model.name={name}", *SETTINGS, *settings])
    torch.manual_seed(0)
    model = build_implicit_model(config.model)
    return Objective(model, config.implicit), model


def a_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 64, 64, generator=generator)
    return images, (torch.rand(2, 1, 64, 64, generator=generator) > 0.7).float()


@pytest.mark.parametrize("name", ["polypdeq-add", "mdeq"])
def test_the_loss_on_the_way_is_that_of_an_iterate(name: str) -> None:
    objective, model = implicit_objective(name, "implicit.correction=0.5")
    weights = list(model.parameters())
    images, masks = a_batch()
    found = objective.eval()(images, masks, True, early=1)
    on_the_way = found.objective - found.loss
    gradients = torch.autograd.grad(on_the_way, weights)

    e = model.features(images)
    with torch.no_grad():
        z = model.deq.f(model.deq.initial_state(e), e)  # Picard's first iterate
    early = structure_loss(model.read_out(model.deq.f(z, e)), masks)  # a step of f further on
    assert on_the_way.item() == pytest.approx(0.5 * early.item(), rel=1e-4)
    for gradient, expected in zip(gradients, torch.autograd.grad(early, weights), strict=True):
        torch.testing.assert_close(gradient, 0.5 * expected, rtol=1e-3, atol=1e-5)

    plain, _ = implicit_objective(name)
    assert found.loss.item() == pytest.approx(plain.eval()(images, masks, True).loss.item())


def test_the_jacobian_term_is_the_mean_square_of_a_product() -> None:
    objective, model = implicit_objective("polypdeq-add", "implicit.jacobian=0.3")
    images, masks = a_batch()
    objective.eval()
    torch.manual_seed(2)
    found = objective(images, masks, True, regularized=True)
    assert found.solution is not None
    assert found.jacobian is not None

    z = found.solution.z.detach().requires_grad_()
    torch.manual_seed(2)
    noise = torch.randn(len(z), z[0].numel()).reshape(z.shape)
    (product,) = torch.autograd.grad(model.deq.f(z, model.features(images)), z, noise)
    expected = product.square().mean().item()
    assert found.jacobian.item() == pytest.approx(expected, rel=1e-4)
    assert found.objective.item() == pytest.approx(found.loss.item() + 0.3 * expected, rel=1e-6)


def test_the_layer_is_set_up_as_the_settings_say() -> None:
    with torch.device("meta"):
        _, model = implicit_objective(
            "polypdeq-add", "implicit.backward=phantom", "implicit.backward_steps=3"
        )
        _, shine = implicit_objective(
            "polypdeq-add", "implicit.backward=shine", "implicit.solver=broyden"
        )
    assert repr(model.deq.backward) == "Phantom(steps=3, damping=1.0)"
    assert repr(model.deq.solver) == "Picard(damping=1.0)"
    assert (model.deq.options.tol, model.deq.options.max_steps) == (1e-6, 6)
    assert (type(shine.deq.backward).__name__, type(shine.deq.solver).__name__) == (
        "Shine",
        "Broyden",
    )


def test_any_step_can_be_scored() -> None:
    objective, model = implicit_objective("polypdeq-add", "implicit.correction=1")
    images, masks = a_batch()
    objective.eval()
    with torch.no_grad():
        e = model.features(images)
        z = model.deq.f(model.deq.initial_state(e), e)
        for step in (1, 2, 3):
            z = model.deq.f(z, e)
            outcome = objective(images, masks, True, early=step)
            early = (outcome.objective - outcome.loss).item()
            assert early == pytest.approx(structure_loss(model.read_out(z), masks).item(), rel=1e-4)


@pytest.mark.parametrize("name", ["polypdeq-add", "polypdeq-res", "mdeq"])
def test_an_update_waits_for_no_value(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors have no values, and mixing them with the CPU's is an error, as on a GPU."""
    monkeypatch.setattr(HostMask, "read", lambda self, running: None)
    with torch.device("meta"):
        objective, model = implicit_objective(name, "implicit.correction=1")
    images, masks = (part.to("meta") for part in a_batch())
    outcome = objective.train()(images, masks, True, regularized=True, early=2)
    outcome.objective.backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_the_step_is_drawn_anew_from_all_and_alike_in_all_processes() -> None:
    config = make_config(
        overrides=["implicit.correction=1", "implicit.correction_steps=3"]
    ).implicit
    processes = [torch.Generator().manual_seed(0) for _ in range(2)]
    drawn = [[early_step(config, generator) for _ in range(24)] for generator in processes]
    assert drawn[0] == drawn[1]
    assert set(drawn[0]) == {1, 2, 3}
    assert early_step(make_config().implicit, processes[0]) == 0
