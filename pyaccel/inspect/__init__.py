"""Machine code of every kernel configuration, for GPUs that are not there: ``pyaccel inspect``."""
