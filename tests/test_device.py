"""Models made ready to be attacked: the same function, the model untouched, and no claim believed."""

from __future__ import annotations

import copy
import pickle
from importlib import import_module

import pytest
import torch
from torch import nn
from torch.nn import functional

from robustkit import device, surgery
from robustkit.attacks import fgsm, pgd
from robustkit.device import Prepared, batch_size, confirmed, prepare
from robustkit.evaluate import predict
from robustkit.models import Normalize, PreActResNet, build, pretrained
from robustkit.threat import Ball
from tests import oracle


@pytest.fixture(autouse=True)
def random_state():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def scrambled(model: nn.Module) -> nn.Module:
    """BatchNorm as after training, but further off: statistics and weights of every size, tiny variances too."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            if layer.running_var is not None:
                layer.running_mean.normal_()
                layer.running_var.uniform_(0, 2)
                layer.running_var[0] = 1e-5  # as small as eps: it counts here
            if layer.affine:
                layer.weight.data.uniform_(-1.5, 1.5)
                layer.bias.data.normal_()
    return model


def resnet() -> nn.Module:
    net = nn.Sequential(Normalize((0.5, 0.4, 0.3), (0.25, 0.2, 0.3)), PreActResNet((1, 1), 4))
    return scrambled(net).eval()


def images(n: int = 8, shape: tuple[int, ...] = (3, 16, 16)) -> torch.Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """A convolution, a BatchNorm and a head, with whatever in between: the part that each case changes."""

    def __init__(self, **norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(6, **norm)
        self.head = nn.Linear(6, 4)

    def between(self, x):
        return self.norm(self.conv(x))

    def forward(self, x):
        return self.head(functional.relu(self.between(x)).mean((2, 3)))


class ConvolutionSeenTwice(Net):
    def between(self, x):
        convolved = self.conv(x)
        return self.norm(convolved) + convolved


class ConvolutionCalledTwice(Net):
    def between(self, x):
        return self.norm(self.conv(x)) + self.conv(1 - x)


class NormCalledTwice(Net):
    def between(self, x):
        return self.norm(self.norm(self.conv(x)))


class ControlFlow(Net):
    def between(self, x):
        return self.norm(self.conv(x)) if x.mean() > 0 else x[:, :1].expand(-1, 6, -1, -1)


class ClampedNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).clamp(0, 1)


class SubclassedNorm(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = ClampedNorm(6)


class WeightNorm(Net):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.conv)


class NormOfTheBatch(Net):
    def __init__(self) -> None:
        super().__init__(track_running_stats=False)


class WithoutScale(Net):
    def __init__(self) -> None:
        super().__init__(affine=False)


class SharedWeights(Net):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False)
        self.other.weight = self.conv.weight

    def between(self, x):
        return self.norm(self.conv(x)) + self.other(x)


class NoGradientPath(Net):
    """fx would trace this into a graph that has lost the no_grad, and gradients with it."""

    def between(self, x):
        with torch.no_grad():
            blocked = self.norm(self.conv(x))
        return blocked + self.conv(x)


NETS = [
    Net,
    ConvolutionSeenTwice,
    ConvolutionCalledTwice,
    NormCalledTwice,
    ControlFlow,
    SubclassedNorm,
    WeightNorm,
    NormOfTheBatch,
    WithoutScale,
    SharedWeights,
    NoGradientPath,
]


def answers(model, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_(True)
    logits = model(x)
    (gradient,) = torch.autograd.grad(logits.logsumexp(1).sum(), x)
    return logits.detach(), gradient


def assert_same(found, wanted, tolerance: float = 1e-5) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() <= tolerance * other.abs().max()


# --- the search copy computes the same function ------------------------------------------------------


@pytest.mark.parametrize("make", NETS)
def test_a_simplified_network_is_the_same_function_however_it_is_wired(make):
    model = scrambled(make()).eval()
    simple = copy.deepcopy(model)
    surgery.simplify(simple, torch.Size((3, 16, 16)))
    assert_same(answers(simple, images()), answers(model, images()))


def test_a_preactivation_resnet_is_folded_where_it_can_be_and_stays_the_same():
    model, x = resnet(), images()
    ready = prepare(model, x, precision=torch.float32)
    assert isinstance(ready, Prepared)
    assert_same(answers(ready, x), answers(model, x))
    kinds = [type(layer) for layer in ready.modules()]
    assert nn.BatchNorm2d not in kinds
    # Each block's second BatchNorm follows a convolution; its first, and the last of all, do not.
    assert kinds.count(surgery.Affine) == 3
    assert kinds.count(Normalize) == 1  # its check of the channels is control flow, yet nothing was lost


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "rewritten"),
    [
        (4, 2, 1, True),
        (7, 2, 3, True),
        (2, 2, 0, True),
        (5, 4, 1, True),
        (3, 2, 1, True),
        (3, 1, 1, False),
        (4, 2, 0, True),
        (3, 3, 1, True),
        ((4, 2), (3, 1), (2, 0), True),
        (2, 6, 0, False),  # of every row it would look at, two pixels in six count
    ],
)
def test_a_strided_convolution_as_a_product_is_the_same_function(kernel, stride, padding, rewritten):
    model = nn.Sequential(nn.Conv2d(3, 5, kernel, stride, padding), nn.Flatten())
    simple = copy.deepcopy(model)
    surgery.rows_as_products(simple, torch.Size((3, 16, 20)))
    assert any(isinstance(layer, surgery.OnRows) for layer in simple.modules()) == rewritten
    x = images(4, (3, 16, 20))
    assert_same(answers(simple, x), answers(model, x))
    with torch.no_grad():
        assert torch.equal(simple(x), model(x))  # forward alone: the convolution as it was
    other = images(4, (3, 18, 22))
    assert_same(answers(simple, other), answers(model, other))  # and so on images of another size


class FlattenedTwice(Net):
    """The flattened images go into two layers: neither may lose the order that it was trained in."""

    def __init__(self):
        super().__init__()
        self.flat, self.one, self.two = nn.Flatten(), nn.Linear(48, 4), nn.Linear(48, 4)

    def forward(self, x):
        flat = self.flat(nn.functional.adaptive_avg_pool2d(x, 4))
        return self.one(flat) + self.two(flat)


@pytest.mark.parametrize("start", [1, 2])
def test_flattening_in_the_order_of_memory_is_the_same_function(start):
    linear = nn.Linear(5 * 49 if start == 1 else 49, 4)
    model = nn.Sequential(nn.Conv2d(3, 5, 3, 2, 1), nn.ReLU(), nn.Flatten(start), linear)
    simple, x = copy.deepcopy(model), images(4, (3, 14, 14))
    surgery.flatten_channels_last(simple, x.shape[1:])
    rewritten = any(isinstance(layer, surgery.FlattenChannelsLast) for layer in simple.modules())
    assert rewritten == (start == 1)
    torch.testing.assert_close(simple(x), model(x))
    if rewritten:  # the weights alone would be another function
        simple[2] = nn.Flatten()
        assert (simple(x) - model(x)).abs().max() > 0.01


@pytest.mark.parametrize(
    "make",
    [FlattenedTwice, lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 3))],
    ids=["twice", "no convolution"],
)
def test_flattening_is_left_where_the_order_of_memory_is_no_help(make):
    model = make()
    surgery.flatten_channels_last(model, torch.Size((3, 16, 16)))
    assert not any(isinstance(layer, surgery.FlattenChannelsLast) for layer in model.modules())


def test_the_course_model_is_rewritten():
    ready = prepare(pretrained("mnist-pgd"), images(8, (1, 28, 28)), precision=torch.float32)
    kinds = {type(layer) for layer in ready.modules()}
    assert {surgery.OnRows, surgery.FlattenChannelsLast} <= kinds


@pytest.mark.parametrize("make", [resnet, lambda: pretrained("mnist-pgd")], ids=["resnet", "mnist"])
def test_in_bfloat16_the_copy_is_near_and_its_parameters_are_half_the_size(make):
    model = make()
    x = images() if make is resnet else images(8, (1, 28, 28))
    ready = prepare(model, x, precision=torch.bfloat16)
    assert isinstance(ready, Prepared)
    found, wanted = answers(ready, x)[0], answers(model, x)[0]
    assert found.dtype == torch.float32
    assert 0 < (found - wanted).abs().max() < 0.05 * wanted.abs().max()
    weights = [layer.weight for layer in ready.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert {weight.dtype for weight in weights} == {torch.bfloat16}


def test_a_prepared_model_goes_to_another_process():
    ready = prepare(resnet(), images())
    again = pickle.loads(pickle.dumps(ready))
    assert torch.equal(again(images()), ready(images()))
    assert torch.equal(again.strict(images()), ready.strict(images()))


# --- the model is left as it was ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_preparing_and_attacking_leave_the_model_as_it_was(mode):
    model = resnet().train(mode)
    model[1].features[1].eval()  # a mixed mode, to be kept
    model[1].head.weight.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    kept = [
        (
            module.training,
            [p.requires_grad for p in module.parameters()],
            [p.stride() for p in module.parameters()],
        )
        for module in model.modules()
    ]
    rng = torch.random.get_rng_state()

    x, y = images(), torch.arange(8)
    ready = prepare(model, x)
    pgd(ready, x, y, Ball("Linf", 0.1), steps=2, generator=torch.Generator().manual_seed(0))
    ready.train().requires_grad_(True).double()  # what another library might do to a module
    confirmed(ready, x, y, torch.ones(8, dtype=torch.bool))

    assert ready.strict is model
    assert not ready.training
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert kept == [
        (
            module.training,
            [p.requires_grad for p in module.parameters()],
            [p.stride() for p in module.parameters()],
        )
        for module in model.modules()
    ]
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
        assert value.dtype == state[name].dtype
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_in_train_mode_is_prepared_as_it_would_be_deployed():
    model = resnet()
    deployed = answers(model, images())
    ready = prepare(model.train(), images(), precision=torch.float32)
    assert_same(answers(ready, images()), deployed)


# --- attacks see no difference -----------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_pgd_through_a_prepared_model_is_pgd_on_the_model(norm):
    """From the same starts. Linf steps go by the sign: a gradient that rounding turns over moves one pixel."""
    model, x = resnet(), images()
    y, ball = model(x).argmax(1), Ball(norm, {"Linf": 0.02, "L2": 0.5}[norm])
    runs = [
        pgd(target, x, y, ball, steps=3, generator=torch.Generator().manual_seed(0))
        for target in (model, prepare(model, x, precision=torch.float32))
    ]
    assert torch.isclose(*runs, atol=1e-5).float().mean() > 0.999
    assert ball.contains(x, runs[1]).all()


def test_robust_accuracy_on_a_linear_model_is_the_closed_form_after_preparation():
    model, ball = oracle.linear(), Ball("Linf", 0.05)
    data = oracle.linear_data(model)
    ready = prepare(model, data.x)
    assert isinstance(ready, Prepared)
    margins = oracle.margins(model, data.x, data.y)
    wanted = int((margins > ball.eps * model.w.detach().abs().sum().item()).sum())
    broken = ~predict(model, fgsm(ready, data.x, data.y, ball), data.y)
    assert int((~broken).sum()) == wanted


# --- what cannot be prepared comes back as it is -------------------------------------------------------


class Noisy(Net):
    def forward(self, x):
        return super().forward(x + 0.1 * torch.randn_like(x))


class DropoutOn(Net):
    def forward(self, x):
        return functional.dropout(super().forward(x), 0.5, training=True)


class Counting(Net):
    """Answers by how often it was asked."""

    asked = 0

    def forward(self, x):
        self.asked += 1
        return super().forward(x) * self.asked


class Unwilling(Net):
    def __deepcopy__(self, memo):
        raise TypeError("not to be copied")


class ReadsItsNorm(Net):
    """A rewritten copy would not run: the layer it looks into is gone."""

    def forward(self, x):
        return super().forward(x) + self.norm.running_mean.sum()


class ChangedByTracing(Net):
    """Rounds as a defence would: a copy in bfloat16 falls on other steps."""

    def forward(self, x):
        return (1e4 * super().forward(x)).round() % 7 + 0 * x.sum((1, 2, 3))[:, None]


@pytest.mark.parametrize("make", [Noisy, DropoutOn, Counting, Unwilling, ReadsItsNorm])
def test_a_model_that_no_copy_can_stand_for_comes_back_itself(make):
    model = scrambled(make()).eval()
    assert prepare(model, images()) is model


def test_a_precision_in_which_the_copy_goes_wrong_is_not_used():
    model = scrambled(ChangedByTracing()).eval()
    assert prepare(model, images(), precision=torch.bfloat16) is model


def test_callables_prepared_models_and_other_classes_of_input_pass_through():
    model = resnet()
    plain = lambda x: model(x)  # noqa: E731
    assert prepare(plain, images()) is plain
    ready = prepare(model, images())
    assert prepare(ready, images()) is ready
    assert prepare(model, images(shape=(1, 16, 16))) is model  # it refuses such images


def test_a_model_without_an_input_gradient_comes_back_itself():
    class Labels(Net):
        def forward(self, x):
            return functional.one_hot(super().forward(x).argmax(1), 4).float()

    model = Labels().eval()
    assert prepare(model, images()) is model


# --- tests of the tests: rewritings with a mistake are seen -------------------------------------------


def without_eps(norm):
    scale = norm.weight / norm.running_var.sqrt()
    return scale.detach(), (norm.bias - scale * norm.running_mean).detach()


def of_the_batch(norm):
    scale = norm.weight.detach()
    return scale, norm.bias.detach()


def without_mean(norm):
    scale, _ = RIGHT(norm)
    return scale, norm.bias.detach()


RIGHT = surgery._affine


@pytest.mark.parametrize("mistake", [without_eps, of_the_batch, without_mean])
def test_a_wrong_fold_is_refused_and_the_model_used_instead(mistake, monkeypatch):
    monkeypatch.setattr(surgery, "_affine", mistake)
    model = resnet()
    assert prepare(model, images()) is model
    folded = copy.deepcopy(model)
    surgery.simplify(folded, torch.Size((3, 16, 16)))
    with pytest.raises(AssertionError):
        assert_same(answers(folded, images()), answers(model, images()))


@pytest.mark.parametrize("make", [ConvolutionSeenTwice, ConvolutionCalledTwice, NormCalledTwice])
def test_a_fold_that_follows_the_order_of_the_layers_and_not_the_data_is_refused(make, monkeypatch):
    monkeypatch.setattr(surgery, "_pairs", lambda model, fit: [(model.conv, model.norm)])
    model = scrambled(make()).eval()
    assert prepare(model, images()) is model


def test_a_copy_with_the_right_logits_and_the_wrong_gradient_is_refused(monkeypatch):
    """What a graph that lost a `detach` does: an attack on it would attack another defence."""

    class Straight(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x + (x.detach() - x))  # the gradient is gone, the value is not

    search_copy = device._search_copy
    monkeypatch.setattr(device, "_search_copy", lambda *a: Straight(search_copy(*a)))
    model = resnet()
    assert prepare(model, images()) is model


# --- claims --------------------------------------------------------------------------------------------


def near_the_boundary(model: oracle.Linear, ball: Ball, n: int = 300) -> torch.Tensor:
    """Images of class 1 that the ball's best perturbation breaks with 2 to 20 % to spare, any other hardly."""
    generator = torch.Generator().manual_seed(1)
    w = model.w.detach()
    aside = 0.2 * (torch.rand(n, oracle.DIMENSION, generator=generator) - 0.5)
    aside -= (aside @ w)[:, None] * w / w.square().sum()
    margin = (0.8 + 0.18 * torch.rand(n, generator=generator)) * ball.eps * w.abs().sum()
    return (0.5 + aside + margin[:, None] * w / w.square().sum()).view(n, 3, 2, 2)


