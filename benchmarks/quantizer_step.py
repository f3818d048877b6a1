"""How fast a quantizer step is: `tiger` and `cat_id2` beside a first-try RQ-VAE and beside their bare matrix products.

    python benchmarks/quantizer_step.py [--batch 4096] [--width 384,768] [--codes 256,512] [--seconds 20] [--json FILE]

Unusual: the contenders take turns, one step each, and medians are compared, because machines are noisy. A case is one
width, one K and one mode; in it stand
    ours             `quantizer.step.training_loss` and AdamW
    straightforward  the same losses as one writes them first: torch.cdist, B×B masks per level, F.cross_entropy
    products         the step's matrix products alone, forward and backward, into arrays that exist already
and in the same turns `rate`, a big matrix product. Before timing, ours and straightforward must agree on the loss.
Peak memory is that of a fresh process per contender and case that takes three steps: VmHWM on CPU (interpreter and
torch included: `idle`), torch.cuda.max_memory_allocated on an accelerator. The last line printed is one JSON object.

Shape letters: B batch, D embedding, Z latent, L levels, K codes, H category depth.
"""

import argparse
import json

import numpy as np
import torch
from harness import finish, in_fresh_process, in_turns, medians, memory_of, parser_of, rounded, where, wholes
from torch import nn
from torch.nn import functional

from catid2_ray.quantizer.model import ResidualQuantizer
from catid2_ray.quantizer.step import LossWeights, parameter_groups, training_loss

LATENT, LEVELS, HIDDEN = 32, 4, (512, 256, 128)
WEIGHTS = {
    "tiger": LossWeights(dispersion=0, hierarchical=0, cluster_scale=0, reconstruction=1),
    "cat_id2": LossWeights(),
}
CONTENDERS = ("ours", "straightforward", "products")


def categories(rows: int, seed: int = 0) -> torch.Tensor:
    """Paths in a tree of 12, 87 and 561 categories, int64 rows×3; the leaf of rank i is drawn with weight i^−0.8."""
    rng = np.random.default_rng(seed)
    middle = np.concatenate((np.arange(87), rng.integers(0, 87, 561 - 87)))
    top = np.concatenate((np.arange(12), rng.integers(0, 12, 87 - 12)))
    weight = rng.permutation(np.arange(1, 562) ** -0.8)
    leaf = rng.choice(561, rows, p=weight / weight.sum())
    return torch.from_numpy(np.stack((top[middle[leaf]], 12 + middle[leaf], 99 + leaf), 1))


class FirstTry(nn.Module):
    """An RQ-VAE as one writes it first; takes the state of a ResidualQuantizer."""

    def __init__(self, like: ResidualQuantizer):
        super().__init__()
        widths = (like.width, *like.hidden, like.latent)
        self.encoder, self.decoder = self.mlp(widths), self.mlp(widths[::-1])
        for level, codes in enumerate(like.codes_per_level):
            self.register_parameter(f"codebook_{level}", nn.Parameter(torch.empty(codes, like.latent)))
        self.load_state_dict(like.state_dict())

    @staticmethod
    def mlp(widths):
        layers = []
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(before, after), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    def loss(self, embedding_BD, category_BH, weights: LossWeights):
        residual = z = self.encoder(embedding_BD)
        total, quantized = 0.0, torch.zeros_like(z)
        for level in range(LEVELS):
            codebook = getattr(self, f"codebook_{level}")
            distance = torch.cdist(residual, codebook)
            codeword = codebook[distance.argmin(1)]
            total = total + (residual.detach() - codeword).pow(2).sum(1).mean()
            total = total + weights.commitment * (residual - codeword.detach()).pow(2).sum(1).mean()
            if weights.cluster_scale:
                usage = (-distance.pow(2)).softmax(1).mean(0).clamp_min(1e-30)
                even = torch.full_like(usage, 1 / len(usage))
                both = (usage * (usage / even).log()).sum() + (even * (even / usage).log()).sum()
                total = total + weights.cluster_scale * both
            if weights.hierarchical and level < category_BH.shape[1]:
                total = total + weights.hierarchical * self.hierarchical(residual, category_BH, level, weights)
            quantized = quantized + codeword
            residual = residual - codeword.detach()
        reconstruction = self.decoder(z + (quantized - z).detach())
        if weights.reconstruction:
            total = total + weights.reconstruction * (reconstruction - embedding_BD).pow(2).sum(1).mean()
        if weights.dispersion:
            logits = functional.normalize(reconstruction) @ functional.normalize(embedding_BD).T / weights.temperature
            own = torch.arange(len(logits), device=logits.device)
            total = total + weights.dispersion * functional.cross_entropy(logits, own)
        return total

    @staticmethod
    def hierarchical(residual, category_BH, level, weights: LossWeights):
        unit = functional.normalize(residual)
        logits = unit @ unit.T / weights.temperature
        same = category_BH[:, level][:, None] == category_BH[:, level][None]
        negative = ~same
        if level > 0:
            negative = negative & (category_BH[:, level - 1][:, None] == category_BH[:, level - 1][None])
        positive = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
        against = (logits.exp() * negative).sum(1, keepdim=True)
        term = -(logits - (logits.exp() + against).log())
        counted = positive.any(1) & negative.any(1)
        return ((term * positive).sum(1)[counted] / positive.sum(1)[counted]).mean()


