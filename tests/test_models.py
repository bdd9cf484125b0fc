"""Models: what they compute, and weights files that must not be believed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from robustkit.data import load
from robustkit.errors import RobustkitError
from robustkit.evaluate import ATTACKS, evaluate
from robustkit.files import write_atomically
from robustkit.models import (
    MODELS,
    Normalize,
    build,
    load_weights,
    preact_resnet18,
    pretrained,
    save_weights,
    zoo,
)
from robustkit.models.files import save_shards
from robustkit.threat import Ball

REAL = Path(os.environ.get("ROBUSTKIT_DATA") or "unset")
needs_lossless = pytest.mark.skipif(
    not (REAL / "cifar10-lossless-4k.npz").is_file(), reason="ROBUSTKIT_DATA names no folder with CIFAR-10"
)


class Canary:
    """Unpickling this writes a file: the proof that somebody unpickled it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def tiny(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.fixture(autouse=True)
def random_state():
    with torch.random.fork_rng(devices=[]):
        yield


# --- models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        ("mnist_cnn", (1, 28, 28), 166_406),
        ("preact_resnet18", (3, 32, 32), 11_172_170),  # the literature says 11.17 million
        ("preact_resnet10_w16", (3, 32, 32), None),
        ("preact_resnet10_w4", (3, 32, 32), None),
    ],
)
def test_models_turn_images_into_ten_logits(name, shape, parameters):
    model = build(name).eval()
    with torch.no_grad():
        assert model(torch.rand(2, *shape)).shape == (2, 10)
    if parameters:
        assert sum(p.numel() for p in model.parameters()) == parameters


def test_a_seed_gives_the_same_model_and_touches_no_global_state():
    before = torch.random.get_rng_state()
    first, again, other = build("mnist_cnn", seed=1), build("mnist_cnn", seed=1), build("mnist_cnn", seed=2)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


def test_an_unknown_model_is_refused_with_the_known_ones():
    with pytest.raises(RobustkitError, match="'lenet' is unknown; choose one of mnist_cnn"):
        build("lenet")
    assert set(MODELS) == {"mnist_cnn", "preact_resnet18", "preact_resnet10_w16", "preact_resnet10_w4"}


def test_normalize_subtracts_and_divides_channel_by_channel():
    layer = Normalize((0.5, 0.25), (0.1, 0.2))
    x = torch.full((1, 2, 1, 2), 0.75)
    torch.testing.assert_close(layer(x).flatten(), torch.tensor([2.5, 2.5, 2.5, 2.5]))
    torch.testing.assert_close(layer(torch.zeros(1, 2, 1, 1)).flatten(), torch.tensor([-5.0, -1.25]))
    assert not layer.state_dict()  # constants of the architecture, not weights


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.1, 0.1)), ((0.5,), (0.0,)), ((0.5,), (-1.0,))])
def test_normalize_refuses_what_it_cannot_divide_by(mean, std):
    with pytest.raises(RobustkitError, match="one positive std per channel"):
        Normalize(mean, std)


def test_normalize_does_not_make_up_channels():
    with pytest.raises(RobustkitError, match=r"images of 3 channels.*got shape \(2, 1, 4, 4\)"):
        Normalize((0.1, 0.2, 0.3), (1.0, 1.0, 1.0))(torch.zeros(2, 1, 4, 4))
    with pytest.raises(RobustkitError, match="images of 1 channels"):
        Normalize((0.1,), (1.0,))(torch.zeros(2, 3, 4, 4))


def test_the_resnet_is_preactivated_and_normalises_inside():
    model = preact_resnet18(width=4).eval()
    with torch.no_grad():
        logits = model(torch.rand(2, 3, 32, 32))
    assert logits.shape == (2, 10)
    assert isinstance(model[0], Normalize)


# --- weights ---------------------------------------------------------------------------------------


def test_weights_come_back_bit_for_bit(tmp_path):
    path = tmp_path / "deep" / "folder" / "model.safetensors"
    model, other = tiny(1), tiny(2)
    save_weights(model, path)
    assert load_weights(other, path) is other
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]


