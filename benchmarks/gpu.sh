#!/usr/bin/env bash
# Builds the package on a machine with a GPU, tests it there, and measures it, in under 8 minutes:
#
#     benchmarks/gpu.sh FOLDER
#
# FOLDER/gpu.log holds everything that was said, FOLDER/gpu.json how each step ended, the counts of
# the tests and what was measured. Ends with 1 when the build, a test or the sanitizer failed.
set -uo pipefail

if [ $# -ne 1 ]; then
    echo "usage: benchmarks/gpu.sh FOLDER" >&2
    exit 2
fi
mkdir -p "$1"
folder=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
: >"$folder/gpu.log"
: >"$folder/steps.txt"

# step NAME SECONDS COMMAND...: runs it under a limit, and notes its exit code (124: out of time)
step() {
    local name=$1 limit=$2 start=$SECONDS code
    shift 2
    echo "== $name" | tee -a "$folder/gpu.log"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$folder/gpu.log"
    code=${PIPESTATUS[0]}
    echo "$name $code $((SECONDS - start))" >>"$folder/steps.txt"
}

tests="$python -m pytest -q --no-header -p no:cacheprovider tests/kernels/test_gpu.py"

# Most of the tests' time is Triton compiling, on one core for each process.
run_tests() {
    local shards index processes=() failed=0
    shards=$(nproc)
    for ((index = 0; index < shards; index++)); do
        $tests --shard "$index/$shards" --junitxml="$folder/tests-$index.xml" \
            >"$folder/tests-$index.log" 2>&1 &
        processes+=($!)
    done
    for ((index = 0; index < shards; index++)); do
        wait "${processes[index]}" || failed=1
        tail -n 60 "$folder/tests-$index.log"
        rm "$folder/tests-$index.log"
    done
    return $failed
}
export -f run_tests
export tests folder

step build 80 "$python" -m pip install --no-build-isolation --no-deps -e .
"$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || {
    echo "error: torch sees no GPU here" | tee -a "$folder/gpu.log" >&2
    exit 2
}
step doctor 15 "$python" -m leedl_fast.cli doctor
step tests 170 bash -c run_tests
# Without torch's own pool every tensor is an allocation, whose bounds the sanitizer knows.
step sanitizer 40 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck \
    --target-processes all --error-exitcode 1 $tests \
    -k "conformance and float32 and (everything or causal-fewer-keys or layer_norm-odd or loss-noise)"
step measure 120 "$python" -m leedl_fast.benchmarks.gpu "$folder/measured.json"
step suite 40 "$python" -c "from pathlib import Path; from leedl_fast.benchmarks.run import bench
bench(True, Path('$folder/suite'), ('attention', 'add_layer_norm', 'diffusion'),
      backend='triton', device='cuda', tiny=True)"

"$python" - "$folder" <<'PYTHON'
import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

folder = Path(sys.argv[1])
rows = [line.split() for line in (folder / "steps.txt").read_text().splitlines()]
report = {"steps": {name: {"exit_code": int(c), "seconds": int(s)} for name, c, s in rows}}
counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
for file in folder.glob("tests-*.xml"):
    suite = ElementTree.parse(file).getroot().find("testsuite").attrib
    counts = {key: count + int(suite[key]) for key, count in counts.items()}
    file.unlink()
report["tests"] = counts
for name, file in (("measured", "measured.json"), ("suite", "suite/results.json")):
    if (folder / file).exists():
        report[name] = json.loads((folder / file).read_text())
must_pass = ["build", "tests"]
said = (folder / "gpu.log").read_text().partition("== sanitizer\n")[2].partition("\n== ")[0]
if "Device not supported" in said:  # some virtual machines keep it from the GPU
    report["steps"]["sanitizer"]["reason"] = "compute-sanitizer does not support the device here"
else:
    must_pass.append("sanitizer")
(folder / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
failed = [name for name in must_pass if report["steps"][name]["exit_code"]]
print("failed: " + ", ".join(failed) if failed else "passed")
sys.exit(bool(failed))
PYTHON
