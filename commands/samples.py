"""
The records that train.py learns from, and which of them make up each micro-batch of each process.
"""
import hashlib
import itertools
import json
import math
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader

from aquila import locate_weights
from commands.processes import ignore_signals
from commands.records import survey
from data import RecordFile, Records, collate
from files.text import file_digest
from tokenizer import load_tokenizer
from toy.scenes import make_records

# {kind of record of toy.scenes: times}: there is one such record a scene, of `times` as many scenes as the recipe has.
# Only four scenes in ten have a question about a place, hence the 10.
BUILT_IN = {"aquila": {1: {"caption": 1, "places": 10}, 2: {"chat": 1, "caption": 1, "places": 5, "numbers": 2}},
            "aquila-plus": {1: {"chat": 1, "caption": 1}, 2: {"region chat": 1},
                            3: {"region chat": 1, "region": 1, "chat": 1}}}


def open_data(args, path, config, recipe):
    """
    The records of a file, or built-in ones, and what a survey of them found: all are good in form and length, and their
    files are there.
    """
    if path is None:
        records = built_in_records(config.family, args.stage, recipe.scenes or 1000, config.image_size)
        digest = hashlib.sha256("\n".join(json.dumps(r, sort_keys=True) for r in records).encode()).hexdigest()[:16]
    else:
        records, digest = RecordFile(path), file_digest(path)[:16]
    tokenizer = load_tokenizer(locate_weights(config.llm_dir, "language model"))
    found = survey(records, args.images, tokenizer, config, max(args.workers, 1), args.skip_bad)
    found.digests = {"data": digest, **found.digests}          # in this order a resume that differs is told
    return records, found


def share_out(lengths, micro, rank, world):
    """
    The sample numbers of this process's batches. Every process has as many (with few samples one may be empty), as
    --shard needs; the samples of a batch are of like length.
    """
    order = np.argsort(lengths, kind="stable")
    rounds = math.ceil(len(order) / (micro * world))
    return [part.tolist() for part in np.array_split(order, rounds * world)][rank::world]


def built_in_records(family, stage, n, size):
    """
    Of every kind above one record a scene, of times * n scenes from number (stage - 1) * times * n on. Of a scene with
    k of them scene i gives number i mod k.
    """
    found = []
    with ProcessPoolExecutor(initializer=ignore_signals, initargs=(0,)) as pool:   # some 0.2 ms a scene
        parts = [pool.map(partial(make_records, "train", n, task, 0, size),
                          [(stage - 1) * times * n + i * n for i in range(times)])
                 for task, times in BUILT_IN[family][stage].items()]
        for records in parts:
            by_scene = {}
            for record in itertools.chain.from_iterable(records):
                by_scene.setdefault(record["image"], []).append(record)
            found += [group[i % len(group)] for i, group in enumerate(by_scene.values())]
    return found


class Batches:
    """
    The sample numbers of each micro-batch of this process, from step `start` to `steps`.

    Every epoch is a permutation drawn from (seed, epoch); the last batch is filled up from the next epoch, so that
    nothing is dropped. Inside a step samples are sorted by length (in characters, before tokens are made), for those of
    one micro-batch are padded to the longest; the gradient of the step is the same sum.
    """

    def __init__(self, lengths, batch, micro, steps, start, seed, rank, world):
        self.lengths, self.batch, self.micro, self.steps, self.start = lengths, batch, micro, steps, start
        self.seed, self.rank, self.world = seed, rank, world

    def __len__(self):
        return (self.steps - self.start) * self.batch // (self.micro * self.world)

    def __iter__(self):
        n, epoch, order = len(self.lengths), -1, None
        for step in range(self.start, self.steps):
            picked = []
            for i in range(step * self.batch, (step + 1) * self.batch):
                if i // n != epoch:
                    epoch = i // n
                    generator = torch.Generator().manual_seed(self.seed * 10007 + epoch)
                    order = torch.randperm(n, generator=generator)
                picked.append(int(order[i % n]))
            picked.sort(key=lambda i: self.lengths[i])
            for turn, begin in enumerate(range(0, self.batch, self.micro * self.world)):
                # Every second time in reverse order, so that no process always gets the longest.
                place = self.rank if turn % 2 == 0 else self.world - 1 - self.rank
                first = begin + place * self.micro
                yield picked[first:first + self.micro]


def load_batches(records, batches, args, config, device):
    tokenizer = load_tokenizer(locate_weights(config.llm_dir, "language model"))
    return DataLoader(Records(records, args.images, tokenizer, config), batch_sampler=batches,
                      collate_fn=partial(collate, skip_bad=args.skip_bad > 0), num_workers=args.workers,
                      worker_init_fn=ignore_signals, pin_memory=device.type == "cuda")
