"""
The flags of evaluate.py, and which go together.
"""
import os
import pathlib
import shutil

import torch

from commands.arguments import SEEDS, Parser, real, whole
from files.text import check_target
from scoring.benchmarks import BENCHMARKS
from scoring.metrics import check_metrics


def build_parser(description=None):
    p = Parser(prog="evaluate.py", description=description)
    add = p.add_argument
    add("--model", help="folder that train.py wrote")
    add("--vision", help="the frozen ConvNeXt's file, if it is no longer where it was in training")
    add("--llm", help="the frozen Llama's folder, if it is no longer where it was in training")
    add("--out", help="write the predictions to this .jsonl file; with all, the benchmark's name is added. They come "
        "to OUT.partial first; after a break the same command goes on where that ends")
    add("--overwrite", action="store_true", help="ask all anew, although there is an OUT.partial")
    add("--limit", type=whole(1), help="at most this many records, of each benchmark")
    add("--images", default=".", help="folder that the image paths of --data start from (default: here)")
    add("--tasks", help="--scenes: what is asked (default caption,vqa, and region if the model reads masks)")
    add("--captions", action="store_true",
        help="--score, --contract: every answer is a caption, not a question (FIT-RSFG's caption files do not say so)")
    add("--metrics", type=lambda text: text.lower().split(","), metavar="NAMES",
        help="of captions (default bleu,rouge-l,cider); figures are percent, CIDEr goes up to 1000")
    add("--blind", action="store_true", help="show the model a gray image instead")
    add("--no-mda", action="store_true", help="switch MDA off, to see what it does")
    add("--compare", action="store_true", help="print --blind, --no-mda and the best constant answers beside the model")
    add("--batch", type=whole(1), default=32, help="prompts at once (default 32)")
    add("--workers", type=whole(0, 1000), default=0, help="data processes (default 0)")
    add("--max-new-tokens", type=whole(1), default=256, help="length of an answer at most (default 256)")
    add("--dtype", choices=("float32", "bfloat16"), help="of all weights (default: bfloat16 on a GPU, else float32)")
    add("--compile", action="store_true", help="compile the decoding of the answer: some 10 s once, then more tokens a "
        "second; needs a C++ compiler on a CPU")
    add = p.add_argument_group("what to ask (one of these)").add_argument
    add("--scenes", type=whole(1), help="captions and questions of this many built-in scenes")
    add("--benchmark", help=f"one of {', '.join(BENCHMARKS)}, or all; needs --root")
    add("--data", help=".jsonl or .json file of records")
    add("--score", help="score this file of predictions; no model is needed; with --benchmark NAME beside the paper's")
    add("--contract", metavar="FILE", help="score this file of predictions in other ways as well: how far does each "
        "choice (case, punctuation, stop words, references ...) move the figure?")
    add("--image", help="image file for --ask, or a built-in scene as in scene:test/0/3/128")
    add = p.add_argument_group("with --benchmark").add_argument
    add("--root", help="folder of the benchmark, as published; of all: holds the folders that a mix of python -m "
        "corpora is made from (see its --help)")
    add("--split", help="of the benchmark (default: the paper's Table 1) or of the scenes (default test). RSVQA-HR: "
        "test_phili is its second test set, a city unseen in training, on which GeoChat and others report")
    add("--sanity", action="store_true",
        help="no model, only the answers that need none (otherwise printed beside the model)")
    add("--leave-out", metavar="TYPES", help="question types not to ask, as count,area, which GeoChat and "
        "LHRS-Bot leave out of RSVQA (default: none, the paper averages over all questions)")
    add("--raw-answers", action="store_true", help="RSVQA: ask for counts and areas as written, \"37\" or \"512m2\" "
        "(default: in the classes that its authors score, \"between 10 and 100\"; in HR only areas have classes)")
    add = p.add_argument_group("with --image").add_argument
    add("--ask", help="question about the image; the answer is printed as it is made")
    add("--mask", action="append", help="mask file of a <region> in the question; once for each, in their order")
    add("--temperature", type=real(0, 100), default=0.0, help="0 takes the best token, more draws (default 0)")
    add("--top-p", type=real(1e-6, 1), default=1.0, help="draw from the likeliest tokens of this mass (default 1)")
    add("--seed", type=whole(0, SEEDS), default=0, help="of the draws (default 0)")
    add("--timings", action="store_true", help="print seconds for loading, vision, prefill and a token")
    return p


GO_WITH = {                                 # flags of some ways to ask alone: they would change nothing in others
    ("scenes",): ("tasks",), ("scenes", "benchmark", "score"): ("split",), ("data",): ("images",),
    ("score", "contract"): ("captions",),
    ("benchmark",): ("root", "sanity", "leave_out", "raw_answers"),
    ("image",): ("ask", "mask", "temperature", "top_p", "seed"),
    ("scenes", "benchmark", "data"): ("out", "overwrite", "limit", "blind", "compare", "batch", "workers")}


def check_args(args):
    empty = [name for name, value in vars(args).items() if value == "" or isinstance(value, list) and "" in value]
    if empty:
        raise ValueError(f"--{empty[0].replace('_', '-')}: the value is empty")
    asked = "scenes", "benchmark", "data", "score", "contract", "image"
    chosen = [name for name in asked if getattr(args, name) is not None]
    if len(chosen) != 1 and chosen != ["benchmark", "score"]:
        raise ValueError("give one of --scenes, --benchmark, --data, --score, --contract or --image with --ask; "
                         f"got {chosen or 'none'}")
    way, defaults = "score" if args.score else chosen[0], build_parser().parse_args([])
    for ways, flags in GO_WITH.items():
        for flag in flags:
            if getattr(args, flag) != getattr(defaults, flag) and way not in ways:
                raise ValueError(f"--{flag.replace('_', '-')} goes with --{' or --'.join(ways)}, not with --{way}; "
                                 "leave it out")
    if args.image and args.ask is None:
        raise ValueError("--image needs --ask, a question")
    if args.score and args.benchmark not in (None, *BENCHMARKS):
        raise ValueError(f"--score with --benchmark {args.benchmark}: expected one benchmark, {', '.join(BENCHMARKS)}")
    if args.out:
        check_target(args.out)
    if args.out and args.data and pathlib.Path(args.out).resolve() == pathlib.Path(args.data).resolve():
        raise ValueError(f"--out {args.out} is the file of records; give another name")
    if args.sanity and args.model:
        raise ValueError("--sanity goes without --model, where it is printed anyway")
    if not (args.model or args.score or args.contract or args.sanity):
        raise ValueError("give --model, the folder that train.py wrote")
    if args.compile and not (torch.cuda.is_available() or os.environ.get("CXX") or shutil.which("g++")):
        raise ValueError("--compile needs a C++ compiler, and there is no g++ and no CXX in the environment; "
                         "install one or leave --compile out")
    if args.metrics:
        check_metrics(args.metrics)


def parse_args(description):
    args = build_parser(description).parse_args()
    check_args(args)
    return args
