#!/usr/bin/env bash
# On a GPU machine, in one command: build with CUDA, run every gate, the GPU tests, memcheck on the
# small gate shapes, and the benches; print a table; leave one folder.
#
#   benchmarks/gpu.sh [--dry-run] [OP ...]
#   benchmarks/gpu.sh low_bit      # the low-bit layers: 'quantize_*' 'gem[mv]_*' 'norm_quantize_*',
#                                  # and whole models in steps "models NAME"
#   benchmarks/gpu.sh caching      # the caches: forecast_apply, snapshot_store, cache_metric,
#                                  # 'token_*', and denoising loops in steps "loops NAME"
#
# OP is an op or a pattern of names; without one it is all of them.
#
#   OUT             results folder (default: benchmarks/out/<date>-<device>)
#   PYTHON          use this interpreter and its packages, and install none but this one; by default
#                   `make` sets up .venv with everything (as `make test` does; TORCH chooses torch)
#   WHEELS          with PYTHON: folder of wheels to install first, and of nvidia-cutlass, whose
#                   headers the build takes; nothing is downloaded
#   VARIANTS        macros to build kernels with once more and bench again, quickly, such as
#                   FEWSTEP_ATTENTION_JVP_TURNS; what is left built is the last one
#   STEPS           a pattern: only the steps below whose title it matches run, so that one folder OUT
#                   can be filled by several calls of limited time, such as STEPS=build,
#                   STEPS='gate|tests', STEPS='^bench', STEPS='check|counters', STEPS=peers,
#                   STEPS='models FLUX'
#   PEERS           folder of other packages' wheels (torchao, gemlite, comfy-kitchen), which only
#                   the steps "peers" and "models" see; without it, what is installed takes part
#   FEWSTEP_COMMIT  commit for the records, where the files came without .git
#
# Setting up .venv may download torch; what follows stops before ten minutes. An op brings its backward
# along. --dry-run goes as far as
# a machine without a GPU can: the CUDA build, the CPU tests, quick benches on the CPU. A step that
# fails does not stop the next ones, but for the build; the exit status is 1 if any failed.
set -u -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

budget=570
dry_run=0
low_bit=0
caching=0
ops=()
for argument in "$@"; do
    case "$argument" in
        --dry-run) dry_run=1 ;;
        -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        -*) echo "gpu.sh: expected --dry-run or an op, got $argument" >&2; exit 2 ;;
        low_bit) low_bit=1 ops+=('quantize_*' 'gem[mv]_*' 'norm_quantize_*') ;;
        caching) caching=1 ops+=(forecast_apply snapshot_store cache_metric 'token_*') ;;
        *) ops+=("$argument") ;;
    esac
done
device=cuda
quick=()
kernels=(--kernels)
if ((dry_run)); then
    device=cpu
    quick=(--quick)
    kernels=()
fi

export FEWSTEP_CUDA=on
given=${PYTHON:-}
if [[ -z $given ]]; then
    make .venv/.test || exit 1
    PYTHON=$PWD/.venv/bin/python
fi
started=$SECONDS

