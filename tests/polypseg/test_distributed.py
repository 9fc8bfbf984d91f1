"""Training in two processes: the gradients and batch statistics of one."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from polypseg.config import make_config
from polypseg.distributed import SharedBatchNorm2d, choose_device, share_batch_statistics
from polypseg.models import build_model
from polypseg.objective import Objective
from tests.two_processes import run_in_two

CONFIG = make_config(overrides=["implicit.tol=1e-6", "implicit.max_steps=60"])
IMAGES = 4


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(IMAGES, 3, 32, 32, generator=generator)
    masks = torch.zeros(IMAGES, 1, 32, 32)
    for number in range(IMAGES):
        masks[number, :, 4 * number : 4 * number + 12, 8:20] = 1
    return images, masks


def objective() -> Objective:
    torch.manual_seed(0)
    return Objective(build_model(CONFIG.model), CONFIG.implicit).train()


def result(module: nn.Module, part: slice, solves: bool) -> dict[str, torch.Tensor]:
    images, masks = inputs()
    module(images[part], masks[part], solves).objective.backward()
    gradients = {k: p.grad for k, p in module.named_parameters() if p.grad is not None}
    buffers = {k: b for k, b in module.named_buffers() if "running" in k}
    return {k.removeprefix("module."): v for k, v in (gradients | buffers).items()}


def work(rank: int) -> list[dict[str, torch.Tensor]]:
    found = []
    for solves in (False, True):
        single = objective()
        share_batch_statistics(single)
        half = IMAGES // 2
        part = slice(half * rank, half * rank + half)
        found.append(result(DistributedDataParallel(single), part, solves))
    return found


def test_two_processes_give_the_gradients_and_statistics_of_one(tmp_path: Path) -> None:
    found = run_in_two(work, tmp_path)
    for solves, two in zip((False, True), found, strict=True):
        one = result(objective(), slice(None), solves)
        assert two.keys() == one.keys()
        assert len(one) == len(list(objective().parameters())) + 2
        scale = max(value.abs().max() for value in one.values())
        for key, value in one.items():
            torch.testing.assert_close(
                two[key], value, rtol=2e-3, atol=2e-5 * scale.item(), msg=key
            )


def test_shared_batch_normalisation_alone_is_the_ordinary_one() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Sequential(nn.BatchNorm2d(3)))
    keys = model.state_dict().keys()
    x = torch.randn(4, 3, 5, 5)
    expected = model(x)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Sequential(nn.BatchNorm2d(3)))
    share_batch_statistics(model)
    assert all(isinstance(m, SharedBatchNorm2d) for m in (model[0], model[2][0]))
    assert torch.equal(model(x), expected)
    assert model.state_dict().keys() == keys


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")
def test_a_missing_gpu_is_told_in_words() -> None:
    with pytest.raises(ValueError, match=r"--device cuda cannot be used: torch .* finds no CUDA"):
        choose_device("cuda")
    with pytest.raises(ValueError, match="--device abacus cannot be used"):
        choose_device("abacus")
    assert choose_device(None) == torch.device("cpu")
