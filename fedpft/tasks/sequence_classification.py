"""One label for a text."""

from fedpft.tasks.task import Task

TASK = Task(
    name="sequence-classification",
    kind="text",
    model="AutoModelForSequenceClassification",
    processor="AutoTokenizer",
    problem_type="single_label_classification",
    head=True,
    peft="SEQ_CLS",
    peft_loader="AutoPeftModelForSequenceClassification",
)
