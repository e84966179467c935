"""What labels can be for: one file a task, and here the table of all. No other file compares a task's name."""

from fedpft.config import TaskName
from fedpft.tasks import image_classification, sequence_classification
from fedpft.tasks.task import Task

TASKS: dict[TaskName, Task] = {task.name: task for task in (sequence_classification.TASK, image_classification.TASK)}

__all__ = ["TASKS", "Task"]
