"""The networks: shapes, injections, the encoder's identity and its weights."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional
from torch.utils import _pytree as pytree

from deqsolvers import Anderson, Broyden, Implicit, fixed_point
from deqsolvers.state import Layout
from polypseg.checkpoint import CheckpointError
from polypseg.config import ModelConfig, make_config
from polypseg.models import (
    MDEQ,
    MixTransformer,
    build_hypersolver,
    build_implicit_model,
    build_model,
    load_encoder_weights,
    load_pretrained,
)
from polypseg.models.mit import _segformer_name, _timm_name

POLYPDEQS = ("polypdeq-add", "polypdeq-res")


def segformer_state(encoder: MixTransformer) -> dict[str, torch.Tensor]:
    """The encoder's weights under the names that SegFormer's own files use."""
    return {_segformer_name(key): value.clone() for key, value in encoder.state_dict().items()}


@pytest.fixture(scope="module")
def encoder() -> MixTransformer:
    torch.manual_seed(0)
    return MixTransformer("b0").eval()


def test_encoder_is_mit_b0(encoder: MixTransformer) -> None:
    # The number of parameters of SegFormer's MiT-B0 without its classification head.
    assert sum(p.numel() for p in encoder.parameters()) == 3_319_392
    with torch.inference_mode():
        shapes = [tuple(x.shape) for x in encoder(torch.randn(2, 3, 64, 96))]
    assert shapes == [(2, 32, 16, 24), (2, 64, 8, 12), (2, 160, 4, 6), (2, 256, 2, 3)]


@pytest.mark.parametrize(
    ("segformer", "timm"),
    [
        ("patch_embed1.proj.weight", "patch_embed.proj.weight"),
        ("patch_embed3.norm.bias", "stages.2.downsample.norm.bias"),
        ("block1.0.attn.q.weight", "stages.0.blocks.0.attn.q.weight"),
        ("block4.1.mlp.dwconv.dwconv.weight", "stages.3.blocks.1.mlp.dwconv.weight"),
        ("norm2.weight", "stages.1.norm.weight"),
    ],
)
def test_key_names(segformer: str, timm: str) -> None:
    assert _timm_name(segformer) == timm
    assert _segformer_name(timm) == segformer


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_encoder_weights_are_loaded_whole(
    encoder: MixTransformer, tmp_path: Path, suffix: str
) -> None:
    state = segformer_state(encoder)
    path = tmp_path / f"mit{suffix}"
    if suffix == ".pth":
        # As SegFormer's own files: nested, prefixed, with a head that is not the encoder's.
        state = {f"backbone.{key}": value for key, value in state.items()}
        torch.save({"state_dict": {**state, "decode_head.bias": torch.zeros(2)}}, path)
    else:
        save_file(state, path)
    other = build_model(ModelConfig()).eval()
    load_encoder_weights(other.encoder, path)
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = encoder(image)
        x = other.features(image)
        assert torch.equal(x, expected[0])  # the model's own parts hold the weights
        for stage, wanted in zip(other.deq.f.stages, expected[1:], strict=True):
            x = stage(x)
            assert torch.equal(x, wanted)


def test_wrong_encoder_weights_name_the_keys_and_load_nothing(tmp_path: Path) -> None:
    model = build_model(ModelConfig())
    before = {key: value.clone() for key, value in model.encoder.state_dict().items()}
    state = segformer_state(model.encoder)
    del state["block2.1.norm1.weight"]
    state["block9.0.norm1.weight"] = torch.ones(3)
    state["norm1.bias"] = torch.ones(7)
    save_file(
        {key: torch.ones_like(value) for key, value in state.items()}, tmp_path / "x.safetensors"
    )
    with pytest.raises(CheckpointError) as caught:
        load_encoder_weights(model.encoder, tmp_path / "x.safetensors")
    for word in ("x.safetensors", "block2.1.norm1.weight", "block9.0.norm1.weight", "norm1.bias"):
        assert word in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.encoder.state_dict().items())


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"patch_embed1.proj.weight": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(CheckpointError, match=r"bomb\.pth"):
        load_encoder_weights(MixTransformer(), tmp_path / "bomb.pth")
    assert not (tmp_path / "exploded").exists()


def test_a_missing_file_of_encoder_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors.*no such file"):
        load_encoder_weights(MixTransformer(), tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("name", POLYPDEQS)
def test_polypdeq_shapes_and_size(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(name=name)).eval()
    # The paper's range for f is 3.9 to 4.2 million with its decoder.
    assert 3.7e6 < sum(p.numel() for p in model.parameters()) < 4.3e6
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        explicit = model.explicit(images)
        implicit = model(images)
    assert explicit.logits.shape == implicit.logits.shape == (2, 1, 64, 96)
    assert explicit.solution is None
    assert implicit.solution is not None
    assert implicit.solution.z.shape == (2, 32, 16, 24)


def test_injections_differ_where_they_should() -> None:
    add, res = (build_model(ModelConfig(name=name)).deq.f for name in POLYPDEQS)
    assert add.injection is None
    z, e = torch.randn(2, 1, 32, 16, 16)
    injected = res.injection(z, e)
    assert injected.shape == z.shape
    assert not torch.allclose(injected, z + e)


@pytest.mark.parametrize("name", POLYPDEQS)
def test_f_treats_images_independently_and_alike_in_training(name: str) -> None:
    torch.manual_seed(0)
    f = build_model(ModelConfig(name=name)).deq.f
    z, e = torch.randn(2, 3, 32, 16, 16)
    with torch.no_grad():
        together = f.train()(z, e)
        again = f(z, e)
        alone = f.eval()(z[1:2], e[1:2])
    assert torch.equal(together, again)  # nothing is redrawn between evaluations
    assert torch.allclose(together[1:2], alone, atol=1e-5)  # no batch statistics


def test_the_implicit_prediction_is_read_from_the_fixed_point() -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig()).eval()
    model.deq = model.deq.with_solver(Anderson(), tol=1e-5, max_steps=100)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        e = model.features(images)
        solution = fixed_point(model.deq.f, torch.zeros_like(e), (e,), tol=1e-5, max_steps=100)
        prediction = model(images)
        assert torch.allclose(prediction.logits, model.read_out(solution.z), atol=1e-4)


def test_gradients_reach_every_parameter_through_the_fixed_point() -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(name="polypdeq-res")).train()
    model.deq = model.deq.with_solver(Anderson(), backward=Implicit(tol=1e-3), max_steps=30)
    model(torch.randn(2, 3, 64, 64)).logits.square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == []


@pytest.mark.parametrize("size", ["b0", "b1", "b2", "b3", "b4", "b5"])
def test_every_encoder_size_serves_in_polypdeq(size: str) -> None:
    # Parameters of the encoders as SegFormer's paper gives them (table 6), in millions.
    published = {"b0": 3.4, "b1": 13.1, "b2": 24.2, "b3": 44.0, "b4": 60.8, "b5": 81.4}
    with torch.device("meta"):
        model = build_model(ModelConfig(encoder=size))
        logits = model.explicit(torch.empty(1, 3, 64, 64)).logits
    assert logits.shape == (1, 1, 64, 64)
    count = sum(p.numel() for p in model.encoder.parameters()) / 1e6
    assert count == pytest.approx(published[size], rel=0.03)


def test_segformer_mixes_its_maps_as_published() -> None:
    model = build_model(ModelConfig(name="segformer-b0")).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    maps = [torch.randn(2, c, 16 >> i, 24 >> i).double() for i, c in enumerate((32, 64, 160, 256))]
    projected = [project(x) for project, x in zip(model.project, maps, strict=True)]
    same = [functional.interpolate(x, (16, 24), mode="bilinear") for x in projected]
    published = model.head[0](torch.cat(same[::-1], dim=1))
    torch.testing.assert_close(model._mix(maps), published)


def test_segformer_b0_is_the_published_one() -> None:
    # The parameters of the published model for ADE20K's 150 classes.
    model = build_model(ModelConfig(name="segformer-b0")).eval()
    classifier = sum(p.numel() for p in model.head[-1].parameters())
    for_150 = 150 * (256 + 1)
    assert sum(p.numel() for p in model.parameters()) - classifier + for_150 == 3_752_694
    prediction = model(torch.randn(2, 3, 64, 96))
    assert prediction.logits.shape == (2, 1, 64, 96)
    assert prediction.solution is None
    with pytest.raises(ValueError, match="segformer-b0 is an explicit network"):
        build_implicit_model(ModelConfig(name="segformer-b0"))
    with pytest.raises(ValueError, match="multiples of 32"):
        model(torch.randn(1, 3, 64, 70))


@pytest.mark.parametrize("name", [*POLYPDEQS, "mdeq", "segformer-b0"])
def test_three_classes_have_three_channels(name: str) -> None:
    model = build_model(ModelConfig(name=name, classes=3)).eval()
    with torch.no_grad():
        assert model.explicit(torch.randn(1, 3, 64, 64)).logits.shape == (1, 3, 64, 64)


@pytest.fixture(scope="module")
def mdeq() -> MDEQ:
    torch.manual_seed(0)
    return MDEQ().eval()


def test_mdeq_has_four_resolutions_and_every_solver_finds_one_fixed_point(mdeq: MDEQ) -> None:
    images = torch.randn(2, 3, 64, 96)
    states = []
    for solver in (Anderson(), Broyden(30)):
        mdeq.deq = mdeq.deq.with_solver(solver, tol=1e-5, max_steps=100)
        with torch.no_grad():
            prediction = mdeq(images)
        assert prediction.logits.shape == (2, 1, 64, 96)
        assert prediction.solution is not None
        assert prediction.solution.residual.max() <= 1e-5
        states.append(prediction.solution.z)
    shapes = [tuple(z.shape) for z in states[0]]
    assert shapes == [(2, 32, 16, 24), (2, 64, 8, 12), (2, 128, 4, 6), (2, 256, 2, 3)]
    layout = Layout.of(states[0])
    anderson, broyden = (layout.flatten(state) for state in states)
    assert (anderson - broyden).norm() < 1e-3 * anderson.norm()


def test_mdeq_treats_images_independently_and_mixes_all_scales(mdeq: MDEQ) -> None:
    e = mdeq.features(torch.randn(3, 3, 64, 64)).detach()
    z = tuple(torch.randn_like(x) for x in mdeq.zero_state(e))
    with torch.no_grad():
        together = mdeq.deq.f(z, e)
        alone = mdeq.deq.f(tuple(x[1:2] for x in z), e[1:2])
    for all_of, one in zip(together, alone, strict=True):
        torch.testing.assert_close(all_of[1:2], one, rtol=1e-4, atol=1e-5)
    for source in range(4):  # every scale of the result depends on every scale of the state
        leaf = z[source].clone().requires_grad_()
        out = mdeq.deq.f((*z[:source], leaf, *z[source + 1 :]), e)
        for target in out:
            (gradient,) = torch.autograd.grad(target.square().sum(), leaf, retain_graph=True)
            assert gradient.abs().max() > 0


def test_mdeq_trains_through_its_fixed_point_and_takes_a_hypersolver(mdeq: MDEQ) -> None:
    model = MDEQ().train()
    model.deq = model.deq.with_solver(Anderson(), backward=Implicit(tol=1e-3), max_steps=30)
    model(torch.randn(2, 3, 64, 64)).logits.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    settings = make_config(overrides=["hyper.initializer=convolution"]).hyper
    hyper = build_hypersolver(mdeq, settings).eval()
    e = mdeq.features(torch.randn(1, 3, 64, 64))
    learned = mdeq.deq.with_solver(hyper)
    for mine, its in zip(learned.initial_state(e), hyper.start(e), strict=True):
        assert torch.equal(mine, its)
    for zeros in mdeq.deq.initial_state(e):
        assert not zeros.any()


@pytest.mark.parametrize("name", ["polypdeq-add", "polypdeq-res", "mdeq"])
def test_a_hypersolver_without_an_initializer_starts_from_zero(name: str) -> None:
    model = build_implicit_model(ModelConfig(name=name)).eval()
    hyper = build_hypersolver(model, make_config(overrides=["hyper.initializer=zero"]).hyper)
    assert hyper.initializer is None
    with torch.no_grad():
        started = model.deq.with_solver(hyper).initial_state(
            model.features(torch.randn(1, 3, 64, 64))
        )
    for zeros in pytree.tree_leaves(started):
        assert not zeros.any()


def test_encoder_weights_for_a_network_without_that_encoder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mit\.pth: MDEQ has no Mix Transformer"):
        load_pretrained(MDEQ(), tmp_path / "mit.pth")


def test_sides_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(ValueError, match="multiples of 32, got 64 x 70"):
        build_model(ModelConfig())(torch.randn(1, 3, 64, 70))


def test_the_real_pretrained_encoder_loads() -> None:
    default = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    folder = Path(os.environ.get("POLYPSEG_DATA", default))
    path = folder.parent / "weights" / "mit_b0_ade20k.safetensors"
    if not path.is_file():
        pytest.skip(f"no pretrained encoder at {path}")
    encoder = MixTransformer().eval()
    before = encoder.patch_embed.proj.weight.clone()
    load_encoder_weights(encoder, path)
    assert not torch.equal(before, encoder.patch_embed.proj.weight)
