"""Trains the small masked-diffusion model that ships in ``dllm_compile/tiny/weights``.

    python examples/train_tiny.py --out dllm_compile/tiny/weights
    python examples/train_tiny.py --out dllm_compile/tiny/weights --stage 2

It checkpoints every 500 steps; --resume goes on from there, --eval-only just evaluates the model in --out. The second
stage goes on from the model that the first one left in --out.

Recipe
    Model   Llama layers without the causal mask: 6 layers, width 160, 5 heads of 32, SwiGLU of 448, tied
            embeddings; 2.1 M parameters.
    Data    fresh problems for each step (dllm_compile/tiny/tasks.py), drawn from random.Random(TRAIN_STREAM + step).
            To find a record by its key is learned first, in RECALL steps most of which have a short context: among
            many records it is not found.
            Seven of ten problems are sudokus, some with more gaps than held-out ones; records stand anywhere.
            Held-out problems are drawn from random.Random(EVAL_SEED); no seed below TRAIN_STREAM is ever trained on.
    Masks   half of the samples hide a random share of the response; the other half look like a state of block-wise
            decoding: blocks before the current one visible, those after it hidden, and in the current one a visible
            prefix and, sometimes, further visible tokens.
    Loss    cross-entropy, averaged over the hidden tokens of the batch.  In the second half only the current block
            counts.  No 1/t weight: exactness is wanted, not a likelihood bound.
    Crops   most steps keep only the first tokens of template and response, the records that these need and some other
            tokens of the context, at the positions they have in the full sequence: a true problem, and a cheaper one.
    Keys    in half of the samples attention does not see a random share of the context that the answer does not need,
            nor of the masks behind the current block: what they hold is of no use, so nothing may depend on them.
    Layers  in the second stage each layer's queries of the current block do not see a random share of the keys outside
            of it, drawn for each layer, in most samples: what an answer needs is then read in several layers, as large
            models do, and no answer hangs on a key that one layer hardly looks at.
    Steps   Muon (the layers' matrices, 3e-3) and AdamW (the rest, 1.5e-3), warm-up and cosine decay, gradient norm at
            most 1, bf16 autocast.  The saved weights are a running average over about 500 steps.  Every step has a
            seed of its own: a resumed run sees the same data as one that was never stopped.  The second stage has two
            thirds of these rates.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dllm_compile import tiny
from dllm_compile.tiny import PROMPT_LENGTH, RESPONSE_LENGTH, TASKS, Problem
from dllm_compile.tiny.tasks import CONTEXT_LENGTH, SUDOKU_LENGTH, VOCABULARY

TRAIN_STREAM = 1_000_000  # training step n uses the random stream of seed TRAIN_STREAM + n
EVAL_SEED = 7  # must be below TRAIN_STREAM
BLOCKS = (8, 16, 32, RESPONSE_LENGTH)
CROPS = {8: (12, 128), SUDOKU_LENGTH: (28, 72), 2 * SUDOKU_LENGTH: (100, 24), RESPONSE_LENGTH: (CONTEXT_LENGTH, 12)}
"""Tokens of the context that are kept, and problems in a batch, by the tokens of the response that are kept."""
RECALL = 350
"""Steps most of which have a very short context."""
SHARES = 3, 7
"""Of TASKS."""
LEAST_SHOWN = 5
"""Cells of a sudoku."""
STEPS = 2400, 1500
"""Of each stage."""
DROPPED = 0.6
"""The largest share of keys that a layer does not see in the second stage."""
WHOLE = 0.2
"""The share of its samples in which every layer sees all keys."""
INDEX = {token: i for i, token in enumerate(VOCABULARY)}  # as the tokenizer has it, only faster


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of VOCABULARY, plus [UNK], [MASK] and an unused end token; words are divided by spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokens = [*VOCABULARY, "[UNK]", "[EOS]", "[MASK]"]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", eos_token="[EOS]", pad_token=tiny.FILLER, mask_token="[MASK]"
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model."""
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=6,
        num_attention_heads=5,
        num_key_value_heads=5,
        head_dim=32,
        max_position_embeddings=PROMPT_LENGTH + RESPONSE_LENGTH,
        rope_theta=10000.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        is_causal=False,
        use_cache=False,
        tie_word_embeddings=True,
    )
    config.mask_token_id = tokenizer.mask_token_id
    return LlamaForCausalLM(config)


