#!/usr/bin/env bash
# README's "The real thing" as its user types it, from published files to scores; with stand-ins for weights and corpora
# (checks/stand_ins.py), two processes for four GPUs, smaller images, and a run that is stopped on its way. It ends with
# an error where a command does, or where a file is missing.
#
#     checks/walk.sh                        # in the environment of requirements.txt; a minute on 2 cores
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
ln -s "$repo"/*.py "$repo"/{checks,commands,corpora,files,pictures,scoring,toy,weights} .
python -m checks.stand_ins fetched
mv fetched/* .
# The only flags that README does not have:
size="--image-size 64"
layers="--mda-layers 0,2"                   # the stand-in for Llama has four layers
short="--max-new-tokens 8"

set -v
python aquila.py --preset aquila-8b
python -m corpora align --root DATA --out align.jsonl
python -m corpora instruct --root DATA --out instruct.jsonl
python data.py check align.jsonl --images DATA --preset aquila-8b --llm Meta-Llama-3-8B-Instruct $size
python data.py check instruct.jsonl --images DATA --preset aquila-8b --llm Meta-Llama-3-8B-Instruct $size
python data.py show align.jsonl --images DATA --preset aquila-8b --llm Meta-Llama-3-8B-Instruct $size -n 1

torchrun --nproc-per-node 2 train.py --preset aquila-8b --stage 1 --vision CLIP.safetensors --llm Meta-Llama-3-8B-Instruct \
    --data align.jsonl --images DATA $size $layers &
until [ -s runs/aquila-8b/stage1/log.jsonl ]; do kill -0 $!; sleep 0.1; done
kill $!
wait $! && exit 1
torchrun --nproc-per-node 2 train.py --preset aquila-8b --stage 1 --vision CLIP.safetensors --llm Meta-Llama-3-8B-Instruct \
    --data align.jsonl --images DATA $size $layers --resume auto
torchrun --nproc-per-node 2 train.py --preset aquila-8b --stage 2 --data instruct.jsonl --images DATA

torchrun --nproc-per-node 2 evaluate.py --model runs/aquila-8b/stage2 --benchmark all --root DATA --out pred.jsonl $short
python evaluate.py --score pred-rsicd.jsonl --benchmark rsicd
python -m pictures.gallery pred-rsicd.jsonl --images DATA/rsicd --out gallery.html
python aquila.py --model runs/aquila-8b/stage2 --export exported

ls runs/aquila-8b/stage{1,2}/{model.safetensors,config.json,log.jsonl,loss.png} \
    pred-{rsicd,sydney,ucm,fit-rsfg-captions,rsvqa-lr,rsvqa-hr,fit-rsfg-vqa}.jsonl gallery.html \
    exported/llm/{model.safetensors,config.json,tokenizer.json} exported/adapter/adapter_{config.json,model.safetensors}