def test_robust_accuracy_is_not_raised_by_claims_in_bfloat16(monkeypatch):
    """Each restart breaks a share of the points, and those that it is believed to have broken get no other."""
    model, ball = oracle.linear(), Ball("Linf", 0.02)
    x = near_the_boundary(model, ball)
    y = torch.ones(len(x), dtype=torch.int64)
    ready = prepare(model, x, precision=torch.bfloat16)
    assert isinstance(ready, Prepared)

    def robust(target) -> int:
        generator = torch.Generator().manual_seed(0)
        found = pgd(target, x, y, ball, steps=3, step_size=ball.eps / 2, restarts=20, generator=generator)
        return int(predict(model, found, y).sum())

    assert robust(model) == 0  # as the closed form says: every point can be broken
    assert robust(ready) <= 5
    trusting = lambda model, points, y, claimed: claimed  # noqa: E731
    monkeypatch.setattr(import_module("robustkit.attacks.pgd"), "confirmed", trusting)
    assert robust(ready) > 15  # the mutant, which trusts the search


LOOSE = {
    "matmul": lambda: torch.set_float32_matmul_precision("medium"),
    "cuDNN": lambda: setattr(torch.backends.cudnn, "allow_tf32", True),
    "everything": lambda: setattr(torch.backends, "fp32_precision", "bf16"),
    "oneDNN": lambda: setattr(torch.backends.mkldnn, "fp32_precision", "bf16"),
    "oneDNN matmul": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "oneDNN conv": lambda: setattr(torch.backends.mkldnn.conv, "fp32_precision", "bf16"),
}