def crop(problem: Problem, width: int, rng: random.Random) -> tuple[list[int], list[bool]]:
    """Positions kept when template and response are cut to ``width`` tokens, and which of them the answer needs.

    The records that the cut answer repeats are kept, and other tokens at random, as many as CROPS says.
    """
    answer = {*problem.answer.split()[:width]}
    needed = {i for i, token in enumerate(problem.prompt.split()[:CONTEXT_LENGTH]) if token in answer}
    others = [i for i in range(CONTEXT_LENGTH) if i not in needed]
    kept = sorted([*needed, *rng.sample(others, CROPS[width][0] - len(needed))])
    rest = [*range(CONTEXT_LENGTH, CONTEXT_LENGTH + width), *range(PROMPT_LENGTH, PROMPT_LENGTH + width)]
    return [*kept, *rest], [*(i in needed for i in kept), *[True] * len(rest)]


def draw_hidden(batch: int, width: int, rng: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Which response tokens are hidden, how much each counts in the loss, which lie behind the current block, and which
    are in it.

    The first half of the samples are states of block-wise decoding. The whole response is the block of the others.

    Returns:
        Four tensors ``[B, width]``.
    """
    noise = torch.rand(batch, width, generator=rng)
    random_hidden = noise < torch.rand(batch, 1, generator=rng)
    # States of block-wise decoding.  Half of them have nothing visible past the prefix (strictly in order).
    size = torch.tensor([min(b, width) for b in BLOCKS])[torch.randint(len(BLOCKS), (batch, 1), generator=rng)]
    start = (torch.rand(batch, 1, generator=rng) * (width / size).ceil()).long() * size
    frontier = start + (torch.rand(batch, 1, generator=rng) * size).long()
    extra = (torch.rand(batch, 1, generator=rng) * 2 - 1).clamp_min(0)
    place = torch.arange(width)
    current = (place >= frontier) & (place < start + size)
    behind = place >= start + size
    block_hidden = behind | (current & (noise >= extra))
    ordered = torch.arange(batch)[:, None] < batch // 2
    hidden = torch.where(ordered, block_hidden, random_hidden)
    weight = torch.where(ordered, current, True) * hidden
    inside = (place >= start) & ~behind | ~ordered
    return hidden, weight / weight.sum(), ordered & behind, inside


def make_batch(step: int, width: int, tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, ...]:
    """Training data of one step.

    Returns:
        Tasks ``[B]``, positions and ids with masks ``[B, S]``, keys that attention sees ``[B, 1, 1, S]`` bool, rows of
        the current block ``[B, S]`` bool, true ids and loss weights ``[B, width]``.
    """
    rng, noise = random.Random(TRAIN_STREAM + step), torch.Generator().manual_seed(TRAIN_STREAM + step)
    whole = width >= SUDOKU_LENGTH  # half a sudoku has no one solution
    chosen = rng.choices(TASKS, SHARES if whole else (1, 0), k=CROPS[width][1])
    drawn = [tiny.make_problem(rng, task, LEAST_SHOWN, None) for task in chosen]
    kept, needed = zip(*(crop(problem, width, rng) for problem in drawn), strict=True)
    texts = [problem.prompt.split() + problem.answer.split() for problem in drawn]
    texts = [text + [tiny.FILLER] * (PROMPT_LENGTH + RESPONSE_LENGTH - len(text)) for text in texts]
    positions = torch.tensor(kept)
    ids = torch.tensor([[INDEX[token] for token in text] for text in texts]).gather(1, positions)
    tasks = torch.tensor([TASKS.index(problem.task) for problem in drawn])
    hidden, weight, behind, inside = draw_hidden(len(ids), width, noise)
    target = ids[:, -width:].clone()
    ids[:, -width:][hidden] = tokenizer.mask_token_id
    useful = torch.tensor(needed)
    useful[:, -width:] &= ~behind
    unseen = torch.rand(len(ids), 1, generator=noise) * 2 - 1  # the share of what is of no use; none in half of them
    seen = useful | (torch.rand(ids.shape, generator=noise) >= unseen)
    block = F.pad(inside, (ids.shape[1] - width, 0))
    return tasks, positions, ids, seen[:, None, None], block, target, weight


def drop_keys(seen: torch.Tensor, block: torch.Tensor, layers: int, step: int) -> torch.Tensor:
    """Which keys each layer sees in the second stage: a random share of those outside of the block is dropped for the
    queries in the block.

    Args:
        seen: ``[B, 1, 1, S]`` bool.
        block: ``[B, S]`` bool.
        layers: of the model.
        step: whose random numbers.

    Returns:
        ``[layers, B, 1, S, S]`` bool.
    """
    noise = torch.Generator().manual_seed(step)
    batch = len(block)
    share = DROPPED * torch.rand(layers, batch, 1, generator=noise)
    share *= torch.rand(batch, 1, generator=noise) >= WHOLE
    dropped = (torch.rand(layers, *block.shape, generator=noise) < share) & ~block
    return seen & ~(block[:, None, :, None] & dropped[:, :, None, None])


def see_by_layer(model: LlamaForCausalLM) -> None:
    """Lets a call of the model give masks for each layer: ``seen_by_layer``, ``[layers, B, 1, S, S]``."""

    def with_own_mask(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "seen_by_layer" in kwargs:
            kwargs["attention_mask"] = kwargs.pop("seen_by_layer")[module.layer_idx]
        return args, kwargs

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(with_own_mask, with_kwargs=True)


@torch.no_grad()
def generate(model: LlamaForCausalLM, prompt: torch.Tensor, block: int) -> torch.Tensor:
    """Vanilla LLaDA decoding of prompts [B, P] to responses [B, R]: one token per step, in blocks."""
    mask_id = model.config.mask_token_id
    ids = F.pad(prompt, (0, RESPONSE_LENGTH), value=mask_id)
    rows = torch.arange(len(ids), device=ids.device)
    for start in range(PROMPT_LENGTH, ids.shape[1], block):
        for _ in range(min(block, ids.shape[1] - start)):
            probability = model(ids).logits[:, start : start + block].float().softmax(-1)
            probability[..., mask_id] = 0
            confidence, token = probability.max(-1)
            confidence = confidence.masked_fill(ids[:, start : start + block] != mask_id, -1)
            best = confidence.argmax(-1)
            ids[rows, start + best] = token[rows, best]
    return ids[:, PROMPT_LENGTH:]


def evaluate(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    count: int,
    block: int,
    seed: int = EVAL_SEED,
    batch: int = 50,
) -> dict[str, float]:
    """Share of exact answers per task, and over all problems, on ``count`` held-out problems."""
    drawn = tiny.problems(count, seed)
    exact: dict[str, list[bool]] = {task: [] for task in TASKS}
    for i in range(0, count, batch):
        part = drawn[i : i + batch]
        ids = generate(model, tiny.encode(part, tokenizer).to(model.device), block)
        for problem, text in zip(part, tiny.decode(ids, tokenizer), strict=True):
            exact[problem.task].append(tiny.is_exact(problem, text))
    result = {task: sum(hits) / max(len(hits), 1) for task, hits in exact.items()}
    return {**result, "all": sum(map(sum, exact.values())) / max(count, 1)}


def draw_width(step: int, steps: int, stage: int) -> int:
    """Tokens of the response that a step keeps: few at first, mostly all of them at the end and in the second stage."""
    share = step / steps
    often = [3, 1, 0, 0] if step < RECALL else [0, max(0.1, 0.8 - share), 0.3, max(0.1, 1.2 * share - 0.2)]
    if stage == 2:
        often = [0, 0.1, 0.3, 0.6]
    return random.Random(step).choices([*CROPS], often)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=(1, 2), default=1)
    parser.add_argument("--steps", type=int, help=f"default: {STEPS[0]}, and {STEPS[1]} in the second stage")
    parser.add_argument("--lr", type=float, help="of AdamW; Muon takes twice as much; default: 1.5e-3, and then 1e-3")
    parser.add_argument("--out", type=Path, default=Path("weights"), help="folder for weights, config and tokenizer")
    parser.add_argument("--curve", type=Path, help="the loss curve's file; default: examples/train_tiny_STAGE.csv")
    parser.add_argument("--checkpoint", type=Path, default=Path("train_tiny.pt"), help="written every 500 steps")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--eval-only", action="store_true", help="evaluate the model in --out and train nothing")
    parser.add_argument("--eval-count", type=int, default=100)
    parser.add_argument("--eval-blocks", type=int, nargs="+", default=[32, 8])
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    args.steps = args.steps or STEPS[args.stage - 1]
    args.lr = args.lr or (1.5e-3, 1e-3)[args.stage - 1]
    args.curve = args.curve or Path(__file__).with_name(f"train_tiny_{args.stage}.csv")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    tokenizer = make_tokenizer()
    if args.eval_only:
        model = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(args.device).eval()
    else:
        model = train(args, tokenizer)
    if args.compile:
        model.compile(dynamic=False)
    for block in args.eval_blocks:
        result = evaluate(model, tokenizer, args.eval_count, block)
        print(f"exact, block length {block}:", " ".join(f"{k} {v:.1%}" for k, v in result.items()), flush=True)


def train(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Trains (or resumes) a stage; writes the loss curve, checkpoints and, to ``args.out``, model and tokenizer."""
    made = make_model(tokenizer) if args.stage == 1 else LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    model = made.to(args.device).train()
    see_by_layer(model)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [model.model.embed_tokens.weight, *(p for p in model.model.parameters() if p.ndim == 1)]
    parts = {
        "model": model,
        "average": average,
        "muon": torch.optim.Muon(matrices, lr=2 * args.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        "adamw": torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01),
    }
    optimizers = parts["muon"], parts["adamw"]
    first, seconds = 0, 0.0
    rows: list[list[float]] = []
    if args.resume:
        state = torch.load(args.checkpoint, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        first, seconds, rows = state["step"], state["seconds"], state["rows"]

    def loss_of(
        positions: torch.Tensor, ids: torch.Tensor, seen: torch.Tensor, target: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        masks = {"attention_mask": seen} if args.stage == 1 else {"attention_mask": seen[0], "seen_by_layer": seen}
        with torch.autocast(args.device.split(":")[0], dtype=torch.bfloat16):
            logits = model(ids, position_ids=positions, **masks).logits[:, -target.shape[1] :]
        losses = F.cross_entropy(logits.float().transpose(1, 2), target, reduction="none")
        return (losses * weight).sum(), losses.detach()

    step_loss = torch.compile(loss_of, dynamic=False) if args.compile else loss_of
    sums: dict[str, list[float]] = {name: [] for name in ("loss", *TASKS)}
    began = time.perf_counter()
    for step in range(first, args.steps):
        rate = args.lr * min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for optimizer, factor in zip(optimizers, (2, 1), strict=True):
            optimizer.param_groups[0]["lr"] = factor * rate
        number = step + sum(STEPS[: args.stage - 1])
        drawn = make_batch(number, draw_width(step, args.steps, args.stage), tokenizer)
        tasks, positions, ids, seen, block, target, weight = drawn
        if args.stage == 2:
            seen = drop_keys(seen, block, len(model.model.layers), number)
        tasks, weight = tasks.to(args.device), weight.to(args.device)
        loss, losses = step_loss(*(x.to(args.device) for x in (positions, ids, seen, target)), weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average.update_parameters(model)

        # Per task, the loss at the first hidden character of decode-like samples: what in-order decoding asks for next.
        half = len(tasks) // 2
        frontier = losses[:half].gather(1, weight[:half].argmax(1, keepdim=True))[:, 0]
        sums["loss"].append(loss.item())
        for i, task in enumerate(TASKS):
            chosen = (tasks[:half] == i) & weight[:half].any(1)
            sums[task].extend(frontier[chosen].tolist())
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            elapsed = seconds + time.perf_counter() - began
            row = [step + 1, round(elapsed), *(round(sum(v) / max(len(v), 1), 5) for v in sums.values())]
            rows.append(row)
            header = ["step", "seconds", *sums]
            print(dict(zip(header, row, strict=True)), flush=True)
            for values in sums.values():
                values.clear()
            with args.curve.open("w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows([header, *rows])
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save({**state, "step": step + 1, "seconds": elapsed, "rows": rows}, args.checkpoint)
            # Prompts hold fillers, which transformers' generate would take for padding.
            average.module.config.pad_token_id = tokenizer.eos_token_id
            average.module.save_pretrained(args.out)
            (args.out / "generation_config.json").unlink(missing_ok=True)  # nothing here uses transformers' generate
            tokenizer.save_pretrained(args.out)
    return average.module.eval()


if __name__ == "__main__":
    main()
