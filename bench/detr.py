"""Whole detectors: a student DETR with random weights in training, distilled or not, and in use.

``python -m bench.detr THREADS WAY SETTING`` prints the peak memory of one training step in bytes,
beyond weights, gradients, the optimizer's state and the images.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DetrForObjectDetection
from transformers.models.resnet.modeling_resnet import ResNetStage

from attn_kd import AttentionDistiller
from attn_kd.distill import distillation_loss
from attn_kd.integrations.transformers import register
from attn_kd.models import build_detr, freeze_backbone, load_backbone_weights
from bench.peak_memory import growth_of_peak

ALPHA = 0.7  # of eq. 3, the paper's best
LEARNING_RATE = 1e-9  # the student hardly changes, so each round measures the same step
# How a step distils: not at all; not at all, though the teacher runs (the lower bound); by the
# fused operator; by the maps that transformers' "eager" attention returns.
WAYS = ("none", "teacher", "attn_kd", "eager")


class Setting(NamedTuple):
    """A detector and its images; the student has one encoder and one decoder layer."""

    preset: str
    pixels: int  # of an image's height
    batch: int
    teacher_layers: int
    width: int = 0  # of an image, in pixels; 0: as its height
    dilated: bool = False  # the backbone's last stage, instead of its stride: DETR-DC5


SETTINGS = {
    "detr-tiny-128": Setting("detr-tiny", 128, 8, 3),  # 64 tokens
    "detr-tiny-416": Setting("detr-tiny", 416, 2, 3),  # 676 tokens
    "detr-tiny-800": Setting("detr-tiny", 800, 1, 3),  # 2500 tokens
    "detr-r50-416": Setting("detr-r50", 416, 1, 6),  # 169 tokens, as in the paper
    "detr-r50-800": Setting("detr-r50", 800, 1, 6),  # 625 tokens
}
# COCO's usual size, as DETR is trained on a GPU: 25 × 42 and 50 × 84 tokens.
GPU_SETTINGS = {
    "detr-r50-coco": Setting("detr-r50", 800, 8, 6, 1344),
    "detr-r50-dc5-coco": Setting("detr-r50", 800, 8, 6, 1344, dilated=True),
}


class Losses(NamedTuple):
    """What one training step has minimised, 0-dimensional."""

    detection: Tensor
    attention_kl: Tensor | None


class TrainingStep:
    """Steps of one student: forward, backward, AdamW. Called with a batch.

    Args:
        dtype: of the weights.
        autocast: what torch.autocast computes in, if it does.
    """

    def __init__(
        self,
        way: str,
        setting: Setting,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        autocast: torch.dtype | None = None,
    ) -> None:
        self.way = way
        self._autocast = partial(
            torch.autocast, torch.device(device).type, autocast, enabled=autocast is not None
        )
        torch.manual_seed(0)
        teacher = build_detector(setting, setting.teacher_layers)
        self.student = build_detector(setting, 1)
        load_backbone_weights(self.student, teacher)
        for model in (teacher, self.student):
            freeze_backbone(model)  # as in the paper
            scale_tokens(model)
            model.to(device, dtype)
            _set_attention(model, "eager" if way == "eager" else "sdpa")
        self.student.train()
        self._teacher = teacher.eval()
        self._distiller = AttentionDistiller(teacher, self.student) if way == "attn_kd" else None
        trained = [p for p in self.student.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)

    def __call__(self, batch: dict[str, Any]) -> Losses:
        """Take one step; the parameters keep its gradients until the next."""
        self._optimizer.zero_grad()
        with self._autocast():
            losses, total = self._losses(batch)
        total.backward()
        self._optimizer.step()
        return losses

    def map_gradient(self) -> Tensor:
        """The last step's gradient of the distilled layer's query and key projections."""
        attention = self.student.model.encoder.layers[-1].self_attn
        weights = (attention.q_proj.weight, attention.k_proj.weight)
        return torch.cat([weight.grad.flatten() for weight in weights])

    def _losses(self, batch: dict[str, Any]) -> tuple[Losses, Tensor]:
        if self._distiller is not None:
            loss = distillation_loss(self._distiller(**batch), alpha=ALPHA)
            return Losses(loss.detection.detach(), loss.attention_kl.detach()), loss.total
        images = {name: batch[name] for name in ("pixel_values", "pixel_mask")}
        if self.way == "none":
            detection = self.student(**batch).loss
            return Losses(detection.detach(), None), detection
        maps = {"output_attentions": self.way == "eager"}
        with torch.no_grad():
            teacher = self._teacher(**images, **maps)
        student = self.student(**batch, **maps)
        if self.way == "teacher":
            return Losses(student.loss.detach(), None), student.loss
        divergence = _divergence(student.encoder_attentions[-1], teacher.encoder_attentions[-1])
        total = (1 - ALPHA) * student.loss + ALPHA * divergence
        return Losses(student.loss.detach(), divergence.detach()), total


def make_batch(
    setting: Setting,
    *,
    pixels: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Images of noise with one object each, of the setting's size or square and of another."""
    size = (setting.pixels, setting.width or setting.pixels) if pixels is None else (pixels, pixels)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(setting.batch, 3, *size, generator=generator)
    box = torch.tensor([[0.5, 0.4, 0.2, 0.3]], dtype=dtype, device=device)
    label = {"class_labels": torch.tensor([0], device=device), "boxes": box}
    return {
        "pixel_values": images.to(device, dtype),
        "pixel_mask": torch.ones(setting.batch, *size, dtype=torch.long, device=device),
        "labels": [label] * setting.batch,
    }


