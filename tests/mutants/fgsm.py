"""Mutants of `fgsm(model, x, y, eps)`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.mutants import gradient, mutant


def _step(model, x, y, eps):
    return (x + eps * gradient(model, x, y).sign()).clamp(0, 1)


# --- where the candidates are ------------------------------------------------------------------------


@mutant("fgsm", closed_form="WRONG_SIGN")
def wrong_sign(model, x, y, eps):
    return (x - eps * gradient(model, x, y).sign()).clamp(0, 1)


@mutant("fgsm", box="BOX_VIOLATED")
def no_clamp(model, x, y, eps):
    return x + eps * gradient(model, x, y).sign()


@mutant("fgsm", box="BOX_VIOLATED")
def clamp_before_the_step_only(model, x, y, eps):
    return x.clamp(0, 1) + eps * gradient(model, x, y).sign()


@mutant("fgsm", box="BOX_VIOLATED")
def clamp_to_signed_range(model, x, y, eps):
    return (x + eps * gradient(model, x, y).sign()).clamp(-1, 1)


@mutant("fgsm", ball="EPS_BALL_VIOLATED", closed_form="STEP_TOO_LARGE")
def normalised_units(model, x, y, eps):
    return _step(model, x, y, eps / 0.3081)


@mutant("fgsm", ball="EPS_BALL_VIOLATED", closed_form="STEP_TOO_LARGE")
def eps_times_255(model, x, y, eps):
    return _step(model, x, y, eps * 255)


@mutant("fgsm", closed_form="STEP_TOO_SMALL")
def eps_over_255(model, x, y, eps):
    return _step(model, x, y, eps / 255)


@mutant("fgsm", ball="EPS_BALL_VIOLATED", closed_form="STEP_TOO_LARGE")
def eps_of_the_lesson(model, x, y, eps):
    return _step(model, x, y, 0.3)


@mutant("fgsm", closed_form="STEP_TOO_SMALL")
def l2_normalised_step(model, x, y, eps):
    g = gradient(model, x, y)
    norm = g.flatten(1).norm(dim=1).clamp_min(1e-12)
    return (x + eps * g / norm.view(-1, 1, 1, 1)).clamp(0, 1)


@mutant("fgsm", ball="EPS_BALL_VIOLATED")
def divides_by_the_sign(model, x, y, eps):
    """Right wherever there is a gradient; without one the pixel goes to infinity, and back to the edge of the box."""
    return (x + eps / gradient(model, x, y).sign()).clamp(0, 1)


@mutant("fgsm", closed_form="NOT_STEEPEST")
def random_signs(model, x, y, eps):
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return (x + eps * noise.sign()).clamp(0, 1)


@mutant("fgsm", closed_form="NOT_STEEPEST")
def one_direction_for_the_whole_batch(model, x, y, eps):
    return (x + eps * gradient(model, x, y).mean(0, keepdim=True).sign()).clamp(0, 1)


@mutant("fgsm", closed_form="NOT_STEEPEST")
def gradient_of_the_first_loss_only(model, x, y, eps):
    g = gradient(model, x, y)
    g[1:] = 0
    return (x + eps * g.sign()).clamp(0, 1)


@mutant("fgsm", everywhere="NO_EFFECT")
def gradient_of_summed_logits(model, x, y, eps):
    x_in = x.clone().requires_grad_(True)
    (g,) = torch.autograd.grad(model.eval()(x_in).sum(), x_in)
    return (x + eps * g.sign()).clamp(0, 1)


@mutant("fgsm", closed_form="NOT_STEEPEST")
def gradient_of_the_largest_logit(model, x, y, eps):
    """Climbs towards the predicted class for every image: right only for the misclassified ones."""
    return (x - eps * gradient(model, x, predicted(model, x)).sign()).clamp(0, 1)


# --- which labels ------------------------------------------------------------------------------------


def predicted(model, x):
    was_training = model.training
    with torch.no_grad():
        answer = model.eval()(x).argmax(1)
    model.train(was_training)
    return answer


@mutant("fgsm", closed_form="LABEL_IGNORED")
def predicted_labels(model, x, y, eps):
    return _step(model, x, predicted(model, x), eps)


@mutant("fgsm", closed_form="LABEL_IGNORED")
def least_likely_class(model, x, y, eps):
    return (x - eps * gradient(model, x, 1 - predicted(model, x)).sign()).clamp(0, 1)


@mutant("fgsm", closed_form="NOT_STEEPEST")
def label_of_the_first_image(model, x, y, eps):
    return _step(model, x, y[:1].expand(len(y)), eps)


# --- what is returned --------------------------------------------------------------------------------


@mutant("fgsm", everywhere="NO_EFFECT")
def no_op(model, x, y, eps):
    return x.clone()


@mutant("fgsm", everywhere="PERTURBATION_RETURNED")
def returns_the_perturbation(model, x, y, eps):
    return _step(model, x, y, eps) - x


@mutant("fgsm", everywhere="WRONG_DTYPE")
def returns_float64(model, x, y, eps):
    return _step(model, x, y, eps).double()


@mutant("fgsm", everywhere="RAISED")
def returns_numpy(model, x, y, eps):
    return _step(model, x, y, eps).numpy()


@mutant("fgsm", everywhere="RAISED")
def returns_candidates_and_verdicts(model, x, y, eps):
    return _step(model, x, y, eps), torch.ones(len(x))


@mutant("fgsm", everywhere="WRONG_SHAPE")
def returns_flat_images(model, x, y, eps):
    return _step(model, x, y, eps).flatten(1)


@mutant("fgsm", everywhere="WRONG_SHAPE")
def returns_only_the_broken_images(model, x, y, eps):
    candidates = _step(model, x, y, eps)
    return candidates[predicted(model, candidates) != y]


@mutant("fgsm", everywhere="NOT_FINITE")
def nan_in_small_batches(model, x, y, eps):
    return _step(model, x, y, eps) * (1.0 if len(x) > 16 else float("nan"))


@mutant("fgsm", everywhere="NOT_FINITE")
def one_infinite_pixel(model, x, y, eps):
    candidates = _step(model, x, y, eps)
    candidates[0, 0, 0, 0] = torch.inf
    return candidates


@mutant("fgsm", everywhere="NOT_IMPLEMENTED")
def stub(model, x, y, eps):
    raise NotImplementedError


@mutant("fgsm", everywhere="RAISED")
def raises(model, x, y, eps):
    return x + eps * x.grad.sign()


# --- what is left behind -----------------------------------------------------------------------------


@mutant("fgsm", hygiene="GRAPH_RETURNED")
def returns_a_graph(model, x, y, eps):
    return _step(model, x, y, eps).requires_grad_(True) * 1.0


@mutant("fgsm", hygiene="INPUT_MODIFIED")
def in_place(model, x, y, eps):
    return x.add_(eps * gradient(model, x, y).sign()).clamp_(0, 1)


@mutant("fgsm", hygiene="INPUT_MODIFIED")
def input_left_requiring_a_gradient(model, x, y, eps):
    x.requires_grad_(True)
    return _step(model, x, y, eps).detach()


@mutant("fgsm", hygiene="INPUT_MODIFIED")
def labels_overwritten(model, x, y, eps):
    candidates = _step(model, x, y, eps)
    y.zero_()
    return candidates


def _backward(model, x, y, eps):
    """The style in which the weights collect gradients too."""
    was_training = model.training
    x_in = x.clone().requires_grad_(True)
    F.cross_entropy(model.eval()(x_in), y).backward()
    model.train(was_training)
    return (x + eps * x_in.grad.sign()).clamp(0, 1)


@mutant("fgsm", hygiene="WEIGHT_GRADIENTS_LEFT")
def weight_gradients_left(model, x, y, eps):
    return _backward(model, x, y, eps)


@mutant("fgsm", hygiene="WEIGHT_GRADIENTS_ERASED")
def weight_gradients_erased(model, x, y, eps):
    candidates = _backward(model, x, y, eps)
    model.zero_grad()
    return candidates


@mutant("fgsm", hygiene="WEIGHT_GRADIENTS_ERASED")
def weight_gradients_zeroed(model, x, y, eps):
    candidates = _backward(model, x, y, eps)
    model.zero_grad(set_to_none=False)
    return candidates


@mutant("fgsm", hygiene="WEIGHTS_CHANGED")
def steps_the_bias(model, x, y, eps):
    candidates = _step(model, x, y, eps)
    with torch.no_grad():
        model.b += 1e-3
    return candidates


@mutant("fgsm", hygiene="WEIGHTS_CHANGED")
def freezes_for_good(model, x, y, eps):
    model.requires_grad_(False)
    return _step(model, x, y, eps)


@mutant("fgsm", hygiene="EVAL_MODE_MISSING")
def in_whatever_mode_it_came(model, x, y, eps):
    x_in = x.clone().requires_grad_(True)
    (g,) = torch.autograd.grad(F.cross_entropy(model(x_in), y), x_in)
    return (x + eps * g.sign()).clamp(0, 1)


@mutant("fgsm", hygiene="MODE_NOT_RESTORED")
def leaves_eval_mode(model, x, y, eps):
    model.eval()
    return _step(model, x, y, eps)


@mutant("fgsm", hygiene="MODE_NOT_RESTORED")
def leaves_train_mode(model, x, y, eps):
    candidates = _step(model, x, y, eps)
    model.train()
    return candidates


@mutant("fgsm", hygiene="MODE_NOT_RESTORED")
def restores_only_the_root(model, x, y, eps):
    was_training = model.training
    model.eval()
    candidates = _step(model, x, y, eps)
    model.training = was_training
    return candidates


@mutant("fgsm", hygiene="GLOBAL_RANDOMNESS")
def sets_the_global_seed(model, x, y, eps):
    torch.manual_seed(0)
    return _step(model, x, y, eps)
