"""`pytest test_all.py`: needs no network and no GPU. The tests compare with independent references: autograd's double
backward, float64, plain loops, functions and optimizers of PyTorch and Keras, closed formulas."""

import csv
import fcntl
import functools
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from unittest import mock

os.environ.update(KERAS_BACKEND="torch", KERAS_TORCH_DEVICE="cpu", CUDA_VISIBLE_DEVICES="",
                  OMP_NUM_THREADS="1")  # more threads do not help small models, and one thread is reproducible

import keras
import numpy as np
import pytest
import scipy.spatial
import scipy.stats
import torch
from PIL import Image
from torch.nn import functional

import data
import hyperinr
import inrn
import mwt
import train

try:
    import pycocotools.mask
    import torchvision
except RuntimeError:  # torchvision's operators want the CUDA build of PyTorch: the same in Python
    def nms(boxes, scores, threshold):
        overlaps, kept = torchvision.ops.box_iou(boxes.double(), boxes.double()), []
        for i in scores.argsort(descending=True, stable=True).tolist():
            kept += [] if (overlaps[i, kept] > threshold).any() else [i]
        return torch.tensor(kept, dtype=torch.int64)

    for module in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[module]
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
        torch.library.impl(f"torchvision::{operator}", "cpu")(nms)
    import torchvision

    sys.modules["torchvision.ops.boxes"]._assert_has_ops = lambda: None
    module = sys.modules["torchvision.ops.roi_align"]
    module._roi_align = module._roi_align.__wrapped__  # without torch.compile
except ImportError:
    torchvision = None

needs_torchvision = pytest.mark.skipif(not torchvision, reason="torchvision and pycocotools are not installed")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's, with NumPy 2
HERE = pathlib.Path(__file__).parent
SMALL = " --batch-size 16 --epochs 2 --validation-images 20 --limit 100 --save-every 3"
SMALL_DETECTOR = dict(widths="8,8,8,12", blocks="1,1,1,1", stem_stride=4, pyramid_width=8, head_width=16, anchor_size=8,
                      proposals=16, samples=8)
RUNS = {
    "mwt": "--dim 16 --depth 2 --inner-steps 2 --blocks 1 --augment" + SMALL,
    "solids": "--dataset solids --dim 8 --depth 1 --inner-steps 2 --blocks 1 --subsample 0.05" + SMALL,
    "hyperinr": "--method hyperinr --dim 8 --depth 1 --encoder-width 2 --latent-dim 16 --classifier latent "
                "--classifier-epochs 1" + SMALL,
    "inrn": "--method inrn --widths 8,8,12,16 --blocks 1,1,2,1 --teacher-epochs 1" + SMALL,
    "fit": "--method inrn --task fit --image-size 24 --parameters 3000 --width 8 --blocks 1 --compare --epochs 2 "
           "--save-every 20",
    "segment": "--method inrn --task segment --image-size 48 --limit 32 --augment --batch-size 8 --validation-images 8 "
               "--epochs 2 --save-every 3 " + " ".join(f"{train.flag(name)} {x}" for name, x in SMALL_DETECTOR.items()),
}
RUNS = {name: options.split() for name, options in RUNS.items() if torchvision or name != "segment"}


def run_python(*arguments, cwd=HERE, **environment):
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, **environment}, timeout=240)


def random_batch(count=5, size=6, channels=1, classes=10, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, size, size, channels, generator=generator, dtype=dtype) * 2 - 1,
            torch.randint(0, classes, (count,), generator=generator))