def with_header(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def state(**changes: torch.Tensor) -> bytes:
    return safetensors.torch.save({**{k: v.clone() for k, v in tiny(3).state_dict().items()}, **changes})


def without(name: str) -> bytes:
    return safetensors.torch.save({k: v.clone() for k, v in tiny(3).state_dict().items() if k != name})


BAD = {
    "missing": (None, "cannot be read"),
    "empty": (b"", "not a safetensors file"),
    "short": (b"\x00\x01", "not a safetensors file"),
    "no JSON": (with_header(b"{{{{{"), "unreadable header"),
    "header of another shape": (with_header([1, 2]), "unreadable header"),
    "header without types": (with_header({"0.weight": {"shape": [4, 3]}}), "unreadable header"),
    "nested": (with_header(b"[" * 50_000), "unreadable header"),
    "not text": (with_header(b"\xff\xfe\x00\x01"), "unreadable header"),
    "header longer than the file": (struct.pack("<Q", 2**40) + b"{}", "not a safetensors file"),
    "cut": (state()[:-4], "damaged"),
    "other architecture": (without("2.bias"), "lacks 2.bias"),
    "extra tensor": (state(extra=torch.zeros(1)), "unknown tensor extra"),
    "other shape": (
        state(**{"0.weight": torch.zeros(3, 4)}),
        r"0.weight .* \(3, 4\), the model needs F32 \(4, 3\)",
    ),
    "other type": (state(**{"0.weight": torch.zeros(4, 3).double()}), "F64"),
    "NaN": (state(**{"0.bias": torch.tensor([0, 0, torch.nan, 0])}), "0.bias .* NaN or infinity"),
    "infinite": (
        state(**{"1.running_var": torch.tensor([1, 1, 1, torch.inf])}),
        "1.running_var .* NaN or infinity",
    ),
    "too large": (state(extra=torch.zeros(400_000)), "at most"),
}


@pytest.mark.parametrize("kind", BAD)
def test_weights_that_cannot_be_believed_are_refused_and_change_nothing(kind, tmp_path):
    content, words = BAD[kind]
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    model = tiny(4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RobustkitError, match=words) as caught:
        load_weights(model, path)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_pickle_is_refused_unopened(tmp_path):
    path, proof = tmp_path / "model.safetensors", tmp_path / "unpickled"
    for write in (pickle.dumps, torch_pickle):
        path.write_bytes(write(Canary(proof)))
        with pytest.raises(RobustkitError, match=r"not a safetensors file|unreadable header"):
            load_weights(tiny(), path)
    assert not proof.exists()
    pickle.loads(pickle.dumps(Canary(proof)))
    assert proof.exists()  # so the canary does sing


def torch_pickle(value: object) -> bytes:
    import io

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_a_folder_is_no_weights_file(tmp_path):
    with pytest.raises(RobustkitError, match="cannot be read"):
        load_weights(tiny(), tmp_path)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_atomically(path, b"old")
    monkeypatch.setattr(
        Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


# --- trained models that come with the package -------------------------------------------------------


OF_MNIST = [name for name in zoo.names() if zoo.card(name)["architecture"] == "mnist_cnn"]
OF_CIFAR10 = [name for name in zoo.names() if name not in OF_MNIST]


@pytest.mark.parametrize("name", zoo.names())
def test_a_trained_model_is_float32_in_eval_mode(name):
    model = pretrained(name)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", OF_MNIST)
def test_a_trained_model_classifies_as_its_card_says(name):
    """On the digits at hand without a download: another data set, so only far above chance is asked."""
    model, described = pretrained(name), zoo.card(name)
    images = load("digits", "test", limit=200)
    right = (model(images.x).argmax(1) == images.y).float().mean().item()
    assert right > 0.25
    assert described["name"] == name
    measured = described["measured"]
    assert measured["clean"]["n"] == measured["robust"]["n"] == 1000
    assert measured["clean"]["k"] > 800
    # Training against one FGSM step fails against PGD; a random start before it is what repairs it.
    assert (measured["robust"]["k"] > 800) == (name not in ("mnist-clean", "mnist-fgsm"))


@pytest.mark.parametrize("name", OF_CIFAR10)
def test_a_card_says_where_its_images_are_from_and_that_none_was_trained_on_or_selected_by(name):
    described = zoo.card(name)
    assert described["data"]["exact"] is (described["data"]["dataset"] == "CIFAR-10")
    assert (
        "far below what is published" in described["note"] or described["architecture"] == "preact_resnet18"
    )
    for section in {"measured", "lossless", "other_ball"} & described.keys():
        measured = described[section]
        assert measured["data"]["split"] in ("test", "report")
        assert measured["attacks"][0]["name"] == "pgd-50x10"
        after = [run["accuracy_after"]["k"] for run in measured["attacks"]]
        assert measured["clean"]["k"] >= after[0]
        assert after == sorted(after, reverse=True)
        assert after[-1] == measured["robust"]["k"]
    assert described["measured"]["threat"] == described["threat"]


@needs_lossless
@pytest.mark.parametrize("name", OF_CIFAR10)
def test_the_lossless_half_gives_the_figures_of_the_card_again(name, monkeypatch):
    """The clean figure to the image; PGD-10, weaker than the card's attack, cannot break more than all do."""
    monkeypatch.setenv("ROBUSTKIT_DATA", str(REAL))
    described, model = zoo.card(name)["lossless"], pretrained(name)
    images = load("cifar10-lossless-4k", "report", limit=described["clean"]["n"])
    assert int((model(images.x).argmax(1) == images.y).sum()) == described["clean"]["k"]
    ball = Ball("L2", 0.5)
    found = evaluate(
        model, images, ball, {"pgd-10": ATTACKS["pgd-10"]}, model_name=name, tier="smoke", progress=False
    )
    assert described["threat"].startswith(str(ball))
    assert described["robust"]["k"] <= found.robust.k <= described["robust"]["k"] + 0.05 * found.n


def test_weights_in_shards_are_those_in_one_file(tmp_path):
    model, other = tiny(1), tiny(2)
    sizes = [value.nbytes for value in model.state_dict().values()]
    paths = save_shards(model, tmp_path / "model.safetensors", most=max(sizes))
    assert len(paths) > 2
    assert paths[0].name == f"model-1of{len(paths)}.safetensors"
    for path in paths:
        assert sum(value.nbytes for value in safetensors.torch.load_file(path).values()) <= max(sizes)
    load_weights(other, *paths)
    assert all(torch.equal(other.state_dict()[name], value) for name, value in model.state_dict().items())
    with pytest.raises(RobustkitError, match=r"lacks .* and is of another architecture"):
        load_weights(other, *paths[1:])
    assert save_shards(model, tmp_path / "model.safetensors", most=10**6) == [tmp_path / "model.safetensors"]


def test_a_card_of_shards_covers_all_of_them(tmp_path):
    model = build("mnist_cnn", seed=1)
    paths = save_shards(model.half(), tmp_path / "large.safetensors", most=320_000)
    assert len(paths) == 2
    card = {"architecture": "mnist_cnn", "files": [path.name for path in paths], "sha256": zoo.digest(paths)}
    (tmp_path / "large.json").write_text(json.dumps(card))
    loaded = zoo.load("large", build, tmp_path)
    for value, stored in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(value, stored.float())
    damaged = bytearray(paths[1].read_bytes())
    damaged[-1] ^= 1
    paths[1].write_bytes(damaged)
    with pytest.raises(RobustkitError, match=r"large-1of2.safetensors, large-2of2.safetensors has sha256"):
        zoo.load("large", build, tmp_path)
    paths[1].unlink()
    with pytest.raises(RobustkitError, match=r"large-2of2.safetensors cannot be read"):
        zoo.load("large", build, tmp_path)


def test_trained_weights_other_than_those_of_the_card_are_refused_in_a_sentence(tmp_path):
    for path in zoo.WEIGHTS.glob("mnist-clean.*"):
        shutil.copy(path, tmp_path)
    assert zoo.load("mnist-clean", build, tmp_path) is not None
    weights = tmp_path / "mnist-clean.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1  # one bit of one weight: a valid file, another model
    weights.write_bytes(damaged)
    with pytest.raises(
        RobustkitError, match=r"sha256 \w{12}, its card says \w{12}; install robustkit again\.$"
    ):
        zoo.load("mnist-clean", build, tmp_path)
    weights.unlink()
    with pytest.raises(RobustkitError, match="cannot be read"):
        zoo.load("mnist-clean", build, tmp_path)


def test_an_unknown_trained_model_is_refused_with_the_known_ones():
    with pytest.raises(RobustkitError, match=r"'mnist-trades' is unknown; choose one of .*mnist-clean, "):
        pretrained("mnist-trades")
