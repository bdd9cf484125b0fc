"""The `robustkit` command: parse, one library call, write, print a summary.

Data go to stdout, progress and complaints to stderr. `main` is the one place where an error becomes a
sentence and an exit status: 0 done, 1 the doctor, an audit or a check of manifests found something wrong, 2 bad
input, 130 interrupted. torch is imported by the commands that need it, so `--help` and `report` are quick.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from robustkit import __version__
from robustkit.errors import RobustkitError
from robustkit.files import write_atomically

if TYPE_CHECKING:
    from torch import nn

    from robustkit.certify.certificates import Certification, Row, Smoothing
    from robustkit.data import Dataset
    from robustkit.device import Model
    from robustkit.doctor import Diagnosis
    from robustkit.evaluate import Runner
    from robustkit.leaderboard import Entry, Leaderboard, Standing
    from robustkit.results import Audit, Evaluation, Hardware
    from robustkit.serve.redteam.records import Campaign
    from robustkit.serve.server import Running
    from robustkit.serve.triage import Triage
    from robustkit.threat import Ball
    from robustkit.train import Run

# Model, norm and eps that go with a data set where the command line names none.
_USUAL = {"mnist": ("mnist_cnn", "Linf", 0.3), "digits": ("mnist_cnn", "Linf", 0.3)}
_USUAL |= dict.fromkeys(
    ("cifar10", "cifar10-jpeg", "cifar10-lossless-4k"), ("preact_resnet18", "Linf", 8 / 255)
)
_IMAGES: dict[str, int | None] = {"smoke": 200, "standard": 1_000, "full": None}
_CERTIFIED = {"smoke": 20, "standard": 500, "full": 500}  # the published logs hold 500 images too

_ATTACKED = {"smoke": (5, 50), "standard": (20, 200), "full": (100, 2_000)}  # images, queries for each

_OF_A_RUN = ("checkpoint.pt", "model.safetensors", "run.json")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status."""
    try:
        options = _parser().parse_args(arguments)
        command: Callable[[argparse.Namespace], int] = options.command
        status = command(options)
        sys.stdout.flush()
        return status
    except RobustkitError as error:
        return _complain(str(error), 2)
    except BrokenPipeError:
        # The reader of stdout, such as `head`, has gone. Python's own flush at exit must not fail too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _complain(f"{place}{error.strerror or error}; choose another path or free this one.", 2)
    except ImportError as error:
        return _complain(f"{error}; `pip install robustkit` brings what it needs.", 2)
    except KeyboardInterrupt:
        return _complain("interrupted; no result was half-written, and --resume goes on.", 130)


def _complain(sentence: str, status: int) -> int:
    print(f"robustkit: {' '.join(sentence.split())}", file=sys.stderr)
    return status


# --- commands --------------------------------------------------------------------------------------


def _doctor(options: argparse.Namespace) -> int:
    from robustkit import doctor

    diagnosis = doctor.examine()
    if options.json:
        _print_json(diagnosis.record())
    else:
        print(_diagnosis_text(diagnosis))
    return 0 if diagnosis.healthy else 1