@pytest.fixture
def arithmetic_as_at_first():
    places = [*device._float32_arithmetic(), torch.backends.mkldnn, torch.backends.cudnn, torch.backends]
    before = [place.fp32_precision for place in places]
    yield
    for place, precision in zip(places, before, strict=True):
        place.fp32_precision = precision


@pytest.mark.usefixtures("arithmetic_as_at_first")
@pytest.mark.parametrize("loosen", LOOSE.values(), ids=LOOSE)
def test_verdicts_are_strict_whatever_is_set_outside_and_leave_it_as_it_was(loosen):
    """Where matrix units take bfloat16, torch can be told to use it for float32."""
    x, w, kernel = images(8, (64, 64)).flatten(0, 1), torch.randn(64, 64), torch.randn(8, 3, 3, 3)

    def errors() -> tuple[float, float]:
        conv = functional.conv2d
        exact = x.double() @ w.double(), conv(images().double(), kernel.double())
        found = x @ w, conv(images(), kernel)
        return tuple(float((one - other).abs().max()) for one, other in zip(found, exact, strict=True))

    loosen()
    loose, settings = errors(), [place.fp32_precision for place in device._float32_arithmetic()]
    with device.strict_fp32():
        assert max(errors()) < 1e-4
    assert errors() == loose
    assert [place.fp32_precision for place in device._float32_arithmetic()] == settings


