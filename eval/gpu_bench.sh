#!/usr/bin/env bash
# This script measures mammut on one GPU within 30 minutes. It writes every result as JSON, with a
# log, into one folder.
#
#   eval/gpu_bench.sh [OUT]            measures on the GPU that JAX finds
#   DRY=1 eval/gpu_bench.sh [OUT]      runs the same calls with the preset tiny, which takes minutes
#                                      on a CPU and shows that all of them work
#
# PEER is a folder that holds the package open_clip; by default the installed package is used. If
# open_clip or PyTorch is missing, the comparison with the peer fails. FORK is a checkout of LAION's
# fork for openMaMMUT, with a version of transformers that it can generate with. BUDGET is a number
# of seconds, 1740 by default: calls that would begin later are left out and listed. If a call
# fails, it is listed, and the others still run.
set -u
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-/tmp/mammut_gpu_bench}")
python=${PYTHON:-python}
budget=${BUDGET:-1740}
mkdir -p "$out"
# By default JAX takes three quarters of the memory. There is no compilation cache, because it would
# hide the time of compilation.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}

preset=mammut_l14 batches="256 128 512 1024" middle=256 images="256 64 1" beams="1 4 6"
tokens=20 steps=20 sizes="224 280 336" lengths="32 64 128" rows=128
peer="--peer-config coca_ViT-L-14" fork="--peer-config mammut_ViT-L-14"
if [ -n "${DRY:-}" ]; then
  preset=tiny batches="4 8" middle=4 images="2" beams="1 2" tokens=4 steps=2
  sizes="24 48" lengths="8 16" peer="--vocab-size 500" fork="" rows=8
fi

begin=$SECONDS failed=() late=()
one() {  # NAME LIMIT ARGUMENTS: calls eval.speed once
  local name=$1 limit=$2
  shift 2
  if (( SECONDS - begin + 20 > budget )); then late+=("$name"); return; fi
  echo "== $name: $*"
  timeout "$limit" "$python" -m eval.speed "$@" --out "$out/$name.json" 2>&1 | tee "$out/$name.log"
  if (( PIPESTATUS[0] )); then failed+=("$name"); fi
}
step() {  # NAME ARGUMENTS: measures the training step
  local name=$1
  shift
  one "$name" 180 --preset $preset --steps $steps --what train "$@"
}

{
  date
  git log -1 --oneline
  nvidia-smi
  "$python" -m pip list
  env | grep -E 'XLA|JAX'
} > "$out/machine.txt" 2>&1

# The most important calls come first, so that a lack of time leaves out the least important ones.
one "train_dots_$middle" 240 --preset $preset --steps $steps --what train parts \
  --batch-size $middle
one "generate" 300 --preset $preset --what generate --batch-sizes $images --beams $beams \
  --new-tokens $tokens
for batch in $batches; do
  for remat in dots full; do
    [ "$remat $batch" = "dots $middle" ] ||
      step "train_${remat}_$batch" --batch-size $batch --remat $remat
  done
done
step "train_unfused_attention" --batch-size $middle --image-attention xla
step "train_fused_passes" --batch-size $middle --passes fused
step "train_whole_vocabulary" --batch-size $middle --vocab-chunk 4096
# The calls below need memory beside JAX: PyTorch runs in the same process, and startup starts a
# second process.
export XLA_PYTHON_CLIENT_PREALLOCATE=false
one "peer_coca" 400 --peer "${PEER:-open_clip}" --peer-family coca $peer --batch-size $rows \
  --dtype bfloat16 --what train generate --batch-sizes 1 $rows --beams 1 6 --new-tokens $tokens \
  --peer-modes eager compile
if [ -n "${FORK:-}" ]; then
  one "peer_openmammut" 400 --peer "$FORK" --peer-family mammut $fork --batch-size $rows \
    --dtype bfloat16 --what train generate --batch-sizes 1 --beams 1 6 --new-tokens $tokens \
    --peer-modes eager compile
fi
one "startup" 240 --preset $preset --what startup --batch-size $middle
one "grow_image_size" 240 --preset $preset --what growth --grow image_size --grow-sizes $sizes \
  --batch-size $middle --steps $steps
one "grow_length" 240 --preset $preset --what growth --grow length --grow-sizes $lengths \
  --batch-size $middle --steps $steps
XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_deterministic_ops=true" \
  step "train_deterministic" --batch-size $middle

echo "results: $out; ${#failed[@]} failed: ${failed[*]:-};" \
  "${#late[@]} left out for lack of time: ${late[*]:-}"
(( ${#failed[@]} == 0 ))