def _as_rank(command: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Under torchrun, `command` as one rank of its group; otherwise `command`."""

    @functools.wraps(command)
    def joined(options: argparse.Namespace) -> int:
        from robustkit import scale

        with scale.joined():
            return command(options)

    return joined


@_as_rank
def _train(options: argparse.Namespace) -> int:
    import torch

    from robustkit import data, device, models, recipes, scale, tensorboard, train

    recipe = recipes.find_recipe(options.recipe)
    out: Path = options.out or Path("runs") / recipe.name
    _check_run_folder(out, resume=options.resume)
    tier = options.tier or device.tier()
    out.mkdir(parents=True, exist_ok=True)  # now, not when the first epoch is over
    place = device.pick_device()
    schedule = replace(recipe.schedules[tier], shards=options.shards)
    load = functools.partial(data.load, seed=options.seed, device=place, dtype=torch.uint8)
    logs = (
        tensorboard.scalars(out / "tensorboard")
        if options.tensorboard and scale.rank() == 0
        else nullcontext()
    )
    with logs as on_epoch:
        run = train.train(
            models.build(recipe.model, seed=options.seed).to(place),
            load(recipe.dataset, recipe.split, limit=recipe.limits[tier]),
            recipes.defence_of(recipe),
            recipe.ball,
            schedule,
            held_out=load(*recipe.held_out, limit=schedule.watched) if recipe.held_out else None,
            seed=options.seed,
            recipe=recipe.name,
            tier=tier,
            run_dir=out,
            on_epoch=on_epoch,
        )
    if scale.rank() > 0:
        return 0
    if options.json:
        print((out / "run.json").read_text(encoding="utf-8"), end="")
    else:
        print(_run_text(run, out))
    return 0


@_as_rank
def _evaluate(options: argparse.Namespace) -> int:
    from robustkit import device, evaluate, scale

    ball = _ball(options)
    attacks = (
        evaluate.find_protocol(options.protocol)
        if options.protocol
        else evaluate.find_attacks(options.attacks)
    )
    tier = options.tier or device.tier()
    out: Path = options.out or options.weights.parent / "eval.json"
    _check_writable(out)
    journal = out.with_name(f"{out.name}.partial")
    _check_result(out, journal, resume=options.resume)
    model = _model(options, options.weights)
    images = _images(options, _IMAGES[tier] if options.n is None else options.n)
    _check_fits(model, _architecture(options), images)
    fitting = min(scale.shared(lambda: device.batch_size(model, images.x)))
    batches = math.ceil(len(images) / fitting)
    batch_size = math.ceil(len(images) / batches)  # of one size: processes that share them end together
    with scale.journal_of_rank(journal) as path, _runner(options) as (runner, machines):
        evaluation = evaluate.evaluate(
            model,
            images,
            ball,
            attacks,
            model_name=_model_name(options.weights),
            tier=tier,
            seed=options.seed,
            batch_size=batch_size,
            runner=runner,
            journal=path,
            progress=scale.rank() == 0,
        )
    if scale.rank() > 0:
        return 0
    evaluation = replace(
        evaluation,
        hardware=machines[0] if machines else evaluation.hardware,
        notes=(_weights_note(options), *evaluation.notes, *(f"also done on {kind}" for kind in machines[1:])),
    )
    write_atomically(out, f"{evaluation.to_json()}\n".encode())
    journal.unlink()
    print(evaluation.to_json() if options.json else _evaluation_text(evaluation, out))
    return 0


def _certify(options: argparse.Namespace) -> int:
    from robustkit import device
    from robustkit.certify.certificates import Smoothing
    from robustkit.certify.smoothing import certify

    smoothing = Smoothing(options.sigma, options.n0, options.n, options.alpha)
    tier = options.tier or device.tier()
    rows: Path = options.out or options.weights.parent / "certificates.tsv"
    _check_writable(rows)
    out = rows.with_suffix(".json")
    if out == rows:
        raise RobustkitError(
            f"{rows} would be the rows and the JSON at once; name the rows with .tsv by --out."
        )
    _check_writable(out)
    if not options.resume and (rows.exists() or out.exists()):
        found = rows if rows.exists() else out
        raise RobustkitError(
            f"{found} already exists; go on with it by --resume, or choose another file with --out."
        )
    model = _model(options, options.weights)
    images = _images(options, _CERTIFIED[tier] if options.images is None else options.images)
    _check_fits(model, _architecture(options), images)
    certification = certify(
        model,
        images,
        smoothing,
        model_name=_model_name(options.weights),
        tier=tier,
        seed=options.seed,
        notes=(_weights_note(options),),
        rows=rows,
        batch_size=options.batch_size,
    )
    write_atomically(out, f"{certification.to_json()}\n".encode())
    print(certification.to_json() if options.json else _certification_text(certification, rows, out))
    return 0


def _curve(options: argparse.Namespace) -> int:
    from robustkit.certify.certificates import Smoothing, read_rows

    smoothing = None if options.sigma is None else Smoothing(options.sigma, n=options.n, alpha=options.alpha)
    logs = [(path, read_rows(path)) for path in options.logs]
    if options.json:
        _print_json({"type": "Curves", "logs": [_curve_record(*log, smoothing) for log in logs]})
    else:
        print("\n\n".join(_curve_text(*log, smoothing) for log in logs))
    return 0


@contextmanager
def _runner(options: argparse.Namespace) -> Iterator[tuple[Runner, list[Hardware]]]:
    """Who does the jobs of an evaluation, and on which machines if not here.

    They are the workers of --dask, the ranks of a torchrun, or forks of this process.
    """
    from robustkit import scale

    if options.dask is None:
        with nullcontext(scale.ranks) if scale.world() > 1 else scale.forks() as runner:
            yield runner, []
        return
    if scale.world() > 1:
        raise RobustkitError("--dask under torchrun would do everything twice; leave out one of the two.")
    from robustkit import cluster

    files = {"ca_file": options.tls_ca_file, "cert": options.tls_cert, "key": options.tls_key}
    with cluster.connected(options.dask, **files) as client:
        yield cluster.workers(client), cluster.machines(client)


def _tls_certificates(options: argparse.Namespace) -> int:
    from robustkit import cluster

    certificate, key = cluster.certificates(options.folder)
    if options.json:
        _print_json({"type": "Certificates", "certificate": str(certificate), "key": str(key)})
    else:
        print(
            f"written: {certificate}, {key}\n\n"
            f"  TLS='--tls-ca-file {certificate} --tls-cert {certificate} --tls-key {key}'\n"
            "  python -m dask scheduler $TLS --host 127.0.0.1 --port 8786 --no-dashboard\n"
            "  python -m dask worker $TLS --nworkers 2 --nthreads 1 --no-dashboard tls://127.0.0.1:8786\n"
            "  robustkit evaluate $TLS --dask tls://127.0.0.1:8786 MODEL.safetensors --data mnist\n\n"
            "Whoever has the key can run code on every worker: keep it as you keep a password."
        )
    return 0


def _audit(options: argparse.Namespace) -> int:
    from robustkit import audit, device

    ball = _ball(options)
    tier = options.tier or device.tier()
    out: Path = options.out or options.weights.parent / "audit.json"
    _check_writable(out)
    model = _model(options, options.weights)
    surrogate = None if options.surrogate is None else _model(options, options.surrogate)
    images = _images(options, _IMAGES[tier] if options.n is None else options.n)
    _check_fits(model, _architecture(options), images)
    found = audit.audit(
        model,
        images,
        ball,
        model_name=_model_name(options.weights),
        tier=tier,
        seed=options.seed,
        surrogate=surrogate,
    )
    found = replace(found, notes=(_weights_note(options),))
    write_atomically(out, f"{found.to_json()}\n".encode())
    print(found.to_json() if options.json else _audit_text(found, out))
    return 1 if found.findings else 0


def _report(options: argparse.Namespace) -> int:
    from robustkit import report
    from robustkit.certify import page
    from robustkit.certify.certificates import Certification, read_certification
    from robustkit.results import is_stored, read_evaluation
    from robustkit.serve.redteam import page as redteam
    from robustkit.serve.redteam.records import Campaign, read_campaign

    _check_writable(options.out)
    proved = [path for path in options.results if is_stored(Certification, path)]
    attacked = [path for path in options.results if is_stored(Campaign, path)]
    evaluations = [read_evaluation(path) for path in options.results if path not in (*proved, *attacked)]
    certifications = [read_certification(path) for path in proved]
    campaigns = [read_campaign(path) for path in attacked]
    more = [*page.sections(certifications), *redteam.sections(campaigns)]
    report.write(report.render(evaluations, options.title, more), options.out)
    if options.json:
        record = {"type": "Report", "out": str(options.out), "evaluations": report.summary(evaluations)}
        record["campaigns"] = [redteam.summary(one) for one in campaigns]
        _print_json(record | {"certifications": [page.summary(one) for one in certifications]})
    else:
        for evaluation in evaluations:
            print(f"{evaluation.model}: robust {evaluation.robust} against {evaluation.threat}")
        for one in certifications:
            print(f"{one.model}: certified, {one.smoothing}: {_curve_line(one.rows)}")
        for found in campaigns:
            print(f"{found.name}:\n{_campaign_text(found)}")
        print(f"written: {options.out}")
    return 0


def _triage(options: argparse.Namespace) -> int:
    from robustkit import report
    from robustkit.models import zoo
    from robustkit.serve import page, triage
    from robustkit.threat import Ball

    trained = [] if options.model is None else [Ball(**zoo.card(options.model)["ball"])]
    if options.report:
        _check_writable(options.report)
    found = triage.triage(triage.read_stream(options.folder), trained)
    if options.report:
        report.write(report.render([], "Incident report", page.sections([], found)), options.report)
    if options.json:
        _print_json(found.record())
    else:
        print(_triage_text(found))
    return 0


def _leaderboard(options: argparse.Namespace) -> int:
    from robustkit import leaderboard
    from robustkit.results import read_evaluation

    if options.write and not options.eval:
        raise RobustkitError("--write needs a result to write; give it with --eval EVAL.json.")
    evaluation = read_evaluation(options.eval) if options.eval else None
    norm = options.norm or (evaluation.threat.ball.norm if evaluation else "Linf")
    board = leaderboard.load(options.data, norm).select(
        extra_data=options.extra_data, synthetic=options.synthetic, architecture=options.architecture
    )
    found = leaderboard.standing(evaluation, board) if evaluation else None
    if options.write and evaluation:
        _check_writable(options.write)
        published = json.dumps(leaderboard.to_robustbench(evaluation), indent=2)
        write_atomically(options.write, f"{published}\n".encode())
    if options.json:
        _print_json(leaderboard.record(board, found))
        return 0
    print(_leaderboard_text(board))
    if evaluation and found:
        print(f"\n{_standing_text(evaluation, board, found)}")
    if options.write:
        print(
            f"written: {options.write}; fill in what is null, and say in its footnote if the training images "
            "were synthetic"
        )
    return 0


def _serve(options: argparse.Namespace) -> int:
    import torch

    from robustkit.serve import logs, server
    from robustkit.serve.settings import Settings

    settings = Settings(
        folder=options.folder,
        model=options.model,
        store=options.store_file.read_text(encoding="utf-8").strip()
        if options.store_file
        else os.environ.get("ROBUSTKIT_STORE", ""),
        credentials_file=options.credentials,
        verify_key=options.verify_key,
        host=options.host,
        port=options.port,
        admin_host=options.admin_host,
        admin_port=options.admin_port,
        workers=options.workers,
        output=options.output,
        mode=options.mode,
        account_rate=options.account_rate,
        address_rate=options.address_rate,
        replicas=options.replicas,
        settle_seconds=options.settle,
        trusted_proxies=options.trusted_proxies,
    )
    torch.set_num_threads(1)  # the pool's threads share the processors
    logs.to_stream()
    server.serve(settings, lambda here: _announce(here, options))
    return 0


def _provision(options: argparse.Namespace) -> int:
    from robustkit.serve.provision import provision

    made = provision(options.model, options.out, options.database)
    if options.json:
        _print_json({"type": "Provision", **{name: str(path) for name, path in asdict(made).items()}})
    else:
        print("\n".join(f"{name.replace('_', ' '):18} {path}" for name, path in asdict(made).items()))
    return 0


def _manifests(options: argparse.Namespace) -> int:
    from robustkit.serve import manifests

    findings = manifests.check([document for file in options.files for document in manifests.read(file)])
    if options.json:
        _print_json({"type": "Findings", "findings": [asdict(finding) for finding in findings]})
    else:
        print("\n".join(f"{finding.rule}: {finding.sentence}" for finding in findings) or "nothing found")
    return 1 if findings else 0


def _announce(here: Running, options: argparse.Namespace) -> None:
    """Where the service listens, and where its credentials lie: never what they are."""
    path = here.replica.settings.credentials_path
    if options.json:
        record = {"type": "Service", "url": here.url, "admin_url": here.admin_url, "credentials": str(path)}
        _print_json(record)
    else:
        print(
            f"data plane     {here.url}\ncontrol plane  {here.admin_url}\ncredentials    {path}\n\n"
            f'  KEY=$(python -c \'import json; print(json.load(open("{path}"))["api_key"])\')\n'
            f'  curl -H "Authorization: Bearer $KEY" --data-binary @IMAGE.png {here.url}/v1/classify\n\n'
            "Stop it with Ctrl-C or SIGTERM: what was accepted is answered first."
        )
    sys.stdout.flush()


def _redteam(options: argparse.Namespace) -> int:
    from robustkit import data, device, models, report
    from robustkit.serve.redteam import page
    from robustkit.serve.redteam.campaign import campaign
    from robustkit.serve.redteam.client import read_access

    ball = _ball(options)
    tier = options.tier or device.tier()
    images, queries = _ATTACKED[tier]
    for place in (options.out, options.report):
        if place:
            _check_writable(place)
    names = options.attacks.split(",")
    found = campaign(
        read_access(options.url, options.keys, options.admin, options.accounts, len(names)),
        data.load(
            options.data, options.split, limit=images if options.n is None else options.n, seed=options.seed
        ),
        names,
        ball,
        queries=queries if options.queries is None else options.queries,
        name=options.name or options.url,
        tier=tier,
        adaptive=options.adaptive,
        pace=options.pace,
        surrogate=models.pretrained(options.surrogate) if options.surrogate else None,
        seed=options.seed,
    )
    write_atomically(options.out, f"{found.to_json()}\n".encode())
    if options.report:
        report.write(report.render([], "Red team", page.sections([found])), options.report)
    print(found.to_json() if options.json else f"{_campaign_text(found)}\nwritten: {options.out}")
    if found.stopped:
        status = 130 if found.stopped == "interrupted" else 2
        return _complain(f"{found.stopped}: {options.out} holds what was measured until then.", status)
    return 0


def _campaign_text(found: Campaign) -> str:
    from robustkit.serve.redteam.page import cells

    rows = [[run.attack, str(run.threat.ball), *cells(run)] for run in found.runs]
    head = ["attack", "threat model", "success", "median queries", "rejected", "keys burnt"]
    return "\n".join([*_columns(head, rows), *(f"{note}." for note in found.notes)])


# --- what `evaluate`, `audit` and `certify` are given -----------------------------------------------------------


def _ball(options: argparse.Namespace) -> Ball:
    from robustkit.threat import Ball

    _, usual_norm, usual_eps = _USUAL[options.data]
    norm = options.norm or usual_norm
    if options.eps is None and norm != usual_norm:
        raise RobustkitError(f"{norm} has no usual size on {options.data}; give --eps, e.g. --eps 1.5.")
    return Ball(norm, usual_eps if options.eps is None else options.eps)


def _kit_card(weights: Path) -> dict[str, Any]:
    """The card of a model of the kit, where `weights` is the name of one and no file; {} otherwise."""
    from robustkit.models import zoo

    return {} if weights.exists() or str(weights) not in zoo.names() else zoo.card(str(weights))


def _architecture(options: argparse.Namespace) -> str:
    return options.model or _kit_card(options.weights).get("architecture") or _USUAL[options.data][0]


def _model(options: argparse.Namespace, weights: Path) -> nn.Module:
    from robustkit import device, models

    model = (
        models.pretrained(str(weights))
        if _kit_card(weights)
        else models.load_weights(models.build(_architecture(options)), weights)
    )
    return model.eval().to(device.pick_device())


def _images(options: argparse.Namespace, limit: int | None) -> Dataset:
    from robustkit import data, device

    return data.load(options.data, options.split, limit=limit, seed=options.seed, device=device.pick_device())


def _weights_note(options: argparse.Namespace) -> str:
    card = _kit_card(options.weights)
    digest = card["sha256"] if card else hashlib.sha256(options.weights.read_bytes()).hexdigest()
    return f"{_architecture(options)}, weights sha256 {digest[:16]}"


# --- checks that come before the work ---------------------------------------------------------------


def _check_run_folder(out: Path, *, resume: bool) -> None:
    """Refuse to mix two runs in one folder. Raises: RobustkitError."""
    if out.exists() and not out.is_dir():
        raise RobustkitError(f"{out} is a file; choose another folder with --out.")
    found = [name for name in _OF_A_RUN if (out / name).exists()]
    if found and not resume:
        raise RobustkitError(
            f"{out} already holds a run ({found[0]}); go on with it by --resume, or choose another folder with --out."
        )
    if found and "checkpoint.pt" not in found:
        raise RobustkitError(
            f"{out} holds {found[0]} but no checkpoint to resume from; choose another folder with --out."
        )
    if resume and not found:
        print(f"robustkit: {out} holds no run yet; starting from the beginning.", file=sys.stderr)


def _check_result(out: Path, journal: Path, *, resume: bool) -> None:
    """Refuse to mix two evaluations, or to lose one. Raises: RobustkitError."""
    if journal.exists() and not resume:
        raise RobustkitError(
            f"{journal} holds an evaluation that is not finished; go on with it by --resume, delete it, "
            "or choose another file with --out."
        )
    if out.exists() and not journal.exists():
        raise RobustkitError(f"{out} already holds a result; delete it, or choose another file with --out.")
    if resume and not journal.exists():
        print(f"robustkit: {journal} is not there; starting from the beginning.", file=sys.stderr)


def _check_writable(out: Path) -> None:
    """Find out before the work, not after it, that the result has nowhere to go. Raises: RobustkitError, OSError."""
    if out.is_dir():
        raise RobustkitError(f"{out} is a folder; name a file in it with --out.")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(out.parent, os.W_OK):
        raise RobustkitError(f"{out.parent} cannot be written; choose another place with --out.")


def _check_fits(model: Model, name: str, images: Dataset) -> None:
    """One image through the model: torch tells a wrong shape in a page, we in a sentence."""
    from robustkit.evaluate import predict

    try:
        predict(model, images.x[:1], images.y[:1])
    except RuntimeError as error:
        raise RobustkitError(
            f"{name} does not take {images.provenance.dataset} images of shape {tuple(images.x.shape[1:])}; "
            "choose the --data that it was trained on."
        ) from error


def _model_name(weights: Path) -> str:
    """runs/mnist-pgd/model.safetensors is mnist-pgd; a file goes by its name, and so does a model of the kit."""
    if _kit_card(weights):
        return str(weights)
    return weights.resolve().parent.name if weights.name == "model.safetensors" else weights.stem


# --- summaries -------------------------------------------------------------------------------------


def _print_json(record: dict[str, Any]) -> None:
    print(json.dumps(record, indent=2, allow_nan=False))


def _run_text(run: Run, out: Path) -> str:
    rows = [
        [
            str(epoch.number),
            f"{epoch.loss:.3f}",
            f"{epoch.clean.share:.1%}",
            f"{epoch.fgsm.share:.1%}",
            f"{epoch.pgd.share:.1%}",
            f"{epoch.seconds:.1f}",
            "catastrophic overfitting" if epoch.alarm else "",
        ]
        for epoch in run.history
    ]
    watched = "training" if run.held_out is None else f"held-out ({run.held_out.dataset})"
    return "\n".join(
        [
            f"{run.recipe}, {run.tier} tier, seed {run.seed}: {run.n:,} training images, ball {run.ball}",
            f"data: {run.data}",
            f"hardware: {run.hardware}, {run.seconds:.0f} s",
            "",
            *_columns(["epoch", "loss", "clean", "FGSM", "PGD-10", "seconds", "alarm"], rows),
            "",
            f"Accuracies on the same {run.history[-1].clean.n} {watched} images, to watch the run by; the weights "
            f"are those of epoch {run.selected}. `robustkit evaluate` measures robustness on the test split.",
            f"written: {out / 'model.safetensors'}, {out / 'run.json'}",
        ]
    )


def _evaluation_text(evaluation: Evaluation, out: Path) -> str:
    rows = [["clean", str(evaluation.clean), ""]]
    for count, run in enumerate(evaluation.attacks, 1):
        rows.append([f"after {run.name}", str(evaluation.robust_after(count)), f"{run.seconds:.1f}"])
    return "\n".join(
        [
            f"{evaluation.model} ({'; '.join(evaluation.notes)})",
            f"threat model: {evaluation.threat}",
            *([f"protocol: {evaluation.protocol}"] if evaluation.protocol else []),
            f"data: {evaluation.data}",
            f"seed {evaluation.seed}, {evaluation.tier} tier, {evaluation.hardware}",
            "",
            *_columns(["", "accuracy, 95 % interval", "seconds"], rows),
            "",
            f"robust accuracy: {evaluation.robust}, the worst case over these attacks, image by image",
            f"written: {out}",
        ]
    )


def _leaderboard_text(board: Leaderboard) -> str:
    rows = [
        [
            str(rank),
            entry.id,
            entry.architecture,
            f"{entry.clean:.2f}",
            f"{entry.robust:.2f}",
            "" if entry.reported is None else f"{entry.reported:.2f}",
            " + ".join(
                name for name, used in (("extra", entry.extra_data), ("synthetic", entry.synthetic)) if used
            ),
        ]
        for rank, entry in enumerate(board.entries, 1)
    ]
    return "\n".join(
        [
            f"RobustBench, {board.dataset}, {board.norm} eps={board.eps}: {board.selection}",
            "",
            *_columns(["rank", "entry", "architecture", "clean", "robust", "reported", "images"], rows),
            "",
            "Published figures in %, not measured here; robust is the lowest known, by AutoAttack or stronger.",
            f"source: {board.source}",
        ]
    )


def _standing_text(evaluation: Evaluation, board: Leaderboard, found: Standing) -> str:
    def beside(entry: Entry | None) -> str:
        return f"{entry.id}, {entry.robust:.2f} %" if entry else "nobody"

    return "\n".join(
        [
            *(f"NOTE: {note}" for note in found.notes),
            f"{evaluation.model}: robust {found.robust} would stand at rank {found.rank} "
            f"(by its interval {found.best} to {found.worst}) among {found.of} {board.selection}",
            f"above it: {beside(found.above)}; below it: {beside(found.below)}",
        ]
    )


def _certification_text(certification: Certification, rows: Path, out: Path) -> str:
    from robustkit.certify.certificates import ABSTAIN, average_radius

    base = certification.base
    abstained = sum(row.prediction == ABSTAIN for row in certification.rows)
    seconds = sum(row.seconds for row in certification.rows)
    return "\n".join(
        [
            f"{certification.model} ({'; '.join(certification.notes)}), smoothed: {certification.smoothing}",
            f"threat model: {certification.threat}",
            f"base classifier: {base.precision}, clean {base.clean}, under the noise {base.noisy}",
            f"data: {certification.data}",
            f"seed {certification.seed}, {certification.tier} tier, {certification.hardware}, {seconds:.0f} s",
            "",
            *_curve_table(certification.rows),
            "",
            f"average certified radius {average_radius(certification.rows):.3f}, abstained on {abstained}; "
            f"no radius above {certification.smoothing.largest_radius:.3f} can follow from these samples",
            f"written: {rows}, {out}",
        ]
    )


def _curve_table(rows: Sequence[Row]) -> list[str]:
    from robustkit.certify.certificates import curve

    cells = [[f"{radius:g}", str(share)] for radius, share in curve(rows)]
    return _columns(["L2 radius", "certified accuracy, 95 % interval"], cells)


def _curve_line(rows: Sequence[Row]) -> str:
    from robustkit.certify.certificates import curve

    return ", ".join(f"{100 * share.share:.1f} % at {radius:g}" for radius, share in curve(rows))


def _curve_text(path: Path, rows: Sequence[Row], smoothing: Smoothing | None) -> str:
    record = _curve_record(path, rows, smoothing)
    if smoothing is None:
        verdict = "give --sigma, --n and --alpha to check the radii against what the samples can prove"
    elif record["beyond_bound"]:
        verdict = (
            f"{len(record['beyond_bound'])} radii, the largest {record['largest_radius']:.4f}, are above "
            f"{smoothing.largest_radius:.4f}, the most that {smoothing} can prove: the log was not made so"
        )
    else:
        verdict = f"no radius is above {smoothing.largest_radius:.4f}, the most that these samples can prove"
    return "\n".join(
        [
            f"{path}: {len(rows)} rows, abstained on {record['abstained']}, "
            f"average certified radius {record['average_certified_radius']:.4f}",
            *_curve_table(rows),
            verdict,
        ]
    )


def _curve_record(path: Path, rows: Sequence[Row], smoothing: Smoothing | None) -> dict[str, Any]:
    from robustkit.certify.certificates import beyond_bound, totals

    beyond = None if smoothing is None else [row.index for row in beyond_bound(rows, smoothing)]
    return {
        "log": str(path),
        **totals(rows),
        "largest_radius": max(row.radius for row in rows),
        "beyond_bound": beyond,
    }


def _audit_text(audit: Audit, out: Path) -> str:
    rows = [
        [
            outcome.check,
            "" if outcome.measured is None else f"{outcome.measured:.3g}",
            f"{outcome.flag} {outcome.threshold:g} {outcome.unit}",
            "FINDING" if outcome.verdict == "flagged" else outcome.verdict,
        ]
        for outcome in audit.outcomes
    ]
    findings = [f"{one.check}: {one.evidence}.\n    Try: {one.repair}" for one in audit.findings]
    skipped = [
        f"{one.check} was not run: {one.evidence}." for one in audit.outcomes if one.verdict == "not run"
    ]
    return "\n".join(
        [
            f"{audit.model} ({'; '.join(audit.notes)})",
            f"threat model: {audit.threat}",
            f"data: {audit.data}, {audit.n} images",
            f"seed {audit.seed}, {audit.tier} tier, {audit.hardware}",
            "",
            *_columns(["check", "measured", "a finding if", "verdict"], rows),
            "",
            *(findings or ["no findings: nothing here says that gradients mislead the attack"]),
            *skipped,
            f"written: {out}",
        ]
    )


def _triage_text(found: Triage) -> str:
    rows = [
        [
            *(group.account[:12], group.family, f"{group.votes.k}/{group.votes.n}", str(group.queries)),
            *(f"{group.typical.l2:.2f}", f"{group.typical.linf:.2f}", f"{group.typical.degrees:+.0f}"),
            {None: "?", True: "yes", False: "no"}[group.outside],
        ]
        for group in found.groups
    ]
    head = ["account", "family", "votes", "queries", "L2", "L-inf", "degrees", "outside"]
    share = found.share(found.family)
    lines = [f"{found.looked_at} of {found.held} quarantined inputs, in {len(found.groups)} groups"]
    lines += ["", *_columns(head, rows), ""]
    if share is None:
        return "\n".join(
            [*lines, "no attack that triage can name: new pictures, repeated ones, or unseen originals"]
        )
    lines.append(f"family: {found.family}, {share} of the groups that are attacks")
    trained = ", ".join(found.trained) or "not named; give --model"
    outside = "cannot be said" if found.outside is None else str(found.outside)
    return "\n".join([*lines, f"outside the trained threat models ({trained}): {outside}"])


def _diagnosis_text(diagnosis: Diagnosis) -> str:
    versions = [[name, version or "not installed"] for name, version in diagnosis.versions.items()]
    minutes = [
        [lesson, *(f"{value:g}" for value in tiers.values())] for lesson, tiers in diagnosis.minutes.items()
    ]
    tiers = list(next(iter(diagnosis.minutes.values())))
    precision = ", ".join(name for name, able in diagnosis.precision.items() if able) or "float32 alone"
    load = "" if diagnosis.load is None else f", load {diagnosis.load:g}"
    problems = [
        f"{'BROKEN' if problem.essential else 'note'}: {problem}" for problem in diagnosis.problems
    ] or ["none"]
    return "\n".join(
        [
            *_columns(["package", "version"], versions),
            f"torchvision: {diagnosis.torchvision}",
            "",
            f"device: {diagnosis.device}; {diagnosis.cpu}, {diagnosis.cpus} processors, "
            f"{diagnosis.threads} torch threads{load}",
            f"arithmetic for training: {precision}",
            *(f"data: {name}: {source}" for name, source in diagnosis.data.items()),
            f"cache: {diagnosis.cache}, {diagnosis.free_bytes / 2**30:.1f} GB free",
            *(f"{name}: {path or 'not found'}" for name, path in diagnosis.programs.items()),
            "",
            f"expected minutes, at the {diagnosis.passes_per_second:,.0f} forward and backward passes a second "
            "measured now",
            *_columns(["lesson", *tiers], minutes),
            "",
            "problems:",
            *problems,
        ]
    )


def _columns(head: list[str], rows: list[list[str]]) -> list[str]:
    """A plain table, one line for each row."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [head, *rows]
    ]


