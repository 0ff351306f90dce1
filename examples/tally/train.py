"""Train the shipped model `tally-3m` from scratch: a small Llama on synthetic reasoning problems.

    python examples/tally/train.py --until 3500 --out build/first --log examples/tally/train.log
    python examples/tally/train.py --resume build/first --steps 1200 --cooldown 1 --seed 1 \
        --out build/tally-3m --log examples/tally/train.log

Everything is seeded; the problems come from `sirius_compile.shipped.problems`, whose hash split
keeps the test problems out of training. The loss counts answer tokens only. Batches are sorted by
length into micro-batches, so that little is spent on padding. Matrices are trained by Muon, the
embedding and the norms by AdamW. The final report (exact match per number of steps on fresh test
problems) and the loss curve are written to the log.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sirius_compile.shipped.problems import (
    MAX_STEPS,
    PIECE_PATTERN,
    Problem,
    Task,
    final_answer,
    problems,
    vocabulary,
)
from sirius_runtime.command_line import (
    finish,
    folder_argument,
    path_argument,
    positive_number,
)

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
IGNORED = -100
MICRO_BATCHES = 4


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words with the space before them, single digits; decoding is concatenation."""
    pieces = [PAD, EOS, UNK, *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE_PATTERN), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A 5-layer Llama, about 3 M parameters, four fifths of them in the MLPs."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=5,
            num_attention_heads=6,
            num_key_value_heads=6,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            rope_theta=10_000.0,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=0.02,
        )
    )


def mixture(seed: int, max_steps: Callable[[], int]) -> Iterator[Problem]:
    """Train problems, three of four reasoning; `max_steps()` is read at each draw."""
    reasoning = problems(Task.REASONING, "train", seed, max_steps)
    understanding = problems(Task.UNDERSTANDING, "train", seed, max_steps)
    for index in itertools.count():
        yield next(understanding if index % 4 == 3 else reasoning)


def curriculum(progress: float) -> int:
    """The most steps that a problem may have: 1 at first, all after a quarter of the training.

    Looking facts up is learnt faster with few facts; starting with long texts makes a long plateau.
    """
    return min(MAX_STEPS, 1 + int(progress * 4 * (MAX_STEPS - 1)))


def encode(tokenizer: PreTrainedTokenizerFast, problem: Problem) -> tuple[list[int], int]:
    """Token ids of prompt + answer + EOS, and the number of prompt tokens."""
    prompt = tokenizer.encode(problem.prompt)
    return prompt + tokenizer.encode(problem.answer) + [tokenizer.eos_token_id], len(prompt)


def micro_batches(
    tokenizer: PreTrainedTokenizerFast, batch: list[Problem]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields (input_ids [b, T], labels [b, T]) of similar lengths, T a multiple of 16."""
    rows = sorted((encode(tokenizer, p) for p in batch), key=lambda row: len(row[0]))
    size = len(rows) // MICRO_BATCHES
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        length = -(-max(len(ids) for ids, _ in part) // 16) * 16
        input_ids = torch.full((len(part), length), tokenizer.pad_token_id)
        labels = torch.full((len(part), length), IGNORED)
        for i, (ids, prompt_length) in enumerate(part):
            input_ids[i, : len(ids)] = torch.tensor(ids)
            # The target of position t is token t + 1; the first answer token follows the prompt.
            labels[i, prompt_length - 1 : len(ids) - 1] = torch.tensor(ids[prompt_length:])
        yield input_ids, labels


def optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the rest."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(
            matrices, lr=lr, momentum=0.95, weight_decay=0.01, adjust_lr_fn="original"
        ),
        torch.optim.AdamW(rest, lr=0.3 * lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def schedule(step: int, steps: int, cooldown: float) -> float:
    """Warm-up over 100 steps, constant, then linear to zero over the last share `cooldown`."""
    return min(1.0, (step + 1) / 100, (steps - step) / (cooldown * steps))


@torch.no_grad()
def exact_match(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    batch: list[Problem],
    device: torch.device,
) -> list[bool]:
    """Greedy generation in float32; True if the number after ``####`` is right."""
    tokenizer.padding_side = "left"
    right: list[bool] = []
    for start in range(0, len(batch), 128):
        part = batch[start : start + 128]
        inputs = tokenizer([p.prompt for p in part], return_tensors="pt", padding=True).to(device)
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=110,
            do_sample=False,
        )
        texts = tokenizer.batch_decode(
            output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        right += [
            final_answer(t) == final_answer(p.answer) for t, p in zip(texts, part, strict=True)
        ]
    return right


def evaluate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int, device: torch.device
) -> dict[str, float]:
    """Exact match on `count` fresh test problems of each task, and per number of steps."""
    model.eval()
    report: dict[str, float] = {}
    for task in Task:
        batch = list(itertools.islice(problems(task, "test", seed=10_000), count))
        right = exact_match(model, tokenizer, batch, device)
        report[str(task)] = sum(right) / count
        if task is Task.REASONING:
            for steps in sorted({p.steps for p in batch}):
                part = [r for r, p in zip(right, batch, strict=True) if p.steps == steps]
                report[f"{steps} steps"] = sum(part) / len(part)
    model.train()
    return report


