"""What the C library does with freed memory: kept for the next step, or returned to the kernel."""
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3   # glibc's malloc.h


def keep_freed_memory() -> None:
    """Let glibc reuse freed buffers of up to 32 MiB, in the whole process; elsewhere nothing is done.

    Returned to the kernel, each step faults its batches in anew (a quarter of the loader's time), and its gradients.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)
