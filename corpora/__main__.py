"""
Published data sets -> our records, LLaVA's form, one JSON object a line (Aquila Sec. 4.1; Aquila-plus's mask data).

    python -m corpora rsicd --root RSICD --split train --out rsicd.jsonl
    python -m corpora align --root FOLDERS --out align.jsonl           # the paper's mixes: align, instruct
    python -m corpora coco-masks --root COCO --file instances.json --out regions.jsonl

Captions: in train one line a caption, in val and test one line an image with all its captions in `references`.
Questions: one line each with their `type`. No image is opened: `python data.py check` does that.
"""
from collections import Counter
from pathlib import Path

from commands.arguments import Parser, whole
from corpora.coco import PER_REGION, SHARES
from corpora.table import CORPORA, MIXES, read_corpus, read_mix
from files.text import check_target, write_json_lines


def build_parser():
    corpora = "\n".join(f"  {name:19}{', '.join(c.splits):30}{c.file}" for name, c in CORPORA.items())
    mixes = "\n".join(f"  {name:19}{', '.join(names)}" for name, names in MIXES.items())
    shares = "\n".join(f"  {kind:19}{share:3} %" for kind, share in SHARES.items())
    lists = f"""\
corpora, their splits, and their files under --root ({{kind}}: questions and answers):
{corpora}

mixes of train splits; --root holds a sub-folder for each corpus, under its name here (FIT-RS and its benchmarks:
fit-rs/), as for evaluate.py --benchmark all; image paths then start from --root; what is not there is listed as absent:
{mixes}

coco-masks, any COCO instance file; share of each type of record:
{shares}"""
    parser = Parser(prog="python -m corpora", description=__doc__, epilog=lists)
    add = parser.add_argument
    add("name", metavar="NAME", help="corpus or mix, from the lists below")
    add("--root", required=True, metavar="DIR", help="folder of the data set as published (required)")
    add("--split", default="train",
        help="one of the corpus's splits; test_phili is RSVQA-HR's second test set, a city unseen in training, on "
             "which GeoChat and others report (default: train)")
    add("--out", required=True, type=Path, metavar="FILE.jsonl", help="the file to write (required)")
    add("--file", help="read this file under --root, not the published one (default: see the list)")
    add("--raw-answers", action="store_true",
        help="RSVQA: keep counts and areas as written, \"37\" or \"512m2\", instead of the authors' classes such as "
             "\"between 10 and 100\" (default: off)")
    add("--limit-per-image", type=whole(1), default=20, metavar="N",
        help=f"coco-masks: records of an image, at most; never more than {PER_REGION} times its regions (default: 20)")
    return parser


def convert(args):
    """Writes all records or none, and prints how many there are of each type."""
    label = f"{args.name} {args.split}"
    check_target(args.out)
    if args.name not in MIXES:
        rows = read_corpus(args.name, args.root, args.split, args.file, args.raw_answers, args.limit_per_image)
    elif args.split != "train" or args.file:
        raise ValueError(f"{args.name} takes the train splits as published; leave --split and --file out")
    else:
        rows = read_mix(args.name, args.root, args.raw_answers)
    ids, images, types = set(), set(), Counter()

    def counted():
        for row in rows:
            if row["id"] in ids:
                raise ValueError(f"{label}: record {row['id']} comes twice; are two copies merged in one file?")
            ids.add(row["id"])
            images.add(row.get("image"))
            types[f"{row.get('type', '')} {row.get('sampling', '')}".strip()] += 1
            yield row
        if not ids:
            raise ValueError(f"{label}: no record of this split in the files under --root; nothing was written")

    write_json_lines(args.out, counted())
    print(f"{label}: {len(ids):,} records, {len(images - {None}):,} images -> {args.out}")
    if "" not in types:                     # captions have no type
        for name, count in sorted(types.items()):
            print(f"  {name:30}{count:>10,}{100 * count / len(ids):7.1f} %")


def main(argv=None):
    build_parser().run(convert, argv)


if __name__ == "__main__":
    main()
