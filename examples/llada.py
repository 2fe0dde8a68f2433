"""Speed up LLaDA's own sampling loop: one line, the model and the loop unchanged.

    python examples/llada.py --model GSAI-ML/LLaDA-8B-Instruct --prompt "What is 12 * 7?"

Without --model the embedded model answers one of its own problems.
"""

import argparse

import torch

from dllm_compile import stats, tiny
from dllm_compile.quota_loop import quota_loop


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a LLaDA checkpoint, by hub name or folder")
    parser.add_argument("--prompt", default="What is 12 * 7?")
    parser.add_argument("--response", type=int, default=64)
    parser.add_argument("--block", type=int, default=32)
    args = parser.parse_args()
    if args.model:
        from transformers import AutoModel, AutoTokenizer

        device = "cuda" if torch.cuda.is_available() else "cpu"
        tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
        model = AutoModel.from_pretrained(args.model, trust_remote_code=True, dtype=torch.bfloat16).to(device).eval()
        model.config.use_cache = False
        mask_id = 126336
        chat = [{"role": "user", "content": args.prompt}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(text, return_tensors="pt").input_ids.to(device)
    else:
        model, tokenizer = tiny.load()
        mask_id = model.config.mask_token_id
        problem = tiny.problems(1, seed=3)[0]
        print("problem:", problem)
        prompt = tiny.encode([problem], tokenizer)

    model.compile(backend="dllm", options={"preset": "dllm-cache/llada-instruct-gsm8k", "mask_id": mask_id})

    x = torch.nn.functional.pad(prompt, (0, args.response), value=mask_id)
    with torch.no_grad():
        for _ in quota_loop(lambda ids: model(ids).logits, x, prompt.shape[1], args.response, args.block, mask_id):
            pass
    print("answer:", tokenizer.decode(x[0, prompt.shape[1] :]))
    print(stats(model))


if __name__ == "__main__":
    main()
