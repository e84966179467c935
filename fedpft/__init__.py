"""FedPFT: federated proxy fine-tuning of foundation models across institutions (arXiv 2404.11536)."""

__version__ = "0.1.0"
