"""What the compiler finds in a model, what each variant of a step computes, and what it costs in closed form."""

import torch

import dllm_compile
from dllm_compile import tiny


def main() -> None:
    model, tokenizer = tiny.load()
    mask_id = model.config.mask_token_id
    prompt = tiny.encode(tiny.problems(1, seed=5), tokenizer)
    ids = torch.nn.functional.pad(prompt, (0, tiny.RESPONSE_LENGTH), value=mask_id)
    print(dllm_compile.explain(model, ids, prompt_interval=50, response_interval=7, transfer_ratio=0.25))


if __name__ == "__main__":
    main()
