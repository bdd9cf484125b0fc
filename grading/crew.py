"""Who carries out the tasks of a class: threads of this machine, each with a process at a time, or Dask's workers."""

# mypy: allow-untyped-calls
# (the client of `distributed` carries no annotations)

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from grading import sandbox
from grading.fresh import Server, Told
from grading.pipeline import Files, Task, carry_out
from robustkit.errors import RobustkitError

if TYPE_CHECKING:
    from distributed import Client

REFRESH = 0.5  # seconds between two looks at the table
_TOPIC = "robustkit-grading"


@dataclass(frozen=True)
class Crew:
    """`submit` begins a task, or queues it; `size` tasks go side by side. `told` hears how far each one is."""

    size: int
    submit: Callable[[Task, Told], Future[Files]]


@contextmanager
def here(server: Server, jobs: int) -> Iterator[Crew]:
    """`jobs` submissions at a time on this machine.

    Raises: RobustkitError when there is not one of them.
    """
    if jobs < 1:
        raise RobustkitError(f"{jobs} submissions at a time is none; say --jobs 1 or more.")
    pool = ThreadPoolExecutor(jobs, "grading")
    try:
        yield Crew(jobs, lambda task, told: pool.submit(carry_out, task, server, told))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # what runs ends with the server


@contextmanager
def of_dask(client: Client, confinement: str) -> Iterator[Crew]:
    """A submission at a time for each thread of the cluster's workers. A dead worker's goes to another one.

    Scheduler and workers need this clone, not only the package: `python -m dask`, in its folder, finds it.
    Raises: RobustkitError when one of them has none, or a worker not the sandbox `confinement`.
    """
    try:
        client.run_on_scheduler(sandbox.choose, sandbox.UNCONFINED)  # it reads the tasks, and runs none
        client.run(sandbox.choose, confinement)
        client.run(sandbox.sweep)
    except Exception as error:
        raise RobustkitError(
            f"the cluster cannot grade: {str(error).rstrip('.')}; start `python -m dask scheduler` and `python -m dask "
            "worker` in the folder of a clone of this repository, the workers on machines with a sandbox."
        ) from error
    listeners: dict[str, Told] = {}

    def hear(event: tuple[float, tuple[str, str]]) -> None:
        identity, line = event[1]
        if identity in listeners:
            listeners[identity](line)

    def submit(task: Task, told: Told) -> Future[Files]:
        listeners[task.identity] = told
        future: Future[Files] = executor.submit(_on_worker, task)
        future.add_done_callback(lambda _: listeners.pop(task.identity, None))
        return future

    client.subscribe_topic(_TOPIC, hear)
    executor: Any = client.get_executor(pure=False)
    try:
        yield Crew(sum(client.nthreads().values()), submit)
    finally:
        client.unsubscribe_topic(_TOPIC)
        executor.shutdown(wait=False)


@cache
def _server() -> Server:
    """Of a Dask worker, whose tasks have nothing else in common; it ends with the worker."""
    return Server()


def _on_worker(task: Task) -> Files:
    from distributed import get_worker

    worker = get_worker()
    return carry_out(task, _server(), lambda line: worker.log_event(_TOPIC, (task.identity, line)))


def results(
    crew: Crew, tasks: Iterable[Task], told: Callable[[Task, str], object], look: Callable[[], object]
) -> Iterator[tuple[Task, Files | RobustkitError]]:
    """Each task with its files, or why there are none, in whatever order they come.

    Tasks are taken when somebody is about to be free for them, so that a class need not fit into memory; `look`
    is called every half second. Raises: RobustkitError when the crew is gone.
    """
    running: dict[Future[Files], Task] = {}
    waiting = iter(tasks)
    while True:
        for task in islice(waiting, 2 * crew.size - len(running)):
            running[crew.submit(task, partial(told, task))] = task
        if not running:
            return
        for future in wait(running, REFRESH, FIRST_COMPLETED).done:
            task = running.pop(future)
            try:
                yield task, future.result()
            except RobustkitError as error:
                yield task, error
            except CancelledError as error:
                raise RobustkitError(
                    "the scheduler has ended and its tasks with it; start it, and grade again to go on."
                ) from error
            except Exception as error:  # Dask's KilledWorker, or a fault of ours: not of the whole class
                yield task, RobustkitError(f"grading failed ({type(error).__name__}: {error}).")
        look()