def test_confirmed_asks_the_strict_model_about_the_claimed_points_alone():
    model = oracle.linear()
    data, asked = oracle.linear_data(model), []

    class Recording(nn.Module):
        def forward(self, x):
            asked.append(len(x))
            return model(x)

    ready = Prepared(lambda x: -model(x), Recording())
    wrong = model(data.x).argmax(1) != data.y
    claimed = torch.arange(len(data)) % 2 == 0
    assert torch.equal(confirmed(ready, data.x, data.y, claimed), wrong & claimed)
    assert asked == [int(claimed.sum())]
    assert torch.equal(confirmed(ready, data.x, data.y, claimed & False), claimed & False)
    assert len(asked) == 1
    assert torch.equal(
        confirmed(model, data.x, data.y, claimed), claimed
    )  # a plain model's claim is a verdict


def test_a_tie_is_confirmed_as_evaluate_counts_it():
    tie = lambda x: torch.zeros(len(x), 2)  # noqa: E731
    ready, x = Prepared(tie, tie), torch.rand(2, 3)
    y, all_of_them = torch.tensor([0, 1]), torch.tensor([True, True])
    assert torch.equal(confirmed(ready, x, y, all_of_them), ~predict(tie, x, y))


# --- batch size ----------------------------------------------------------------------------------------


def test_batches_are_smaller_for_models_that_keep_more():
    small, large = pretrained("mnist-clean"), build("preact_resnet18").eval()
    x, rng = images(shape=(3, 32, 32)), torch.random.get_rng_state()
    assert batch_size(small, images(shape=(1, 28, 28))) == 128
    assert batch_size(large, x) == 16
    assert batch_size(lambda x: x.flatten(1), x) == 128
    assert torch.equal(torch.random.get_rng_state(), rng)
    middle = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), *[nn.Tanh()] * 3, nn.Flatten())
    # A float32 image and three outputs of tanh: 12,288 + 3 * 262,144 bytes, and the weights once.
    assert batch_size(middle, x) == 64
