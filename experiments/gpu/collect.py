"""Collect what experiments/gpu/run.sh needs beside the repository: wheels, and the archives of CIFAR-10.

    python experiments/gpu/collect.py [--images FOLDER] [--python 3.12] [--to FOLDER]

Into experiments/gpu/collected/, which git ignores. Wheels are those that a machine with torch, torchvision, timm,
pandas and scikit-learn lacks. grad-cam needs OpenCV, larger than all the rest, which stays away: where the machine
does not have it, rows with a CAM mask are left out.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
COLLECTED = HERE / "collected"
ARCHIVES = ("cifar10-jpeg.tar.xz", "tinyimagenet-near-dev.tar.xz")
MOST = 60 * 2**20
"""Bytes of all that is collected."""

WHEELS = {
    "diffusers": "importlib-metadata zipp regex requests urllib3 idna certifi charset-normalizer",
    "pydantic": "pydantic-core annotated-types typing-inspection typing-extensions",
    "piq": "",
    "loky": "cloudpickle",
    "pytorch-ood": "",
    "simplejpeg": "",
    "huggingface-hub": "httpx httpcore h11 anyio sniffio fsspec filelock packaging tqdm pyyaml",
    "safetensors": "",
    "timm": "",
    "pytest": "pluggy iniconfig pygments",
}
"""What is imported, each with those of its requirements that a bare machine may lack."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help=f"folder that holds {' and '.join(ARCHIVES)}")
    parser.add_argument("--python", default="3.12", help="version of Python there")
    parser.add_argument("--to", type=Path, default=COLLECTED)
    options = parser.parse_args()
    folder = options.to / "wheels"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    names = [each for name, more in WHEELS.items() for each in (name, *more.split())]
    command = [*pip(), "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--python-version", options.python]
    for platform in ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"):
        command += ["--platform", platform]
    constraints = HERE.parents[1] / "constraints.txt"
    command += ["--implementation", "cp", "--constraint", str(constraints)] if constraints.is_file() else []
    missing = []
    # All in one go; where that fails, one by one, to say which is missing.
    if subprocess.run([*command, "--dest", str(folder), *names], capture_output=True).returncode:
        for name in names:
            done = subprocess.run([*command, "--dest", str(folder), name], capture_output=True, text=True)
            if done.returncode:
                missing.append(f"{name}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    # It is published as source alone, which is Python.
    built = subprocess.run([*pip(), "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), "grad-cam", "ttach"])
    if built.returncode:
        missing.append("grad-cam, which is built from its source")
    if missing:
        sys.exit("error: no wheel of " + "; ".join(missing))
    if options.images is not None:
        (options.to / "images").mkdir(exist_ok=True)
        for name in ARCHIVES:
            if not (options.images / name).is_file():
                sys.exit(f"error: {options.images / name}: no such file")
            shutil.copyfile(options.images / name, options.to / "images" / name)
    size = sum(path.stat().st_size for path in options.to.rglob("*") if path.is_file())
    print(f"{len(list(folder.glob('*.whl')))} wheels; {size / 2**20:.1f} MiB in {options.to}")
    if size > MOST:
        sys.exit(f"error: more than {MOST / 2**20:.0f} MiB")


def pip() -> list[str]:
    """pip's command: this environment's, or one that uv brings."""
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode == 0:
        return [sys.executable, "-m", "pip"]
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "pip"]
    sys.exit("error: neither pip nor uv is here; install one")


if __name__ == "__main__":
    main()
