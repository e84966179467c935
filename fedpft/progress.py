"""How long a phase still takes: a bar on a terminal, plain log lines elsewhere."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

log = logging.getLogger(__name__)
LINES = 5  # log lines a phase, where there is no terminal


@contextmanager
def progress(title: str, total: int, unit: str = "step") -> Iterator[Callable[..., None]]:
    """Yields a function to call with (units done, loss) after each, or with (units done) where there is no loss.

    A process that logs warnings alone says nothing of it: another one does.
    """
    if sys.stderr.isatty() and log.isEnabledFor(logging.INFO):
        with tqdm(total=total, desc=title, leave=False) as bar:

            def draw(done: int, loss: float | None = None, /) -> None:
                bar.update(done - bar.n)
                if loss is not None:
                    bar.set_postfix(loss=f"{loss:.3f}")

            yield draw
        return
    every = max(1, -(-total // LINES))

    def write(done: int, loss: float | None = None, /) -> None:
        if done % every == 0 or done == total:
            reached = "" if loss is None else f", loss {loss:.4f}"
            log.info("%s: %s %d of %d%s", title, unit, done, total, reached)

    yield write
