#!/usr/bin/env bash
# Builds the package on a machine with a GPU, tests it there, and measures it, in under 8 minutes:
#
#     benchmarks/gpu.sh FOLDER
#
# FOLDER/gpu.log holds everything that was said, FOLDER/gpu.json how each step ended, what each test
# said and what was measured; both are written again after every step, and a step that fails or runs
# out of time loses no other's results. Ends with 1 when the build, a test or the sanitizer failed.
set -uo pipefail

if [ $# -ne 1 ]; then
    echo "usage: benchmarks/gpu.sh FOLDER" >&2
    exit 2
fi
mkdir -p "$1"
folder=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
parts=$(mktemp -d)  # what the steps leave, each in files of its own
trap 'rm -rf "$parts"' EXIT
export folder parts python PYTHONUNBUFFERED=1

report() {
    "$python" benchmarks/gpu_report.py "$parts" "$folder"
}

# step NAME SECONDS COMMAND...: runs it under a limit, and notes its exit code (124, 137: out of time)
step() {
    local name=$1 limit=$2 start=$SECONDS code
    shift 2
    echo "== $name"
    timeout --signal=INT --kill-after=5 "$limit" "$@" >"$parts/$name.log" 2>&1
    code=$?
    echo "$name $code $((SECONDS - start))" >>"$parts/steps.txt"
    echo "== $name ended with $code after $((SECONDS - start)) s"
}

tests="-m pytest -q --no-header -p no:cacheprovider --tb=short tests/kernels/test_gpu.py"

# run_shard INDEX COUNT DEADLINE: an illegal access takes the GPU from the whole process, and another
# one goes on with the next test.
run_shard() {
    local attempt code
    for attempt in 1 2 3 4 5; do
        "$python" $tests --shard "$1/$2" --deadline "$3" --outcomes "$parts/outcomes-$1.jsonl"
        code=$?
        case $code in 0 | 1 | 4 | 5) break ;; esac  # 5: no test is left
        [ "$(date +%s)" -lt "$3" ] || break
    done
    [ $code -eq 0 ] || [ $code -eq 5 ]
}

# run_tests SECONDS: most of the time is Triton compiling, on one core for each process.
run_tests() {
    local index shards deadline processes=() failed=0
    shards=$(nproc)
    deadline=$(($(date +%s) + $1))
    export OMP_NUM_THREADS=1
    for ((index = 0; index < shards; index++)); do
        run_shard $index "$shards" $deadline >"$parts/shard-$index.txt" 2>&1 &
        processes+=($!)
    done
    for ((index = 0; index < shards; index++)); do
        wait "${processes[index]}" || failed=1
        tail -n 1 "$parts/shard-$index.txt"
    done
    return $failed
}

# Exit code 75: the GPU was lost to the process; what is left to measure needs another one.
measure() {
    local attempt code
    for attempt in 1 2 3; do
        "$python" -m leedl_fast.benchmarks.gpu "$parts/measured.json"
        code=$?
        [ $code -eq 75 ] || break
    done
    return $code
}
export -f run_shard run_tests measure
export tests

install=("$python" -m pip install --no-build-isolation --no-deps -e .)
step build 110 "${install[@]}"
if ! grep -q '^build 0 ' "$parts/steps.txt"; then  # the kernels in Triton need no compiler
    step build-without-cpu 30 env CXX=false "${install[@]}"
fi
report
"$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || {
    echo "error: torch sees no GPU here" | tee -a "$folder/gpu.log" >&2
    exit 2
}
step doctor 20 "$python" -m leedl_fast.cli doctor
# Beside the tests. Without torch's own pool every tensor is an allocation, whose bounds the
# sanitizer knows.
step sanitizer 185 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 OMP_NUM_THREADS=1 compute-sanitizer \
    --tool memcheck --target-processes all --error-exitcode 99 "$python" $tests \
    -k "conformance and float32 and (everything or causal-fewer-keys or layer_norm-odd or loss-noise)" &
step tests 185 bash -c "run_tests 170"
wait
report
step measure 125 bash -c measure
report
step suite 45 "$python" -c "from pathlib import Path; from leedl_fast.benchmarks.run import bench
bench(True, Path('$parts/suite'), ('attention', 'add_layer_norm', 'diffusion'),
      backend='triton', device='cuda', tiny=True)"
report
