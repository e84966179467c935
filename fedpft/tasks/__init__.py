"""What labels can be for: one file a task, and here the table of all. No other file compares a task's name."""

from fedpft.config import TaskName
from fedpft.data.rows import Form
from fedpft.tasks.causal_lm import CausalLM
from fedpft.tasks.image_classification import ImageClassification
from fedpft.tasks.multi_label_classification import MultiLabelClassification
from fedpft.tasks.regression import Regression
from fedpft.tasks.sequence_classification import SequenceClassification
from fedpft.tasks.task import Metric, Task
from fedpft.tasks.token_classification import TokenClassification

TASKS: dict[TaskName, Task] = {
    task.name: task
    for task in (
        SequenceClassification(),
        MultiLabelClassification(),
        Regression(),
        TokenClassification(),
        ImageClassification(),
        CausalLM(),
    )
}
FORMS: tuple[Form, ...] = tuple(dict.fromkeys(form for task in TASKS.values() for form in task.forms))

__all__ = ["FORMS", "TASKS", "Metric", "Task"]
