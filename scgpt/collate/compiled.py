"""What the machine code of a loop was made of, for Numba's cache.

Numba keeps machine code and notices a change of the file of the loop alone, but the steps that the loop calls, and
constants, are compiled into it. What a function captures is part of the key of that cache: let it capture a digest of
their files.
"""
import hashlib
from pathlib import Path
from types import ModuleType


def digest_of(*steps: ModuleType) -> str:
    """One digest of the source files of modules."""
    return hashlib.sha256(b"".join(Path(str(step.__file__)).read_bytes() for step in steps)).hexdigest()
