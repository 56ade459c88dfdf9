"""The deployments of prefect.yaml, with where a worker finds the code: a folder, or a revision of a git repository.

    python -m flows.deploy                                # this folder
    python -m flows.deploy --path /srv/diffguard          # a folder of the worker's machine
    python -m flows.deploy --repository URL --revision v1 --working-dir /srv/runs

A worker clones a repository into its working directory, and brings the clone to the revision before each run; data and
scores stay there between runs. Not by Prefect's step git_clone, which removes a clone that it cannot pull, as after a
run has changed dvc.lock, and all that it holds.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from diffguard.errors import DiffGuardError, ServiceError, SettingError
from flows.start import check_prefect
from tasks.config import project

CLONE = "diffguard"
"""The folder of the clone, in a worker's working directory."""

_STEPS = "prefect.deployments.steps"


def pull_steps(path: str | None, repository: str | None, revision: str | None) -> list[dict[str, Any]]:
    """Prefect's steps that bring a worker to the code.

    Args:
        path: a folder of the worker's machine; this project's if there is no repository either.
        repository: its URL, as git clone takes it.
        revision: a branch, a tag, or a whole commit hash; the repository's default branch if not given. A branch is
            read anew before each run.

    Raises:
        SettingError: both were given, or a revision of nothing, or one that git would take for an option.
    """
    if path is not None and repository is not None:
        raise SettingError("path, repository: give one of them")
    if repository is None:
        if revision is not None:
            raise SettingError("revision: belongs to a repository, which was not given")
        return [{f"{_STEPS}.set_working_directory": {"directory": path or str(project.ROOT)}}]
    for name, value in (("repository", repository), ("revision", revision)):
        if value is not None and value.startswith("-"):
            raise SettingError(f"{name}: {value} begins with a hyphen")
    # What a run has changed of git's own files (dvc.lock, summary.json) is that revision's again; the rest stays.
    script = (
        f"set -e; test -d {CLONE}/.git || git clone --quiet --no-checkout {shlex.quote(repository)} {CLONE}; "
        f"cd {CLONE}; git remote set-url origin {shlex.quote(repository)}; "
        f"git fetch --quiet origin {shlex.quote(revision or 'HEAD')}; git checkout --quiet --force --detach FETCH_HEAD"
    )
    run = {"script": f"bash -c {shlex.quote(script)}", "stream_output": True}
    return [{f"{_STEPS}.run_shell_script": run}, {f"{_STEPS}.set_working_directory": {"directory": CLONE}}]


def deployments(
    pull: list[dict[str, Any]], pool: str | None, working_dir: str | None, image: str | None
) -> dict[str, Any]:
    """prefect.yaml with these steps.

    Args:
        pool: the work pool; prefect.yaml's own if not given.
        working_dir: where a worker starts a run; a temporary folder of Prefect's if not given.
        image: of a work pool of type docker.
    """
    settings: dict[str, Any] = yaml.safe_load((project.ROOT / "prefect.yaml").read_text(encoding="utf-8"))
    # Anchors are resolved here, so that two deployments do not share what is changed below.
    for each in settings["deployments"]:
        work_pool = each["work_pool"] = {**each["work_pool"], "name": pool or each["work_pool"]["name"]}
        extra = {key: value for key, value in {"working_dir": working_dir, "image": image}.items() if value is not None}
        work_pool["job_variables"] = {**work_pool.get("job_variables", {}), **extra}
    return {**settings, "pull": pull}


def deploy(settings: dict[str, Any]) -> None:
    """Create or change them on the server of PREFECT_API_URL.

    Raises:
        ServiceError: Prefect refuses, and has printed why.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prefect.yaml"
        file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)]
        done = subprocess.run(command, cwd=project.ROOT)
    if done.returncode:
        raise ServiceError("prefect deploy failed; see above")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flows.deploy", description="Create or change the deployments of prefect.yaml on a server."
    )
    parser.add_argument("--path", help="the project's folder on the worker's machine; this one if nothing is given")
    parser.add_argument("--repository", help="URL of a git repository that a worker clones")
    parser.add_argument("--revision", help="of the repository: a branch, a tag or a whole commit hash")
    parser.add_argument("--pool", help="the work pool; diffguard if not given")
    parser.add_argument("--working-dir", help="where a worker starts a run, and keeps the clone")
    parser.add_argument("--image", help="of a work pool of type docker")
    options = parser.parse_args()
    try:
        steps = pull_steps(options.path, options.repository, options.revision)
        if "PREFECT_API_URL" not in os.environ:
            raise SettingError("PREFECT_API_URL: not set; a deployment is kept by a server")
        check_prefect()
        deploy(deployments(steps, options.pool, options.working_dir, options.image))
    except DiffGuardError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