def stirred(model, scale=0.1):
    """Changes all weights of the model at random, so that no small initial value hides an error; returns the model."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for variable in model.trainable_variables:
            variable.value.add_(scale * torch.randn(variable.shape, generator=generator, dtype=variable.value.dtype))
    return model


def small_mwt(images, dtype="float32", **changes):
    """A small MWT whose learned base and omega are far from their defaults, so that neither hides an error."""
    keras.utils.set_random_seed(1)
    model = mwt.MWT(**dict(channels=images.shape[-1], dim=8, depth=3, omega=3.3, inner_steps=3, blocks=2,
                           token_scale=20.0, mlp_ratio=2) | changes, dtype=dtype)
    base = model.classifier.layers[0].base
    base.assign(0.01 * keras.random.normal(base.shape))
    return model


def small_hyperinr(images, **changes):
    keras.utils.set_random_seed(1)
    return hyperinr.HyperINR(**dict(image_size=images.shape[1], channels=images.shape[-1], latent_dim=16,
                                    encoder_width=4, dim=8, depth=2, omega=6.0) | changes)


def small_inrn(channels=1, classes=10, **changes):
    keras.utils.set_random_seed(1)
    return stirred(inrn.INRN(channels, classes, **{**dict(widths="4,6,8,10", blocks="1,1,1,1", stem_stride=2,
                                                          compression=2.0), **changes}))


def small_teacher(classes=10, size=16, softmax=False):
    keras.utils.set_random_seed(2)
    teacher = inrn.residual_cnn((size, size, 1), classes, stem_stride=2, widths=(4, 8, 16, 16))
    return keras.Model(teacher.inputs, keras.layers.Softmax()(teacher.output)) if softmax else teacher


def plain_dense(layer, x):
    return x @ layer.kernel.value + (0 if layer.bias is None else layer.bias.value)


def plain_norm(layer, x):
    return functional.layer_norm(x, x.shape[-1:], layer.gamma.value, layer.beta.value, 1e-5)


def plain_convolution(layer, x, stride=1):
    kernel, bias = layer.kernel.value, layer.bias.value
    return keras.ops.conv(x, kernel, stride, "same", data_format="channels_last") + bias


def double_backward_siren(model, samples):
    """MWT's tokens and the errors (K+1, N) before the first inner step and after each, by
    `torch.autograd.grad(create_graph=True)`, with tokens assembled one by one."""
    siren, count, of_steps = model.siren, samples[0][1].shape[0], []
    start = [tensor.value.expand(count, -1, -1) for tensor in siren.initial]
    weights, head = start, [tensor.value * siren.head_scale.value for tensor in siren.head]

    def errors(weights, coords, pixels):
        hidden = coords.expand(count, -1, -1)
        for layer in range(0, len(weights), 2):
            hidden = torch.sin((1 if layer else siren.omega) * (hidden @ weights[layer] + weights[layer + 1]))
        return ((hidden @ head[0] + head[1] - pixels) ** 2).mean(dim=(1, 2))

    for step, sample in enumerate(samples[:-1]):
        of_steps.append(errors(weights, *sample))
        gradients = torch.autograd.grad(of_steps[-1].sum(), weights, create_graph=True)
        weights = [tensor - rates.value[0 if siren.shared_step_sizes else step] * gradient
                   for tensor, rates, gradient in zip(weights, siren.step_sizes, gradients)]
    offsets = [after - before for after, before in zip(weights, start)]
    tokens = [torch.cat([offsets[layer][:, :, neuron], offsets[layer + 1][:, :, neuron]], dim=1)
              for layer in range(2, len(offsets), 2) for neuron in range(offsets[0].shape[2])]
    return torch.stack(tokens, dim=1), torch.stack([*of_steps, errors(weights, *samples[-1])])


def plain_transformer(classifier, tokens):
    """MWT's Transformer, with the attention of PyTorch. There is one head for 64 channels."""
    base, embed, *blocks, _, classify = classifier.layers
    x = plain_dense(embed, base.scale * (tokens + base.base.value))
    for block in blocks:
        y, dim = plain_norm(block.norm1, x).swapaxes(0, 1), x.shape[-1]
        attended, _ = functional.multi_head_attention_forward(
            y, y, y, dim, max(1, dim // 64), block.qkv.kernel.value.T, None, None, None, False, 0.0,
            block.project.kernel.value.T, block.project.bias.value, need_weights=False)
        x = x + block.scale1.value * attended.swapaxes(0, 1)
        hidden = functional.gelu(plain_dense(block.expand, plain_norm(block.norm2, x)))
        x = x + block.scale2.value * plain_dense(block.reduce, hidden)
    return plain_dense(classify, x.mean(1))


def plain_theta(model, images):
    """HyperINR's latents, and the parameters of the SIRENs."""
    *layers, last = [layer for layer in model.encoder.layers if layer.weights]
    if model.experiment == "pretrained":
        hidden = plain_dense(layers[-1], images.flatten(1)).relu()
        latents = functional.layer_norm(hidden, hidden.shape[1:], last.gamma.value, eps=1e-3)
    else:
        first, *blocks = layers
        x = plain_convolution(first, images).relu()
        for reduce, refine, shortcut in zip(blocks[::3], blocks[1::3], blocks[2::3]):
            refined = plain_convolution(refine, plain_convolution(reduce, x, 2).relu())
            x = (refined + plain_convolution(shortcut, x, 2)).relu()
        latents = plain_dense(last, x.flatten(1))
    tensors = []
    for shape, (one, two, three) in zip(model.hypernetwork.shapes, (mlp.layers for mlp in model.hypernetwork.mlps)):
        hidden = plain_dense(two, plain_dense(one, latents).relu()).relu()
        tensors.append(plain_dense(three, hidden).reshape(-1, *shape))
    return latents, list(zip(tensors[::2], tensors[1::2]))


def plain_losses(model, images, labels):
    """The two terms of HyperINR's loss (section 5), with the weights 0.1, 100 and 0.1 and omega 6."""
    latents, theta = plain_theta(model, images)
    axis, dim, layers = torch.linspace(-1, 1, images.shape[1]), theta[0][0].shape[2], model.classifier.layers
    hidden, features = torch.cartesian_prod(axis, axis), latents
    for kernel, bias in theta[:-1]:
        hidden = torch.sin(6.0 * (torch.matmul(hidden, kernel) + bias))
    rendered = torch.matmul(hidden, theta[-1][0]) + theta[-1][1]
    mse = functional.mse_loss(rendered.reshape(images.shape), images)
    every = torch.cat([tensor.flatten() for pair in theta for tensor in pair])
    if model.experiment == "weights":  # kernels as (outputs, inputs), repeated to squares, each number standardized
        features = torch.stack([kernel.mT.repeat(1, dim, dim)[:, :dim, :dim] for kernel, _ in theta], dim=-1)
        layers = layers[4:]
    if model.experiment in ("weights", "latent", "pretrained"):
        standardized = functional.batch_norm(features.flatten(1), None, None, training=True, eps=1e-8)
        features, layers = standardized.reshape(features.shape), layers[model.experiment != "weights":]
    logits = functools.reduce(lambda x, layer: layer(x), layers, features)
    return mse + 0.1 * latents.pow(2).mean() + 100 * every.pow(2).mean(), 0.1 * functional.cross_entropy(logits, labels)


def plain_feature_loss(alignment, outputs, features):
    """Equation 3, summed over the stages."""
    total = 0.0
    for align, output, feature in zip(alignment, outputs, features, strict=True):
        aligned = (output @ align.kernel.value[0, 0] + align.bias.value).permute(0, 3, 1, 2)
        target = functional.layer_norm(feature, feature.shape[1:], eps=1e-6).permute(0, 3, 1, 2)
        total += functional.mse_loss(functional.interpolate(aligned, target.shape[2:], mode="bilinear"), target)
    return total


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def copy_of(model):
    """A model of the same class with the same arguments and weights."""
    copy = type(model).from_config(model.get_config())
    copy.set_weights(model.get_weights())
    return copy


def assert_trains_like_pytorch(model, copy, groups, optimizers, losses, batch, steps, clip_norm=math.inf, path=None):
    """Trains `model` with train_step, and `copy` with PyTorch's optimizers on autograd's gradients. At the end the
    weights of each group may differ by 1e-4 of their distance from the start.

    groups: model -> lists of variables. optimizers: one of PyTorch for each group. losses: step -> {index of a group:
    the copy's loss}; the others do not learn. path: where to save and load the model in between.
    """
    def flat(model):
        return [torch.cat([variable.value.detach().flatten() for variable in group]) for group in groups(model)]

    parameters = [[variable.value for variable in group] for group in groups(copy)]
    assert {id(variable) for group in groups(copy) for variable in group} == {*map(id, copy.trainable_variables)}
    start = flat(copy)
    for step in range(steps):
        if path and step == 3 * steps // 4:
            model.save(path)
            model = keras.saving.load_model(path)
        learning = losses(step)
        model.train_step(batch)
        for index, loss in learning.items():
            optimizers[index].zero_grad()
            loss.backward(retain_graph=True, inputs=parameters[index])
        for index in learning:
            torch.nn.utils.clip_grad_norm_(parameters[index], clip_norm)
            optimizers[index].step()
    for ours, reference, first in zip(flat(model), flat(copy), start, strict=True):
        assert (ours - reference).norm() <= 1e-4 * (reference - first).norm()


# ---- mwt.py ----


@pytest.mark.parametrize("task_weight, subsample, shared, axes, channels, dim", [
    (0.0, 1.0, False, 2, 3, 8), (0.01, 0.5, False, 2, 3, 8), (1.0, 0.5, True, 2, 3, 8), (1.0, None, False, 3, 1, 8),
    (1.0, None, True, 3, 2, 8), (1.0, None, False, 2, 3, 128)])
def test_loss_and_gradient_equal_double_backward(task_weight, subsample, shared, axes, channels, dim):
    """Of images, or of points where subsample is None."""
    images, labels = random_batch(channels=channels, dtype=torch.float64)
    model = small_mwt(images, "float64", axes=axes, task_weight=task_weight, subsample=subsample or 1.0,
                      shared_step_sizes=shared, dim=dim)
    assert 0.9 / axes < model.siren.initial[0].value.abs().max() < 1 / axes
    if subsample:
        samples = model.siren.sample_points(images, training=True)
        model.siren.sample_points = lambda *arguments: samples
    else:
        images = some_points(5, axes, channels)
        samples = [*zip(*(part.unbind(1) for part in images))]
    tokens, errors = double_backward_siren(model, samples)
    assert relative_error(model.siren(images, training=True)[0], tokens) < 1e-9
    logits, residuals, cross_entropy = model.losses(images, labels, training=True)
    assert relative_error(residuals.square().mean(dim=(2, 3)), errors) < 1e-9
    expected_logits = plain_transformer(model.classifier, tokens)
    assert relative_error(logits, expected_logits) < 1e-6  # `keras.ops.matmul` rounds float64 to float32
    variables = [variable.value for variable in model.trainable_variables]
    actual = torch.autograd.grad(residuals.square().mean() + cross_entropy, variables)
    losses = errors.mean(), functional.cross_entropy(expected_logits, labels)
    of_mse, of_task = (torch.autograd.grad(loss, variables, retain_graph=True, materialize_grads=True)
                       for loss in losses)
    in_siren = {id(variable) for variable in model.siren.trainable_variables}
    assert len(in_siren) == 2 * 8 + 3  # kernels and biases of four layers, their step sizes, the head, its scale
    for variable, gradient, mse, task in zip(model.trainable_variables, actual, of_mse, of_task):
        expected = mse + (task_weight if id(variable) in in_siren else 1.0) * task
        assert relative_error(gradient, expected) < 3e-6, variable.path


def test_subsampling_draws_even_subsets_without_replacement_for_each_step():
    images = torch.arange(2 * 28 * 21, dtype=torch.float32).reshape(2, 28, 21, 1)  # the value of a pixel is its position
    model = small_mwt(images, subsample=0.25)
    drawn = []
    for _ in range(100):
        samples = model.siren.sample_points(images, training=True)
        coords, pixels = map(torch.stack, zip(*samples))
        assert coords.shape == (4, 147, 2) and (pixels[:, 1] - pixels[:, 0] == 28 * 21).all()  # of all images the same
        places = pixels[:, 0, :, 0].long()
        torch.testing.assert_close(coords, torch.stack([places // 21 / 13.5, places % 21 / 10], dim=-1) - 1)
        drawn.append(functional.one_hot(places, 28 * 21).sum(dim=1).unflatten(1, (28, 21)))
    drawn = torch.cat(drawn)
    assert drawn.max() == 1 and len(drawn.flatten(1).unique(dim=0)) > 200
    assert 0.15 < drawn.float().mean(dim=0).min() and drawn.float().mean(dim=0).max() < 0.35
    of_blocks = drawn.unflatten(1, (4, 7)).unflatten(3, (3, 7)).sum(dim=(2, 4))  # independent draws: 12.25 ± 3.03
    assert of_blocks.float().std() < 1 and (of_blocks - 12.25).abs().max() < 4
    assert model.siren.sample_points(images, training=False)[0][1].shape == (2, 588, 1)


def test_the_points_are_processed_in_small_parts_outside_of_training(monkeypatch):
    images, labels = random_batch(size=9)
    model, sizes, affine = small_mwt(images), [], mwt.affine
    expected = *model.siren(images), *model.losses(images, labels)  # records gradients: one part
    monkeypatch.setattr(mwt, "affine", lambda inputs, *layer: sizes.append(inputs.shape[-2]) or affine(inputs, *layer))
    monkeypatch.setattr(mwt, "POINTS_AT_ONCE", 20 * len(images))
    with torch.no_grad():
        torch.testing.assert_close((*model.siren(images), *model.losses(images, labels)), expected)
    assert {*sizes} == {16, 17}
    model.reconstruct(images)
    assert {*sizes} == {16, 17, 81}  # all points of the shared weights before the first step


def test_mwt_starts_with_the_published_initial_values():
    keras.utils.set_random_seed(0)
    model = mwt.MWT(**{name: mwt.PAPER[name] for name in ("dim", "depth", "inner_steps")})
    for number, (tensor, rates) in enumerate(zip(model.siren.initial, model.siren.step_sizes)):
        limit = 0 if number % 2 else math.sqrt(6 / 128) if number else 1 / 2  # kernels, then biases
        assert 0.95 * limit <= tensor.value.abs().max() <= limit and rates.shape == (6, *tensor.shape)
        assert 0.1 <= rates.value.min() < 0.12 and 0.98 < rates.value.max() <= 1.0
    assert model.siren.head_scale.value.tolist() == pytest.approx([0.1])


def test_every_step_is_rendered_and_shared_step_sizes_allow_more_steps():
    """Seven inner steps outside of training, three in training; pictures of any size."""
    images, labels = random_batch(size=7)
    model, axis = small_mwt(images, shared_step_sizes=True, inner_steps_test=7), torch.linspace(-1, 1, 7)
    model.compile(total_steps=1)
    stages, larger = model.reconstruct(images, steps=40), model.reconstruct(images, size=(13, 19))
    assert stages.shape == (5, 41, 7, 7, 1) and larger.shape == (5, 8, 13, 19, 1)
    np.testing.assert_allclose(larger[:, :, ::2, ::3], stages[:, :8], atol=1e-5)  # the two grids share these points
    errors = np.square(stages - images[:, None].numpy()).mean(axis=(2, 3, 4))
    for step in range(8):
        samples = [(torch.cartesian_prod(axis, axis), images.flatten(1, 2))] * (step + 1)
        tokens, expected = double_backward_siren(model, samples)
        np.testing.assert_allclose(errors[:, step], expected[-1].detach(), rtol=1e-4)
    logits, errors = plain_transformer(model.classifier, tokens).detach(), errors.mean(axis=0)
    np.testing.assert_allclose(model.predict(images, verbose=0), logits, rtol=1e-4, atol=1e-6)
    metrics = model.evaluate(images, labels, verbose=0, return_dict=True)
    assert metrics["mse"] == pytest.approx(errors[7], rel=1e-4) and errors[40] < errors[7]
    model.reset_metrics()
    assert float(model.train_step((images, labels))["mse"]) == pytest.approx(errors[3], rel=1e-4)
    assert model.reconstruct(images, steps=0).shape == (5, 1, 7, 7, 1)


@pytest.mark.parametrize("total_steps, warmup", [(200, 0.05), (30, 0.3), (10, 0.05), (7, 1.0)])
def test_one_cycle_equals_pytorch(total_steps, warmup):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=total_steps, pct_start=warmup)
    for step in range(total_steps):
        group = optimizer.param_groups[0]
        assert mwt.one_cycle(step, total_steps, warmup) == pytest.approx((group["lr"], group["betas"][0]), rel=1e-9)
        if step < total_steps - 1:
            optimizer.step()
            reference.step()
    assert mwt.one_cycle(total_steps + 5, total_steps, warmup)[0] == pytest.approx(1 / 250_000)  # stays at the end


def test_mwt_warms_up_in_at_least_200_steps_or_a_fifth():
    model = small_mwt(random_batch(count=4)[0])
    for total_steps, warmup in ((100, 0.2), (2000, 0.1), (8000, 0.05)):
        model.compile(total_steps)
        assert model.warmup == pytest.approx(warmup)


@pytest.mark.parametrize("sequential, every_step", [(False, True), (True, False)])
def test_mwt_trains_like_pytorch(sequential, every_step, tmp_path):
    """Three clipped AdamW optimizers with one-cycle schedules. The gradients are small, so that epsilon matters."""
    images, labels = random_batch(count=4)
    model = small_mwt(images, task_weight=0.5, sequential=sequential, every_step=every_step)
    rates, clip_norm = (1e-3, 1e-1, 1e-2), 1e-3
    model.compile(20, *rates, warmup=0.3, beta_2=0.9, weight_decay=0.1, clip_norm=clip_norm)
    copy = copy_of(model)

    def groups(model):
        siren = model.siren
        return [*siren.initial, *siren.head, siren.head_scale], siren.step_sizes, model.classifier.trainable_variables

    optimizers = [torch.optim.AdamW([variable.value for variable in group], betas=(0.9, 0.9), weight_decay=0.1)
                  for group in groups(copy)]
    schedules = [torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, 10 if sequential else 20, pct_start=0.3)
                 for optimizer, rate in zip(optimizers, rates)]

    def losses(step):
        _, residuals, cross_entropy = copy.losses(images, labels, training=True)
        mse = (residuals[1:] if every_step else residuals[3]).square().mean()
        indices, loss = (0, 1, 2), mse + cross_entropy
        if sequential:
            indices, loss = ((0, 1), mse) if step < 10 else ((2,), cross_entropy)
        for index in indices:
            if optimizers[index].state:  # after its first step
                schedules[index].step()
        return {index: loss for index in indices}

    assert_trains_like_pytorch(model, copy, groups, optimizers, losses, (images, labels), 20, clip_norm,
                               tmp_path / "model.keras")


def test_parts_of_mwt_can_be_frozen():
    images, labels = random_batch(count=4)
    for part in ("siren", "classifier"):
        model = small_mwt(images, task_weight=0.5)
        getattr(model, part).trainable = False
        model.compile(2)
        before = copy_of(model)
        model.train_step((images, labels))
        for name in ("siren", "classifier"):
            weights = zip(getattr(model, name).weights, getattr(before, name).weights)
            assert {torch.equal(new.value, old.value) for new, old in weights} == {name == part}


# ---- hyperinr.py ----


def test_hypernetwork_has_the_documented_initial_values():
    keras.utils.set_random_seed(0)
    model, inputs = hyperinr.HyperINR(), [2, 256, 256, 256, 256]
    for number, mlp in enumerate(model.hypernetwork.mlps):
        last, limit = mlp.layers[-1], 1 / (256 if number % 2 else inputs[number // 2])
        spread = pytest.approx(math.sqrt(2 / 256) / 100, rel=0.2 / math.sqrt(last.units))
        assert last.kernel.value.std().item() == spread
        assert (0.95 * limit if last.units > 100 else 0) < last.bias.value.abs().max() <= limit
    for kernel, _ in model.hypernetwork(model.encode(random_batch(count=8, size=28)[0])):
        start = 1 / kernel.shape[1] / math.sqrt(3)  # of U(±1/inputs), similar for all images
        assert kernel.std().item() == pytest.approx(start, rel=0.1)
        assert kernel.std(dim=0).mean().item() < 0.3 * start


@pytest.mark.parametrize("experiment, frozen", [("joint", True), ("latent", True), ("weights", True), ("pixels", True),
                                                ("pretrained", True), ("pretrained", False)])
def test_hyperinr_trains_like_pytorch(experiment, frozen):
    """Two Adam optimizers with cosine decay: both learn in all six steps of `joint`, the second one in all of `pixels`,
    otherwise each in three. If it is not frozen, both train the encoder of `pretrained`."""
    images, labels = random_batch(count=12, size=8)
    model = stirred(small_hyperinr(images, classifier=experiment, encoder_width=2, freeze_encoder=frozen))
    joint, part = experiment == "joint", 6 if experiment in ("joint", "pixels") else 3  # steps of each optimizer
    model.compile(total_steps=6, classifier_steps=6 - part, hyper_rate=1e-3, classifier_rate=1e-2, separate_rate=3e-3,
                  final_rate=0.25)
    assert {optimizer.epsilon for optimizer in model.optimizers} == {1e-8}  # below it is larger, for exact comparison
    copy = copy_of(model)
    order = {"joint": [(0, 1)] * 6, "pretrained": [(1,)] * 3 + [(0,)] * 3, "pixels": [(1,)] * 6}.get(
        experiment, [(0,)] * 3 + [(1,)] * 3)

    def groups(model):
        parts = (model.encoder, model.hypernetwork, model.classifier)
        encoder, hyper, classifier = (part.trainable_variables for part in parts)
        return (hyper if experiment == "pixels" or experiment == "pretrained" and frozen else encoder + hyper,
                encoder + classifier if experiment in ("pretrained", "pixels") else classifier)

    optimizers = [torch.optim.Adam([variable.value for variable in group], eps=1e-4) for group in groups(copy)]

    def losses(step):
        for optimizer in model.optimizers:  # Keras adds epsilon before it corrects the second moment, PyTorch after it
            optimizer.epsilon = 1e-4 * math.sqrt(1 - 0.999 ** (step % part + 1))
        parts = plain_losses(copy, images, labels)
        decay = 0.25 + 0.75 * (1 + math.cos(math.pi * (step % part / part))) / 2
        for optimizer, rate in zip(optimizers, (1e-3, 1e-2 if joint else 3e-3)):
            optimizer.param_groups[0]["lr"] = rate * decay
        return {index: sum(parts) if joint else parts[index] for index in order[step]}

    assert_trains_like_pytorch(model, copy, groups, optimizers, losses, (images, labels), 6)


def test_what_is_classified_is_standardized_by_statistics_of_the_model(tmp_path):
    images, labels = random_batch(count=12, size=8)
    model = stirred(small_hyperinr(images, classifier="latent"))
    model.compile(total_steps=6, classifier_steps=3)
    mean, variance = torch.zeros(16), torch.ones(16)
    for _ in range(5):
        latents = plain_theta(model, images)[0].detach()
        mean, variance = 0.9 * mean + 0.1 * latents.mean(0), 0.9 * variance + 0.1 * latents.var(0, unbiased=False)
        model.train_step((images, labels))
    model.save(tmp_path / "model.keras")
    for model in (model, keras.saving.load_model(tmp_path / "model.keras")):
        standardized = (plain_theta(model, images)[0] - mean) / variance.sqrt()
        logits = functools.reduce(lambda x, layer: layer(x), model.classifier.layers[1:], standardized)
        np.testing.assert_allclose(model.predict(images, verbose=0), logits.detach(), rtol=1e-3, atol=1e-4)


def test_small_differences_are_standardized():
    values = np.float32(0.5 + 2e-4 * np.random.default_rng(0).normal(size=(64, 500))).astype("float64")
    expected = (values - values.mean(0)) / np.sqrt(values.var(0) + 1e-8)
    standardized = hyperinr.standardize(dtype="float32")(values.astype("float32"), training=True)
    np.testing.assert_allclose(standardized, expected, atol=1e-2)


def test_images_are_rendered_and_read_at_any_size():
    images, _ = random_batch(size=7, channels=3)
    model = stirred(small_hyperinr(images))
    reconstruction = model.reconstruct(images)
    assert reconstruction.shape == (5, 7, 7, 3) and reconstruction.dtype == np.float32
    np.testing.assert_array_equal(model.upsample(images, 1), reconstruction)
    assert model.upsample(images.numpy(), 2.5).shape == (5, 18, 18, 3)
    np.testing.assert_allclose(model.reconstruct(images, size=(13, 19))[:, ::2, ::3], reconstruction, atol=1e-4)
    many = model.reconstruct(images.repeat(14, 1, 1, 1), size=(33, 34))  # 70 images, 1,122 points: more than one part
    np.testing.assert_allclose(many[65:], model.reconstruct(images, size=(33, 34)), atol=1e-4)
    grids = [np.meshgrid(np.linspace(-1, 1, rows), np.linspace(-1, 1, columns), indexing="ij")
             for rows, columns in ((28, 10), (7, 7))]
    ramp, expected = ((0.3 * rows - 0.6 * columns).astype("float32")[None, :, :, None] for rows, columns in grids)
    np.testing.assert_allclose(hyperinr.resize(ramp, (7, 7)).numpy(), expected, atol=1e-6)
    model = stirred(small_hyperinr(expected))
    np.testing.assert_allclose(model.reconstruct(ramp, size=(7, 7)), model.reconstruct(expected), atol=1e-4)
    assert model.reconstruct(ramp).shape == ramp.shape and model(ramp).shape == (1, 10)


def test_denoising_refines_the_latent_of_each_image():
    images, _ = random_batch(size=8, channels=3)
    model = stirred(small_hyperinr(images))
    latents, _ = plain_theta(model, images)
    theta, grid = model.hypernetwork(latents), hyperinr.coordinates(8, 8)
    error = (hyperinr.render(theta, grid, 6.0) - images.flatten(1, 2)).square().sum()
    moved = latents - 2e-3 * torch.autograd.grad(error, latents)[0].sign()  # Adam's first step
    expected = hyperinr.render(model.hypernetwork(moved), grid, 6.0).detach().reshape(images.shape)
    np.testing.assert_allclose(model.denoise(images, steps=1), expected, atol=1e-3)
    np.testing.assert_array_equal(model.denoise(images, steps=0), model.reconstruct(images))
    np.testing.assert_allclose(model.denoise(images[:1]), model.denoise(images)[:1], atol=1e-3)
    errors = [np.square(model.denoise(images, steps) - images.numpy()).mean() for steps in (0, 4, 12)]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("per_image", [False, True])
def test_inpainting_keeps_known_pixels_and_ignores_the_hole(per_image):
    images = random_batch(size=8, channels=3)[0].numpy()
    model = stirred(small_hyperinr(images))
    mask = np.random.default_rng(0).random((5, 8, 8) if per_image else (8, 8)) < 0.4
    hole = np.broadcast_to(mask, (5, 8, 8))
    for image, filled, holes in zip(images, hyperinr.fill_with_mean(images, mask), hole):
        np.testing.assert_array_equal(filled[~holes], image[~holes])
        np.testing.assert_allclose(filled[holes], np.tile(image[~holes].mean(axis=0), (holes.sum(), 1)), atol=1e-6)
    result = model.inpaint(images, mask)
    np.testing.assert_array_equal(result[~hole], images[~hole])
    assert (np.abs(result[hole] - images[hole]) > 1e-3).mean() > 0.95
    once = np.where(hole[..., None], model.reconstruct(hyperinr.fill_with_mean(images, mask)), images)
    twice = np.where(hole[..., None], model.reconstruct(once), images)
    np.testing.assert_array_equal(model.inpaint(images, mask, steps=2), twice)
    np.testing.assert_array_equal(model.inpaint(np.where(hole[..., None], 1.0, images), mask), result)


# ---- inrn.py ----


def shuffled(x, scale):
    """(N, H, W, scale² C) -> (N, scale H, scale W, C): the first C channels are the first pixel of the first row."""
    return x.unflatten(-1, (scale, scale, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def plain_block(block, x, activation):
    """An INReBlock, from the description of its arguments."""
    config = block.get_config()
    order = {"interleaved": "dcd" if config["compression"] >= 1 else "cdd", "front": "cdd", "post": "ddc", "mlp": "dd"}
    stride = config["stride"]
    if config["hybrid"] == "mlp" and stride > 1:
        x = functional.avg_pool2d(x.permute(0, 3, 1, 2), stride, ceil_mode=True, count_include_pad=False)
        x = x.permute(0, 2, 3, 1)
    y, kinds, scale = plain_norm(block.norm, x), order[config["hybrid"]], config["upscale"]
    for kind, layer in zip(kinds, block.steps, strict=True):
        y = y if layer is block.steps[0] else activation(y)
        y = plain_dense(layer, y) if kind == "d" else plain_convolution(layer, y, stride)
        y = shuffled(y, scale) if layer is block.steps[1 if kinds == "dcd" else -1] else y
    if scale > 1:
        x = plain_dense(block.shortcut, x).permute(0, 3, 1, 2)
        return y + functional.interpolate(x, scale_factor=scale, mode="bilinear").permute(0, 2, 3, 1)
    shortcut = plain_dense if config["hybrid"] == "mlp" else functools.partial(plain_convolution, stride=stride)
    return y + (x if x.shape == y.shape else shortcut(block.shortcut, x))


@pytest.mark.parametrize("hybrid, parameters", [
    ("mlp", 8 * 4 + 4 + 4 * 24 + 24), ("front", 72 * 8 + 8 + 8 * 4 + 4 + 4 * 24 + 24),
    ("post", 8 * 4 + 4 + 4 * 8 + 8 + 72 * 24 + 24), ("interleaved", 8 * 4 + 4 + 36 * 16 + 16 + 4 * 6 + 6)])
def test_a_block_that_doubles_the_resolution(hybrid, parameters):
    block, x = inrn.INReBlock(8, 6, 2.0, 1, "gelu", hybrid, upscale=2), random_batch(2, 5, 8)[0]
    assert all(layer.kernel.value.abs().max() > 0 for layer in block.steps)
    assert block.count_params() == parameters + (8 * 6 + 6) + 2 * 8
    stirred(block, 0.2)
    torch.testing.assert_close(block(x), plain_block(block, x, functional.gelu), rtol=1e-4, atol=1e-4)
    assert inrn.INReBlock(8, 2, 2.0, 1, "gelu", hybrid, upscale=2)(x).shape == (2, 10, 10, 2)  # inputs = s² width


@pytest.mark.parametrize("hybrid", ["interleaved", "front", "post", "mlp"])
@pytest.mark.parametrize("compression, activation", [(0.5, "relu"), (1.0, "gelu"), (2.0, "gelu")])
def test_inrn_is_its_stem_stages_and_head(hybrid, compression, activation):
    keras.utils.set_random_seed(1)
    model = inrn.INRN(3, 5, "4,6,8,10", "1,2,3,1", 2, compression, activation, hybrid)
    start = random_batch(2, 7, 6)[0]
    assert torch.equal(model.stages[1][1](start), start)  # a new block equals its shortcut
    stirred(model, 0.2)
    for size in ((28, 28), (33, 20)):
        images = torch.rand(2, *size, 3)
        outputs = model.stage_outputs(images)
        x, sides = plain_convolution(model.stem, images, 2), [-(-side // 2) for side in size]
        for number, (blocks, count, width) in enumerate(zip(model.stages, (1, 2, 3, 1), (4, 6, 8, 10), strict=True), 1):
            assert len(blocks) == count
            for block in blocks:
                x = plain_block(block, x, getattr(functional, activation))
            assert outputs[f"stage{number}"].shape == (2, *sides, width)
            torch.testing.assert_close(outputs[f"stage{number}"], x, rtol=1e-3, atol=1e-3)
            sides = [-(-side // 2) for side in sides]
        expected = plain_dense(model.head, plain_norm(model.norm, x.mean((1, 2))))
        torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("frames, parameters, scales", [(1, 1000, [2, 2, 1]), (9, 12_000, [2] * 5)])
def test_inrn_draws_like_plain_pytorch(frames, parameters, scales):
    """Pictures from maps at three resolutions, frames from those of their time; blocks double the resolution."""
    model, times = stirred(inrn.PictureFit("inrn", (60, 90), frames, parameters), 0.02), torch.tensor([-0.625, 0.5, 1])
    time, layers, x = frames > 1, model.network, torch.zeros(3, 2, 3, 0)
    if not time:
        *start, first = layers[:4]
        *layers, last = layers[4:]
        x = [functional.interpolate(layer.maps.value.permute(0, 3, 1, 2), start[0].maps.shape[1:3], mode="bilinear")
             for layer in start]
        x = plain_dense(first, torch.cat(x, 1).permute(0, 2, 3, 1))
    blocks = [layer for layer in layers if isinstance(layer, inrn.INReBlock)]
    assert [block.upscale for block in blocks] == scales
    widths = [block.get_config()["width"] for block in blocks]
    after = [max(2, round(0.8 * width)) if time else width for width in widths]
    assert widths[1:] == [*after[:-2], 3 if time else after[-2]]  # the last block of a video draws its colours
    maps = [tuple(layer.maps.shape) for layer in layers if layer not in blocks]  # each of at most 1200 parameters
    assert maps == ([(9, 2, 3, 17), (9, 4, 6, 5), (3, 8, 12, 4), (1, 16, 24, 3)] if time else [])
    for layer in layers:
        if layer in blocks:
            x = plain_block(layer, x, functional.gelu)
        else:
            maps = functional.interpolate(layer.maps.value.flatten(1).T[None], 17, mode="linear", align_corners=True)
            x = torch.cat([x, maps[0, :, [3, 12, 16]].T.unflatten(1, layer.maps.shape[1:])], -1)  # at the three times
    expected = (x if time else shuffled(plain_dense(last, x), 2))[:, :60, :90].expand(3, -1, -1, -1)
    torch.testing.assert_close(model(times), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(model.render(times, 60, 90), expected.detach().clip(-1, 1).numpy(), atol=1e-4)
    larger = functional.interpolate(expected.permute(0, 3, 1, 2), size=(120, 150), mode="bicubic", antialias=True)
    larger = larger.permute(0, 2, 3, 1).detach().clip(-1, 1)
    np.testing.assert_allclose(model.render(times, 120, 150), larger, atol=1e-4)


@pytest.mark.parametrize("arguments, rate", [("", 1e-2), ("--parameters 400000", 4e-3), ("--rate 0.1", 0.1)])
def test_the_learning_rate_of_a_fit_follows_its_number_of_parameters(arguments, rate):
    options, task = train.parse(["--method", "inrn", "--task", "fit", *arguments.split()])
    (_, model, _), = task.build(options, data.Dataset(None, range(2), (64, 64, 3)), 10)
    assert float(model.optimizers[0].learning_rate) == pytest.approx(rate)


@pytest.mark.parametrize("network", ["siren", "relu", "nerv"])
def test_the_networks_compared_with_inrn_equal_plain_pytorch(network):
    video, times, size = network == "nerv", torch.tensor([-0.5, 0.5, 1.0]), (60, 90)
    model = stirred(inrn.PictureFit(network, size, 9 if video else 1, 8000), 0.02)
    axes = [(torch.arange(side) + 0.5) / side * 2 - 1 for side in size]  # centres of pixels
    x = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)[None]
    _, *layers, last = model.network
    if network == "siren":
        for layer in layers:
            x = torch.sin(30 * plain_dense(layer, x))
    elif network == "relu":
        angles = x @ layers[0].kernel.value
        x = torch.cat([angles.sin(), angles.cos()], -1)
        for layer in layers[1:]:
            x = plain_dense(layer, x).relu()
    else:
        angles = times[:, None] * math.pi * 1.25 ** torch.arange(16)
        x = functional.gelu(plain_dense(layers[0], torch.cat([angles.sin(), angles.cos()], -1)))
        x = plain_dense(layers[1], x).reshape(3, 2, 3, 16)
        for layer in layers[3::2]:
            x = functional.gelu(shuffled(plain_convolution(layer, x), 2))
    expected = (plain_convolution(last, x)[:, :60, :90] if video else plain_dense(last, x)).expand(3, -1, -1, -1)
    torch.testing.assert_close(model(times), expected, rtol=1e-4, atol=1e-4)


def test_networks_have_the_largest_width_that_their_parameters_allow():
    for network, frames, layer, factor in (("inrn", 1, 3, 1), ("siren", 1, 1, 1), ("relu", 1, 2, 1), ("nerv", 9, 4, 4)):
        model = inrn.PictureFit(network, (90, 160), frames, 20_000)
        width = model.network[layer].kernel.shape[-1] // factor
        same, larger = (inrn.PictureFit(network, (90, 160), frames, 20_000, width + i) for i in (0, 1))
        assert 17_000 < model.count_params() == same.count_params() <= 20_000 < larger.count_params()
    for frames in (2, 4, 8):  # short videos have room for many channels at few positions
        assert 18_000 < inrn.PictureFit(size=(32, 32), frames=frames, parameters=20_000).count_params() <= 20_000
    assert 12 < inrn.PictureFit("relu").network[1].kernel.value.std() < 18
    _, first, second, *_ = inrn.PictureFit("siren").network
    for layer, limit in ((first, 1 / 2), (second, math.sqrt(6 / second.kernel.shape[0]) / 30)):
        assert 0.98 * limit < layer.kernel.value.abs().max() <= limit


def test_a_fit_trains_like_pytorch():
    """Equation 1, Adam with beta_2 0.9 and cosine decay to 0. Without time, a batch counts as its first frame."""
    frames, times = random_batch(2, 12, 3)[0].double(), torch.zeros(2)
    model = stirred(inrn.PictureFit(size=(12, 12), parameters=500, alpha=0.6))
    model.compile(total_steps=4, rate=1e-3)
    copy = copy_of(model)
    optimizer = torch.optim.Adam([variable.value for variable in copy.trainable_variables], betas=(0.9, 0.9), eps=1e-14)
    model.optimizers[0].epsilon = 1e-14

    def losses(step):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 + math.cos(math.pi * step / 4)) / 2
        picture = copy(times)[:1]
        ssim = keras.ops.image.ssim(picture + 1, frames[:1] + 1, max_val=2)
        return {0: 0.6 * ((picture - frames[:1]) ** 2).mean() + 0.4 * (1 - ssim.mean())}

    assert_trains_like_pytorch(model, copy, lambda model: [model.trainable_variables], [optimizer], losses,
                               (frames, times), 4)


@pytest.mark.parametrize("softmax, classes, order, task_weight, logits_weight", [
    (False, 10, "1234", 0.8, 0.25), (True, 3, "1234", 0.8, 0.25), (False, 10, "4321", 0.0, 0.0)])
def test_the_student_learns_the_distillation_loss(softmax, classes, order, task_weight, logits_weight, tmp_path):
    """Losses and metrics are those of plain PyTorch. With fewer than five classes, all count as the first five. In the
    order 4321, resolutions differ. The student is saved without its teacher."""
    images, labels = random_batch(20, 16, classes=classes)
    student, teacher = small_inrn(classes=classes), small_teacher(classes, softmax=softmax)
    names = [f"stage{number}" for number in order]
    distiller = stirred(inrn.Distiller(student, teacher, (16, 16, 1), names if order == "4321" else (), task_weight,
                                       feature_weight=0.5, logits_weight=logits_weight, temperature=3.0))
    distiller.compile(total_steps=10)
    before, start = teacher.get_weights(), [layer.get_weights() for layer in distiller.alignment]
    with torch.no_grad():
        logits = student(images)
        layers = [teacher.get_layer(name).output for name in names]
        *features, taught = keras.Model(teacher.inputs, [*layers, teacher.output])(images, training=False)
        distance = plain_feature_loss(distiller.alignment, student.stage_outputs(images).values(), features)
        taught = taught.log() if softmax else taught
        divergence = functional.kl_div((logits / 3).log_softmax(-1), (taught / 3).softmax(-1), reduction="batchmean")
        distillation = 0.5 * distance + logits_weight * 9 * divergence
        expected = task_weight * functional.cross_entropy(logits, labels) + distillation
    metrics = distiller.train_step((images, labels))
    assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-3)
    assert float(metrics["distillation"]) == pytest.approx(float(distillation), rel=1e-3)
    top5 = (logits.topk(min(5, classes)).indices == labels[:, None]).any(1).float().mean().item()
    assert float(metrics["top5_accuracy"]) == pytest.approx(top5) and (top5 < 1) == (classes == 10)
    assert metrics.keys() == {"loss", "accuracy", "top5_accuracy", "distillation"}
    assert all(map(np.array_equal, before, teacher.get_weights()))
    assert not any(np.array_equal(old, align.kernel) for (old, _), align in zip(start, distiller.alignment))
    for layer in [*(blocks[-1] for blocks in student.stages), *distiller.alignment]:
        assert all(variable.value.grad.abs().max() > 0 for variable in layer.trainable_variables)
    assert task_weight or student.head.kernel.value.grad is None or student.head.kernel.value.grad.abs().max() == 0
    assert not {id(variable) for variable in teacher.variables} & {id(variable) for variable in distiller.variables}
    distiller.save(tmp_path / "model.keras")
    assert type(keras.saving.load_model(tmp_path / "model.keras")) is inrn.INRN
    assert (tmp_path / "model.keras").stat().st_size < 12 * student.count_params() + 250_000


def test_a_distiller_trains_like_pytorch():
    """AdamW with warm-up, clipping to norm 1 and weight decay of the kernels only; without a teacher."""
    images, labels = 100 * random_batch(8, 16)[0], random_batch(8)[1]  # so large that gradients are clipped
    distiller = inrn.Distiller(small_inrn())
    distiller.compile(total_steps=40, rate=1e-2, weight_decay=0.1)
    copy = copy_of(distiller.student)
    kernels, others = ([v.value for v in copy.trainable_variables if (v.name == "kernel") == wanted]
                       for wanted in (True, False))
    optimizer = torch.optim.AdamW([{"params": kernels, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
                                  eps=1e-14)
    distiller.optimizers[0].epsilon = 1e-14

    def losses(step):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (step / 2 if step < 2 else (1 + math.cos(math.pi * (step - 2) / 38)) / 2)
        return {0: functional.cross_entropy(copy(images), labels)}

    assert_trains_like_pytorch(distiller, copy, lambda model: [getattr(model, "student", model).trainable_variables],
                               [optimizer], losses, (images, labels), 5, clip_norm=1.0)


def test_teacher_layers_are_matched_by_resolution_or_name():
    student, teacher = small_inrn(), small_teacher()
    quarter, again = (keras.layers.Conv2D(3, 3, strides=4, padding="same", name="quarter") for _ in range(2))
    sequential = keras.Sequential([keras.Input((None, None, 1)), quarter, keras.layers.GlobalMaxPooling2D()])
    names = ["stage4", "stage3", "stage2", "stage1"]
    three_stages = inrn.residual_cnn((16, 16, 1), 10, 2, widths=(4, 4, 4))
    named, unnamed = (keras.Sequential([keras.Input((16, 16, 1)), *[
        keras.layers.Conv2D(3, 3, stride, "same", name=name) for name, stride in ((first, 4), ("last", 1))]])
        for first in ("stage2", "most"))
    for model, layers, expected in ((teacher, [], dict(zip(names, names))), (sequential, [], {"stage2": "quarter"}),
                                    (teacher, names, dict(zip(reversed(names), names))),
                                    (three_stages, [], dict(zip(names[1:], names[1:]))),
                                    (named, [], {"stage2": "stage2"}), (unnamed, [], {"stage2": "last"})):
        matched = inrn.match_layers(model, student, (16, 16, 1), layers)
        assert {stage: layer.name for stage, layer in matched.items()} == expected
    frozen = keras.Sequential([keras.Input((16, 16, 1)), keras.layers.Rescaling(2.0), again])
    frozen.trainable = False
    assert inrn.match_layers(frozen, small_inrn(stem_stride=1), (16, 16, 1)) == {"stage3": again}  # not the scaling


def test_resnet101_receives_images_as_in_its_training(monkeypatch):
    teacher = inrn.resnet101((32, 32, 1), weights=None)
    images = random_batch(1, 32)[0]
    received = keras.Model(teacher.inputs, teacher.get_layer("conv1_pad").input)(images).numpy()
    expected = (127.5 * (images.numpy() + 1)).repeat(3, -1) - np.array([103.939, 116.779, 123.68])  # BGR means
    np.testing.assert_allclose(received, expected, rtol=1e-4, atol=1e-3)
    monkeypatch.setattr(keras.config, "image_data_format", lambda: "channels_first")
    with pytest.raises(ValueError, match="channels_last"):
        inrn.resnet101((32, 32, 1), weights=None)
    student = small_inrn(stem_stride=4)
    assert len(inrn.Distiller(student, teacher, (32, 32, 1)).alignment) == 4  # it needs no classes
    with pytest.raises(ValueError, match="logits_weight at 0"):
        inrn.Distiller(student, teacher, (32, 32, 1), logits_weight=1.0)


# ---- All methods ----


@pytest.mark.parametrize("small, task_weight", [(small_mwt, 1.0), (small_hyperinr, 0.1)])
def test_metrics_equal_their_definitions(small, task_weight):
    """Sample weights apply to the cross entropy and the accuracy only."""
    images, labels = random_batch(count=7)
    weights = torch.tensor([0.0, 1.0, 2.0, 0.5, 0.0, 3.0, 1.0])
    model = stirred(small(images), 0.02)
    model.compile(total_steps=1)
    metrics = model.evaluate(images, labels, batch_size=3, sample_weight=weights, verbose=0, return_dict=True)
    logits = torch.tensor(model.predict(images, verbose=0))
    pictures = model.reconstruct(images).reshape(7, -1, 6, 6, 1)[:, -1]  # of MWT after the last inner step
    errors = np.square(pictures - images.numpy()).mean(axis=(1, 2, 3))
    assert metrics["accuracy"] == pytest.approx(np.average(logits.argmax(1) == labels, weights=weights))
    assert metrics["mse"] == pytest.approx(errors.mean(), rel=1e-4)
    assert metrics["psnr"] == pytest.approx((10 * np.log10(4 / errors)).mean(), rel=1e-4)
    reconstruction = errors.mean() if small is small_mwt else plain_losses(model, images, labels)[0].item()
    cross_entropy = (functional.cross_entropy(logits, labels, reduction="none") * weights).mean().item()
    assert metrics["loss"] == pytest.approx(reconstruction + task_weight * cross_entropy, rel=1e-4)


def test_wrong_arguments_and_inputs():
    images, labels = random_batch(size=8, channels=3)
    grey, hole = images[..., :1], np.eye(8, dtype=bool)
    siren, hyper, network = small_mwt(images), small_hyperinr(images), small_inrn(channels=3)
    siren.compile(total_steps=1)
    cases = {"shared_step_sizes": [functools.partial(siren.reconstruct, images, steps=4),
                                   lambda: small_mwt(images, inner_steps_test=7)]}
    cases["at least 1"] = [
        lambda: mwt.MWT(inner_steps=0), lambda: mwt.MWT(depth=0), lambda: inrn.INRN(num_classes=0),
        lambda: inrn.PictureFit(blocks=0)]
    odd = keras.Sequential([keras.Input((16, 16, 1)), keras.layers.Conv2D(3, 14), keras.layers.Flatten()])
    cases["resolution"] = [lambda: inrn.match_layers(odd, small_inrn(), (16, 16, 1))]
    cases["too few"] = [lambda: inrn.PictureFit(parameters=300)]
    cases["for a video"] = [lambda: inrn.PictureFit("nerv")]
    cases[r"\(N, H, W, 3\)"] = [lambda: siren(grey), lambda: siren.fit(grey, labels, verbose=0), lambda: network(grey),
                                lambda: hyper(grey), lambda: hyper.inpaint(grey, hole)]
    cases[r"boolean, of shape \(8, 8\) or \(5, 8, 8\)"] = [
        functools.partial(hyper.inpaint, images, mask) for mask in (
            np.ones((8, 7), bool), np.ones((4, 8, 8), bool), np.ones((8, 8)), np.ones((5, 8, 8, 3), bool))]
    cases[r"\(N, 9, 9, 3\)"] = [lambda: inrn.PictureFit(size=(9, 9), parameters=500).test_step((images, labels))]
    cases["leave some pixels"] = [lambda: hyper.inpaint(images, np.ones((8, 8), bool))]
    coords, values = some_points()
    model = small_mwt(values, "float64", axes=3)
    cases[r"coords \(N, 4, P, 3\) and values \(N, 4, P, 1\)"] = [functools.partial(model, signal) for signal in (
        (coords[..., :2], values), (coords, values[:, :3]), (coords[:, :3], values[:, :3]), coords, [coords],
        (coords, values[:4]), (coords, values[..., 0]), (coords[:, 0], values[:, 0]), (coords, values) * 2)]
    for message, call in [(message, call) for message, calls in cases.items() for call in calls]:
        with pytest.raises(ValueError, match=message):
            call()


def test_mixed_precision_leaves_the_inr_in_float32():
    images, labels = random_batch(size=8)
    model = small_mwt(images, "mixed_bfloat16")
    tokens, _ = model.siren(images)
    torch.testing.assert_close(tokens, small_mwt(images).siren(images)[0])
    assert model.classifier.layers[2](model.classifier.layers[1](tokens)).dtype == torch.bfloat16
    hyper = small_hyperinr(images, dtype="mixed_bfloat16")
    assert hyper.encoder(images).dtype == torch.bfloat16
    assert {tensor.dtype for pair in hyper.hypernetwork(hyper.encode(images)) for tensor in pair} == {torch.float32}
    student = small_inrn(dtype="mixed_bfloat16")
    assert student.stage_outputs(images)["stage2"].dtype == torch.bfloat16
    for trained in (model, hyper, inrn.Distiller(student, small_teacher(size=8), (8, 8, 1))):
        trained.compile(total_steps=2)
        assert math.isfinite(trained.train_step((images, labels))["loss"]) and trained(images).dtype == torch.float32


@pytest.mark.parametrize("small, part", [(small_mwt, lambda model: model.siren.inner_loop),
                                         (small_hyperinr, lambda model: model.render)])
def test_the_compiled_part_is_one_graph(small, part, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # fast to compile
    images, labels = random_batch(size=8)
    model, gradients = stirred(small(images)), []
    for jit_compile in (True, False):
        model.zero_grad()
        model.compile(total_steps=1, jit_compile=jit_compile)
        assert hasattr(part(model), "_torchdynamo_orig_callable") == jit_compile
        _, *terms = model.losses(images, labels, training=True)  # otherwise mwt does not use its compiled part
        sum(term.mean() for term in terms).backward()
        gradients.append([variable.value.grad for variable in model.trainable_variables])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method, preset, changes, parameters", [
    ("mwt", "quick", {}, 81_164), ("mwt", "paper", {}, 1_543_692), ("mwt", "paper-large", {}, 6_134_796),
    ("mwt", "paper-wide", {}, 2_530_572), ("mwt", "paper-sequential", {}, 1_543_692),
    *[("hyperinr", "quick", {"classifier": name}, count) for name, count in (
        ("joint", 3_933_643), ("latent", 3_934_027), ("weights", 4_136_523), ("pretrained", 3_352_587))],
    ("hyperinr", "paper", {}, 54_627_979),
    ("inrn", "small", {"classes": 100}, 2.86e6), ("inrn", "small", {"classes": 100, "compression": 1.0}, 2.5e6),
    ("inrn", "medium", {"classes": 1000}, 5.7e6), ("inrn", "medium", {"classes": 1000, "compression": 1.0}, 14e6),
    ("inrn", "large", {"classes": 1000}, 21e6), ("inrn", "large", {"classes": 1000, "compression": 1.0}, 57e6),
    ("inrn", "cifar100", {"teacher": "resnet56", "classes": 10}, 853_018 + 2_752 + 4_256)])
def test_presets_have_their_numbers_of_parameters(method, preset, changes, parameters):
    """Those of INRN are the paper's (Table 2). ResNet-56 has 0.85 million (He et al., table 6), convolutions in its
    shortcuts, and averages of what is normalized."""
    options, task = train.parse(["--method", method, "--preset", preset])
    vars(options).update({"teacher": "none", **changes})
    channels, classes = 3 if "classes" in changes else 1, ("",) * changes.get("classes", 10)
    (_, model, _), *_ = task.build(options, data.Dataset(None, None, (28, 28, channels), classes), 9)
    assert model.count_params() == pytest.approx(parameters, rel=0.02 if isinstance(parameters, float) else 0)


def test_presets_hold_the_published_hyperparameters():
    paper = dict(dim=128, depth=4, omega=10.0, inner_steps=6, inner_steps_test=0, shared_step_sizes=False,
                 subsample=1.0, blocks=10, mlp_ratio=1, token_scale=500.0, task_weight=0.01, every_step=False,
                 sequential=False, siren_rate=1e-4, step_size_rate=1e-2, classifier_rate=1e-4, warmup=0.05,
                 beta_2=0.999, weight_decay=1e-4, clip_norm=1.0, batch_size=16, epochs=10)
    variants = {"paper": {}, "paper-large": dict(dim=256), "paper-wide": dict(mlp_ratio=4),
                "paper-separate": dict(task_weight=0.0),
                "paper-sequential": dict(task_weight=0.0, sequential=True, epochs=20),
                "paper-modelnet": dict(dim=256, inner_steps=4, subsample=0.1, epochs=150),
                "paper-320": dict(omega=30.0, inner_steps=4, subsample=0.1, epochs=40),
                "paper-320-large": dict(omega=30.0, inner_steps=4, subsample=0.1, epochs=40, dim=256)}
    for preset, changes in variants.items():
        assert mwt.PRESETS[preset] == {**paper, **changes}
    for arguments, preset in (("", "quick"), ("--dataset solids", "quick-3d"), ("--dataset mnist", "quick"),
                              ("--dataset modelnet40 --preset paper", "paper"), ("--method inrn", "quick")):
        assert train.parse(arguments.split())[0].preset == preset
    options = vars(train.parse(["--preset", "paper", "--inner-steps", "4", "--shared-step-sizes"])[0])
    assert {**options, **paper, "inner_steps": 4, "shared_step_sizes": True} == options
    published = dict(classifier="joint", latent_dim=256, dim=256, depth=3, omega=30.0, latent_penalty=0.1,
                     weight_penalty=100.0, task_weight=0.1, hyper_rate=5e-5, classifier_rate=1e-2, separate_rate=1e-3,
                     final_rate=1.0)
    assert published.items() <= hyperinr.PRESETS["paper"].items()
    for task in (task for method in (mwt, hyperinr, inrn) for task in method.TASKS.values()):
        assert all(values.keys() == task.hyperparameters.keys() for values in task.presets.values())
        for variants in task.ablations.values():
            assert len({str(variant) for variant in variants}) == len(variants) >= 2
            assert all(variant.keys() <= task.hyperparameters.keys() for variant in variants)


@pytest.mark.parametrize("model, text", [
    (lambda: mwt.MWT(dim=8, depth=1), (HERE / "README.md").read_text()),
    (lambda: hyperinr.HyperINR(classifier="weights", dim=16), hyperinr.__doc__),
    (lambda: inrn.INRN(widths="4,6,8,10", hybrid="post", activation="relu"), inrn.__doc__)], ids=train.METHODS)
def test_a_method_alone_in_an_empty_folder(tmp_path, model, text):
    """In a process without TensorFlow: the documented example, and a model that was saved here with its optimizer."""
    images, labels = random_batch(count=8, size=28)
    model = model()
    method, trained = type(model).__module__, inrn.Distiller(model) if isinstance(model, inrn.INRN) else model
    trained.compile(total_steps=5)
    trained.fit(images, labels, batch_size=4, verbose=0)
    trained.save(tmp_path / "model.keras")
    np.savez(tmp_path / "case.npz", images=images, logits=model.predict(images, verbose=0),
             momentum=trained.optimizers[0].variables[2].numpy())
    example, = (part for part in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if f"import {method}" in part)
    shutil.copy(HERE / f"{method}.py", tmp_path)
    (tmp_path / "example.py").write_text(f"import sys\nsys.modules['tensorflow'] = None\n{example}" + """
import keras
model, case = keras.saving.load_model("model.keras"), np.load("case.npz")
assert abs(model.predict(case["images"], verbose=0) - case["logits"]).max() < 1e-5
optimizer = getattr(model, "optimizers", [model.optimizer])[0]
assert int(optimizer.iterations) == 2 and abs(optimizer.variables[2].numpy() - case["momentum"]).max() == 0
""")
    result = run_python("example.py", cwd=tmp_path)
    assert result.returncode == 0 and "accuracy" in result.stdout, result.stderr


# ---- inrn.py: detection and segmentation ----


def small_detector(masks=True, **changes):
    keras.utils.set_random_seed(1)
    return inrn.Detector(10, 48, masks, **{**SMALL_DETECTOR, **changes})


def few_scenes(count=4, **options):
    split = data.load_objects("scenes", image_size=48, masks=True, **options).train
    images, targets = split.examples(np.arange(count))
    return torch.tensor(images), {name: torch.tensor(values) for name, values in targets.items()}


@needs_torchvision
@pytest.mark.parametrize("backbone", ["inrn", "resnet18"])
def test_a_detector_learns_the_losses_of_torchvision(backbone, tmp_path):
    """Its training step equals one of torchvision's own Mask R-CNN around the same backbone, all of which learns."""
    options = {name: value for name, value in SMALL_DETECTOR.items() if name not in ("widths", "blocks", "stem_stride")}
    model = small_detector() if backbone == "inrn" else inrn.Detector(10, 48, True, backbone, **options)
    stirred(model.body, 0.01)
    model.compile(total_steps=9, rate=0.0)
    images, targets = few_scenes()
    targets["crowd"][0, 0] = 1  # is not learned
    rcnn = model.rcnn.module
    model(images[:, :16])  # flat pictures
    assert rcnn.roi_heads.box_roi_pool.scales == rcnn.roi_heads.mask_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]

    def levels(x):
        outputs = model.body.stage_outputs(x.permute(0, 2, 3, 1)) if backbone == "inrn" else model.body.module(x)
        return rcnn.backbone({str(i): x.permute(0, 3, 1, 2) if backbone == "inrn" else x
                              for i, x in enumerate(outputs.values())})

    whole = torchvision.models.detection.generalized_rcnn.GeneralizedRCNN(
        levels, rcnn.rpn, rcnn.roi_heads, rcnn.transform)
    objects = [{name: values[i][targets["labels"][i] >= 0][i == 0:] + (name == "labels")
                for name, values in targets.items()} for i in range(len(images))]
    torch.manual_seed(0)  # seed 0, step 0
    expected = whole.train()(list(images.permute(0, 3, 1, 2)), objects)
    metrics = model.train_step((images, targets))
    for name, value in [*expected.items(), ("loss", sum(expected.values()))]:
        assert float(metrics[name.removeprefix("loss_")]) == pytest.approx(value.item(), rel=1e-4)
    assert all(variable.value.grad.abs().max() > 0 for variable in model.body.trainable_variables)
    with mock.patch("torch.manual_seed") as seed:
        model.train_step((images, targets))
        model.train_step((images, targets))
    assert seed.mock_calls == [mock.call(1), mock.call(2)]  # another in each step
    found = whole.eval()(list(images.permute(0, 3, 1, 2)))
    model.save(tmp_path / "model.keras")
    for one, two, three in zip(found, model(images), keras.saving.load_model(tmp_path / "model.keras")(images)):
        assert len(one["boxes"]) and (one["labels"] == two["labels"] + 1).all()
        torch.testing.assert_close(two["labels"], three["labels"])
        for name in ("boxes", "scores", "masks"):
            torch.testing.assert_close(one[name].reshape(two[name].shape), two[name], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(three[name], two[name])


@needs_torchvision
def test_a_pyramid_teaches_the_stages(tmp_path):
    """Equation 3 in plain PyTorch; the teacher is not a part of the student."""
    teacher, (images, targets) = small_detector(masks=False, pyramid_width=12), few_scenes()
    teacher.save(tmp_path / "teacher.keras")
    before, model = teacher.get_weights(), small_detector()
    model.learn_from(str(tmp_path / "teacher.keras"), feature_weight=0.5)
    model.compile(total_steps=9)
    with torch.no_grad():
        padded = functional.pad(images, (0, 0, 0, 16, 0, 16))  # to a multiple of 32 pixels
        stages = model.body.stage_outputs(padded).values()
        levels = list(teacher.rcnn.module.backbone({name: x.permute(0, 3, 1, 2) for name, x in
                                                    teacher.body.stage_outputs(padded).items()}).values())[:4]
        expected = 0.5 * plain_feature_loss(model.alignment, stages, [x.permute(0, 2, 3, 1) for x in levels])
    kernels = [variable for variable in model.trainable_variables if len(variable.shape) > 1]
    start = [kernel.numpy().copy() for kernel in kernels]
    assert float(model.train_step((images, targets))["distillation"]) == pytest.approx(float(expected), rel=1e-4)
    assert not any(map(np.array_equal, start, kernels))  # all learn
    assert all(map(np.array_equal, before, teacher.get_weights()))
    model.save(tmp_path / "model.keras")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone = keras.saving.load_model(tmp_path / "model.keras")
    assert int(alone.optimizers[0].iterations) == 1
    assert len(model.trainable_variables) == len(alone.trainable_variables) + 8
    with pytest.raises(ValueError, match="resolutions"):
        small_detector().learn_from(small_detector(stem_stride=8))
    for name in ("no_such_detector", str(tmp_path / "missing.keras")):
        with pytest.raises(ValueError, match="cannot load the teacher"):
            small_detector().learn_from(name)


def precisions_of(images, masks, rank=0, store=None):
    """In the first image an object is found: its box overlaps by 0.62, its mask by 0.72. In the second an object is not
    found, but a crowd, which is neither a hit nor a miss. With `store`, the result is common to two processes."""
    if store:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    there = {"boxes": torch.Tensor([[0, 0, 10, 10], [20, 20, 40, 50], [40, 0, 50, 5]]), "iscrowd": torch.arange(3) % 2,
             "labels": torch.zeros(3).long(), "masks": torch.zeros(3, 50, 50) > 0}
    for mask, (left, top, right, bottom) in zip(there["masks"], there["boxes"].int()):
        mask[top:bottom, left:right] = True
    found = {name: values[:2].clone() for name, values in there.items()} | {"scores": torch.tensor([0.8, 0.9])}
    found["boxes"][0, 3], found["masks"][0, :, 8:], found["masks"][0, 9:] = 6.2, False, False
    metric = inrn.AveragePrecision(masks)
    for i in images:
        metric.update_state([{name: values[i:2 * i + 1] for name, values in there.items()}],
                            [{name: values[i:i + 1] for name, values in found.items()}])
    return metric.result()


@needs_torchvision
@pytest.mark.parametrize("kinds", [{"": 0.3}, {"bbox_": 0.3, "segm_": 0.5}])  # share of the thresholds 0.5, 0.55, …
def test_average_precisions_equal_those_computed_by_hand(kinds, tmp_path):
    """In one process, and in two of which each has one of the images."""
    half, masks = 51 / 101, "" not in kinds  # half: of the recalls at which precisions are averaged
    expected = pytest.approx({f"{kind}map{threshold}": part * half for kind, share in kinds.items()
                              for threshold, part in (("", share), ("_50", 1), ("_75", 0))})
    assert precisions_of([0, 1], masks) == expected
    with multiprocessing.get_context("fork").Pool(2) as pool:
        both = pool.starmap_async(precisions_of, [([i], masks, i, tmp_path / "store") for i in (0, 1)], 1).get(300)
    assert both == 2 * [expected]


@needs_torchvision
def test_predicted_objects_are_printed_and_drawn(runs, tmp_path, capsys, monkeypatch):
    """In the pixels of the user's picture, whatever its size."""
    folder, picture = shutil.copytree(runs / "segment", tmp_path / "run"), tmp_path / "scene.png"
    Image.fromarray(data.scenes([3], 96)[0][0][:, :80]).save(picture)
    assert train.main(["--predict", str(folder), str(picture)]) == 0
    assert capsys.readouterr().out == f"{picture}: nothing found\n"
    detect = inrn.Detector.detect

    def certain(self, images, targets=None):
        return [one | {"scores": one["scores"] * 0 + 0.9} for one in detect(self, images, targets)]

    monkeypatch.setattr(inrn.Detector, "detect", certain)
    assert train.main(["--predict", str(folder), str(picture)]) == 0
    model = keras.saving.load_model(folder / "model.keras")
    one = model(data.scale(np.asarray(Image.open(picture)))[None])[0]
    assert one["masks"].shape[1:] == (96, 80) and 48 < one["boxes"].max() <= 96
    box = ", ".join(f"{x:.0f}" for x in one["boxes"][0].tolist())
    assert f"{data.SHAPES[one['labels'][0]]} 90.0% at {box}" in capsys.readouterr().out
    assert Image.open(folder / "predictions" / "0-scene-detections.png").size[0] > 200


def test_detection_without_torchvision_is_refused(tmp_path, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models.detection", None)
    if torchvision:
        assert "pip install torchvision" in refused("--method", "inrn", "--task", "detect", "--validation-images", 4,
                                                    "--run-dir", tmp_path / "run")
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    assert "pip install torchvision" in refused("--method", "inrn", "--task", "segment", "--dataset", "coco",
                                                "--image-size", 64, "--run-dir", tmp_path / "run")


# ---- data.py ----


@needs_torchvision
def test_scenes_have_exact_boxes_and_masks():
    images, targets = data.scenes([5, 6, 7], size=96, masks=True)
    again, _ = data.scenes([7], size=96)
    np.testing.assert_array_equal(again[0], images[2])
    assert not np.array_equal(again, data.scenes([7], size=96, seed=1)[0])
    fine = data.scenes([5, 6, 7], size=192)[1]
    for target, finer in zip(targets, fine):
        masks = np.unpackbits(target["masks"], axis=-1)
        assert masks.sum(axis=0).max() == 1 and 2 <= len(masks) <= 8  # visible parts do not overlap
        for mask, (left, top, right, bottom) in zip(masks, target["boxes"].astype(int)):
            assert mask[top:bottom, left:right].sum() == mask.sum() > 8
            assert all(side.any() for side in (mask[top], mask[bottom - 1], mask[:, left], mask[:, right - 1]))
        np.testing.assert_array_equal(target["labels"], finer["labels"])
        assert abs(target["boxes"] * 2 - finer["boxes"]).max() <= 2
    dataset = data.load_objects("scenes")
    assert dataset.image_shape == (128, 128, 3) and "masks" not in dataset.test.examples(np.arange(2))[1]
    assert not np.array_equal(dataset.train[np.arange(1)][0], dataset.test[np.arange(1)][0])


@needs_torchvision
def test_objects_are_augmented_with_their_images():
    """An object is as bright as nothing else, so its box and mask can be seen in the augmented image."""
    image, mask = np.full((1, 64, 64, 3), 128, np.uint8), np.zeros((64, 64), np.uint8)
    image[0, 10:40, 20:60], mask[10:40, 20:60] = 255, 1
    split = data.Objects(32, lambda indices: (np.repeat(image, len(indices), 0), [
        data._target(64, [(20, 10, 60, 40)], [3], [0], [mask]) for _ in indices]))
    images, targets = data.Batches(split, None, 32, 0, augment=True, flip=True)[0]
    sizes, mirrored = set(), 0
    for picture, boxes, labels, masks in zip(images, *(targets[name] for name in ("boxes", "labels", "masks"))):
        bright = picture[:, :, 0] > 0.5
        assert (labels[0] == 3) == (bright.sum() > 4)
        if labels[0] == 3 and bright.sum() > 4:
            rows, columns = bright.any(axis=1).nonzero()[0], bright.any(axis=0).nonzero()[0]
            np.testing.assert_allclose(boxes[0], [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], atol=1.6)
            assert (masks[0] != bright).mean() < 0.05
            sizes.add(round(float(boxes[0][2] - boxes[0][0])))
            mirrored += boxes[0][0] > 32
    assert len(sizes) > 10 and mirrored
    share = data.Batches(split, None, 32, 0, augment=True, flip=True, share=slice(1, None, 2))[0]
    np.testing.assert_array_equal(share[0], images[1::2])
    np.testing.assert_array_equal(share[1]["boxes"], targets["boxes"][1::2])


@pytest.fixture
def coco(tmp_path):
    """A folder in the form of COCO 2017: a polygon, run lengths, a crowd, no area; an image without objects."""
    categories = [{"id": 3, "name": "cat"}, {"id": 90, "name": "dog"}]  # with gaps
    images = [dict(id=i, file_name=f"{i}.jpg", width=80, height=60) for i in (7, 9, 12)]
    runs = [30 * 60 + 20, *[20, 40] * 39, 20, 20 + 10 * 60]  # of rows 20 to 40 of columns 30 to 70, column by column
    names, runs = "id image_id category_id bbox iscrowd area segmentation", {"counts": runs, "size": [60, 80]}
    annotations = [(1, 7, 90, [8, 4, 16, 32], 0, 512, [[8, 4, 24, 4, 24, 36, 8, 36]]),
                   (2, 7, 3, [30, 20, 40, 20], 1, 800, runs), (3, 9, 3, [30, 20, 40, 20], 0, 800, runs),
                   (4, 9, 3, [5, 5, 0, 9], 0, 0, [[5, 5, 5, 14, 5, 14]])]
    content = dict(images=images, categories=categories,
                   annotations=[dict(zip(names.split(), annotation)) for annotation in annotations])
    (tmp_path / "annotations").mkdir()
    for part in ("train2017", "val2017"):
        (tmp_path / part).mkdir()
        (tmp_path / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
        for i, image in enumerate(images):
            Image.new("RGB", (80, 60), (80 * i, 0, 255)).save(tmp_path / part / image["file_name"])
    return tmp_path


@needs_torchvision
def test_coco_is_read(coco, capsys):
    dataset = data.load_objects("coco", str(coco), image_size=40, masks=True)
    assert "coco: 2 boxes have no area" in capsys.readouterr().out
    assert dataset.class_names == ("cat", "dog") and (len(dataset.train), len(dataset.test)) == (2, 3) and dataset.flip
    images, targets = dataset.test.examples(np.arange(3))
    assert images.shape == (3, 40, 40, 3) and abs(images[:, 30:]).max() < 0.01  # grey below 40×30 pixels
    np.testing.assert_allclose(images[:, 15, 20, 0], data.scale(np.array([0, 80, 160])), atol=0.1)
    np.testing.assert_array_equal(targets["labels"], [[1, 0], [0, -1], [-1, -1]])
    np.testing.assert_array_equal(targets["crowd"], [[0, 1], [0, 0], [0, 0]])
    np.testing.assert_allclose(targets["boxes"][0], [[4, 2, 12, 18], [15, 10, 35, 20]])
    expected = np.zeros((2, 40, 40))
    expected[0, 2:18, 4:12] = expected[1, 10:20, 15:35] = 1
    np.testing.assert_array_equal(targets["masks"][0], expected)
    np.testing.assert_array_equal(targets["masks"][1, 0], expected[1])
    assert not targets["masks"][2].any()


@needs_torchvision
@pytest.mark.parametrize("damage, hint", [
    (lambda folder, content: (folder / "annotations" / "instances_val2017.json").unlink(), "FileNotFoundError"),
    (lambda folder, content: shutil.rmtree(folder / "train2017"), "FileNotFoundError"),
    (lambda folder, content: (folder / "val2017" / "9.jpg").unlink(), "1 images, such as 9.jpg, are not in val2017"),
    (lambda folder, content: content["annotations"][0].update(image_id=5), "annotation 1 is of image 5"),
    (lambda folder, content: content["annotations"][0].update(category_id=5), "category 5"),
    (lambda folder, content: content["annotations"][0].pop("iscrowd"), "KeyError: 'iscrowd'"),
    (lambda folder, content: content["images"][0].pop("width"), "KeyError: 'width'"),
    (lambda folder, content: content["categories"].append({"id": 91, "name": "cow"}), "differ"),
    (lambda folder, content: content["annotations"].clear(), "no images with objects"),
    (lambda folder, content: content.pop("images"), "instances_train2017.json")])
def test_a_broken_coco_folder_is_refused(coco, tmp_path, refused, damage, hint):
    path = coco / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    damage(coco, content)
    path.write_text(json.dumps(content))
    assert hint in refused("--method", "inrn", "--task", "detect", "--dataset", "coco", "--data-dir", coco,
                           "--image-size", "40", "--run-dir", tmp_path / "run")


def test_shapes_are_balanced_and_depend_on_seed_and_index_at_every_resolution():
    coarse, fine = (data.shapes(range(20), size=size, channels=3)[0] for size in (28, 82))
    assert np.array_equal(fine[:, ::3, ::3], coarse)  # 81 = 3 * 27 intervals: the grids share every third point
    assert np.array_equal(data.shapes([17, 3], channels=3, seed=0)[0], coarse[[17, 3]])
    assert not np.array_equal(data.shapes([3], channels=3, seed=1)[0], coarse[[3]])
    dataset = data.load("shapes", image_size=16, seed=5)
    assert not dataset.train.kept and not dataset.test.kept  # read when used
    splits = [split[np.arange(len(split))] for split in (dataset.train, dataset.test)]
    assert [images.shape for images, _ in splits] == [(10_000, 16, 16, 1), (2_000, 16, 16, 1)]
    assert all(labels.tolist() == [*range(10)] * (len(labels) // 10) for _, labels in splits)
    known, new = ({image.tobytes() for image in images} for images, _ in splits)
    fine = dataset.finer(7, 3)  # of the same test pictures; the grids share the corners
    assert not known & new and fine.shape == (7, 48, 48, 1) and dataset.image_shape == (16, 16, 1)
    assert np.array_equal(fine[:, ::47, ::47], data.scale(splits[1][0][:7, ::15, ::15]))


@pytest.fixture(scope="module")
def dummy_mnist(tmp_path_factory):
    """A dataset that TFDS prepares without a download, in both formats: 20 images in each split."""
    import tensorflow_datasets as tfds
    folder = tmp_path_factory.mktemp("tfds")
    for name in ("array_record", "tfrecord"):
        tfds.testing.DummyMnist(data_dir=folder / name, file_format=name).download_and_prepare()
    return folder


def test_tfds_datasets_on_disk(dummy_mnist, tmp_path):
    """Read without TensorFlow, read from TFRecord, and damaged."""
    result = run_python("-c", """
import sys, numpy as np, data
dataset = data.load("dummy_mnist")
for images, labels in (dataset.train[np.arange(20)], dataset.test[np.arange(20)]):
    assert images.shape == (20, 28, 28, 1) and (images == 1).all() and sorted(labels) == sorted(list(range(10)) * 2)
assert dataset.class_names == tuple("0123456789") and dataset.image_shape == (28, 28, 1)
assert "tensorflow" not in sys.modules
""", TFDS_DATA_DIR=str(dummy_mnist / "array_record"))
    assert result.returncode == 0 and not result.stderr, result.stderr
    images, _ = data.load("dummy_mnist", dummy_mnist / "tfrecord", image_size=16).train[np.arange(20)]
    assert images.shape == (20, 16, 16, 1) and images.dtype == np.uint8
    shutil.copytree(dummy_mnist / "array_record", tmp_path, dirs_exist_ok=True)
    dataset, (path,) = data.load("dummy_mnist", tmp_path), tmp_path.rglob("*-train.array_record*")
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(data.DataError, match=f"example 3 of the split 'train' in {path.parent}"):
        dataset.train[np.array([3, 5])]


def test_the_broken_example_of_a_batch_is_named(dummy_mnist):
    import tensorflow_datasets as tfds

    class Source(list):
        def __getitems__(self, indices):
            return [self[index] for index in indices]

    examples = [{"image": np.zeros((28, 28, 1), np.uint8), "label": 0}] * 5 + [{}] * 15
    with (mock.patch.object(tfds.core.DatasetBuilder, "as_data_source", lambda builder, split: Source(examples)),
          pytest.raises(data.DataError, match="example 5 of the split 'train'")):
        data.load("dummy_mnist", dummy_mnist / "array_record").train[np.array([3, 5])]


def test_examples_are_read_ahead_in_order_and_kept_while_there_is_room():
    read = []

    def images(indices):
        read.extend(indices.tolist())
        return np.ones((1, 10, 10, 1), np.uint8) * indices.astype(np.uint8)[:, None, None, None], indices

    split = data.Split(40, images)
    split.room = 1_000  # ten images
    batches = data.Batches(split, np.arange(5, 25), 5, seed=0)
    epochs = []
    for epoch, first in ((1, 2), (2, 0)):  # the first one is resumed in its middle
        batches.begin(epoch)
        epochs.append(list(batches.ahead(first, lambda batch: batch)))
        for index, (pictures, labels) in enumerate(epochs[-1], first):
            np.testing.assert_array_equal(labels, batches.order[5 * index:5 * index + 5])
            np.testing.assert_array_equal(pictures[:, 3, 4, 0], data.scale(labels))
    assert len(epochs[0]) == 2 and len(split.kept) == 10 and len(read) == 10 + 10 and sorted(read) == [*range(5, 25)]
    everything = data.Split(40, images)
    assert everything.room == 2**30 and len(everything[np.arange(40)][1]) == len(everything.kept) == 40


def test_tfds_prepares_what_is_not_on_disk(tmp_path, monkeypatch):
    """With a dataset that needs no download, and then without a network, where TFDS would retry for minutes."""
    import requests
    import tensorflow_datasets as tfds
    dummy = tfds.testing.DummyMnist
    monkeypatch.setattr(tfds, "builder", lambda name, **options: dummy(**options))
    assert data.load("dummy_mnist", data_dir=tmp_path).flip
    monkeypatch.setattr(dummy, "name", "mnist")
    dataset = data.load("mnist", data_dir=tmp_path)
    assert not dataset.flip and dataset.train[np.arange(20)][0].shape == (20, 28, 28, 1)  # mirrored digits are invalid
    assert list(tmp_path.rglob("*.array_record*"))
    monkeypatch.setattr(dummy, "url_infos", {"https://example.org/images": None})
    monkeypatch.setattr(dummy, "download_and_prepare", mock.Mock(side_effect=AssertionError("TFDS tried to download")))
    monkeypatch.setattr(requests, "head", mock.Mock(side_effect=requests.ConnectionError("no route to host")))
    with pytest.raises(data.DataError, match="no route to host.*TFDS_DATA_DIR.*--dataset shapes"):
        data.load("mnist", data_dir=tmp_path / "other")


def test_batches_follow_seed_and_epoch_and_validation_images_are_held_out():
    split = data.Split(70, lambda indices: (indices.astype(np.uint8).reshape(-1, 1, 1, 1), indices))
    options = train.parse(["--validation-images", "20", "--limit", "35", "--batch-size", "8", "--seed", "3"])[0]
    batches, validation = train.training_batches(options, data.Dataset(split, None, (1, 1, 1), flip=True))
    epochs = []
    for epoch in (1, 2):
        batches.begin(epoch)
        seen = [batches[index] for index in range(len(batches))]
        assert all(np.array_equal(np.rint((x[:, 0, 0, 0] + 1) * 127.5), y) for x, y in seen)
        epochs.append(np.concatenate([y for _, y in seen]).tolist())
    assert len(epochs[0]) == len({*epochs[0]}) == 32 and epochs[0] != epochs[1] and len({*epochs[0], *epochs[1]}) <= 35
    again, _ = train.training_batches(options, data.Dataset(split, None, (1, 1, 1)))
    assert again[3][1].tolist() == epochs[0][24:]  # a batch depends on seed, epoch and index only
    held_out = np.concatenate([validation[index][1] for index in range(len(validation))])
    assert len({*held_out}) == 20 and not {*held_out} & {*epochs[0], *epochs[1]}
    assert batches.flip and not again.flip and not batches.augment


def test_frames_are_read_from_files_or_drawn(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "b.png")
    Image.fromarray(255 - picture).save(tmp_path / "a.bmp")
    (tmp_path / "c.txt").write_text("no picture")

    def frames_of(path, longest):
        dataset = data.load_frames(path, image_size=longest)
        frames, _ = dataset.test[np.arange(len(dataset.test))]
        assert frames.shape[1:] == dataset.image_shape
        return frames

    assert np.array_equal(frames_of(tmp_path / "b.png", 100), picture[None])  # never scaled up
    assert frames_of(tmp_path / "b.png", 15).shape == (1, 10, 15, 3)
    assert np.array_equal(frames_of(tmp_path, 30), [255 - picture, picture])
    dataset = data.load_frames(tmp_path, image_size=30)
    assert dataset.train[np.array([0, 1, 0])][1].tolist() == [-1, 1, -1]
    batches, _ = train.training_batches(train.parse(["--method", "inrn", "--task", "fit"])[0], dataset)
    assert np.bincount(batches.indices).tolist() == [100, 100]
    for number, frame in ((10, picture), (2, 255 - picture)):
        (tmp_path / "numbered").mkdir(exist_ok=True)
        Image.fromarray(frame).save(tmp_path / "numbered" / f"{number}.png")
    assert np.array_equal(frames_of(tmp_path / "numbered", 30), [255 - picture, picture])
    Image.fromarray(picture[:10, :, 0]).save(tmp_path / "grey.png")
    assert np.array_equal(frames_of(tmp_path / "grey.png", 30)[0], picture[:10, :, :1].repeat(3, -1))
    with pytest.raises(data.DataError, match="30×10"):
        data.load_frames(tmp_path, image_size=30)
    mosaic, frames = data.shapes_mosaic(64, seed=2), data.shapes_video(16, 5, seed=2)
    tiles = mosaic.reshape(4, 16, 4, 16, 3).swapaxes(1, 2).reshape(16, 16, 16, 3)
    assert np.array_equal(tiles, data.shapes(range(16), 16, channels=3, seed=2)[0])
    parts = {mosaic[i:i + 16, j:j + 16].tobytes() for i in range(49) for j in range(49)}
    assert len({frame.tobytes() for frame in frames} & parts) == 5


def test_images_of_all_kinds_are_read(tmp_path, monkeypatch):
    picture = Image.fromarray(data.shapes([3])[0][0, :, :, 0])
    same = {"grey.png": picture, "rgb.png": picture.convert("RGB"), "palette.gif": picture.convert("P"),
            "rgba.png": picture.convert("RGBA"), "la.png": picture.convert("LA"),
            "deep.png": Image.fromarray(np.asarray(picture).astype(np.uint16) << 8)}
    other = {"photo.jpg": picture.resize((301, 200)).convert("RGB")}
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)  # by default 90 million: Pillow refuses twice as many
    for name, image in (same | other).items():
        image.save(tmp_path / name)
        read, _ = data.read_example("classify", "shapes", tmp_path / name, (28, 28, 1))
        expected = data.scale(np.asarray(picture))[None, :, :, None]
        assert read.shape == (1, 28, 28, 1) and (name in other or np.array_equal(read, expected))
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "truncated.jpg").write_bytes((tmp_path / "photo.jpg").read_bytes()[:2000])
    for name in ("empty.png", "truncated.jpg", "missing.png"):
        with pytest.raises(data.DataError, match=f"cannot read .*{name}"):
            data.read_example("classify", "shapes", tmp_path / name, (28, 28, 1))
    for name, kind in (("integers.tiff", np.int32), ("floats.tiff", np.float32)):
        Image.fromarray(np.full((9, 9), 2**20, kind)).save(tmp_path / name)
        with pytest.raises(data.DataError, match=f"{name} has values of 32 bits"):
            data.read_example("classify", "shapes", tmp_path / name, (28, 28, 1))


@pytest.mark.parametrize("flip", [False, True])
def test_augmentation_crops_the_reflected_image_by_seed_epoch_and_batch(flip):
    images = np.random.default_rng(0).integers(0, 256, (32, 9, 11, 3), dtype=np.uint8)
    split, places = data.Split(32, lambda indices: (images[indices], indices)), []
    padded = data.scale(np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="reflect"))
    crops = {padded[i, row:row + 9, column:column + 11][:, ::mirror].tobytes(): (i, row, column, mirror)
             for i, row, column, mirror in itertools.product(range(32), range(9), range(9), (1, -1))}
    for seed, epoch, index in [(0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0)] * 2:
        batches = data.Batches(split, None, 16, seed, augment=True, flip=flip)
        batches.begin(epoch)
        result, labels = batches[index]
        found, *place = zip(*[crops[crop.tobytes()] for crop in result])
        assert found == tuple(labels)
        places.append(place)
    assert places[:4] == places[4:] and len({*map(str, places)}) == 4
    rows, columns, mirrors = np.concatenate(places[:4], axis=1)
    assert {*rows} == {*columns} == {*range(9)} and len({*zip(rows, columns)}) > 30
    assert 15 < (mirrors < 0).sum() < 49 if flip else mirrors.min() == 1


def test_large_images_are_rotated_cropped_scaled_and_mirrored():
    """The images show their rows and columns, to which an affine map is fitted."""
    image = np.stack([*np.mgrid[:128, :128], np.zeros((128, 128))], axis=-1).astype(np.uint8)
    images = np.repeat(image[None], 64, axis=0)
    draws = np.random.default_rng(1).random((64, 6))
    pictures, mirrored = data.augment_large(images, draws, True), 0
    grid = np.stack([*np.mgrid[54:74, 54:74], np.ones((20, 20))], axis=-1).reshape(-1, 3)
    for picture in pictures:
        matrix, errors, *_ = np.linalg.lstsq(grid, picture[54:74, 54:74, :2].reshape(-1, 2).astype(float), rcond=None)
        height, width = np.linalg.norm(matrix[:2], axis=1) * 128 / 160  # of the crop, as a part of the padded image
        turn = np.degrees(np.arctan2(matrix[0, 1], matrix[0, 0]))
        assert errors.max() < 400 and abs(turn) < 31 and 0.76 < height * width < 1.01 and 0.74 < width / height < 1.35
        mirrored += np.linalg.det(matrix[:2]) < 0
    assert 15 < mirrored < 49
    for part in (images, images[:, 50:60, 50:60]):
        batch = data.Batches(data.Split(64, lambda indices: (part[indices], indices)), None, 64, 0, True, True)[0][0]
        corners = (batch == -1).all(axis=-1).any()
        assert batch.shape == part.shape and corners == (part is images)  # black where large images are rotated
    crops = data.augment_large(images, draws, False, crop=True).astype(int)
    heights, widths = (abs(crops[:, -1, -1, i] - crops[:, 0, 0, i]) / 127 for i in (0, 1))
    assert (heights * widths).min() < 0.2 and (heights * widths).max() > 0.9
    assert (np.ptp(crops[..., 1], axis=1) == 0).all()  # not rotated


# ---- train.py ----


@pytest.fixture(scope="session", autouse=True)
def few_shapes():
    """Reduces `shapes` and `solids` to 2,200 training and 100 test examples, and `scenes` to 50 and 9."""
    def load(name, *arguments, load=data.load, **options):
        dataset = load(name, *arguments, **options)
        if name in ("shapes", "solids"):
            dataset.train.count, dataset.test.count = 2_200, 100
        return dataset

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.LOADERS, "classify", load)
        patch.setattr(data, "SCENES", (50, 9))
        patch.setattr("torch.utils.benchmark.Timer.blocked_autorange", lambda timer, min_run_time: timer.timeit(2))
        yield


def run(name, folder, *options):
    return train.main([*RUNS[name], "--run-dir", str(folder), *map(str, options)])


def after_each_step(patch, action):
    """Adds action(number of the step, model, metrics) to the training step of MWT."""
    train_step, numbers = mwt.MWT.train_step, itertools.count(1)

    def step(self, batch):
        metrics = train_step(self, batch)
        action(next(numbers), self, metrics)
        return metrics

    patch.setattr(mwt.MWT, "train_step", step)


def run_with_signals(folder, *signals):
    """Returns the exit status of a run of MWT that receives signals in the second step of its second epoch."""
    with pytest.MonkeyPatch.context() as patch:
        after_each_step(patch, lambda step, *state: [signal.raise_signal(number) for number in signals if step == 8])
        return run("mwt", folder)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A folder with a finished run of each of RUNS, and with an interrupted one."""
    folder = tmp_path_factory.mktemp("runs")
    assert not any([run(name, folder / name) for name in RUNS])
    assert run_with_signals(folder / "interrupted", signal.SIGINT) == 130
    return folder


@pytest.fixture
def refused(capsys):
    """refused(*arguments): the one line with which train.py refuses them."""
    def refuse(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            train.main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        assert stopped.value.code == 2 and output.out == "" and output.err.count("\n") == 1
        return output.err
    return refuse


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def results_of(folder):
    """results.json without times."""
    return json.loads((folder / "results.json").read_text(), object_hook=lambda results: {
        name: value for name, value in results.items() if not name.startswith("seconds")})


def assert_same_run(folder, reference):
    """Equal weights and optimizers bit for bit, equal history and results, no files left behind."""
    assert contents(folder).keys() == contents(reference).keys() and results_of(folder) == results_of(reference)
    for path in reference.rglob("history.csv"):
        assert path.read_text() == (folder / path.relative_to(reference)).read_text()
    for path in reference.rglob("model.keras"):
        models = [keras.saving.load_model(path) for path in (folder / path.relative_to(reference), path)]
        optimizers = [getattr(model, "optimizers", [model.optimizer]) for model in models]
        values = [model.get_weights() + [variable.numpy() for optimizer in part for variable in optimizer.variables]
                  for model, part in zip(models, optimizers)]
        assert all(map(np.array_equal, *values)) and len(values[0]) == len(values[1])


@pytest.mark.parametrize("name, figures, parts", [
    *[(name, {"reconstructions.png"}, []) for name in ("mwt", "solids", "hyperinr")],
    ("inrn", {"stages.png"}, ["teacher"]), ("fit", {"fit.png"}, ["relu", "siren"]),
    pytest.param("segment", {"detections.png"}, [], marks=needs_torchvision)])
def test_a_whole_run_trains_like_model_fit(runs, name, figures, parts, tmp_path, refused):
    folder = shutil.copytree(runs / name, tmp_path / "run")
    assert {str(path) for path in contents(folder)} == {
        "config.json", "history.csv", "model.keras", "results.json", "curves.png", *figures,
        *[f"{part}/{file}" for part in parts for file in ("history.csv", "model.keras")]}
    config, results = (json.loads((folder / file).read_text()) for file in ("config.json", "results.json"))
    options, task = train.parse(RUNS[name])
    assert {key: x for key, x in vars(options).items() if key not in train.NOT_IN_CONFIG}.items() <= config.items()
    assert config["versions"]["torch"] == torch.__version__ and results["device"] and results["seconds_per_epoch"] > 0
    history = list(csv.DictReader((folder / "history.csv").open(newline="")))
    assert [row["epoch"] for row in history] == ["0", "1", "2"][:2 + (name == "hyperinr")]
    assert ("val_segm_map_50" if name == "segment" else "val_loss") in history[0]
    dataset = train.load_dataset(options, task)
    inputs, labels = dataset.test.examples(np.arange(len(dataset.test)))
    batches, _ = train.training_batches(options, dataset)
    begin = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: batches.begin(epoch + 1))
    for part, fitted, epochs in train.build(options, task, dataset, len(batches)):
        losses = fitted.fit(batches, epochs=epochs, shuffle=False, verbose=0, callbacks=[begin]).history["loss"]
        np.testing.assert_array_equal(
            np.genfromtxt(folder / part / "history.csv", delimiter=",", names=True)["loss"], losses)
        model, found = keras.saving.load_model(folder / part / "model.keras"), results[part] if part else results
        assert all(map(np.array_equal, getattr(fitted, "student", fitted).get_weights(), model.get_weights()))
        assert found["parameters"] == model.count_params()
        metrics = model.evaluate(inputs, labels, batch_size=7, verbose=0, return_dict=True)
        assert {metric: found[f"test_{metric}"] for metric in metrics} == pytest.approx(metrics, rel=1e-4)
        if name == "fit":
            squared = np.square(model.render([0.0], 24, 24) - inputs).mean()
            ssim = float(keras.ops.image.ssim(model.render([0.0], 24, 24) + 1, inputs + 1, max_val=2)[0])
            expected = {"loss": 0.7 * squared + 0.3 * (1 - ssim), "psnr": 10 * math.log10(4 / squared), "ssim": ssim}
            assert metrics == pytest.approx(expected, rel=1e-4)
            assert results["test_psnr"] > 20 and found["test_psnr"] > 13
            assert 0.8 * results["parameters"] < found["parameters"] <= results["parameters"]
        elif name != "segment":
            accuracy = (model.predict(inputs, verbose=0).argmax(-1) == labels).mean()
            assert 0 < accuracy < 1 and found["test_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    before = contents(folder)
    assert "already holds a run" in refused(*RUNS[name], "--run-dir", folder)
    assert train.main(["--resume", str(folder)]) == 0 and before == contents(folder)
    assert train.main(["--evaluate", str(folder)]) == 0
    evaluation, = folder.glob("evaluation-*")
    assert results_of(evaluation) == results_of(folder) and {path.name for path in evaluation.glob("*.png")} == figures


def test_two_processes_train_like_one_and_go_on_after_a_kill(tmp_path):
    """torchrun starts both processes again when one is killed. A single one that a signal ends is resumed."""
    options = ("--dim 8 --blocks 1 --subsample 1 --augment --image-size 10 --limit 240 --validation-images 51 "
               "--epochs 2 --save-every 1").split()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    said = {"killed": "lost another process", "stopped": "interrupted"}
    for name in ("one", "whole", *said):
        start = command if name != "one" else command[:1]
        process = subprocess.Popen([*start, HERE / "train.py", *options, "--run-dir", tmp_path / name], text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if name == "one":
            next(line for line in process.stdout if "step 1/7" in line)
            process.terminate()
        elif name in said:
            next(line for line in process.stdout if "step 7/7" in line)
            children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(children[1]), signal.SIGKILL if name == "killed" else signal.SIGTERM)
        output = process.communicate(timeout=240)[0]
        assert process.returncode == (143 if name == "one" else 0), output
        assert name not in said or said[name] in output and "0 and 0 done" not in output, output
    assert run_python(HERE / "train.py", "--resume", tmp_path / "one").returncode == 0
    weights = [keras.saving.load_model(tmp_path / name / "model.keras").get_weights() for name in ("whole", *said)]
    histories = [np.genfromtxt(tmp_path / name / "history.csv", delimiter=",", skip_header=1)
                 for name in ("one", "whole", *said)]
    np.testing.assert_allclose(histories[1], histories[0], rtol=1e-4)
    for other, history in zip(weights[1:], histories[2:]):
        assert all(map(np.array_equal, weights[0], other))
        np.testing.assert_array_equal(histories[1], history)
    assert results_of(tmp_path / "one")["test_psnr"] == pytest.approx(results_of(tmp_path / "whole")["test_psnr"], 1e-4)
    assert run_python(*command[1:], HERE / "train.py", "--evaluate", tmp_path / "whole").returncode == 0
    assert results_of(tmp_path / "whole" / "evaluation-shapes") == results_of(tmp_path / "whole")


def test_every_method_runs_on_a_device_that_is_not_the_cpu():
    """PyTorch's FakeTensorMode computes shapes and devices only. The device "lazy" stands for a GPU: no driver needed.
    Tensors of two devices in one operation are an error. A step reads at most one number back, the optimizer's step."""
    result = run_python("-c", """
import os, sys
sys.modules["tensorflow"] = None
import numpy as np, torch
import keras.src.backend.torch.random
keras.src.backend.torch.random.torch_seed_generator = lambda seed: None  # there is no generator for this device
import data, train
from torch._subclasses import FakeTensorMode, fake_impls
reads = []
def read(mode, function, tensor):
    reads.extend([tensor] * (tensor.device.type != "cpu"))
    return tensor.dtype.is_floating_point + 1
def numpy(tensor, *arguments, **options):
    assert tensor.device.type == "cpu", "a tensor on the GPU is not a NumPy array"
    return np.ones(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
fake_impls.op_implementations_dict[torch.ops.aten._local_scalar_dense.default] = read
torch.Tensor.numpy = torch.Tensor.__array__ = numpy
with FakeTensorMode(allow_non_fake_inputs=True):
    experiments = [f"hyperinr --classifier {name}" for name in ("joint", "latent", "weights", "pretrained", "pixels")]
    for method in ("mwt", "inrn", "inrn --task fit", *experiments):
        options, task = train.parse(["--method", *method.split()])
        channels, kind = (3, "float32") if options.task == "fit" else (1, "int64")
        images, labels = np.random.rand(4, 12, 12, channels).astype("float32"), np.zeros(4, kind)
        dataset = data.Dataset(None, range(1), images.shape[1:], tuple("0123456789"))
        for _, model, _ in train.build(options, task, dataset, 90):
            batch = train.to_tensors((images, labels))
            assert batch[0].device.type == "lazy"
            reads.clear()
            model.train_step(batch)
            assert len(reads) <= (options.method != "inrn")
            model.test_step(batch)
        if getattr(options, "classifier", "joint") == "joint":  # the report does not depend on it and takes time
            model = getattr(model, "student", model)
            task.report({options.method: model}, images, labels, dataset.class_names, None)
""", KERAS_TORCH_DEVICE="lazy:0")
    assert result.returncode == 0, result.stderr[-3000:]


def test_image_operations_of_hyperinr(runs):
    results, model = results_of(runs / "hyperinr"), keras.saving.load_model(runs / "hyperinr" / "model.keras")
    images, fine = (data.scale(data.shapes(range(10_000, 10_100), size=size)[0]) for size in (28, 112))
    errors = np.square(fine - model.upsample(images, 4)).mean(axis=(1, 2, 3))
    assert results["psnr"]["upsample"] == pytest.approx((10 * np.log10(4 / errors)).mean(), rel=1e-4)
    assert 12 < results["psnr"]["noisy"] < 14  # a noise of 0.5 alone: 12 dB; clipping reduces it
    odd, _ = hyperinr.report({"hyperinr": model}, np.zeros((3, 13, 13, 1), "float32"), None, (), None)
    assert odd["psnr"]["bilinear"] > 40 and odd["psnr"]["mean-filled"] > 40
    fits = results["a SIREN for each of 100 images"]
    assert 0 < fits["steps to the psnr of INR (at most 51)"] < 51
    assert fits["psnr after 5 steps"] < fits["psnr after 20 steps"] < fits["psnr after 50 steps"]


def test_sirens_are_fitted_to_each_image_like_a_single_one_in_pytorch():
    images = random_batch(size=8, channels=3)[0]
    errors = hyperinr.fit_each(images, dim=8, depth=1, omega=30.0, steps=5)
    seed, limit, coords = keras.random.SeedGenerator(0), math.sqrt(6 / 8) / 30, torch.linspace(-1, 1, 8)
    theta = [keras.random.uniform((5, *shape), -bound, bound, seed=seed)[-1].requires_grad_() for shape, bound in (
        ((2, 8), 1 / 2), ((1, 8), 2**-0.5), ((8, 8), limit), ((1, 8), 8**-0.5), ((8, 3), limit), ((1, 3), 8**-0.5))]
    optimizer = torch.optim.Adam(theta, lr=1e-3)
    for step in range(5):  # of the last image alone
        hidden = torch.cartesian_prod(coords, coords)
        for kernel, bias in zip(theta[:4:2], theta[1:4:2]):
            hidden = torch.sin(30.0 * (hidden @ kernel + bias))
        error = functional.mse_loss(hidden @ theta[4] + theta[5], images[-1].flatten(0, 1))
        assert errors[step][-1] == pytest.approx(error.item(), rel=1e-4)
        optimizer.zero_grad()
        error.backward()
        optimizer.step()


def test_a_run_on_a_tfds_dataset(runs, dummy_mnist, tmp_path, refused, monkeypatch):
    """From training in mixed precision to an evaluation on the same data, and runs that do not match the data."""
    folder, source = tmp_path / "run", ["--dataset", "dummy_mnist", "--data-dir", str(dummy_mnist / "array_record"),
                                        "--validation-images", "0"]
    assert run("mwt", folder, *source, "--precision", "mixed_bfloat16", "--image-size", 12) == 0
    keras.config.set_dtype_policy("float32")
    assert "val_" not in (folder / "history.csv").read_text()
    assert keras.saving.load_model(folder / "model.keras").classifier.layers[2].compute_dtype == "bfloat16"
    assert not any(train.main(["--evaluate", str(folder), *size]) for size in ([], ["--image-size", "14"]))
    evaluations = results_of(folder / "evaluation-dummy_mnist"), results_of(folder / "evaluation-dummy_mnist-14")
    assert evaluations[0] == results_of(folder) != evaluations[1]
    with monkeypatch.context() as patch:
        patch.setattr(train, "load_dataset", lambda *_: data.Dataset(None, None, (28, 28, 1), ("a", "b", "c")))
        assert "3 classes" in refused("--evaluate", runs / "mwt")
    assert "32×32" in (error := refused("--evaluate", runs / "fit", "--image-size", 32)) and "24×24" in error
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:5000]), lambda path: path.unlink()):
        damage(folder / "model.keras")
        assert "model.keras" in refused("--evaluate", folder)
    monkeypatch.setattr(data.Split, "__getitem__", lambda *arguments: pytest.fail("images were read"))
    assert "subsample" in refused(*RUNS["mwt"], *source, "--subsample", "2")


@pytest.mark.parametrize("name", ["mwt", "hyperinr", "inrn"])
def test_predict(runs, tmp_path, name, capsys, refused):
    folder, bad = shutil.copytree(runs / name, tmp_path / "run"), tmp_path / "bad.png"
    image = data.shapes([10_003])[0][0]
    good = tmp_path / ("数" * 80 + ".png")  # 244 bytes
    Image.fromarray(image[:, :, 0]).save(good)
    bad.write_text("this is no picture")
    assert train.main(["--predict", str(folder), str(bad), str(good)]) == 1
    output = capsys.readouterr()
    logits = torch.tensor(keras.saving.load_model(folder / "model.keras").predict(data.scale(image[None]), verbose=0))
    best = [f"{data.SHAPES[label]} {part:.1%}" for part, label in zip(*logits[0].softmax(-1).topk(3))]
    assert output.out == f"{good}: {', '.join(best)}\n"
    assert f"cannot read {bad}" in output.err and output.err.count("\n") == 1
    assert list((folder / "predictions").glob("1-数数*.png"))
    assert "classifier" in refused("--predict", runs / "fit", good)


def test_teachers_from_files(tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_teacher(size=28).save("teacher.keras")
    assert run("inrn", tmp_path / "run", "--teacher", "teacher.keras", "--logits-weight", 1, "--teacher-layers",
               "stage2,stage2,stage3,stage4") == 0
    assert not (tmp_path / "run" / "teacher").exists() and "distillation" in (tmp_path / "run/history.csv").read_text()
    assert train.read_config(tmp_path / "run")["teacher"] == str(tmp_path / "teacher.keras")
    small_teacher(classes=7, size=28).save("seven.keras")
    small_teacher(size=16).save("small.keras")
    small_inrn().save("inrn.keras")
    monkeypatch.setattr(keras.applications, "ResNet101", lambda **_: open("no network"))
    for teacher, hint in (("seven.keras", "7 classes, the dataset has 10"), ("small.keras", "the images are (28, 28,"),
                          ("inrn.keras", "functional or sequential"), ("missing.keras", "missing.keras"),
                          ("resnet101", "no network")):
        assert hint in refused(*RUNS["inrn"], "--teacher", teacher, "--run-dir", "bad")
    assert not (tmp_path / "bad").exists()


def test_fitting_files(tmp_path, monkeypatch):
    """The path of the files is relative, and the run is evaluated from another working directory."""
    frames, folder = data.shapes_video(18, 3), tmp_path / "run"
    (tmp_path / "frames").mkdir()
    for i in (2, 0, 1):
        Image.fromarray(frames[i]).save(tmp_path / "frames" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    assert run("fit", folder, "--no-compare", "--dataset", "frames", "--image-size", 12, "--parameters",
               12000, "--epochs", 8) == 0
    monkeypatch.chdir(HERE)
    assert train.main(["--evaluate", str(folder)]) == 0
    assert not (folder / "siren").exists() and train.read_config(folder)["image_shape"] == [12, 12, 3]
    pictures = keras.saving.load_model(folder / "model.keras").render([-1.0, 0.0, 1.0], 12, 12)
    truth = data.load_frames(tmp_path / "frames", image_size=12).test.examples(np.arange(3))[0]
    assert (((pictures[:, None] - truth) ** 2).mean((2, 3, 4)).argmin(1) == range(3)).all()  # each time shows its frame


def test_an_ablation(tmp_path, capsys, monkeypatch, refused):
    """Interrupted in the second of four parts, refused with other options, finished by the same command."""
    variants = [{"task_weight": 0.5, "mlp_ratio": 2}, {"task_weight": 1.0, "mlp_ratio": 2, "warmup": 0.5}]
    labels, steps = ["task_weight 0.5", "task_weight 1.0, warmup 0.5"], []  # without what the variants share
    monkeypatch.setitem(mwt.TASKS["classify"].ablations, "task_weight", variants)
    after_each_step(monkeypatch, lambda step, *state: (
        steps.append(step) or step == 8 and signal.raise_signal(signal.SIGTERM)))
    options = ("--epochs", 1, "--ablate", "task_weight")
    assert run("mwt", tmp_path, *options) == 143
    assert capsys.readouterr().err == "train.py: interrupted; run the same command again to continue\n"
    assert "contradicts" in refused(*RUNS["mwt"], "--run-dir", tmp_path, *options, "--dim", 8)
    assert run("mwt", tmp_path, *options) == 0 and len(steps) == 4 * 6  # no step is repeated
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = list(csv.DictReader((tmp_path / "table.csv").open(newline="")))
    assert len(printed) == 4 and printed[0] == f"| {' | '.join(rows[0])} |" and {*printed[1]} == {*"| -"}
    for row, variant, label, line in zip(rows, variants, labels, printed[2:], strict=True):
        folders = [tmp_path / f"{label.replace(', ', '-').replace(' ', '-')}-{seed}" for seed in (0, 1)]
        found = [results_of(folder)["test_psnr"] for folder in folders]
        assert float(row["test_psnr"]) == pytest.approx(np.mean(found))
        assert float(row["test_psnr ±"]) == pytest.approx(np.std(found, ddof=1))
        assert row["task_weight"] == label and line.startswith(f"| {label} | {row['parameters']} | ")
        config = train.read_config(folders[1])
        assert config["seed"] == 1 and {**config, **variant} == config


@pytest.mark.parametrize("terminal", [False, True])
def test_progress(tmp_path, monkeypatch, capsys, terminal):
    """With six steps of 8 seconds in each epoch."""
    steps = []
    after_each_step(monkeypatch, lambda *arguments: steps.append(8))
    monkeypatch.setattr(train.time, "perf_counter", lambda: 1000.0 + sum(steps))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    assert run("mwt", tmp_path / "run") == 0
    lines = re.findall(r"([^\r\n]*)epoch (\d)/2, step (\d)/6: ([^;]*); ([\d:]+) left(?:\x1b\[K)?([\r\n])",
                       capsys.readouterr().out)
    shown = {(1, 1): "0:01:28", (1, 5): "0:00:56", (1, 6): "0:00:48", (2, 4): "0:00:16", (2, 6): "0:00:00"}
    positions = [(int(epoch), int(step)) for _, epoch, step, *_ in lines]
    assert positions == ([(epoch, step) for epoch in (1, 2) for step in range(1, 7)] if terminal else [*shown])
    for step, (bar, _, _, metrics, left, end) in zip(positions, lines):
        assert shown.get(step, left) == left and "loss" in metrics and "accuracy" in metrics
        assert end == ("\r" if terminal and step[1] < 6 else "\n") and ("=" in bar) == terminal
    assert json.loads((tmp_path / "run" / "results.json").read_text())["seconds_per_epoch"] == 48


@pytest.mark.parametrize("arguments, hint", [
    ("--method nerf", "mwt"), ("--preset huge", "paper-wide"), ("--precision int8", "mixed_bfloat16"),
    ("--dataset no_such_dataset", "shapes, mnist"), ("--dataset imagenette/9px", "imagenette/320px-v2"),
    ("--dataset lm1b", "not an image classification dataset"), ("--dataset mnist:9.9.9", "unknown dataset"),
    ("--dataset imagenette/320px-v2", "--image-size 64"), ("--task fit", "classify"), ("--limit some", "an integer"),
    ("--limit 8", "--batch-size"), ("--inner-steps 0", "from 1 up"), ("--seed 4294967296", "2**32"),
    ("--siren-rate nan", "a number"), ("--validation-images 10000", "--limit"), ("--dim 100", "multiple of 64"),
    ("--subsample 0", "subsample"), ("--warmup 2", "between 0 and 1"), ("--inner-steps-test 9", "shared_step_sizes"),
    ("--shared-step-sizes maybe", "maybe"), ("--teacher none", "--teacher"), ("--seeds 0", "from 1 up"),
    ("--beta-2 1", "below 1"),
    ("--resume no/such", "config.json"), ("--benchmark --resume runs", "not allowed with"), ("--seed -1", "from 0 up"),
    ("--predict", "folder of a run"), ("--predict assets", "image files"), ("--predict assets a.png", "config.json"),
    ("--ablate task_weight --task-weight 0.7", "--task-weight itself"), ("--dataset modelnet40", "--data-dir"),
    ("--dataset solids --image-size 20", "--image-size"), ("--dataset modelnet40 --data-dir assets", "--data-dir"),
    *[(f"--method hyperinr {arguments}", hint) for arguments, hint in [
        ("--classifier cnn", "pretrained"), ("--final-rate 2", "0 and 1"), ("--dataset solids", "--method mwt")]],
    *[(f"--method inrn {arguments}", hint) for arguments, hint in [
        ("--widths 8,8", "four whole numbers"), ("--blocks 1,2,0,1", "four whole numbers"), ("--compare", "--compare"),
        ("--activation tanh", "relu"), ("--compile", "--compile"), ("--compression 0", "compression"),
        ("--ablate all", "stages"), ("--hybrid both", "interleaved"), ("--teacher-layers a,b", "stage1"),
        ("--ablate activation --limit 9", "--limit")]],
    *[(f"--method inrn --task fit {arguments}", hint) for arguments, hint in [
        ("--ablate stages", "architecture"), ("--widths 8,8,8,8", "--widths"), ("--alpha 2", "alpha"),
        ("--dataset no/such.png", "no/such.png"), ("--dataset .ci/run", "image"), ("--dataset .ci", "no image"),
        ("--precision mixed_bfloat16", "float32"), ("--augment", "--augment"), ("--limit 9", "--limit"),
        ("--validation-images 0", "--validation-images")]],
    *[(f"--method inrn --task detect --validation-images 4 {arguments}", hint) for arguments, hint in [
        ("--backbone vgg", "resnet18"), ("--dataset mnist", "scenes or coco"), ("--compile", "--compile"),
        ("--dataset coco", "--image-size 640")] if torchvision]])
def test_bad_options(arguments, hint, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(HERE)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "datasets"))
    assert hint in refused("--run-dir", tmp_path / "run", *arguments.split())
    assert not (tmp_path / "run").exists()


def test_compilation_without_a_compiler_is_refused(tmp_path):
    result = run_python(HERE / "train.py", "--compile", "--run-dir", tmp_path / "run", CXX="none",
                        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert result.returncode == 2 and "install a C++ compiler" in result.stderr and not (tmp_path / "run").exists()


def test_help_explains_every_hyperparameter_and_imports_no_tensorflow(tmp_path):
    result = run_python("-X", "importtime", HERE / "train.py", "--preset", "paper", "--help", cwd=tmp_path)
    imported = {line.rsplit("|", 1)[1].strip() for line in result.stderr.splitlines() if "import time:" in line}
    assert result.returncode == 0 and "keras" in imported
    assert not {"tensorflow", "tensorflow_datasets"} & imported and not list(tmp_path.iterdir())
    options = " ".join(result.stdout.split())
    for name, (value, text) in mwt.HYPERPARAMETERS.items():
        assert f"--{name.replace('_', '-')} " in options and f"{' '.join(text.split())} (default: {value})" in options


def test_benchmark(capsys):
    assert train.main("--benchmark --image-size 8 --batch-size 16 --inner-steps 2 --dim 32 --depth 2 --subsample 1 "
                      "--blocks 3".split()) == 0
    figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert {"ms_per_step", "peak_memory_mb", "gflop_per_step"} < figures.keys() and min(figures.values()) > 0
    parts = sum(figures[f"{part}_ms"] for part in ("forward", "backward", "optimizer"))
    assert abs(parts - figures["ms_per_step"]) < 0.05
    # An inner step costs three passes; training triples all but the gradients of what is not learned.
    siren = 64 * (2 * 32 + 2 * 32**2 + 32)
    transformer = 64 * (33 * 32 + 3 * (6 * 32**2 + 2 * 64 * 32))
    expected = 2 * 16 * ((2 * 9 + 3) * siren + 3 * transformer) / 1e9
    assert 0.75 * expected < figures["gflop_per_step"] <= 1.05 * expected


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_ends_like_one_that_was_not(runs, tmp_path, name, monkeypatch):
    """The files that a killed process leaves change only where it renames one, so it is killed before or after random
    renames, again and again. The two runs also show that the same seed gives the same run."""
    rng, replace, kills, folder = np.random.default_rng(1), os.replace, 0, tmp_path / "run"

    class Killed(BaseException):
        """Stands for `kill -9`: train.py does not catch it."""

    def replace_or_be_killed(source, target):
        moment = rng.random()
        if moment < 0.15:
            raise Killed
        replace(source, target)
        if moment > 0.85:
            raise Killed

    monkeypatch.setattr(os, "replace", replace_or_be_killed)
    while not (folder / "results.json").exists():
        try:
            train.main(["--resume", str(folder)]) if (folder / "config.json").exists() else run(name, folder)
        except Killed:
            kills += 1
    assert kills > 3
    for left in [*folder.rglob("checkpoint.pt"), *folder.rglob("new-*")]:
        left.unlink()
    assert_same_run(folder, runs / name)


@pytest.mark.parametrize("signals, position", [([signal.SIGTERM], (1, 2)), ([signal.SIGINT, signal.SIGTERM], (1, 0))])
def test_the_first_signal_saves_and_the_second_ends_at_once(tmp_path, capsys, signals, position):
    folder = tmp_path / "run"
    assert run_with_signals(folder, *signals) == 143
    assert capsys.readouterr().err == f"train.py: interrupted; continue with python train.py --resume {folder}\n"
    state, _ = torch.load(folder / "checkpoint.pt")
    assert (state["epoch"], state["step"]) == position


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_before_training(tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr(train, "load_dataset", lambda *_: os.kill(os.getpid(), number))
    assert run("mwt", tmp_path / "run") == 128 + number
    assert capsys.readouterr().err == "train.py: interrupted\n" and not (tmp_path / "run").exists()


def test_a_signal_in_the_last_validation(runs, tmp_path, monkeypatch):
    folder, evaluate, calls = tmp_path / "run", train.evaluate_model, []
    monkeypatch.setattr(train, "evaluate_model", lambda *arguments: (
        calls.append(0) or len(calls) == 2 and signal.raise_signal(signal.SIGTERM)) or evaluate(*arguments))
    assert run("mwt", folder) == 143 and len(calls) == 2 and not (folder / "results.json").exists()
    assert train.main(["--resume", str(folder)]) == 0
    assert_same_run(folder, runs / "mwt")


def test_a_second_start_leaves_the_empty_folder_of_the_first(tmp_path, refused):
    with train.locked(tmp_path / "run"):
        assert "in use by another process" in refused(*RUNS["mwt"], "--run-dir", tmp_path / "run")
        assert (tmp_path / "run").exists()
    assert not (tmp_path / "run").exists()


def flip_a_bit(checkpoint):
    """Changes one bit of the largest array; the file can still be read."""
    content = bytearray(checkpoint.read_bytes())
    largest = max(torch.load(checkpoint)[1], key=torch.Tensor.numel).numpy().tobytes()
    content[content.index(largest) + len(largest) // 2] ^= 1
    checkpoint.write_bytes(content)


@pytest.mark.parametrize("damage, arguments, hint", [
    *[(damage, "", "checkpoint.pt") for damage in (
        lambda path: path.write_bytes(path.read_bytes()[:-1000]), lambda path: path.write_bytes(b""), flip_a_bit,
        pathlib.Path.unlink)],
    *[(lambda path, text=text: path.with_name("config.json").write_text(text), "", "config.json")
      for text in ("{", "[]", '{"method": "nerf"}', '{"method": "mwt", "image_shape": [28, 28, 1]}')],
    (lambda path: fcntl.flock(os.open(path.parent, os.O_RDONLY), fcntl.LOCK_EX), "", "in use by another process"),
    *[(str, arguments, hint) for arguments, hint in (
        ("--dim 32", "--dim 32 contradicts"), ("--seed 7", "says 0"), ("--method hyperinr", "says mwt"),
        ("--dataset mnist", "says shapes"))]])
def test_resume_refuses(runs, tmp_path, refused, damage, arguments, hint):
    """Damaged files, a folder that is in use and other options are refused, and the folder does not change."""
    folder = shutil.copytree(runs / "interrupted", tmp_path / "run")
    damage(folder / "checkpoint.pt")
    before = contents(folder)
    assert hint in refused("--resume", folder, *arguments.split())
    assert before == contents(folder)


def test_a_failure_to_write(runs, tmp_path, capsys, monkeypatch):
    """Without a folder, and where the operating system limits files to 2 kB, which has the effect of a full disk."""
    interrupted, copy = (shutil.copytree(runs / "interrupted", tmp_path / name) for name in ("run", "copy"))
    (tmp_path / "file").write_text("not a folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        assert run("mwt", folder) == 1 and capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "not a folder"
    checkpoint, limits = (interrupted / "checkpoint.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        assert train.main(["--resume", str(interrupted)]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "File too large" in error and f"--resume {interrupted}" in error
    assert checkpoint == (interrupted / "checkpoint.pt").read_bytes() and not list(interrupted.rglob("new-*"))
    assert train.main(["--resume", str(interrupted)]) == 0
    assert_same_run(interrupted, runs / "mwt")
    capsys.readouterr()
    monkeypatch.setattr(os, "fsync", lambda descriptor: shutil.rmtree(copy))  # it vanishes during the run
    assert train.main(["--resume", str(copy)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"cannot write {copy} (No such file" in error


@pytest.mark.parametrize("what, spoil", [
    ("loss", lambda model, metrics: metrics.update(loss=torch.tensor(math.nan))),
    ("weight", lambda model, metrics: model.siren.head_scale.assign([math.inf]))])
def test_nan_keeps_good_weights(tmp_path, capsys, monkeypatch, what, spoil):
    """In the ninth step the loss becomes NaN, or a weight infinite, which the loss of this step does not show."""
    after_each_step(monkeypatch, lambda step, *state: step == 9 and spoil(*state))
    with pytest.raises(SystemExit):
        run("mwt", tmp_path / "run")
    error = capsys.readouterr().err
    assert "step 3 of epoch 2" in error and what in error and error.count("\n") == 1
    model = keras.saving.load_model(tmp_path / "run" / "model.keras")
    assert all(int(optimizer.iterations) == 6 for optimizer in model.optimizers)  # of the first epoch
    assert all(np.isfinite(weight).all() for weight in model.get_weights())


def test_readme_commands_are_real(runs, monkeypatch):
    config = train.read_config(runs / "mwt")
    monkeypatch.setattr(train, "read_config", lambda folder: config)
    readme = (HERE / "README.md").read_text().replace("\\\n", "")  # long commands have two lines
    commands = [shlex.split(command, comments=True) for command in re.findall(r"python train\.py([^\n`|]*)", readme)]
    assert all(["--method", "mwt", "--dataset", name] in commands for name in ("shapes", "mnist"))
    for command in commands:
        if "--help" not in command:
            train.parse(command)
    for arguments, folder in (("--dataset a/b --seed 7", "mwt-classify-a-b-quick-7"),
                              ("--ablate task_weight", "mwt-classify-shapes-quick-task_weight"),
                              ("--method inrn --task fit --dataset a/b.png", "inrn-fit-b-quick-0")):
        assert train.parse(arguments.split())[0].run_dir == pathlib.Path("runs", folder)
    assert "pip install -r requirements.txt && pytest test_all.py" in readme
    assert "pytest test_all.py" in (HERE / ".ci" / "run").read_text()
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", readme):
        assert (HERE / picture).stat().st_size < 300_000


# ---- 3-D shapes ----

CUBE = [(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]
SQUARES = [(0, 1, 3, 2), (4, 5, 7, 6), (0, 1, 5, 4), (2, 3, 7, 6), (0, 2, 6, 4), (1, 3, 7, 5)]
TRIANGLES = [half for a, b, c, d in SQUARES for half in ((a, b, c), (a, c, d))]


def dense_points(name, a, b, c):
    """A grid of points on a solid: on boxes, or on a curve r + iz through the given points, turned about the axis z."""
    def box(*sides):
        cube = np.stack(np.meshgrid(*3 * [np.linspace(0, 1, 61)]), axis=-1).reshape(-1, 3)
        return cube[abs(cube - 0.5).max(axis=1) == 0.5] * np.ptp(sides, axis=1) + np.min(sides, axis=1)

    def board(x, y, bottom, top):
        legs = [box((i * (x - 0.14), i * x), (j * (y - 0.14), j * y), (bottom, top - 0.14))
                for i in (-1, 1) for j in (-1, 1)]
        return np.concatenate([box((-x, x), (-y, y), (top - 0.14, top)), *legs])

    half, seat, ball, rod, tall = 0.35 + 0.15 * a, 0.3 * b - 0.2, 0.6 + 0.3 * a, 0.25 + 0.25 * a, 0.3j + 0.3j * b
    high, edge = 0.4j + 0.4j * b, 0.08 + 0.12 * c + 0.3j + 0.4j * b
    arc = np.exp(1j * np.linspace(-np.pi / 2, np.pi / 2, 2401))  # half of a circle; its squares are a whole one
    points = {
        "box": lambda: box(*[(-0.35 - 0.4 * p, 0.35 + 0.4 * p) for p in (a, b, c)]),
        "table": lambda: board(ball, 0.4 + 0.3 * b, -0.4 - 0.3 * c, 0.4 + 0.3 * c),
        "chair": lambda: np.concatenate([board(half, half, -0.85, seat), box(
            (-half, 0.14 - half), (-half, half), (seat, 0.65 + 0.25 * c))]),
        "sphere": lambda: ball * arc,
        "capsule": lambda: [*(rod * arc[:1201] - tall), *(rod * arc[1200:] + tall)],
        "torus": lambda: 0.5 + 0.2 * a + (0.15 + 0.15 * b) * arc**2,
        "cylinder": lambda: [-high, 0.35 + 0.35 * a - high, 0.35 + 0.35 * a + high, high],
        "tube": lambda: 0.5 + 0.2 * a + np.array([-edge, edge.conjugate(), edge, -edge.conjugate(), -edge]),
        "cone": lambda: [-0.6j, 0.5 + 0.4 * a - 0.6j, 0.5j + 0.4j * b],
        "dome": lambda: [-0.4j, *(ball * arc[1200:] - 0.4j)],
    }[name]()
    if np.ndim(points) > 1:
        return points
    lengths = np.cumsum(abs(np.diff(points, prepend=points[:1])))
    curve = np.interp(np.linspace(0, lengths[-1], 1201), lengths, points)
    turn = arc[::4, None] ** 2 * curve.real
    return np.column_stack([turn.real.ravel(), turn.imag.ravel(), np.tile(curve.imag, 601)])


@pytest.mark.parametrize("label", range(10))
def test_distances_from_solids_equal_those_from_dense_points(label):
    """The nearest of many points is never nearer than the surface, and a little farther."""
    rows, labels = data.solids([label, label + 10], seed=5)
    assert labels.tolist() == 2 * [label]
    np.testing.assert_array_equal(rows[1], data.solids([label + 10], seed=5)[0][0])  # depends on (seed, index) alone
    for row in rows:
        coords = np.random.default_rng(label).uniform(-1, 1, (400, 3))
        turn = scipy.spatial.transform.Rotation.from_euler("z", row[4])
        points = row[3] * turn.apply(dense_points(data.SOLIDS[label], *row[5:].astype(float))) + row[:3]
        expected, _ = scipy.spatial.cKDTree(points).query(coords)
        excess = expected - data.solid_distances(row, label, coords)
        assert -1e-6 < excess.min() and excess.max() < 0.01 and excess.mean() < 5e-4


def test_points_of_meshes_are_uniform_by_area():
    """Over faces of unequal size, and within a face, where the covariance of points depends on its corners."""
    corners = np.random.default_rng(0).normal(size=(20, 3, 3))
    corners[..., 2] = 4 * np.arange(20)[:, None]  # a point's height tells its face
    points = data.mesh_points(corners.reshape(-1, 3), np.arange(60).reshape(20, 3), largest=0.5) / 32767
    assert points.shape == (32_768, 3) and abs(points.mean(axis=0)).max() < 1e-4
    assert abs(points).max() == pytest.approx(0.5, abs=1e-4)
    face = (19 * (points[:, 2] - points[:, 2].min()) / np.ptp(points[:, 2])).round().astype(int)
    corners = (corners - corners.mean(axis=1, keepdims=True))[..., :2]
    areas = abs(np.linalg.det(corners[:, 1:] - corners[:, :1]))
    assert scipy.stats.chisquare(np.bincount(face), 32_768 * areas / areas.sum()).pvalue > 1e-4
    within = points[:, :2] * 76 / np.ptp(points[:, 2])  # corners' units; a face's center is taken from its points
    within -= np.stack([within[face == index].mean(axis=0) for index in range(20)])[face]
    expected = np.einsum("f,fvi,fvj->ij", areas / areas.sum(), corners, corners) / 12
    np.testing.assert_allclose(np.cov(within.T), expected, rtol=0.03, atol=0.005)


def test_distances_from_points_equal_those_of_all_pairs():
    rng = np.random.default_rng(0)
    points, coords = rng.integers(-32767, 32768, (40, 3), np.int16), rng.uniform(-1, 1, (25, 3)).astype("float32")
    rng = np.random.default_rng(1)
    moved = rng.uniform(0.9, 1.1) * points / 32767 + rng.normal(0, 0.01, points.shape)
    for rng, expected in ((None, points / 32767), (np.random.default_rng(1), moved)):
        distances = scipy.spatial.distance.cdist(coords, expected).min(axis=1)
        np.testing.assert_allclose(data.point_distances(points, 0, coords, rng), distances, atol=1e-6)


def write_off(path, header="OFF\n", faces=SQUARES, vertices=CUBE, ending=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [" ".join(map(str, vertex)) for vertex in vertices]
    lines += [f"{len(face)} {' '.join(map(str, face))}{ending}" for face in faces]
    path.write_text(f"{header}{len(vertices)} {len(faces)} 0\n" + "\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("form", [{}, {"header": "OFF"}, {"header": "OFF "}, {"header": "OFF # here\n\n# a cube\n"},
                                  {"ending": " 255 0 0"}, {"ending": "  # a face"}, {"faces": TRIANGLES},
                                  {"faces": TRIANGLES, "ending": " 0.5 0.5 0.5"}])
def test_all_forms_of_off_files_are_read(tmp_path, form):
    vertices, triangles = data.read_off(write_off(tmp_path / "a.off", **form))
    np.testing.assert_array_equal(vertices, CUBE)
    assert {*map(frozenset, triangles.tolist())} == {*map(frozenset, TRIANGLES)}


@pytest.mark.parametrize("change, hint", [
    (lambda text: text[:60], "vertices"), (lambda text: text[:-3], "faces"), (lambda text: text[:-15], "faces"),
    (lambda text: "", "OFF"), (lambda text: "ply\n" + text, "OFF"), (lambda text: "OFF\n0 0 0\n", "zero-size|area"),
    (lambda text: "OFF 8", "index"), (lambda text: text.replace("-1 -1 1", "-1 nan 1"), "finite"),
    (lambda text: text.replace("4 5 7 6", "4 5 9 6"), "index 9"), (lambda text: text.replace("-1", "1"), "area"),
    (lambda text: text.replace("4 5 7 6", "4 5 -9 6"), "corner"), (lambda text: text.replace("4 0 1", "4 x 1"), "'x'"),
    (lambda text: text.replace("8 6 0\n", "8 0 0\n"), "zero-size|area"), (lambda text: "\0\xff" * 50, "OFF")])
def test_broken_off_files_are_named(tmp_path, change, hint):
    path = write_off(tmp_path / "a.off")
    path.write_text(change(path.read_text()))
    with pytest.raises(data.DataError, match=f"cannot read .*a.off.*({hint})") as error:
        data.read_off(path)
    assert "\n" not in str(error.value)


def test_modelnet_is_read_once_and_its_errors_are_named(tmp_path, monkeypatch):
    points = ((3, 1e-3), (3, 1e-3))
    for label in range(3):  # boxes
        for name in ("train/a", "train/b", "test/c"):
            write_off(tmp_path / f"class{label}" / f"{name}.off", vertices=np.array(CUBE) * [1, 1 + label, 2])
    broken, whole = tmp_path / "class1/train/a.off", (tmp_path / "class1/train/a.off").read_text()
    broken.write_text(whole[:-20])
    with pytest.raises(data.DataError, match="cannot read .*a.off"):
        data.load("modelnet10", str(tmp_path), points=points).test[np.arange(1)]
    assert not [path for path in tmp_path.iterdir() if path.is_file()]
    broken.write_text(whole)
    dataset = data.load("modelnet10", str(tmp_path), points=points)
    (coords, distances), labels = dataset.test.examples(np.arange(3))
    assert (len(dataset.train), dataset.image_shape, coords.shape) == (6, (3, 32, 1), (3, 3, 32, 3))
    assert labels.tolist() == [0, 1, 2] and dataset.class_names == ("class0", "class1", "class2")
    half = np.array([(1, 1 + label, 2) for label in range(3)]) / [[max(2, 1 + label)] for label in range(3)]
    outside = abs(coords) - half[:, None, None]
    expected = np.linalg.norm(np.maximum(outside, 0), axis=-1) - np.minimum(outside.max(axis=-1), 0)
    np.testing.assert_allclose(distances[..., 0], expected, atol=0.04)
    monkeypatch.setattr(data, "read_off", lambda path: pytest.fail("the files are read again"))
    again = data.load("modelnet40", str(tmp_path), points=points)
    np.testing.assert_array_equal(again.test.examples(np.arange(3))[0][1], distances)
    (tmp_path / "class0/train/a.off").rename(tmp_path / "class0/train/d.off")
    with pytest.raises(pytest.fail.Exception, match="read again"):
        data.load("modelnet40", str(tmp_path), points=points).test[np.arange(1)]


def test_points_are_drawn_anew_for_each_batch_and_epoch():
    split = data.load("solids", points=((4, 0.02), (3, 0.05))).train
    batches, augmented = (data.Batches(split, np.arange(50), 8, 1, augment) for augment in (False, True))

    def expected(coords, indices, factor=1.0):
        return np.array([factor * data.solid_distances(*one, points / factor)
                         for one, points in zip(zip(*data.solids(indices)), coords.reshape(len(coords), -1, 3))])

    (coords, distances), labels = batches[2]
    assert coords.shape == (8, 4, 20, 3) and coords.dtype == distances.dtype == "float32"
    np.testing.assert_allclose(distances.reshape(8, -1), expected(coords, batches.order[16:24]), rtol=1e-6)
    np.testing.assert_array_equal(batches[2][0][0], coords)
    same = data.Batches(split, np.arange(8), 8, 1)  # the same solids in each epoch
    drawn = [coords, batches[3][0][0], same[0][0][0]]
    same.begin(2)
    drawn = np.array([*drawn, same[0][0][0]])
    assert len({part.tobytes() for part in drawn.reshape(-1, 60)}) == 4 * 8 * 4
    assert scipy.stats.chisquare(np.histogram(drawn, 10, (-1, 1))[0]).pvalue > 1e-4
    fixed = [np.concatenate([data.Batches(split, np.arange(12), n)[i][0][1] for i in range(12 // n)]) for n in (3, 4)]
    assert fixed[0].shape == (12, 3, 51, 1) and np.array_equal(*fixed)
    factors = []
    for epoch in (1, 2):
        augmented.begin(epoch)
        (coords, distances), _ = augmented[2]
        errors = np.array([abs(expected(coords, augmented.order[16:24], factor) - distances.reshape(8, -1)).max(axis=1)
                           for factor in np.linspace(0.9, 1.1, 401)])
        assert errors.min(axis=0).max() < 1e-3
        factors += errors.argmin(axis=0).tolist()
    assert len({*factors}) > 11


def some_points(count=6, axes=3, channels=1):
    generator = torch.Generator().manual_seed(0)
    return (2 * torch.rand(count, 4, 30, axes, generator=generator, dtype=torch.float64) - 1,
            torch.rand(count, 4, 30, channels, generator=generator, dtype=torch.float64))


def test_a_run_on_solids_predicts_meshes(runs, tmp_path, capsys, monkeypatch, refused):
    monkeypatch.setattr(data, "POINTS", 2000)
    folder = shutil.copytree(runs / "solids", tmp_path / "run")
    signal = data.load("solids", points=((3, 1.0), (3, 1.0))).test.examples(np.arange(100))[0]
    model, results = train.load_model(folder), results_of(folder)
    residuals = model.siren(signal)[1].detach()
    assert [*results["mean absolute error"]] == ["step 0", "step 1", "step 2"] and "test_psnr" not in results
    assert results["test_mse"] == pytest.approx(residuals[-1].square().mean().item(), rel=1e-4)
    for step, found in enumerate(results["mean absolute error"].values()):
        assert found == pytest.approx(residuals[step].abs().mean().item(), rel=1e-4)
    assert found == pytest.approx(results["test_mae"], rel=1e-4)
    assert model.reconstruct(signal, size=(4, 5, 6)).shape == (100, 3, 4, 5, 6, 1)
    assert train.main(["--predict", str(folder), str(write_off(tmp_path / "cube.off")), str(HERE / "README.md")]) == 1
    output = capsys.readouterr()
    assert "cube.off: " in output.out and "cannot read" in output.err
    assert len([*(folder / "predictions").iterdir()]) == 1
    assert train.main([*RUNS["solids"], "--benchmark"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ms_per_step"] > 0
    assert "10 classes, 2 axes" in refused("--evaluate", folder, "--dataset", "shapes")