def shapes(mode: str, batch: int, width: int, codes: int, category_BH: torch.Tensor) -> list[tuple[int, int, int]]:
    """(m, k, n) of every product of one step, forward and backward; rows of one parent meet each other."""
    widths, products = (width, *HIDDEN, LATENT), []
    layers = [*zip(widths, widths[1:], strict=False), *zip(widths[:0:-1], widths[-2::-1], strict=True)]
    for index, (before, after) in enumerate(layers):
        products += [(batch, before, after), (after, batch, before)]
        products += [(batch, after, before)] if index else []  # embeddings get no gradient
    products += [(batch, LATENT, codes)] * LEVELS
    if mode == "cat_id2":
        products += [(batch, LATENT, codes), (batch, codes, LATENT), (codes, batch, LATENT)] * LEVELS
        products += [(batch, width, batch), (batch, batch, width)]
        groups = [len(category_BH)]
        for depth in range(category_BH.shape[1]):
            for rows in groups:
                products += [(rows, LATENT, rows), (rows, rows, LATENT), (rows, rows, LATENT)]
            groups = torch.unique(category_BH[:, depth], return_counts=True)[1].tolist()
    return products


def stepper(contender: str, mode: str, batch: int, width: int, codes: int, device: str):
    """A callable that takes one training step (or runs its products) and returns the loss, if it has one."""
    torch.manual_seed(0)
    embedding_BD, category_BH = torch.randn(batch, width).to(device), categories(batch).to(device)
    model = ResidualQuantizer(width=width, hidden=HIDDEN, latent=LATENT, codes_per_level=(codes,) * LEVELS).to(device)
    if contender == "products":
        biggest, arrays = {}, []
        for m, k, n in shapes(mode, batch, width, codes, category_BH.cpu()):
            if (m, k, n) not in biggest:
                biggest[m, k, n] = tuple(torch.randn(shape, device=device) for shape in ((m, k), (k, n), (m, n)))
            arrays.append(biggest[m, k, n])

        def products():
            for left, right, out in arrays:
                torch.mm(left, right, out=out)

        return products
    weights = WEIGHTS[mode]
    if contender == "straightforward":
        model = FirstTry(model).to(device)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    else:
        optimiser = torch.optim.AdamW(parameter_groups(model, weight_decay=1e-4), lr=1e-3)

    def step():
        if contender == "ours":
            loss = training_loss(model, embedding_BD, category_BH, weights=weights).total
        else:
            loss = model.loss(embedding_BD, category_BH, weights)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        return loss.detach()

    return step


