"""The suites of projects that pyaccel works with, stock beside accelerated: ``python -m tests.peers``."""
