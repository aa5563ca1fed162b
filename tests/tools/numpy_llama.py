"""An independent reader of exported models: the numpy API of safetensors and a written-out forward pass."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


def read(directory: Path) -> tuple[dict, dict[str, np.ndarray]]:
    config = json.loads((directory / "config.json").read_text())
    index = directory / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return config, {name: tensor for file in files for name, tensor in load_file(directory / file).items()}


def frequencies(config: dict) -> np.ndarray:
    """Radians per token of each pair of channels, from what versions before 5 of transformers wrote."""
    width = config["head_dim"]
    plain = config["rope_theta"] ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    scaling = config["rope_scaling"]
    if scaling is None:
        return plain
    assert scaling["rope_type"] == "llama3"
    wavelength = 2 * math.pi / plain
    original = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * plain / scaling["factor"] + smooth * plain
    return np.where(
        wavelength > original / low, plain / scaling["factor"], np.where(wavelength < original / high, plain, between)
    )


def logits(directory: Path, ids: list[int]) -> np.ndarray:
    """(T, V) float64."""
    config, weights = read(directory)
    w = {name: tensor.astype(np.float64) for name, tensor in weights.items()}
    heads, groups, width = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    angles = np.outer(np.arange(len(ids)), frequencies(config))
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def norm(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * gain

    def turn(x: np.ndarray) -> np.ndarray:
        first, second = np.split(x, 2, -1)
        return np.concatenate((first * cos - second * sin, second * cos + first * sin), -1)

    x = w["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        y = norm(x, w[f"{layer}input_layernorm.weight"])
        q, k, v = (
            (y @ w[f"{layer}self_attn.{name}_proj.weight"].T).reshape(len(ids), number, width)
            for name, number in (("q", heads), ("k", groups), ("v", groups))
        )
        q, k = turn(q), np.repeat(turn(k), heads // groups, 1)
        scores = np.einsum("qhc,khc->hqk", q, k) / math.sqrt(width)
        scores[:, ~np.tri(len(ids), dtype=bool)] = -np.inf
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khc->qhc", shares, np.repeat(v, heads // groups, 1))
        x = x + mixed.reshape(len(ids), -1) @ w[f"{layer}self_attn.o_proj.weight"].T
        y = norm(x, w[f"{layer}post_attention_layernorm.weight"])
        gate, up = (y @ w[f"{layer}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{layer}mlp.down_proj.weight"].T
    head = w["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return norm(x, w["model.norm.weight"]) @ head.T
