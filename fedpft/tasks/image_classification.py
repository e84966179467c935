"""One label for an image."""

from fedpft.tasks.task import Task

TASK = Task(
    name="image-classification",
    kind="image",
    model="AutoModelForImageClassification",
    processor="AutoImageProcessor",
    problem_type="single_label_classification",
    head=True,
    peft=None,
    peft_loader="AutoPeftModel",
)
