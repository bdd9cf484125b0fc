"""TensorBoard: what training tells after each epoch, as event files. Needs the extra `tensorboard`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from robustkit.errors import RobustkitError
from robustkit.train import Epoch


@contextmanager
def scalars(folder: Path) -> Iterator[Callable[[Epoch], None]]:
    """A function for `train(on_epoch=...)` that appends an epoch's loss, seconds and accuracies to event files.

    The step is the number of the epoch. A run that goes on in the same folder adds a file, and its curve goes on.
    Raises: RobustkitError when TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RobustkitError(
            f"TensorBoard cannot be imported ({error}); install robustkit[tensorboard], or leave out --tensorboard."
        ) from error

    with SummaryWriter(str(folder)) as writer:

        def write(epoch: Epoch) -> None:
            values = {"loss": epoch.loss, "seconds": epoch.seconds}
            values |= {f"accuracy/{name}": getattr(epoch, name).share for name in ("clean", "fgsm", "pgd")}
            for name, value in values.items():
                writer.add_scalar(name, value, epoch.number)
            writer.flush()  # what is seen while the run goes on, and is left when it is killed

        yield write
