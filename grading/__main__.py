"""`python -m grading HOP`: each command parses, calls one function of the library, writes and prints a summary."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from grading.workspace import LAYOUTS, Workspace, repository
from robustkit.errors import RobustkitError

if TYPE_CHECKING:
    from grading.crew import Crew
    from grading.run import Limits

Command = Callable[[argparse.Namespace], int]

# Library imports stay inside the commands: the judge's process must not load nbgrader or a kernel client.


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 where `build --check` finds something, 2 for bad input, told in one sentence."""
    arguments = _parser().parse_args(argv)
    command: Command = arguments.command
    try:
        return command(arguments)
    except RobustkitError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what was written is whole, run the same command again.", file=sys.stderr)
        return 130


def _build(arguments: argparse.Namespace) -> int:
    from grading import build
    from grading.judge import find_lesson

    workspace = repository()
    lessons = [find_lesson(name).id for name in arguments.lessons] or build.standing(workspace)
    if not arguments.check:
        paths = build.build(workspace, lessons)
        _report(arguments, [str(path) for path in paths], [f"made {path}" for path in paths])
        return 0
    problems = build.check(workspace, lessons)
    fine = f"course/ is what solutions/ generates, leaks nothing and grades right ({', '.join(lessons)})."
    _report(arguments, problems, problems or [fine])
    return 1 if problems else 0


def _run(arguments: argparse.Namespace) -> int:
    from grading import notebooks, run
    from grading.judge import find_lesson
    from grading.workspace import check_student, course_secret

    path, workspace = _notebook(arguments.submission), repository()
    lesson = (
        find_lesson(arguments.lesson)
        if arguments.lesson
        else notebooks.lesson_of(notebooks.read_submission(path)[0])
    )
    result = run.run_submission(
        path,
        lesson,
        arguments.release or workspace.release(lesson.id),
        arguments.out,
        student=check_student(arguments.student),
        secret=course_secret(arguments.secret or workspace.secret),
        tier=arguments.tier,
        limits=_limits_in(arguments),
        confinement=arguments.sandbox,
        told=lambda line: print(line, file=sys.stderr, flush=True),
    )
    _report(arguments, asdict(result), [f"{entry.exercise}: {entry.outcome}" for entry in result.exercises])
    return 0


def _judge(arguments: argparse.Namespace) -> int:
    from grading import judge, records
    from grading.workspace import course_secret

    verdicts = judge.judge(arguments.evidence, course_secret(arguments.secret or repository().secret))
    records.write(arguments.out, verdicts)
    lines = [f"{m.exercise} {m.criterion}: {m.points:g}/{m.maximum:g} {m.outcome}" for m in verdicts.marks]
    _report(arguments, asdict(verdicts), lines)
    return 0


def _score(arguments: argparse.Namespace) -> int:
    from grading import records
    from grading.score import read_marks, score, write_scorecard

    card = score(
        records.read_records(arguments.records), read_marks(arguments.marks) if arguments.marks else {}
    )
    write_scorecard(arguments.out, card)
    _report(
        arguments,
        asdict(card),
        [f"{card.points:g} of {card.maximum:g} points, {len(card.pending)} answers to mark"],
    )
    return 0


def _feedback(arguments: argparse.Namespace) -> int:
    from grading import feedback
    from grading.score import read_scorecard

    feedback.write_page(read_scorecard(arguments.scorecard), arguments.out)
    _report(arguments, str(arguments.out), [f"made {arguments.out}"])
    return 0


def _collect(arguments: argparse.Namespace) -> int:
    from grading import intake
    from grading.judge import find_lesson

    workspace = repository()
    if arguments.into:
        workspace = replace(workspace, submitted=arguments.into)
    outcomes = intake.collect(arguments.source, find_lesson(arguments.lesson), workspace)
    counts = intake.summary(outcomes)
    _report(
        arguments,
        {"summary": counts, "files": [asdict(outcome) for outcome in outcomes]},
        [*map(str, outcomes), ", ".join(f"{count} {action}" for action, count in counts.items()) + "."],
    )
    return 2 if counts[intake.REFUSED] else 0


