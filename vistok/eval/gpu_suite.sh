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
# ONLY    names of the steps to do, separated by spaces [all]
#
# A step that fails, needs what is not there, or takes longer than its share is noted and the next one goes on; the
# benchmarks of kernels and families keep what they measured until then. The status is 0 if every step that ran succeeded.
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
only=${ONLY:-}
[ -z "$only" ] || only="wheels $only"
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

wanted() { # NAME
    [ -z "$only" ] || [[ " $only " == *" $1 "* ]]
}

step() { # NAME LIMIT COMMAND...
    local name=$1 limit=$2 started=$SECONDS code
    shift 2
    wanted "$name" || return 0
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

benchmark() { # NAME LIMIT FOLDER MODULE ARGUMENTS...
    local name=$1 limit=$2 folder=$work/results/$3 module=$4
    shift 4
    wanted "$name" || return 0
    if ! "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$module') is None)" 2> /dev/null; then
        note "$name" "skipped: there is no $module" 0
        return
    fi
    mkdir -p "$folder"
    step "$name" "$limit" "$python" -m "$module" -o "$folder" --device "$device" "$@"
}

tests() { # NAME LIMIT EXPRESSION FILES...
    local name=$1 limit=$2 marks=$3 each=()
    shift 3
    wanted "$name" || return 0
    if ! "$python" -c 'import pytest' 2> /dev/null; then
        note "$name" "skipped: there is no pytest" 0
        return
    fi
    if "$python" -c 'import pytest_timeout' 2> /dev/null; then each=(--timeout 90); fi
    step "$name" "$limit" "$python" -m pytest -q -p no:cacheprovider --durations 8 -m "$marks" ${each[@]+"${each[@]}"} \
        --junitxml "$out/$name.xml" "$@"
}

facts() {
    local code=0
    if [ "$device" = cuda ]; then nvidia-smi || code=1; fi
    "$python" -m vistok doctor --json > "$work/results/doctor.json" || code=1
    cat "$work/results/doctor.json"
    "$python" -c 'import triton; print("triton", triton.__version__)' || true
    return $code
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

export -f facts
export python device work
step facts 60 bash -c facts

quick='not (gpu or slow or network or browser)'
if [ "$device" = cuda ]; then
    mapfile -t files < <(grep -rlE 'mark\.gpu' --include='*.py' tests | xargs -n 1 dirname | sort -u)
    tests gpu-tests 140 gpu "${files[@]}"
    mapfile -t files < <(grep -rlF '"cuda" if torch.cuda.is_available()' --include='test_*.py' tests | sort)
    tests kernel-tests 60 "$quick" "${files[@]}"
    benchmark decode-attention 45 decode-attention vistok.eval.kernel_speed --kernels "decode attention"
    benchmark sampling 30 sampling vistok.eval.kernel_speed --kernels sampling
    benchmark attention 60 attention vistok.eval.kernel_speed --kernels attention
    speed=(--preset full --dtypes bfloat16 --repeats 3 --longest 4)
    benchmark llamagen-b 90 speed vistok.eval.speed --families llamagen-b --batch-sizes 1 64 "${speed[@]}"
    benchmark nar-b 70 speed vistok.eval.speed --families nar-b --batch-sizes 1 64 "${speed[@]}"
    benchmark llamagen-l 70 speed vistok.eval.speed --families llamagen-l --batch-sizes 1 64 "${speed[@]}"
    benchmark llamagen-xl 90 speed vistok.eval.speed --families llamagen-xl --batch-sizes 1 64 "${speed[@]}"
    benchmark xar-flextok 60 speed vistok.eval.speed --families xar-b flextok-d12-d12 --batch-sizes 1 8 "${speed[@]}"
    benchmark profiles 60 profiles vistok.eval.profiles --subjects llamagen-b nar-b flextok --dtypes bfloat16 --repeats 1
    benchmark speculation 60 speculation vistok.eval.speculative_speed --dtypes bfloat16 --num-drafted 1 4 8
    benchmark serving 60 serving vistok.eval.serving_speed --models llamagen-b --dtypes bfloat16 --loads 0.9
else
    tests gpu-tests 200 "$quick" tests/gpu
    benchmark sampling 60 sampling vistok.eval.kernel_speed --kernels sampling --repeats 1
    benchmark emoji 100 speed vistok.eval.speed --families emoji-64 --ways eager --dtypes float32 --batch-sizes 1 --repeats 1 \
        --longest 1
    benchmark profiles 60 profiles vistok.eval.profiles --subjects emoji-64 --dtypes float32 --repeats 1
    benchmark serving 60 serving vistok.eval.serving_speed --images 8 --slots 4 --loads 0.9
fi
pack
cat "$out/summary.md"
exit $status
