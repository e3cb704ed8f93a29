"""A program of the tests: export FOLDER/run to FOLDER/release; how many bytes of anonymous memory that took at most."""
import sys
import threading
from pathlib import Path

from pretrain.export import export
from scgpt.model.build import build_model
from scgpt.model.config import ModelConfig


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


def main(folder: Path) -> None:
    """Export, and print the most that memory grew by."""
    build_model(ModelConfig(n_layers=1), {"<pad>": 0}, device="meta")   # loads 70 MB of torch's code, once
    before, found, done = anonymous_bytes(), [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            found[0] = max(found[0], anonymous_bytes() - before)

    sampler = threading.Thread(target=sample)
    sampler.start()
    export(folder / "run", folder / "release")
    done.set()
    sampler.join()
    sys.stdout.write(f"{found[0]}\n")


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