def build_student(
    setting: Setting, implementation: str, dtype: torch.dtype = torch.float32
) -> DetrForObjectDetection:
    """The student in evaluation mode, with one of transformers' attention implementations."""
    register()
    torch.manual_seed(0)
    student = build_detector(setting, 1)
    scale_tokens(student)
    student.to(dtype).eval()
    _set_attention(student, implementation)
    return student


def peak_bytes_of_step(way: str, setting: Setting) -> int:
    """Growth of this process's peak by one training step."""
    step = TrainingStep(way, setting)
    step(make_batch(setting, pixels=64))  # makes the optimizer's state, loads what is lazy
    batch = make_batch(setting)
    return growth_of_peak(lambda: step(batch))


def build_detector(setting: Setting, layers: int) -> DetrForObjectDetection:
    """A detector with so many encoder and decoder layers, random weights and no dropout."""
    # One query has one way to be matched; without dropout, all ways compute the same.
    model = build_detr(
        setting.preset, encoder_layers=layers, decoder_layers=layers, num_queries=1, dropout=0.0
    )
    if setting.dilated:
        _dilate_last_stage(model)
    return model


def _dilate_last_stage(model: DetrForObjectDetection) -> None:
    """Trade the stride of the backbone's last stage for dilation: four times the tokens."""
    stages = [m for m in model.model.backbone.modules() if isinstance(m, ResNetStage)]
    for convolution in stages[-1].modules():
        if isinstance(convolution, torch.nn.Conv2d):
            convolution.stride = (1, 1)
            if convolution.kernel_size == (3, 3):
                convolution.dilation = convolution.padding = (2, 2)


@torch.no_grad()
def scale_tokens(model: DetrForObjectDetection) -> None:
    """Make the encoder's tokens of size 1, as a trained backbone and projection would.

    Those of a random ResNet-50 are hundreds of times larger, and all attention is one-hot.
    """
    batch = make_batch(SETTINGS["detr-tiny-128"])
    features, _ = model.model.backbone(batch["pixel_values"], batch["pixel_mask"])[-1]
    projection = model.model.input_projection
    size = projection(features).std()
    projection.weight /= size
    projection.bias /= size


def _set_attention(model: DetrForObjectDetection, implementation: str) -> None:
    # Not through set_attn_implementation alone: that asks the ResNet, too, for "sdpa".
    if model.config._attn_implementation != implementation:
        model.set_attn_implementation(implementation)


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean KL(student ‖ teacher) of stored maps [B, H, HW, HW] over images, heads and rows."""
    return (student * (student.log() - teacher.log())).sum(-1).mean()


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    print(peak_bytes_of_step(sys.argv[2], SETTINGS[sys.argv[3]]))