def log(file: TextIO, **fields: object) -> None:
    line = json.dumps(fields)
    print(line, flush=True)
    file.write(line + "\n")
    file.flush()


def backward(
    model: LlamaForCausalLM,
    trunk: Callable[..., Any],
    batches: list[tuple[torch.Tensor, torch.Tensor]],
    device: torch.device,
) -> torch.Tensor:
    """Accumulates the gradient of the mean loss over the answer tokens of `batches`; returns it."""
    answers = sum(int((labels != IGNORED).sum()) for _, labels in batches)
    total = torch.zeros((), device=device)
    for ids, labels in batches:
        ids, labels = ids.to(device), labels.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            hidden = trunk(input_ids=ids, use_cache=False).last_hidden_state
            picked = labels != IGNORED
            logits = model.lm_head(hidden[picked])
        loss = F.cross_entropy(logits.float(), labels[picked], reduction="sum") / answers
        loss.backward()
        total += loss.detach()
    return total


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    args: argparse.Namespace,
    device: torch.device,
    file: TextIO,
) -> None:
    """The training loop; see the module's docstring."""
    # Fused attention's backward took half of a training step on CPU at these short lengths.
    model.set_attn_implementation("eager")
    trunk = torch.compile(model.model, dynamic=True)
    optims = optimizers(model, args.lr)
    step = 0
    stream = mixture(args.seed, lambda: MAX_STEPS if args.resume else curriculum(step / args.steps))
    start, tokens = time.perf_counter(), 0
    for step in range(args.until or args.steps):
        for optim in optims:
            for group in optim.param_groups:
                group.setdefault("initial_lr", group["lr"])
                group["lr"] = group["initial_lr"] * schedule(step, args.steps, args.cooldown)
        batches = list(micro_batches(tokenizer, list(itertools.islice(stream, args.batch))))
        loss = backward(model, trunk, batches, device)
        tokens += sum(ids.numel() for ids, _ in batches)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad(set_to_none=True)
        if step % 50 == 0:
            elapsed = time.perf_counter() - start
            log(
                file,
                step=step,
                loss=round(float(loss), 4),
                tokens_per_second=round(tokens / elapsed),
                seconds=round(elapsed),
            )
        if (step + 1) % args.eval_every == 0:
            log(file, step=step, exact_match=evaluate(model, tokenizer, 128, device))


def ship(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, device: torch.device
) -> dict[str, float]:
    """Saves the model in bfloat16 with its tokenizer, and evaluates what was saved."""
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    shipped = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).to(device)
    return evaluate(shipped, tokenizer, 500, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=folder_argument, required=True)
    parser.add_argument("--log", type=path_argument, required=True)
    parser.add_argument("--steps", type=positive_number, default=6000)
    parser.add_argument("--until", type=positive_number, help="stop after this step of --steps")
    parser.add_argument(
        "--resume", type=path_argument, help="continue from the weights of an earlier run"
    )
    parser.add_argument("--cooldown", type=float, default=0.4, help="share of steps, at the end")
    parser.add_argument("--batch", type=positive_number, default=128)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-every", type=positive_number, default=500)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    if args.resume is None:
        model = build_model(tokenizer).to(device)
    else:  # only the weights are resumed: optimizers restart, problems have their full length
        model = LlamaForCausalLM.from_pretrained(args.resume, dtype=torch.float32).to(device)
    args.log.parent.mkdir(parents=True, exist_ok=True)
    with args.log.open("a") as file:
        log(
            file,
            arguments={k: str(v) for k, v in vars(args).items()},
            parameters=model.num_parameters(),
            torch=torch.__version__,
            device=str(device),
        )
        train(model, tokenizer, args, device, file)
        if args.until is None:
            log(file, final=ship(model, tokenizer, args.out, device))
        else:
            model.save_pretrained(args.out)


if __name__ == "__main__":
    sys.exit(finish("train.py", main))
