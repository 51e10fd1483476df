"""The largest sizes that the kernels take. Plain Python: what decides without Triton reads them too."""

MAX_ROW = 16384
MAX_QUANTIZED_ROW = (
    8192  # of what is quantized beside a residual: a longer row and its codes don't fit in registers
)
MAX_HEAD_DIM = 256
