"""Speed up Dream's own `diffusion_generate`: one line, the model and its sampler unchanged.

    python examples/dream.py --model Dream-org/Dream-v0-Instruct-7B --prompt "Write a haiku."

Dream's code needs transformers 4.46 to 4.57.

Dream has no blocks. Without --model, the embedded model runs with Dream's schedule over its whole response.
"""

import argparse

import torch

from dllm_compile import stats, tiny


def embedded() -> None:
    model, tokenizer = tiny.load()
    mask_id = model.config.mask_token_id
    problem = tiny.problems(1, seed=4)[0]
    print("problem:", problem)
    x = torch.nn.functional.pad(tiny.encode([problem], tokenizer), (0, tiny.RESPONSE_LENGTH), value=mask_id)
    model.compile(backend="dllm", options={"preset": "dllm-cache/dream-instruct-gsm8k", "mask_id": mask_id})
    times = torch.linspace(1, 1e-3, tiny.RESPONSE_LENGTH + 1)
    with torch.no_grad():
        for i in range(tiny.RESPONSE_LENGTH):
            masked = x == mask_id
            probability, best = model(x).logits.softmax(-1).max(-1)
            last = i == tiny.RESPONSE_LENGTH - 1
            count = int(masked.sum() * (1.0 if last else 1 - times[i + 1] / times[i]))
            at = torch.where(masked, probability, -1.0).topk(count, dim=1).indices
            x.scatter_(1, at, best.gather(1, at))
    print("answer:", tokenizer.decode(x[0, tiny.PROMPT_LENGTH :]))
    print(stats(model))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a Dream checkpoint, by hub name or folder")
    parser.add_argument("--prompt", default="Write a haiku.")
    args = parser.parse_args()
    if not args.model:
        return embedded()
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
    model = AutoModel.from_pretrained(args.model, trust_remote_code=True, torch_dtype=torch.bfloat16).eval()
    model.compile(backend="dllm", options={"preset": "dllm-cache/dream-instruct-gsm8k", "mask_id": 151666})
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": args.prompt}], return_tensors="pt", return_dict=True, add_generation_prompt=True
    )
    out = model.diffusion_generate(
        inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=256, steps=256, alg="entropy"
    )
    print(tokenizer.decode(out[0, inputs.input_ids.shape[1] :]))


if __name__ == "__main__":
    main()
