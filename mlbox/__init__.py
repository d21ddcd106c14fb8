"""mlbox: job queue, live logs and inference server for one shared GPU box, in one light daemon."""

__version__ = "0.1.0"
