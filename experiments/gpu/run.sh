#!/usr/bin/env bash
# What a quarter of an hour of a GPU is for, on a bare machine: CUDA, torch, torchvision, timm, pandas, scikit-learn.
#
#   experiments/gpu/run.sh [--rehearse] [--resume FOLDER] [--only images,tests,published] [--out FOLDER]
#                          [--collected FOLDER]
#
# Needs experiments/gpu/collected/, which experiments/gpu/collect.py fills, and no network. Each step has a time limit,
# and a step that fails leaves the others to go on; at most 9 minutes in all, thrice that in a rehearsal, which a busy
# processor may have to do. Results are in $OUT (--out): results.json and weights.tar.0, .1, …
set -uo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
out=${OUT:-$here/out} rehearse=() patience=1 resume=() only=images,tests,published collected=$here/collected
while [ $# -gt 0 ]; do
  case $1 in
    --rehearse) rehearse=(--rehearse) patience=3 ;;
    --resume) resume=(--resume "$(realpath "$2")"); shift ;;
    --only) only=$2; shift ;;
    --out) out=$2; shift ;;
    --collected) collected=$(realpath "$2"); shift ;;
    *) echo "error: $1: not an option of ${0##*/}; see its first lines" >&2; exit 2 ;;
  esac
  shift
done
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

# A step: its name, its time limit in seconds, its command. What it prints goes to the screen.
step() {
  local name=$1 limit=$(($2 * patience)) began=$SECONDS
  shift 2
  echo "== $name (at most $limit s)"
  timeout --kill-after=10 "$limit" "$@"
  local status=$?
  echo "== $name: exit $status after $((SECONDS - began)) s"
  "$python" - "$out" "$name" "$status" $((SECONDS - began)) <<'PY'
import sys
from pathlib import Path

from results import Results

folder, name, status, seconds = sys.argv[1:]
Results(Path(folder)).add(f"step/{name}", {"exit": int(status), "seconds": int(seconds)})
PY
  [ $status -eq 0 ] || failed=1
}

export PYTHONPATH=$work/site:$here:$root DIFFGUARD_RESULTS=$out PYTHONDONTWRITEBYTECODE=1
wheels=("$collected"/wheels/*.whl)
if [ ! -e "${wheels[0]}" ]; then
  echo "error: $collected/wheels: no wheels; run: python experiments/gpu/collect.py" >&2
  exit 1
fi
for wheel in "${wheels[@]}"; do # as an installer would, which a bare machine need not have
  "$python" -m zipfile -e "$wheel" "$work/site" || exit 1
done
"$python" -c "from pathlib import Path; from results import Results, machine; Results(Path('$out')).add('machine', machine())" \
  || exit 1

images=$collected/images
if [ ${#rehearse[@]} -gt 0 ]; then
  images=$work/images
  "$python" -c "from pathlib import Path; from cifar10_images import write_made_up; write_made_up(Path('$images'), 30)" || exit 1
  export DIFFGUARD_TEST_DEVICE=cpu
  seconds=(--denoiser-seconds 10)
else
  # A step that is alone has the time of all; a classifier that is there already leaves its own to the denoiser.
  denoiser=$([ "$only" = images ] && echo 400 || echo 205)
  seconds=(--classifier-seconds 60 --denoiser-seconds $((denoiser + (${#resume[@]} > 0 ? 60 : 0))))
fi
limit=$([ "$only" = images ] && echo 530 || echo 340)
published=$([ "$only" = published ] && echo 520 || echo 120)
case ,$only, in *,images,*)
  [ ${#rehearse[@]} -gt 0 ] || [ -d "$images" ] || echo "error: $images: no images; collect.py --images FOLDER" >&2
  step images "$limit" "$python" "$here/cifar10.py" --images "$images" --out "$out" "${seconds[@]}" "${resume[@]}" "${rehearse[@]}" ;;
esac
case ,$only, in *,tests,*)
  step tests 60 "$python" -m pytest -q -p no:cacheprovider --import-mode=importlib -o addopts= "$root/tests/gpu" ;;
esac
case ,$only, in *,published,*)
  step published "$published" "$python" "$here/published.py" --out "$out" --seconds $((published - 15)) "${rehearse[@]}" ;;
esac
exit $failed