has() { "$PYTHON" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"; }

has torch || { echo "gpu.sh: $PYTHON has no torch; set PYTHON" >&2; exit 2; }
if ((!dry_run)) && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: torch finds no CUDA device here; --dry-run goes as far as it can" >&2
    exit 2
fi
name=$("$PYTHON" -c 'import re, sys, torch
name = torch.cuda.get_device_name() if sys.argv[1] == "cuda" else "dry-run"
print(re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"))' "$device")
OUT=${OUT:-benchmarks/out/$(date -u +%Y%m%d-%H%M%S)-$name}
mkdir -p "$OUT"
summary=$OUT/summary.txt
touch "$summary"
failed=0

note() { printf '%-34s %-8s %6s  %s\n' "$1" "$2" "$3" "${4:-}" | tee -a "$summary"; }

# step NAME SECONDS COMMAND...: run within its time and the whole budget, keep the log and verdict.
step() {
    local title=$1 limit=$2 begin=$SECONDS left log status
    shift 2
    [[ $title =~ ${STEPS:-.} ]] || return 0
    left=$((budget - (SECONDS - started)))
    log=$OUT/$(tr -c 'a-zA-Z0-9\n' '-' <<<"$title").log
    if ((left < 5)); then
        note "$title" skipped 0s "the time is spent"
        failed=1
        return 1
    fi
    timeout $((limit < left ? limit : left)) "$@" >"$log" 2>&1
    status=$?
    if ((status == 0)); then
        note "$title" ok $((SECONDS - begin))s "$(tail -n 1 "$log" | cut -c1-90)"
        return 0
    fi
    failed=1
    note "$title" FAILED $((SECONDS - begin))s "status $status, see $log"
    tail -n 15 "$log"
    return 1
}

if [[ -n $given ]]; then
    if [[ -n ${WHEELS:-} ]]; then
        # The build fetches CUTLASS's headers by pip, which then finds its wheel here.
        export PIP_NO_INDEX=1 PIP_FIND_LINKS=$WHEELS
        wheels=()
        for wheel in "$WHEELS"/*.whl; do
            [[ ! -e $wheel || $wheel == */nvidia_cutlass-* ]] || wheels+=("$wheel")
        done
        ((${#wheels[@]})) && step "wheels" 90 "$PYTHON" -m pip install --no-deps "${wheels[@]}"
    fi
    missing=()
    modules=(pytest rich typer numpy pybind11 triton)
    ((low_bit || caching)) && modules+=(diffusers importlib_metadata)
    for module in "${modules[@]}"; do
        has "$module" || missing+=("$module")
    done
    for tool in cmake ninja nvcc; do
        command -v "$tool" >/dev/null || [[ $tool == nvcc && -x /usr/local/cuda/bin/nvcc ]] ||
            missing+=("$tool")
    done
    if ((${#missing[@]})); then
        echo "missing here: ${missing[*]} (Python packages can come as wheels in WHEELS)" |
            tee -a "$summary"
    fi
    step "build with CUDA" 300 "$PYTHON" -m pip install --no-build-isolation --no-deps --no-index \
        -e . || exit 1
fi
# Patterns become names; a name that is no op stays, and its steps say so.
mapfile -t ops < <("$PYTHON" -c 'import sys
from fnmatch import filter
from fewstep.ops import OPS
wanted = sys.argv[1:] or ["*"]
print(*dict.fromkeys(op for name in wanted for op in filter(OPS, name) or [name]), sep="\n")' \
    ${ops[@]+"${ops[@]}"})

for op in "${ops[@]}"; do
    if [[ -f benchmarks/ops/${op}_backward.py && " ${ops[*]} " != *" ${op}_backward "* ]]; then
        ops+=("${op}_backward")
    fi
done

step "every gate" 200 "$PYTHON" -m fewstep doctor --check
"$PYTHON" -m fewstep doctor --json >"$OUT/doctor.json" 2>"$OUT/doctor.log"
pytest=("$PYTHON" -m pytest -q -p no:cacheprovider)
tests=()
for op in "${ops[@]}"; do
    [[ -f tests/ops/test_$op.py ]] && tests+=("tests/ops/test_$op.py")
    for test in "tests/cuda/test_${op}"{,_sm90}.py; do
        [[ -f $test ]] && tests+=("$test")
    done
done
# What several ops share: masks, rows, states.
[[ -n ${tests[*]} ]] && tests+=(tests/ops/test__*.py)
((low_bit)) && tests+=(tests/bench/test_model_steps.py)
((caching)) && tests+=(tests/bench/test_cache_steps.py tests/patching/test_cache_on_gpu.py)
if ((dry_run)); then
    # The CPU subset that needs no interpreter: a check of this script more than of the kernels.
    step "op tests, native on the CPU" 120 "${pytest[@]}" -x -k "native" "${tests[@]}"
else
    step "op tests on cuda" 200 "${pytest[@]}" -m gpu "${tests[@]}"
    step "the CUDA build" 30 "${pytest[@]}" tests/test_cuda_build.py
fi
for op in "${ops[@]}"; do
    if [[ ! -f benchmarks/ops/$op.py ]]; then
        note "bench $op" skipped 0s "no benchmarks/ops/$op.py"
        continue
    fi
    COLUMNS=160 step "bench $op" 150 "$PYTHON" -m fewstep bench ops --op "$op" --device "$device" \
        --output "$OUT/records" ${kernels[@]+"${kernels[@]}"} ${quick[@]+"${quick[@]}"}
done
sanitizer=$(command -v compute-sanitizer || true)
[[ -z $sanitizer && -x /usr/local/cuda/bin/compute-sanitizer ]] &&
    sanitizer=/usr/local/cuda/bin/compute-sanitizer
mapfile -t kernels < <("$PYTHON" -c '
import sys, torch
from fewstep.cli.doctor import runnable
for op in sys.argv[2:]:
    for impl in runnable(op, torch.device(sys.argv[1])):
        print(op, impl)' "$device" "${ops[@]}" | sort -k 2)
if [[ -z $sanitizer || $device != cuda ]]; then
    note "check memory and races" skipped 0s "needs compute-sanitizer and a GPU"
else
    for kernel in "${kernels[@]}"; do
        read -r op impl <<<"$kernel"
        # Without torch's pool every tensor is its own allocation, and a read past its end is seen.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "check memory $op $impl" 60 "$sanitizer" \
            --tool memcheck --error-exitcode 3 "$PYTHON" -m fewstep.ops._gate "$op" "$impl" cuda
        # Triton orders its own shared memory; ours is ours to order.
        [[ $impl == native ]] && step "check races $op $impl" 90 "$sanitizer" \
            --tool racecheck --error-exitcode 3 "$PYTHON" -m fewstep.ops._gate "$op" "$impl" cuda
    done
fi

# Where the time goes: the counters of a few launches at FLUX.1's shape.
profiler=$(command -v ncu || true)
[[ -z $profiler && -x /usr/local/cuda/bin/ncu ]] && profiler=/usr/local/cuda/bin/ncu
# counters OP KERNEL SCRIPT [ARGUMENT]: of the first launch of a kernel whose name has KERNEL in it.
counters() {
    [[ " ${ops[*]} " == *" $1 "* ]] || return 0
    if [[ -z $profiler || $device != cuda ]]; then
        note "counters $1 ${4:-}" skipped 0s "needs ncu and a GPU"
        return 0
    fi
    step "counters $1 ${4:-}" 60 "$profiler" --csv --launch-count 1 --kernel-name "regex:$2" \
        --section SpeedOfLight --section WarpStateStats --section MemoryWorkloadAnalysis \
        --section LaunchStats "$PYTHON" -c "$3" "${4:-}"
}
for dim in 64 128 256; do
    counters attention_jvp attention_jvp '
import sys, torch
from fewstep import ops
shape = 1, 24, 4608, int(sys.argv[1])
x = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(6)]
ops.attention_jvp(*x, impl="native")' "$dim"
done
for op in gemm_w8a8 gemm_fp8 gemm_w4a8; do
    counters "$op" 'gemm[48]_sm90' '
import sys, torch
from fewstep import ops
x, w = (torch.randn(n, 3072, device="cuda", dtype=torch.bfloat16) for n in (4096, 12288))
product = getattr(ops, sys.argv[1])
int8, int4, fp8 = ops.quantize_int8, ops.quantize_int4, ops.quantize_fp8
rows, weight = {"gemm_w8a8": (int8, int8), "gemm_w4a8": (int8, int4)}.get(sys.argv[1], (fp8, fp8))
product(*rows(x), *weight(w), out_dtype=x.dtype, impl="native")' "$op"
done
counters gemv_w4a16_grouped gemv_w4a16 '
import torch
from fewstep import ops
x = torch.randn(1, 3072, device="cuda", dtype=torch.bfloat16)
w = [torch.randint(0, 256, (18432, 1536), device="cuda", dtype=torch.uint8) for _ in range(57)]
scale = [torch.ones(18432, 48, device="cuda", dtype=torch.bfloat16) for _ in w]
ops.gemv_w4a16_grouped(x, w, scale, impl="native")'
if [[ " ${ops[*]} " == *" attention_jvp "* ]] && has diffusers; then
    models=("$PYTHON" benchmarks/pipelines/forward_mode_models.py --device "$device")
    ((dry_run)) && models+=(--tiny --repeats 2)
    step "models in forward mode" 150 "${models[@]}" --output "$OUT/models"
fi

# Other packages: where they are installed for this, they take no part in the steps above.
beside=()
if [[ -n ${PEERS:-} ]]; then
    step "install peers" 90 "$PYTHON" -m pip install --no-deps --no-index --no-compile --upgrade \
        --target "$PWD/build/peers" "$PEERS"/*.whl
    beside=(env "PYTHONPATH=$PWD/build/peers${PYTHONPATH:+:$PYTHONPATH}")
fi
rivals=()
for op in gemm_w8a8 gemm_fp8 gemm_w4a8; do
    [[ " ${ops[*]} " == *" $op "* ]] && rivals+=(--op "$op")
done
others() { [[ -n ${PEERS:-} ]] || has torchao || has gemlite || has comfy_kitchen; }
if ((low_bit)) && { ((dry_run)) || ! others; }; then
    note "peers" skipped 0s "needs a GPU and other packages: PEERS"
elif ((low_bit)); then
    COLUMNS=160 step "peers" 400 ${beside[@]+"${beside[@]}"} "$PYTHON" -m fewstep bench ops \
        "${rivals[@]}" --device "$device" --peers --kernels --output "$OUT/records"
fi
if ((low_bit)) && ! has diffusers; then
    note "models" skipped 0s "needs diffusers"
elif ((low_bit)); then
    for model in FLUX.1-dev SDXL SANA-1.6B PixArt-Sigma Qwen-Image; do
        models=("$PYTHON" benchmarks/pipelines/model_steps.py "$model" --device "$device")
        if ((dry_run)); then
            models+=(--quick --forms bf16 w8a8 w4a8-r32 --output "$OUT/models")
        else
            models+=(--record "$OUT/records")
        fi
        step "models $model" 330 ${beside[@]+"${beside[@]}"} "${models[@]}"
    done
fi

if ((caching)) && ! has diffusers; then
    note "loops" skipped 0s "needs diffusers"
elif ((caching)); then
    for model in FLUX.1-dev Qwen-Image Wan2.1-T2V-1.3B SDXL; do
        loops=("$PYTHON" benchmarks/pipelines/cache_steps.py "$model" --device "$device")
        if ((dry_run)); then loops+=(--quick); else loops+=(--record "$OUT/records"); fi
        step "loops $model" 300 "${loops[@]}"
    done
fi

# A kernel's variants, last: each is built in the place of the one above.
for variant in ${VARIANTS:-}; do
    FEWSTEP_CUDA_DEFINES=$variant step "build $variant" 120 "$PYTHON" -m pip \
        install --no-build-isolation --no-deps --no-index -e . || continue
    for op in "${ops[@]}"; do
        step "bench $op $variant" 90 "$PYTHON" -m fewstep bench ops --op "$op" --device "$device" \
            --quick --output "$OUT/$variant"
    done
    COLUMNS=140 "$PYTHON" -m fewstep bench show "$OUT/$variant" 2>&1 | tee -a "$summary"
done
[[ -d $OUT/records ]] &&
    COLUMNS=140 "$PYTHON" -m fewstep bench show "$OUT/records" 2>&1 | tee -a "$summary"
echo "$((SECONDS - started)) s; results: $OUT" | tee -a "$summary"
exit "$failed"
