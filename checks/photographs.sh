#!/usr/bin/env bash
# The four rows of Table 5 on photographs: two stages each on the captions of RSICD's train split, then its val split.
# Rows that are there already are not trained again. The maps of the frozen encoder are kept (4 GB).
#
#     checks/photographs.sh RSICD [steps of stage 1] [steps of stage 2] [seeds]
#
# By default 100 steps of 64, 500 of 32 and seeds 0 and 1; two rows at a time, one thread each.
set -euo pipefail
export root=$1 first=${2:-100} second=${3:-500} out=runs/photographs-ladder OMP_NUM_THREADS=1
mkdir -p "$out"
[ -f "$out/captions.jsonl" ] || python -m corpora rsicd --root "$root" --out "$out/captions.jsonl"

row() {
    local seed=$1 name=$2 flags=""
    local run="python -m checks.variants --maps runs/maps whole" last=$out/$name-$seed
    local data="--preset small --data $out/captions.jsonl --images $root --dtype bfloat16 --seed $seed --resume auto"
    [[ $name = sfi* ]] || flags="--integration concat"
    [[ $name = *mda ]] || flags="$flags --mda-layers none"
    [ -f "$last.jsonl" ] && return
    $run train.py --stage 1 $data --steps "$first" --out "$last/stage1" $flags
    $run train.py --stage 2 $data --steps "$second" --init-from "$last/stage1" --out "$last/stage2"
    $run evaluate.py --model "$last/stage2" --benchmark rsicd --root "$root" --split val --max-new-tokens 40 \
        --out "$last.jsonl"
}
export -f row
for seed in $(seq 0 $((${4:-2} - 1))); do
    printf "$seed %s\n" sfi-mda sfi baseline-mda baseline
done | xargs -P 2 -L 1 bash -ec 'row "$@" > "$out/$2-$1.log" 2>&1' - ||
    { echo "photographs.sh: a row failed; the last lines of its file in $out/*.log say why" >&2; exit 1; }
python -m checks.photographs compare "$out"/{sfi-mda,sfi,baseline-mda,baseline}-*.jsonl --root "$root"