# --- the parser ------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """argparse, but a mistake on the command line is one sentence like any other."""

    def error(self, message: str) -> NoReturn:
        raise RobustkitError(f"{message[:1].lower()}{message[1:]}; see `{self.prog} --help`.")


def _size(text: str) -> float:
    """A size in input units, where a fraction such as 8/255 may be written as one."""
    over, _, under = text.partition("/")
    try:
        return float(over) / float(under or 1)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is no number; write 0.3 or 8/255") from None


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="robustkit",
        description="Train, attack, measure and report on the robustness of image classifiers.",
        epilog="example: robustkit doctor",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"robustkit {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, command: Callable[[argparse.Namespace], int], summary: str, example: str) -> _Parser:
        added: _Parser = commands.add_parser(
            name,
            help=summary[0].lower() + summary[1:].rstrip("."),
            description=summary,
            epilog=f"example: {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(command=command)
        added.add_argument("--json", action="store_true", help="print JSON to stdout, and nothing else")
        return added

    tier: dict[str, Any] = {
        "choices": ("smoke", "standard", "full"),
        "help": "how much to spend; without it ROBUSTKIT_TIER, else standard",
    }
    seed: dict[str, Any] = {
        "type": int,
        "default": 0,
        "metavar": "N",
        "help": "seed of everything random (default 0)",
    }

    def add_subject(command: _Parser) -> None:
        """Which model on which images: what evaluations, audits and certifications are about."""
        command.add_argument(
            "weights", type=Path, metavar="MODEL", help="weights.safetensors, or a model of the kit by name"
        )
        command.add_argument("--data", required=True, choices=tuple(_USUAL), help="data set of the images")
        command.add_argument("--split", default="test", help="split of it (default test)")
        command.add_argument(
            "--model", help="architecture of the weights (default: the usual one for the data)"
        )
        command.add_argument("--seed", **seed)
        command.add_argument("--tier", **tier)

    def add_ball(command: _Parser) -> None:
        """Against which ball, and with how many images."""
        command.add_argument("--norm", choices=("Linf", "L2", "L1"), help="norm of the ball (default Linf)")
        command.add_argument(
            "--eps",
            type=_size,
            metavar="SIZE",
            help="size of the ball (default 0.3 on digits, 8/255 on CIFAR-10)",
        )
        command.add_argument(
            "--n",
            type=int,
            metavar="N",
            help="images drawn from the split (default 200, 1,000 or all, by tier)",
        )

    add(
        "doctor",
        _doctor,
        "Say what this machine has for the course, what it lacks, and how long each lesson takes.",
        "robustkit doctor --json",
    )

    train = add(
        "train",
        _train,
        "Train a model by a recipe.",
        "robustkit train mnist-pgd --tier smoke --out runs/first",
    )
    train.add_argument(
        "recipe", metavar="RECIPE", help="e.g. mnist-pgd, cifar10-l2-smoke, or a file: mine.toml"
    )
    train.add_argument("--tier", **tier)
    train.add_argument("--seed", **seed)
    train.add_argument("--out", type=Path, metavar="FOLDER", help="where the run goes (default runs/RECIPE)")
    train.add_argument(
        "--shards",
        type=int,
        default=1,
        metavar="N",
        help="parts of a batch, for that many ranks or fewer (default 1)",
    )
    train.add_argument("--resume", action="store_true", help="go on with the run in that folder")
    train.add_argument(
        "--tensorboard", action="store_true", help="write each epoch's figures to FOLDER/tensorboard as well"
    )

    evaluate = add(
        "evaluate",
        _evaluate,
        "Measure robust accuracy: the worst case over attacks, image by image.",
        "robustkit evaluate runs/first/model.safetensors --data mnist --attacks fgsm,pgd-40 --n 500",
    )
    add_subject(evaluate)
    add_ball(evaluate)
    which = evaluate.add_mutually_exclusive_group()
    which.add_argument(
        "--attacks", default="fgsm,pgd-40", help="attacks in order, by comma (default fgsm,pgd-40)"
    )
    which.add_argument(
        "--protocol", metavar="NAME", help="a list of attacks with a name: quick, fast or standard"
    )
    evaluate.add_argument("--out", type=Path, metavar="FILE", help="default: eval.json beside the weights")
    evaluate.add_argument(
        "--resume", action="store_true", help="go on with the evaluation that was to write that file"
    )
    evaluate.add_argument(
        "--dask", metavar="ADDRESS", help="tls:// address of a Dask scheduler whose workers do the attacks"
    )
    for option, what in (("ca-file", "authority"), ("cert", "certificate"), ("key", "key")):
        evaluate.add_argument(
            f"--tls-{option}", type=Path, metavar="FILE", help=f"{what} for --dask, as Dask's"
        )

    certificates = add(
        "tls-certificates",
        _tls_certificates,
        "Write a certificate and its key, for Dask workers by TLS, and say how to use them.",
        "robustkit tls-certificates tls",
    )
    certificates.add_argument("folder", type=Path, metavar="FOLDER", help="where the two files go")

    certify = add(
        "certify",
        _certify,
        "Certify L2 robustness by randomized smoothing, image by image.",
        "robustkit certify runs/first/model.safetensors --data mnist --sigma 0.25 --n 10000 --images 500",
    )
    add_subject(certify)
    certify.add_argument(
        "--sigma",
        type=float,
        required=True,
        help="standard deviation of the noise, input units; as in training",
    )
    certify.add_argument("--n0", type=int, default=100, help="samples that choose the class (default 100)")
    certify.add_argument("--n", type=int, default=10_000, help="samples that certify it (default 10,000)")
    certify.add_argument(
        "--alpha", type=float, default=0.001, help="chance of a wrong certificate, per image (default 0.001)"
    )
    certify.add_argument(
        "--images", type=int, metavar="N", help="images drawn from the split (default 20 or 500, by tier)"
    )
    certify.add_argument(
        "--batch-size", type=int, default=250, metavar="N", help="noisy copies per pass; changes no result"
    )
    certify.add_argument(
        "--out",
        type=Path,
        metavar="ROWS.tsv",
        help="one line an image; the JSON goes beside it (default: certificates.tsv beside the weights)",
    )
    certify.add_argument("--resume", action="store_true", help="go on with the rows in that file")

    curve = add(
        "curve",
        _curve,
        "Tabulate certification logs, ours or published ones, and check what they claim.",
        "robustkit curve sigma_0.25 --sigma 0.25 --n 100000 --alpha 0.001",
    )
    curve.add_argument(
        "logs",
        type=Path,
        nargs="+",
        metavar="ROWS.tsv",
        help="tab-separated: index, label, prediction, radius, ...",
    )
    curve.add_argument("--sigma", type=float, help="noise that the logs state; without it nothing is checked")
    curve.add_argument("--n", type=int, default=100_000, help="samples that they state (default 100,000)")
    curve.add_argument("--alpha", type=float, default=0.001, help="alpha that they state (default 0.001)")

    audit = add(
        "audit",
        _audit,
        "Check whether a robustness figure is real; status 1 when a check finds a reason to doubt it.",
        "robustkit audit runs/first/model.safetensors --data mnist --tier smoke",
    )
    add_subject(audit)
    add_ball(audit)
    audit.add_argument(
        "--surrogate",
        type=Path,
        metavar="OTHER",
        help="another model, of the same architecture or of the kit, for the transfer check",
    )
    audit.add_argument("--out", type=Path, metavar="FILE", help="default: audit.json beside the weights")

    report = add(
        "report",
        _report,
        "Make one static page, with figures and tables, of evaluations and certifications.",
        "robustkit report runs/first/eval.json -o report.html",
    )
    report.add_argument(
        "results", type=Path, nargs="+", metavar="RESULT.json", help="from `robustkit evaluate` or `certify`"
    )
    report.add_argument(
        "-o", "--out", type=Path, default=Path("report.html"), metavar="FILE", help="default report.html"
    )
    report.add_argument("--title", default="Robustness report", help="heading of the page")

    triage = add(
        "triage",
        _triage,
        "Name the family of attack in a recorded quarantine, and whether the model was trained for it.",
        "robustkit triage incident-7 --model mnist-pgd --report incident.html",
    )
    triage.add_argument("folder", type=Path, metavar="FOLDER", help="a recorded stream: stream.npz")
    triage.add_argument(
        "--model", metavar="NAME", help="model of the kit that was attacked, for its threat model"
    )
    triage.add_argument("--report", type=Path, metavar="FILE", help="write the page as well")

    leaderboard = add(
        "leaderboard",
        _leaderboard,
        "Show RobustBench's published figures, and where an evaluation would stand among them.",
        "robustkit leaderboard --norm L2 --architecture resnet-18 --synthetic",
    )
    leaderboard.add_argument("--data", default="cifar10", help="data set (default cifar10)")
    leaderboard.add_argument(
        "--norm", choices=("Linf", "L2"), help="norm (default that of the evaluation, or Linf)"
    )
    leaderboard.add_argument(
        "--extra-data", action="store_true", help="admit models trained with extra real images"
    )
    leaderboard.add_argument(
        "--synthetic", action="store_true", help="admit models trained with images made by a model"
    )
    leaderboard.add_argument(
        "--architecture", default="", metavar="NAME", help="only architectures with this in their name"
    )
    leaderboard.add_argument(
        "--eval", type=Path, metavar="EVAL.json", help="say where this evaluation would stand"
    )
    leaderboard.add_argument(
        "--write", type=Path, metavar="FILE", help="write that evaluation in RobustBench's JSON form"
    )

    serve = add(
        "serve",
        _serve,
        "Serve a model over HTTP, guarded; the control plane listens on a port of its own.",
        "robustkit serve cifar10-l2-w16 --folder service",
    )
    serve.add_argument(
        "model",
        metavar="MODEL",
        help="champion of a new store: a model of the kit, or the path of a signed folder, with a / in it",
    )
    serve.add_argument(
        "--folder",
        type=Path,
        default=Path("service"),
        help="credentials, registry and state (default service); ROBUSTKIT_STORE names a PostgreSQL instead of "
        "the SQLite file in it",
    )
    serve.add_argument(
        "--store-file",
        type=Path,
        metavar="FILE",
        help="a file that holds the URL, instead of ROBUSTKIT_STORE",
    )
    serve.add_argument(
        "--credentials", type=Path, metavar="FILE", help="made elsewhere (default: made in the folder)"
    )
    serve.add_argument(
        "--verify-key",
        type=Path,
        metavar="FILE",
        help="public half of the key that models are signed with (default: a pair made in the folder)",
    )
    for plane, port in (("", 8000), ("admin-", 8001)):
        what = "control" if plane else "data"
        serve.add_argument(f"--{plane}host", default="127.0.0.1", help=f"of the {what} plane (127.0.0.1)")
        serve.add_argument(
            f"--{plane}port", type=int, default=port, help=f"of the {what} plane ({port}; 0: any)"
        )
    serve.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="threads (processors)"
    )
    serve.add_argument(
        "--output", default="label", metavar="POLICY", help="label (default), rounded, or full scores"
    )
    serve.add_argument(
        "--mode", default="reject", help="what a flagged query meets: off, shadow, reject (default) or ban"
    )
    serve.add_argument(
        "--account-rate", default="600/minute", metavar="RATE", help="of each key (600/minute)"
    )
    serve.add_argument(
        "--address-rate", default="1200/minute", metavar="RATE", help="of each address (1200/minute)"
    )
    serve.add_argument(
        "--replicas", type=int, default=1, metavar="N", help="how many share these rates (default 1)"
    )
    serve.add_argument(
        "--settle",
        type=float,
        default=0,
        metavar="SECONDS",
        help="between SIGTERM and closing the port, for a balancer to notice (default 0)",
    )
    serve.add_argument(
        "--trusted-proxies", default="", metavar="ADDRESSES", help="whose X-Forwarded-For is believed"
    )

    provision = add(
        "provision",
        _provision,
        "Make what containers of the service are given: credentials, a signed model, the store's password.",
        "robustkit provision cifar10-l2-w16 --out deploy/run",
    )
    provision.add_argument("model", metavar="MODEL", help="a model of the kit, to be signed")
    provision.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the files go")
    provision.add_argument(
        "--database", default="database", metavar="HOST[:PORT]", help="of the store's PostgreSQL (database)"
    )

    manifests = add(
        "manifests",
        _manifests,
        "Check Kubernetes manifests and compose files of a service; status 1 when something is found.",
        "robustkit manifests deploy/kubernetes.yaml deploy/compose.yaml",
    )
    manifests.add_argument(
        "files", type=Path, nargs="+", metavar="FILE.yaml", help="what is applied together"
    )

    redteam = add(
        "redteam",
        _redteam,
        "Attack a service of your own within a query budget; each success is asked about again.",
        "robustkit redteam http://127.0.0.1:8000 --keys service/credentials.json --admin http://127.0.0.1:8001 "
        "--data cifar10-jpeg --n 20 --queries 200",
    )
    redteam.add_argument("url", metavar="URL", help="data plane of a service that `robustkit serve` started")
    redteam.add_argument(
        "--keys",
        type=Path,
        required=True,
        metavar="FILE",
        help="API keys, one a line, dealt out to the attacks, the last for checking results; or the service's "
        "credentials.json",
    )
    redteam.add_argument(
        "--admin",
        default="",
        metavar="URL",
        help="control plane, which makes the accounts (needs credentials.json)",
    )
    redteam.add_argument(
        "--accounts",
        type=int,
        default=1,
        metavar="N",
        help="keys of the attacker, made by --admin (default 1)",
    )
    redteam.add_argument("--data", required=True, choices=tuple(_USUAL), help="data set of the images")
    redteam.add_argument("--split", default="test", help="split of it (default test)")
    add_ball(redteam)
    redteam.add_argument(
        "--queries", type=int, metavar="N", help="budget for an image (default 50, 200 or 2,000, by tier)"
    )
    redteam.add_argument(
        "--attacks",
        default="square,simba,nes,linear-bandit,hop-skip-jump,rotation-translation",
        metavar="NAMES",
        help="by comma; also transfer-pgd and art-square (default all others)",
    )
    redteam.add_argument(
        "--adaptive", action="store_true", help="follow the rejections with steps and noise; keys take turns"
    )
    redteam.add_argument(
        "--pace", type=float, default=0.0, metavar="SECONDS", help="between queries: a slow drip (default 0)"
    )
    redteam.add_argument("--surrogate", metavar="NAME", help="model of the kit that transfer-pgd searches on")
    redteam.add_argument("--seed", **seed)
    redteam.add_argument("--tier", **tier)
    redteam.add_argument("--name", help="of the service's state in tables, e.g. 'reject' (default the URL)")
    redteam.add_argument(
        "--out", type=Path, default=Path("redteam.json"), metavar="FILE", help="default redteam.json"
    )
    redteam.add_argument("--report", type=Path, metavar="FILE", help="write the page as well")
    return parser