def _grade(arguments: argparse.Namespace) -> int:
    from grading import grade
    from grading.pipeline import Settings

    workspace = _workspace(arguments)
    lessons = grade.lessons_in(workspace, arguments.lesson)
    if arguments.again:
        grade.forget(workspace, lessons)
    with _crew(arguments) as crew:
        settings = Settings(arguments.tier, _limits_in(arguments), arguments.sandbox)
        return _graded(arguments, grade.grade(workspace, lessons, settings, crew))


@contextmanager
def _crew(arguments: argparse.Namespace) -> Iterator[Crew]:
    """Who runs and judges a class: the workers of --dask, or processes of this machine."""
    from grading import crew, fresh, sandbox

    if arguments.dask is None:
        sandbox.choose(arguments.sandbox)  # refused before anything is begun, rather than once a submission
        with fresh.Server() as server, crew.here(server, arguments.jobs) as local:
            yield local
        return
    if arguments.jobs != 1:
        raise RobustkitError("--jobs is for this machine and --dask for others; leave out one of the two.")
    from robustkit import cluster

    files = {"ca_file": arguments.tls_ca_file, "cert": arguments.tls_cert, "key": arguments.tls_key}
    with (
        cluster.connected(arguments.dask, **files) as client,
        crew.of_dask(client, arguments.sandbox) as remote,
    ):
        yield remote


def _regrade(arguments: argparse.Namespace) -> int:
    from grading import grade

    return _graded(arguments, grade.regrade(_workspace(arguments)))


def _graded(arguments: argparse.Namespace, graded: Sequence[object]) -> int:
    from grading.grade import Graded

    outcomes = [outcome for outcome in graded if isinstance(outcome, Graded)]
    content = [{**asdict(outcome), "card": outcome.card and outcome.card.points} for outcome in outcomes]
    _report(arguments, content, [str(outcome) for outcome in outcomes])
    return 2 if any(outcome.problem for outcome in outcomes) else 0


def _export(arguments: argparse.Namespace) -> int:
    from grading import export, gradebook

    rows = gradebook.rows(_workspace(arguments))
    export.write_csv(rows, arguments.out)
    _report(arguments, [asdict(row) for row in rows], [f"{len(rows)} submissions in {arguments.out}"])
    return 0


def _class(arguments: argparse.Namespace) -> int:
    from grading import class_report, grade

    cards = grade.scorecards(_workspace(arguments))
    class_report.write_page(cards, arguments.out)
    _report(arguments, str(arguments.out), [f"{len(cards)} submissions in {arguments.out}"])
    return 0


def _mutate(arguments: argparse.Namespace) -> int:
    from grading import build, mutate
    from grading.judge import find_lesson

    workspace = repository()
    lessons = [find_lesson(name) for name in arguments.lessons or build.standing(workspace)]
    verdicts = [
        mutate.mutate(
            workspace,
            lesson,
            arguments.journals / f"{lesson.id}.jsonl",
            exercises=arguments.exercise,
            sample=arguments.sample,
            seed=arguments.seed,
            jobs=arguments.jobs,
            sandbox=arguments.sandbox,
        )
        for lesson in lessons
    ]
    by_lesson = list(zip(lessons, verdicts, strict=True))
    if arguments.table:
        arguments.table.write_text(mutate.table(by_lesson), encoding="utf-8")
    _report(
        arguments,
        [asdict(verdict) for found in verdicts for verdict in found],
        [line for lesson, found in by_lesson for line in mutate.report(found, lesson)],
    )
    enough = (mutate.kills(found, lesson.id).share.share >= mutate.LEAST for lesson, found in by_lesson)
    return 0 if all(enough) else 1


def _demo(arguments: argparse.Namespace) -> int:
    from grading import demo

    rows = demo.demo(arguments.out)
    _report(arguments, [asdict(row) for row in rows], demo.table(rows, arguments.out))
    return 0


# --- helpers ---------------------------------------------------------------------------------------


