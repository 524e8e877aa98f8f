#!/usr/bin/env bash
# All that only a GPU can show, in under nine minutes: facts, tests, benchmarks, profiles.
#
#   vistok/eval/gpu_suite.sh OUT [WHEELS]
#
# OUT     folder for the results: summary.md, log.txt, reports.md, the JUnit files of the tests and results.tar.gz
# WHEELS  folder of wheels to install first, for packages that the machine lacks (or set WHEELS); nothing is downloaded
#
# PYTHON  the interpreter [python3]
# DEVICE  cuda or cpu; on a CPU it is a rehearsal at the smallest sizes [cuda where torch finds one]
# BUDGET  seconds for everything [530]
#
# A step that fails, needs what is not there, or takes longer than its share is noted and the next one goes on. The status
# is 0 if every step that ran succeeded.
set -uo pipefail

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
    echo "usage: $0 OUT [WHEELS]" >&2
    exit 2
fi
mkdir -p -- "$1" || exit 2
out=$(cd -- "$1" && pwd -P)
wheels=${2:-${WHEELS:-}}
[ -z "$wheels" ] || wheels=$(cd -- "$wheels" && pwd -P) || exit 2
root=$(cd -P -- "$(dirname -- "$0")" && cd ../.. && pwd -P)
cd -- "$root" || exit 2
python=${PYTHON:-python3}
budget=${BUDGET:-530}
work=$(mktemp -d) || exit 2
trap 'rm -rf -- "$work"' EXIT
mkdir -p "$work/results" "$work/site"
status=0
SECONDS=0

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 MPLCONFIGDIR="$work/matplotlib"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$work/inductor}" TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$work/triton}"

: > "$out/log.txt"
printf '| Step | Outcome | Seconds |\n| --- | --- | ---: |\n' > "$work/steps.md"

note() { # STEP OUTCOME SECONDS
    printf '| %s | %s | %s |\n' "$1" "$2" "$3" >> "$work/steps.md"
    printf '%-24s %s (%s s)\n' "$1" "$2" "$3"
}

pack() { # so that whoever stops the suite keeps what there is
    { printf '# GPU suite\n\n'; cat "$work/steps.md"; printf '\n%s s of %s s\n' "$SECONDS" "$budget"; } > "$out/summary.md"
    find "$work/results" -name report.md | sort | xargs -r cat > "$out/reports.md"
    tar -czf "$out/results.tar.gz" -C "$work" results
}

step() { # NAME LIMIT COMMAND...
    local name=$1 limit=$2 started=$SECONDS code
    shift 2
    if [ $((budget - SECONDS)) -lt "$limit" ]; then limit=$((budget - SECONDS)); fi
    if [ "$limit" -lt 5 ]; then
        note "$name" "skipped: no time left" 0
        return
    fi
    printf '\n===== %s: %s\n' "$name" "$*" >> "$out/log.txt"
    timeout -k 5 "$limit" "$@" > "$work/step.log" 2>&1
    code=$?
    tail -c 1000000 "$work/step.log" >> "$out/log.txt"
    case $code in
        0) note "$name" ok $((SECONDS - started)) ;;
        124 | 137) note "$name" "stopped after $limit s" $((SECONDS - started)); status=1 ;;
        *) note "$name" "failed: $code" $((SECONDS - started)); status=1; tail -n 5 "$work/step.log" ;;
    esac
    pack
}

module_step() { # NAME LIMIT MODULE ARGUMENTS...
    local name=$1 limit=$2 module=$3
    shift 3
    if ! "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$module') is None)" 2> /dev/null; then
        note "$name" "skipped: there is no $module" 0
        return
    fi
    mkdir -p "$work/results/$name"
    step "$name" "$limit" "$python" -m "$module" -o "$work/results/$name" "$@"
}

if [ -n "$wheels" ]; then
    step wheels 60 "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$work/site" "$wheels"/*.whl
    export PYTHONPATH="$work/site:$PYTHONPATH"
fi
device=${DEVICE:-$("$python" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')}
if [ "$device" != cuda ]; then
    export CUDA_VISIBLE_DEVICES=
fi

facts() {
    local missing=0
    nvidia-smi || [ "$device" = cpu ] || missing=1
    "$python" -m vistok doctor --json > "$work/results/doctor.json" || missing=1
    "$python" -m vistok doctor || missing=1
    "$python" -c 'import triton; print("triton", triton.__version__)' || true
    return $missing
}
export -f facts
export python device work
step facts 40 bash -c facts

tests() { # NAME LIMIT EXPRESSION FILES...
    local name=$1 limit=$2 marks=$3 each=()
    shift 3
    if "$python" -c 'import pytest_timeout' 2> /dev/null; then each=(--timeout 60); fi
    step "$name" "$limit" "$python" -m pytest -q -p no:cacheprovider --durations 8 -m "$marks" ${each[@]+"${each[@]}"} \
        --junitxml "$out/$name.xml" "$@"
}

if "$python" -c 'import pytest' 2> /dev/null; then
    mapfile -t files < <(grep -rlE 'mark\.gpu' --include='test_*.py' tests | sort)
    if [ "$device" = cuda ]; then
        tests gpu-tests 130 gpu "${files[@]}"
        tests kernel-tests 60 'not (gpu or slow or network or browser)' tests/kernels
    else
        tests gpu-tests 130 'not (gpu or slow or network or browser)' tests/gpu
    fi
else
    note gpu-tests "skipped: there is no pytest" 0
fi
