"""How long a phase still takes: a bar on a terminal, plain log lines elsewhere."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

log = logging.getLogger(__name__)
LINES = 5  # log lines a phase, where there is no terminal


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int, float], None]]:
    """Yields a function to call with (steps done, loss) after each step."""
    if sys.stderr.isatty():
        with tqdm(total=total, desc=title, leave=False) as bar:

            def draw(done: int, loss: float) -> None:
                bar.update(done - bar.n)
                bar.set_postfix(loss=f"{loss:.3f}")

            yield draw
        return
    every = max(1, -(-total // LINES))

    def write(done: int, loss: float) -> None:
        if done % every == 0 or done == total:
            log.info("%s: step %d of %d, loss %.4f", title, done, total, loss)

    yield write