def _notebook(path: Path) -> Path:
    """The notebook itself, or the only one in a submission's folder."""
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.ipynb"))
    if len(found) != 1:
        raise RobustkitError(f"{path} holds {len(found)} notebooks, one is graded; name the notebook itself.")
    return found[0]


def _limits_in(arguments: argparse.Namespace) -> Limits:
    from grading.run import Limits

    return Limits(arguments.cell_seconds, arguments.notebook_seconds, arguments.output_bytes)


def _workspace(arguments: argparse.Namespace) -> Workspace:
    workspace = repository()
    submitted = getattr(arguments, "submitted", None)
    return replace(workspace, submitted=submitted) if submitted else workspace


def _report(arguments: argparse.Namespace, content: object, lines: Sequence[str]) -> None:
    """Data to stdout: JSON where it is asked for, lines otherwise."""
    print(json.dumps(content, indent=1, default=str) if arguments.json else "\n".join(lines))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m grading",
        description="Build the course, grade submissions, report on a class.",
        epilog="example: python -m grading class grade --lesson 01-mnist-fgsm",
    )
    hops = parser.add_subparsers(required=True, metavar="HOP")
    about_class = "Collect, grade, export, report: what is done with a whole class."
    whole = hops.add_parser("class", help=about_class, description=about_class)
    groups = {"": hops, "class": whole.add_subparsers(required=True, metavar="COMMAND")}

    def hop(name: str, command: Command, text: str, example: str) -> argparse.ArgumentParser:
        group, _, last = name.rpartition(" ")
        added = groups[group].add_parser(
            last,
            help=text.replace("%", "%%"),
            description=text,
            epilog=f"example: python -m grading {example}",
        )
        added.set_defaults(command=command)
        added.add_argument("--json", action="store_true", help="print JSON")
        return added

    build = hop("build", _build, "Make course/ from solutions/, or check it.", "build --check")
    build.add_argument("lessons", nargs="*", metavar="LESSON", help="default: every lesson that stands")
    build.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 when course/ may not be released"
    )

    run = hop(
        "run",
        _run,
        "Execute one submission and collect evidence.",
        "run lesson.ipynb -o evidence --student s-17",
    )
    run.add_argument("submission", type=Path, help="the notebook, or a folder with one")
    run.add_argument("-o", "--out", type=Path, required=True, metavar="EVIDENCE_DIR")
    run.add_argument(
        "--student", default="anonymous", help="whose hidden cases to draw (default: %(default)s)"
    )
    run.add_argument("--lesson", help="default: the lesson whose cells it has")
    run.add_argument("--release", type=Path, help="the released notebook (default: the one in course/)")
    _secret(run)
    _limits(run)

    judge = hop("judge", _judge, "Judge evidence, without the submission.", "judge evidence -o records.json")
    judge.add_argument("evidence", type=Path, metavar="EVIDENCE_DIR")
    judge.add_argument("-o", "--out", type=Path, required=True, metavar="RECORDS")
    _secret(judge)

    score = hop(
        "score", _score, "Add up records and hand-given marks.", "score records.json -o scorecard.json"
    )
    score.add_argument("records", type=Path)
    score.add_argument("-o", "--out", type=Path, required=True, metavar="SCORECARD")
    score.add_argument("--marks", type=Path, help='JSON of points given by hand: {"s1_judgement": 7.5}')

    feedback = hop(
        "feedback", _feedback, "Make a learner's page.", "feedback scorecard.json -o feedback.html"
    )
    feedback.add_argument("scorecard", type=Path)
    feedback.add_argument("-o", "--out", type=Path, required=True, metavar="PAGE")

    collect = hop(
        "class collect",
        _collect,
        "Take the notebooks of a zip file or a folder into grading/submitted: notebooks alone, each checked and "
        "written anew. A later hand-in takes the place of an earlier one, which is kept in earlier/ beside it.",
        "class collect hand-ins.zip --lesson 01-mnist-fgsm",
    )
    collect.add_argument(
        "source", type=Path, help=f"a zip file or a folder, with {LAYOUTS}; nothing else is a hand-in"
    )
    collect.add_argument("--lesson", required=True)
    collect.add_argument("--into", type=Path, metavar="FOLDER", help="default: grading/submitted")

    grade = hop(
        "class grade",
        _grade,
        "Grade every submission that has not been graded, into the gradebook. Killed, it goes on where it was.",
        "class grade --lesson 01-mnist-fgsm --jobs 4",
    )
    grade.add_argument("--lesson", help="default: every lesson with submissions")
    grade.add_argument(
        "--submitted", type=Path, help="folder STUDENT/LESSON/LESSON.ipynb (default: grading/submitted)"
    )
    grade.add_argument("--again", action="store_true", help="also what was graded before, as it is now")
    grade.add_argument(
        "--jobs", type=int, default=1, help="submissions at a time on this machine (default: %(default)s)"
    )
    grade.add_argument(
        "--dask", metavar="ADDRESS", help="tls:// address of a Dask scheduler whose workers do it instead"
    )
    for option, what in (("ca-file", "authority"), ("cert", "certificate"), ("key", "key")):
        grade.add_argument(f"--tls-{option}", type=Path, metavar="FILE", help=f"{what} for --dask, as Dask's")
    _limits(grade)

    hop(
        "class regrade",
        _regrade,
        "Score the stored records again, with the marks given since; runs nothing.",
        "class regrade",
    )

    export = hop("class export", _export, "Write the gradebook as CSV.", "class export -o grades.csv")
    export.add_argument("-o", "--out", type=Path, required=True, metavar="CSV")

    report = hop(
        "class report", _class, "Make the class report, one HTML page.", "class report -o class.html"
    )
    report.add_argument("-o", "--out", type=Path, required=True, metavar="PAGE")

    mutate = hop(
        "mutate",
        _mutate,
        "Grade mutants of the lessons' reference solutions: how many of them lose points, and which do not. "
        "Exit 1 when fewer than 95 % of a lesson's do. Stopped, it goes on where it was.",
        "mutate 00-start-here --jobs 2",
    )
    mutate.add_argument("lessons", nargs="*", metavar="LESSON", help="default: every lesson that stands")
    mutate.add_argument(
        "--exercise", action="append", default=[], metavar="ID", help="only this one; may be repeated"
    )
    mutate.add_argument("--sample", type=int, metavar="N", help="only so many, of each exercise in turn")
    mutate.add_argument("--seed", type=int, default=0, help="of the sample (default: %(default)s)")
    mutate.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="kernels at once (default: %(default)s)"
    )
    mutate.add_argument(
        "--journals",
        type=Path,
        default=Path("runs", "mutate"),
        metavar="FOLDER",
        help="what has been graded, a file for each lesson (default: %(default)s)",
    )
    mutate.add_argument(
        "--table", type=Path, metavar="FILE", help="write a Markdown table of what was killed"
    )
    mutate.add_argument("--sandbox", default="auto", metavar="TIER", help="default: %(default)s")

    demo = hop(
        "demo", _demo, "Grade four example submissions to lesson 1, from build to class report.", "demo"
    )
    demo.add_argument("--out", type=Path, default=Path("demo"), help="default: %(default)s/")
    return parser


def _secret(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--secret", type=Path, help="the course secret's file (default: grading/secret)")


def _limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tier", default="smoke", help="default: %(default)s")
    parser.add_argument(
        "--cell-seconds", type=float, default=300, help="longest that a cell may run (default: %(default)g)"
    )
    parser.add_argument(
        "--notebook-seconds", type=float, default=900, help="longest in all (default: %(default)g)"
    )
    parser.add_argument(
        "--output-bytes", type=int, default=5 * 2**20, help="most that it may print (default: %(default)d)"
    )
    parser.add_argument(
        "--sandbox",
        default="auto",
        metavar="TIER",
        help="bwrap, landlock, or none for submissions that you trust (default: the strongest that works here)",
    )


if __name__ == "__main__":
    sys.exit(main())