def memory_child(arguments: str) -> None:
    """Three steps in this process; print peak and idle memory in MiB."""
    case = json.loads(arguments)
    torch.set_num_threads(case.pop("threads"))
    idle = memory_of("VmHWM") / 2**20
    step = stepper(**case)
    for _ in range(3):
        step()
    on_gpu = case["device"] != "cpu"
    peak = torch.cuda.max_memory_allocated() if on_gpu else memory_of("VmHWM")
    print(json.dumps([peak / 2**20, 0 if on_gpu else idle]))


def memory(contender: str, threads: int, **case) -> list[float]:
    arguments = json.dumps({"contender": contender, "threads": threads, **case})
    return in_fresh_process(__file__, "--memory-child", arguments)


def measure(batch: int, width: int, codes: int, device: str, threads: int, budget: float) -> list[dict]:
    """Both modes of one width and K, all contenders of a mode in turns until `budget` seconds are spent."""
    case = {"batch": batch, "width": width, "codes": codes, "device": device}
    runs = {(mode, who): stepper(who, mode, **case) for mode in WEIGHTS for who in CONTENDERS}
    for mode in WEIGHTS:
        first, second = (float(runs[mode, who]()) for who in ("ours", "straightforward"))
        if abs(first - second) > 1e-3 * abs(second):
            raise SystemExit(f"{mode}: ours has loss {first}, straightforward {second}; they must compute the same")
    side = 2048 if device == "cpu" else 8192
    square = torch.randn(side, side, device=device)
    out = torch.empty_like(square)
    runs["rate"] = lambda: torch.mm(square, square, out=out)
    for run in runs.values():
        run()
    results = []
    for mode in WEIGHTS:
        names = dict.fromkeys([*((mode, who) for who in CONTENDERS), ("tiger", "ours"), "rate"])
        taken = in_turns({name: runs[name] for name in names}, turns=5, seconds=budget, device=device)
        seconds = medians(taken)
        rate = 2 * side**3 / seconds["rate"]
        times = {who: seconds[mode, who] for who in CONTENDERS}
        flop = sum(2 * m * k * n for m, k, n in shapes(mode, batch, width, codes, categories(batch)))
        peaks = {who: memory(who, threads, mode=mode, **case) for who in CONTENDERS}
        results.append(
            {
                "mode": mode, "batch": batch, "width": width, "codes": codes, "turns": len(taken["rate"]),
                "seconds": times,
                "steps_per_s": {who: 1 / taken for who, taken in times.items()},
                "peak_memory_mib": {**{who: peak for who, (peak, _) in peaks.items()}, "idle": peaks["ours"][1]},
                "gflop": flop / 1e9, "rate_gflop_per_s": rate / 1e9,
                "ratios": {
                    "speed_over_straightforward": times["straightforward"] / times["ours"],
                    "time_over_products": times["ours"] / times["products"],
                    "share_of_rate": flop / times["ours"] / rate,
                    "products_share_of_rate": flop / times["products"] / rate,
                    "time_over_tiger": times["ours"] / seconds["tiger", "ours"],
                },
            }
        )  # fmt: skip
    return results


def main() -> None:
    parser = parser_of(__doc__, page=None)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--width", type=wholes, default=[384, 768], help="D, comma-separated")
    parser.add_argument("--codes", type=wholes, default=[256, 512], help="K, comma-separated")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each case; at least five turns are taken")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--memory-child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_child:
        memory_child(options.memory_child)
        return
    torch.set_num_threads(options.threads)
    cases = []
    for width in options.width:
        for codes in options.codes:
            for case in measure(options.batch, width, codes, options.device, options.threads, options.seconds):
                cases.append(rounded(case))
                print(f"{case['mode']} D={width} K={codes}: {json.dumps(cases[-1]['ratios'])}", flush=True)
    memory_kind = "VmHWM of a fresh process" if options.device == "cpu" else "torch.cuda.max_memory_allocated"
    report = {
        **where("quantizer_step", device=options.device, threads=options.threads), "device": options.device,
        "peak_memory": memory_kind, "cases": cases,
    }  # fmt: skip
    finish(report, None, options)


if __name__ == "__main__":
    main()
