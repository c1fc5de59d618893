#!/usr/bin/env bash
# The four rows of Table 5 on photographs: two stages each on the captions of RSICD's train split, then its val split.
# Rows that are there already are not trained again. The maps of the frozen encoder are kept (4 GB).
#
#     checks/photographs.sh RSICD [steps of stage 1] [steps of stage 2]
#
# By default 200 steps of 64 and 800 of 32, some 15 minutes a row.
set -euo pipefail
root=$1 first=${2:-200} second=${3:-800} out=runs/photographs-ladder
mkdir -p "$out"
[ -f "$out/captions.jsonl" ] || python -m corpora rsicd --root "$root" --out "$out/captions.jsonl"

run="python -m checks.variants --maps runs/maps whole"
data="--preset small --data $out/captions.jsonl --images $root --dtype bfloat16"
row() {
    local name=$1; shift
    [ -f "$out/$name.jsonl" ] && return
    $run train.py --stage 1 $data --steps "$first" --out "$out/$name/stage1" --resume auto "$@"
    $run train.py --stage 2 $data --steps "$second" --init-from "$out/$name/stage1" --out "$out/$name/stage2" --resume auto
    $run evaluate.py --model "$out/$name/stage2" --benchmark rsicd --root "$root" --split val --max-new-tokens 40 \
        --out "$out/$name.jsonl"
}
row baseline --integration concat --mda-layers none
row baseline-mda --integration concat
row sfi --mda-layers none
row sfi-mda
python -m checks.photographs compare "$out"/{sfi-mda,sfi,baseline-mda,baseline}.jsonl --root "$root"
