"""
A real pretrained model: SmolLM2-135M-Instruct answers, and its greedy tokens are transformers' for 50 tokens.

    python -m checks.smollm2 DIR         # a Hugging Face directory of the model; in the peers' environment

Not part of the test suite, since it needs the weights. Exits with 1 if something differs.
"""
import sys

import torch

from commands.arguments import Parser
from fast_decoding import fastest_step
from llama import generate, load_llama
from tokenizer import load_tokenizer

PROMPTS = ["The capital of France is", "Water boils at 100 degrees and", "def fibonacci(n):\n    ",
           "Once upon a time, in 1969,"]


def compare(args):
    import transformers
    folder = args.folder
    ours, tokenizer = load_llama(folder), load_tokenizer(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    failed = False
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt)])
        same_prompt = ids[0].tolist() == their_tokenizer(prompt, add_special_tokens=False).input_ids
        with torch.no_grad():
            expected = theirs(ids).logits
            difference = ((ours(ids) - expected).abs().max() / expected.abs().max()).item()
            whole = theirs.generate(ids, max_new_tokens=50, do_sample=False, eos_token_id=None, pad_token_id=0)
        answer = whole[0, ids.shape[1]:].tolist()
        x = ours.embed(ids)
        tokens = [int(i) for i in generate(ours, x, max_new_tokens=50)]
        fast = [int(i) for i in generate(ours, x, max_new_tokens=50, next_logits=fastest_step(ours, x))]
        same = same_prompt and tokens == fast == answer
        failed |= not same
        print(f"{prompt!r} -> {tokenizer.decode(tokens)!r}\n    {'equals' if same else 'DIFFERS FROM'} transformers; "
              f"logits of the prompt differ by {difference:.1e} of the largest")
        if prompt == PROMPTS[0] and "Paris" not in tokenizer.decode(tokens[:5]):
            failed = True
            print("    Paris is missing")
    sys.exit(int(failed))


def main():
    parser = Parser(prog="python -m checks.smollm2", description=__doc__)
    parser.add_argument("folder", help="a Hugging Face directory of the model")
    parser.run(compare)


if __name__ == "__main__":
    main()
