"""What there is to say about a task; each is one such object, in a file of its own."""

from dataclasses import dataclass

from fedpft.config import TaskName
from fedpft.data.samples import Kind


@dataclass(frozen=True)
class Task:
    """What labels are for.

    Attributes:
        name: in server.yaml, in a proxy's files and on the wire.
        kind: of a sample's input, which is also the key under `columns` of its column.
        model: the class of transformers that loads an FM with a head for the task.
        processor: the class of transformers that loads what goes with it.
        problem_type: what the model's loss has to be told, by transformers' name.
        head: whether the FM gets a head for the task, which trains in full; else nothing on top of it does.
        peft: peft's name of the task; None if it has none, and takes the model's class.
        peft_loader: the class of peft that loads the product.
    """

    name: TaskName
    kind: Kind
    model: str
    processor: str
    problem_type: str
    head: bool
    peft: str | None
    peft_loader: str

    @property
    def has_tokens(self) -> bool:
        """Whether an input has a length, which `max_tokens` bounds."""
        return self.kind == "text"
