"""A small DETR in plain torch, in the style of facebookresearch/detr: no keywords, no ModelOutput.

As there: attention is torch.nn.MultiheadAttention with the length first, positions are added to
queries and keys in every layer, and the attention maps that it returns are dropped unseen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH, HEADS, STRIDE = 32, 4, 8


class EncoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(WIDTH, HEADS)
        self.feedforward = nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, WIDTH))
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, src: Tensor, pos: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        q = k = src + pos
        src2 = self.self_attn(q, k, value=src, key_padding_mask=src_key_padding_mask)[0]
        src = self.norm1(src + src2)
        return self.norm2(src + self.feedforward(src))


class DecoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(WIDTH, HEADS)
        self.multihead_attn = nn.MultiheadAttention(WIDTH, HEADS)
        self.feedforward = nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, WIDTH))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(WIDTH) for _ in range(3))

    def forward(
        self, tgt: Tensor, memory: Tensor, pos: Tensor, query_pos: Tensor, mask: Tensor
    ) -> Tensor:
        q = k = tgt + query_pos
        tgt = self.norm1(tgt + self.self_attn(q, k, value=tgt)[0])
        tgt2 = self.multihead_attn(
            query=tgt + query_pos, key=memory + pos, value=memory, key_padding_mask=mask
        )[0]
        tgt = self.norm2(tgt + tgt2)
        return self.norm3(tgt + self.feedforward(tgt))


class Encoder(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer() for _ in range(depth))

    def forward(self, src: Tensor, pos: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            src = layer(src, pos, mask)
        return src


class Decoder(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer() for _ in range(depth))

    def forward(
        self, tgt: Tensor, memory: Tensor, pos: Tensor, query_pos: Tensor, mask: Tensor
    ) -> Tensor:
        for layer in self.layers:
            tgt = layer(tgt, memory, pos, query_pos, mask)
        return tgt


class Transformer(nn.Module):
    def __init__(self, encoder_layers: int, decoder_layers: int) -> None:
        super().__init__()
        self.encoder = Encoder(encoder_layers)
        self.decoder = Decoder(decoder_layers)

    def forward(self, src: Tensor, mask: Tensor, query_embed: Tensor, pos: Tensor) -> Tensor:
        src, pos = (x.flatten(2).permute(2, 0, 1) for x in (src, pos))
        query_embed = query_embed.unsqueeze(1).repeat(1, src.shape[1], 1)
        mask = mask.flatten(1)
        memory = self.encoder(src, pos, mask)
        return self.decoder(torch.zeros_like(query_embed), memory, pos, query_embed, mask)


class PlainDetr(nn.Module):
    """forward(images [B, 3, H, W], mask [B, H, W], True = padding) returns a dict, as DETR's."""

    def __init__(self, encoder_layers: int = 2, decoder_layers: int = 1, queries: int = 3) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, WIDTH, STRIDE, STRIDE)
        self.transformer = Transformer(encoder_layers, decoder_layers)
        self.query_embed = nn.Embedding(queries, WIDTH)
        self.class_embed = nn.Linear(WIDTH, 3)
        self.bbox_embed = nn.Linear(WIDTH, 4)

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        features = self.backbone(images)
        mask = mask[:, ::STRIDE, ::STRIDE]
        hs = self.transformer(features, mask, self.query_embed.weight, sine_positions(~mask))
        hs = hs.transpose(0, 1)
        return {"pred_logits": self.class_embed(hs), "pred_boxes": self.bbox_embed(hs).sigmoid()}


def sine_positions(real: Tensor) -> Tensor:
    """Return sine embeddings [B, WIDTH, h, w] of the positions in real [B, h, w]."""
    frequencies = 10 ** -torch.linspace(0, 2, WIDTH // 4, dtype=torch.float64)
    y, x = (real.cumsum(dim).unsqueeze(1) * frequencies[:, None, None] for dim in (1, 2))
    positions = torch.cat([y.sin(), y.cos(), x.sin(), x.cos()], dim=1)
    return positions


def plain_detr(*, seed: int, **options: int) -> PlainDetr:
    """Build a DETR in double precision whose maps are far from uniform."""
    torch.manual_seed(seed)
    model = PlainDetr(**options)
    for name, parameter in model.transformer.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.5 if "attn" in name else 0.2)
    return model.double()


def plain_batch(*, padded: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """Two images of 64 x 64; padded ones have 8 x 5 and 6 x 8 real tokens of 8 x 8."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, 3, 64, 64, generator=generator, dtype=torch.float64)
    mask = torch.zeros(2, 64, 64, dtype=torch.bool)
    if padded:
        mask[0, :, 5 * STRIDE :] = True
        mask[1, 6 * STRIDE :, :] = True
    return {"images": images, "mask": mask}
