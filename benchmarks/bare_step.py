"""One step of a plain PyTorch script of the debug recipe's shape, for benchmarks/startup.py: random ids, no loader."""

import torch
import torch.nn.functional as F
from torch import nn

VOCAB, DIM, LAYERS, HEADS, KV_HEADS, FFN = 4096, 128, 6, 4, 2, 384
BATCH, MICRO_BATCH, LENGTH = 16, 8, 256


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(DIM) for _ in range(2))
        self.q = nn.Linear(DIM, DIM, bias=False)
        self.kv = nn.Linear(DIM, 2 * DIM * KV_HEADS // HEADS, bias=False)
        self.out = nn.Linear(DIM, DIM, bias=False)
        self.gate, self.up = (nn.Linear(DIM, FFN, bias=False) for _ in range(2))
        self.down = nn.Linear(FFN, DIM, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        normed = self.norms[0](x)
        q = rotate(self.q(normed).unflatten(-1, (HEADS, -1)).transpose(1, 2), cos, sin)
        k, v = self.kv(normed).unflatten(-1, (2 * KV_HEADS, -1)).transpose(1, 2).chunk(2, 1)
        attended = F.scaled_dot_product_attention(q, rotate(k, cos, sin), v, is_causal=True, enable_gqa=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        normed = self.norms[1](x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    one, other = x.chunk(2, -1)
    return torch.cat((one * cos - other * sin, one * sin + other * cos), -1)


def main() -> None:
    torch.manual_seed(0)
    embedding, norm = nn.Embedding(VOCAB, DIM), nn.RMSNorm(DIM)
    blocks, head = nn.ModuleList(Block() for _ in range(LAYERS)), nn.Linear(DIM, VOCAB, bias=False)
    model = nn.ModuleList((embedding, blocks, norm, head))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    half = DIM // HEADS // 2
    angles = torch.outer(torch.arange(LENGTH), 10_000 ** (-torch.arange(half) / half))
    for ids in torch.randint(VOCAB, (BATCH // MICRO_BATCH, MICRO_BATCH, LENGTH + 1)):
        x = embedding(ids[:, :-1])
        for block in blocks:
            x = block(x, angles.cos(), angles.sin())
        loss = F.cross_entropy(head(norm(x)).flatten(0, 1), ids[:, 1:].flatten())
        (loss * MICRO_BATCH / BATCH).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    print(f"loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    main()
