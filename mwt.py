"""Meta Weight Transformer (MWT): classifies an image by the weights of the small network that represents it.

Gielisse & van Gemert, "End-to-End Implicit Neural Representations for Classification", CVPR 2025.

A SIREN maps a coordinate to a colour: coords -> sine layers -> head -> pixel. For every image, K steps of gradient
descent on the reconstruction error adapt the same learned initialization, with a learned step size for every parameter
and step. The offsets of the weights, adapted minus initial, become a sequence of tokens, one per neuron, and a
Transformer classifies them. Training differentiates through the adaptation: initialization, step sizes and Transformer
are trained together, so that a few steps suffice and the offsets separate the classes.

The K gradients are written out below (`error_gradients`): backpropagation through a sine MLP takes a dozen lines. The
training step is therefore an ordinary forward graph with a single `backward()`, without second-order differentiation.

    symbol    shape                     meaning
    N P C     -                         images, points (pixels) of one image, colour channels
    D L K     -                         width of the SIREN, its hidden layers D -> D, inner steps
    coords    (P, 2) or (N, P, 2)       row and column, each from -1 to 1; points in space are (P, 3) or (N, P, 3)
    pixels    (N, P, C)                 colours at coords, from -1 to 1; in space, the distance from a surface
    weights   2 (L+1) tensors           kernel (N, in, D), bias (N, 1, D) of each sine layer; no N before the first step
    head      (D, C), (1, C)            kernel and bias of the last, linear layer, shared by all images
    tokens    (N, L*D, D+1)             one per neuron of the L hidden layers: offsets of its incoming weights and bias
"""

import math
import os
import types

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import torch
from keras import ops

if keras.backend.backend() != "torch":
    raise ImportError("this file needs Keras on PyTorch: set KERAS_BACKEND=torch before keras is imported")

# Each hyperparameter: the paper's value, and what it is.
HYPERPARAMETERS = {
    "dim": (128, "width D of the SIREN and of the Transformer"),
    "depth": (4, "number of hidden layers of the SIREN"),
    "omega": (10.0, "frequency of the SIREN's first layer; the paper uses 30 for Imagenette and ImageNet"),
    "inner_steps": (6, "number of gradient steps that adapt the SIREN to an image"),
    "inner_steps_test": (0, "inner steps outside of training, 0: as in training; more need shared step sizes"),
    "shared_step_sizes": (False, "use the same step sizes in all inner steps"),
    "subsample": (1.0, "fraction of the points that an inner step uses in training; the paper uses 0.1 for Imagenette"),
    "blocks": (10, "number of Transformer blocks"),
    "mlp_ratio": (1, "hidden width of the Transformer's MLPs, as a multiple of D"),
    "token_scale": (500.0, "factor that brings the tokens, which are small, to the order of 1"),
    "task_weight": (0.01, "factor of the classifier's gradient for the SIREN and the step sizes"),
    "every_step": (False, "train on the mean error after each inner step, not only after the last (arXiv:1810.09502)"),
    "sequential": (False, "train the SIREN in the first half of the steps and the classifier in the second"),
    "siren_rate": (1e-4, "peak learning rate of the SIREN"),
    "step_size_rate": (1e-2, "peak learning rate of the step sizes"),
    "classifier_rate": (1e-4, "peak learning rate of the classifier"),
    "warmup": (0.05, "fraction of the training steps in which the learning rates rise, at least 200 steps or a fifth"),
    "beta_2": (0.999, "decay rate of AdamW's averages of squared gradients"),
    "weight_decay": (1e-4, "weight decay of AdamW"),
    "clip_norm": (1.0, "largest gradient norm of each of the three groups of variables"),
    "batch_size": (16, "images per step"),
    "epochs": (10, "the paper uses 10 for MNIST, Fashion-MNIST and CIFAR-10, 40 for Imagenette and ImageNet"),
}
PAPER = {name: value for name, (value, _) in HYPERPARAMETERS.items()}
QUICK = {**PAPER, "dim": 64, "depth": 1, "inner_steps": 4, "subsample": 0.25, "blocks": 2, "task_weight": 0.3,
         "every_step": True, "siren_rate": 4e-3, "step_size_rate": 0.1, "classifier_rate": 1e-3, "batch_size": 32,
         "epochs": 3}  # tuned on held-out training images of MNIST, for six minutes on two CPU cores
PRESETS = {
    "quick": QUICK,
    "quick-3d": {**QUICK, "inner_steps": 6, "blocks": 3, "task_weight": 0.02, "siren_rate": 3e-3,
                 "classifier_rate": 2e-3, "epochs": 4},  # squared errors of distances are smaller than those of colours
    "paper": PAPER,                                                                            # MWT
    "paper-large": {**PAPER, "dim": 256},                                                      # MWT-L
    "paper-wide": {**PAPER, "mlp_ratio": 4},                                                   # MWT-W
    "paper-separate": {**PAPER, "task_weight": 0.0},                                           # WT-sim
    "paper-sequential": {**PAPER, "task_weight": 0.0, "sequential": True, "epochs": 20},       # WT-seq
    "paper-320": {**PAPER, "omega": 30.0, "inner_steps": 4, "subsample": 0.1, "epochs": 40},   # Imagenette, ImageNet
    "paper-320-large": {**PAPER, "dim": 256, "omega": 30.0, "inner_steps": 4, "subsample": 0.1, "epochs": 40},
    "paper-modelnet": {**PAPER, "dim": 256, "inner_steps": 4, "subsample": 0.1, "epochs": 150},  # Figure 3; 0.1: ours
}
POINTS_AT_ONCE = 2**16  # of all images together, outside of training: limits the memory


# ---- The SIREN, and its gradient written out ----


def coordinates(size, dtype="float32"):
    """Grid on [-1, 1] along each axis. For size (H, W): pixel centres, row by row, (H * W, 2), each (row, column)."""
    ticks = [ops.linspace(-1.0, 1.0, count, dtype=dtype) for count in size]
    return ops.reshape(ops.stack(ops.meshgrid(*ticks, indexing="ij"), axis=-1), (-1, len(size)))


def affine(inputs, kernel, bias):
    """Dense layer: inputs (…, P, in), kernel (…, in, out), bias (…, 1, out) -> (…, P, out)."""
    return (inputs @ kernel).add_(bias)  # in place, which saves an array


def in_parts(weights, *arrays):
    """Parts of the arrays (…, P, …) along their points, of at most POINTS_AT_ONCE points of all images together; one
    part where gradients are recorded, which needs the memory of all parts anyway."""
    points = arrays[0].shape[-2] * max(math.prod(array.shape[:-2]) for array in (weights[0], *arrays))
    count = 1 if torch.is_grad_enabled() else max(1, math.ceil(points / POINTS_AT_ONCE))
    return zip(*(torch.tensor_split(array, count, dim=-2) for array in arrays))


def render(weights, head, coords):
    """The SIREN: colours (N, P, C) at coords, or (P, C) if neither weights nor coords have an axis N. A layer is
    sin(h W + b), the head is linear. The first layer's W and b include omega, as from `MetaSiren.parameters_for`."""
    colours = []
    for (hidden,) in in_parts(weights, coords):
        for kernel, bias in zip(weights[::2], weights[1::2]):
            hidden = ops.sin(affine(hidden, kernel, bias))
        colours.append(affine(hidden, *head))
    return ops.concatenate(colours, axis=-2)


class SinCos(torch.autograd.Function):
    """sin(x) and cos(x) together. Each is the other's derivative up to sign, so backward computes neither again."""

    @staticmethod
    def forward(ctx, x):
        sin, cos = torch.sin(x), torch.cos(x)
        ctx.save_for_backward(sin, cos)
        return sin, cos

    @staticmethod
    def backward(ctx, grad_sin, grad_cos):
        sin, cos = ctx.saved_tensors
        return (grad_sin * cos).addcmul_(grad_cos, sin, value=-1.0)


def error_gradients(weights, head, coords, pixels, points):
    """The residual (N, P, C), and for each tensor of `weights` the gradient (N, in, D) or (N, 1, D) of each image's
    squared error, summed over the given points and divided by `points`, the number of all points, and by C. Weights
    without an axis N are shared by all images; what depends only on them and on shared coords is computed once."""
    kernels, inputs, slopes, gradients = weights[::2], [coords], [], []
    for kernel, bias in zip(kernels, weights[1::2]):
        hidden, slope = SinCos.apply(affine(inputs[-1], kernel, bias))
        inputs.append(hidden)
        slopes.append(slope)
    residual = affine(inputs[-1], *head) - pixels                                  # (N, P, C)

    delta = (2 / (points * pixels.shape[-1]) * residual) @ head[0].mT              # (N, P, D) d error / d hidden
    for layer in reversed(range(len(kernels))):
        delta = delta * slopes[layer]                                              # (N, P, D) d error / d affine
        kernel_gradient = inputs[layer].mT @ delta                                 # (N, in, D)
        bias_gradient = ops.sum(delta, axis=-2, keepdims=True)                     # (N, 1, D)
        gradients = [kernel_gradient, bias_gradient, *gradients]
        if layer > 0:
            delta = delta @ kernels[layer].mT
    return residual, gradients


def inner_step(weights, step_sizes, head, coords, pixels):
    """One step of gradient descent on each image's mean squared error, with elementwise step sizes: the weights (N, …)
    after it, the residual before it. Before the first, weights have no axis N. (Paper: inner loop of Algorithm 1.)"""
    parts = [error_gradients(weights, head, *part, pixels.shape[-2]) for part in in_parts(weights, coords, pixels)]
    residuals, gradients = zip(*parts)
    weights = [torch.addcmul(tensor, rate, sum(rest, first), value=-1.0)  # tensor - rate * gradient
               for tensor, rate, (first, *rest) in zip(weights, step_sizes, zip(*gradients))]
    return weights, ops.concatenate(residuals, axis=-2)


def inner_loop(weights, step_sizes, head, samples):
    """The weights after K inner steps, and the residuals (K+1, N, P, C) before the first step and after each. A pure
    function. step_sizes: K lists like weights. samples: K+1 pairs (coords, pixels), one for each residual."""
    residuals = []
    for rates, (coords, pixels) in zip(step_sizes, samples):
        weights, residual = inner_step(weights, rates, head, coords, pixels)
        residuals.append(residual)
    coords, pixels = samples[-1]
    return weights, ops.stack([*residuals, render(weights, head, coords) - pixels])


class MetaSiren(keras.layers.Layer):
    """Learned initialization, step sizes and head of the SIREN; adapts it to images. Initial values as published:
    first kernel U(±1/axes), hidden kernels U(±sqrt(6/D)), biases 0; step sizes U(0.1, 1); head U(±1/sqrt(D)), times a
    scale per channel that starts at 0.1."""

    def __init__(self, axes, channels, dim, depth, omega, inner_steps, inner_steps_test, shared_step_sizes, subsample,
                 **kwargs):
        super().__init__(**kwargs)
        self.axes, self.omega, self.subsample, self.shared_step_sizes = axes, omega, subsample, shared_step_sizes
        self.inner_steps, self.inner_steps_test = inner_steps, inner_steps_test or inner_steps
        self.seed_generator = keras.random.SeedGenerator()
        self.inner_loop = inner_loop  # in training, where it can be compiled
        uniform, count = keras.initializers.RandomUniform, 1 if shared_step_sizes else inner_steps
        self.initial, self.step_sizes = [], []  # for the kernel and the bias of each sine layer in turn
        for layer in range(depth + 1):
            fan_in, limit = (dim, math.sqrt(6 / dim)) if layer else (axes, 1 / axes)
            for name, rows, start in (("kernel", fan_in, uniform(-limit, limit)), ("bias", 1, "zeros")):
                self.initial.append(self.add_weight((rows, dim), start, name=f"{name}_{layer}"))
                self.step_sizes.append(
                    self.add_weight((count, rows, dim), uniform(0.1, 1.0), name=f"{name}_{layer}_step_sizes"))
        limit = 1 / math.sqrt(dim)
        self.head = [self.add_weight((rows, channels), uniform(-limit, limit), name=f"head_{name}")
                     for name, rows in (("kernel", dim), ("bias", 1))]
        self.head_scale = self.add_weight((channels,), keras.initializers.Constant(0.1), name="head_scale")
        self.built = True
        self.parameters_for(self.inner_steps_test)  # raises ValueError if there are no step sizes for them

    def parameters_for(self, steps):
        """Initial weights, head times its scale, and the step sizes of `steps` inner steps, as tensors. The first layer
        is adapted as omega W0 and omega b0, with omega² times its step sizes: W0 and b0 then change as published."""
        if steps > self.inner_steps and not self.shared_step_sizes:
            raise ValueError(f"the model has step sizes for {self.inner_steps} inner steps, not for {steps}: use fewer "
                             "steps, or train with shared_step_sizes=True")
        initial, sizes = ([variable.value for variable in group] for group in (self.initial, self.step_sizes))
        initial = [*(self.omega * tensor for tensor in initial[:2]), *initial[2:]]
        sizes = [*(self.omega**2 * tensor for tensor in sizes[:2]), *sizes[2:]]
        rates = [[tensor[0 if self.shared_step_sizes else step] for tensor in sizes] for step in range(steps)]
        return initial, [tensor * self.head_scale for tensor in self.head], rates

    def sample_points(self, images, training):
        """One pair (coords, pixels) for each inner step and one more. In training each pair has its own random subset
        of the points, otherwise all points. Signals that consist of points have one set for each pair."""
        steps, channels = self.inner_steps if training else self.inner_steps_test, self.head[0].shape[1]
        shapes = [tuple(part.shape) for part in keras.tree.flatten(images)]
        count, height, width = (*shapes[0], 0, 0)[:3]
        if shapes == [(count, steps + 1, width, last) for last in (self.axes, channels)]:
            return list(zip(*(ops.unstack(part, axis=1) for part in images)))
        if self.axes != 2 or shapes != [(count, height, width, channels)]:
            images = f"images (N, H, W, {channels}), or " if self.axes == 2 else ""
            raise ValueError(f"the input must be {images}coords (N, {steps + 1}, P, {self.axes}) and values (N, "
                             f"{steps + 1}, P, {channels}); got the shapes {shapes}")
        coords, pixels = coordinates((height, width), self.dtype), ops.reshape(images, (count, -1, channels))
        points = max(1, round(self.subsample * height * width))
        if not training or points == height * width:
            return [(coords, pixels)] * (steps + 1)
        # Points where a randomly shifted R2 sequence (Roberts) is largest: spread evenly, the same for all images. A
        # quarter changes the first gradients of shapes by 2 %; drawn for each image independently, as published, 13 %.
        mask = np.add.outer(np.arange(height) * 0.7548776662466927, np.arange(width) * 0.5698402909980532) % 1
        shifts = keras.random.uniform((steps + 1, 1), seed=self.seed_generator)
        _, chosen = ops.top_k((ops.convert_to_tensor(mask.ravel(), "float32") + shifts) % 1, points, sorted=False)
        return [*zip(coords[chosen], pixels[:, chosen].unbind(1))]

    def call(self, images, training=False):
        """Images, or points as in `MWT` -> tokens (N, L*D, D+1), residuals (K+1, N, P, C) as from `inner_loop`."""
        samples = self.sample_points(images, training)
        initial, head, rates = self.parameters_for(len(samples) - 1)
        adapted, residuals = (self.inner_loop if training else inner_loop)(initial, rates, head, samples)
        # Token l*D + j: the offsets of the weights into neuron j of hidden layer l, then that of its bias. The first
        # layer has no tokens, as published.
        offsets = [new - old for new, old in zip(adapted[2:], initial[2:])]
        tokens = [ops.concatenate(pair, axis=1).mT for pair in zip(offsets[::2], offsets[1::2])]
        return ops.concatenate(tokens, axis=1), residuals


# ---- The Transformer that classifies the tokens ----


def linear(inputs, units, **kwargs):
    """Dense layer with PyTorch's default initialization, as in the published code: U(±1/sqrt(inputs))."""
    kernel, bias = (keras.initializers.RandomUniform(-1 / math.sqrt(inputs), 1 / math.sqrt(inputs)) for _ in range(2))
    return keras.layers.Dense(units, kernel_initializer=kernel, bias_initializer=bias, **kwargs)


class LearnedBase(keras.layers.Layer):
    """scale * (tokens + base). The learned base (L*D, D+1) starts at 0 and identifies the neurons."""

    def __init__(self, shape, scale, **kwargs):
        super().__init__(**kwargs)
        self.scale = scale
        self.base = self.add_weight(shape=shape, initializer="zeros", name="base")

    def call(self, tokens):
        return self.scale * (tokens + self.base)


class Block(keras.layers.Layer):
    """x + scale1 * attention(norm(x)), then x + scale2 * mlp(norm(x)); both scales are per channel and start at 0.1."""

    def __init__(self, dim, mlp_ratio, **kwargs):
        super().__init__(**kwargs)
        self.heads, dtype = max(1, dim // 64), self.dtype_policy  # heads of 64 channels
        self.norm1, self.norm2 = (keras.layers.LayerNormalization(epsilon=1e-5, dtype=dtype) for _ in range(2))
        self.qkv = linear(dim, 3 * dim, use_bias=False, dtype=dtype)
        self.project = linear(dim, dim, dtype=dtype)
        self.expand = linear(dim, mlp_ratio * dim, activation="gelu", dtype=dtype)
        self.reduce = linear(mlp_ratio * dim, dim, dtype=dtype)
        self.scale1, self.scale2 = (self.add_weight((dim,), keras.initializers.Constant(0.1), name=name)
                                    for name in ("scale1", "scale2"))

    def call(self, x):
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        attended = (ops.softmax(query / math.sqrt(query.shape[-1]) @ key.mT) @ value if x.device.type == "cpu" else
                    torch.nn.functional.scaled_dot_product_attention(query, key, value))  # slower on CPUs
        x = x + self.scale1 * self.project(attended.transpose(1, 2).flatten(2))
        return x + self.scale2 * self.reduce(self.expand(self.norm2(x)))


def weight_transformer(num_classes, dim, depth, blocks, mlp_ratio, token_scale, dtype):
    """Model from tokens (N, L*D, D+1) to logits (N, num_classes)."""
    return keras.Sequential([
        keras.Input((depth * dim, dim + 1)),
        LearnedBase((depth * dim, dim + 1), token_scale, dtype=dtype),
        linear(dim + 1, dim, dtype=dtype),
        *[Block(dim, mlp_ratio, dtype=dtype) for _ in range(blocks)],
        keras.layers.GlobalAveragePooling1D("channels_last", dtype=dtype),
        linear(dim, num_classes, dtype=dtype.variable_dtype),  # logits in full precision
    ], name="weight_transformer")


# ---- Training ----


def one_cycle(step, total_steps, warmup):
    """Learning rate as a fraction of its peak, and Adam's beta_1, in a training step (from 0).

    The rate rises from 1/25 to 1 in the first `warmup` fraction of the steps, then falls to 1/250,000, both along half
    a cosine; beta_1 falls from 0.95 to 0.85 and rises again. (Smith & Topin, arXiv:1708.07120; PyTorch's defaults.)
    """
    top, end = warmup * total_steps - 1, total_steps - 1
    rising = step < top
    progress = step / top if rising else 1 + min(1, (step - top) / max(1, end - top))  # 0 first, 1 at the peak, 2 last
    height, lowest = (1 - math.cos(math.pi * progress)) / 2, 1 / 25 if rising else 1 / 250_000
    return lowest + (1 - lowest) * height, 0.95 - 0.1 * height


@keras.saving.register_keras_serializable("mwt")
class MWT(keras.Model):
    """Images (N, H, W, C), `float32` in [-1, 1] -> logits (N, num_classes).

    Other signals are pairs of coords (N, K+1, P, axes) in [-1, 1] and values (N, K+1, P, C): points for each inner step
    and for the error after the last. 3-D shapes have 3 axes; their values are the distances from the surface.

    `HYPERPARAMETERS` explains the arguments. H and W are arbitrary and may differ between training and use. `dtype` is
    the policy of the Transformer; the SIREN uses the type of its variables, because in bfloat16 the relative error of
    the inner loop's gradients is tens of percent. Raises ValueError for invalid arguments.

    Metrics: loss = mse + cross entropy; mse, the mean squared error of the reconstruction after the last inner step
    (also with every_step), on the scale of [-1, 1]; psnr, the mean over images of 10 log10(4 / mse), in dB, or with
    other axes than 2: mae, the mean absolute error; accuracy.
    """

    def __init__(self, channels=1, num_classes=10, dim=128, depth=4, omega=10.0, inner_steps=6, inner_steps_test=0,
                 shared_step_sizes=False, subsample=1.0, blocks=10, mlp_ratio=1, token_scale=500.0, task_weight=0.01,
                 every_step=False, sequential=False, axes=2, dtype=None, **kwargs):
        config = {key: value for key, value in locals().items() if key in {*PAPER, "channels", "num_classes", "axes"}}
        policy = keras.dtype_policies.get(dtype or keras.config.dtype_policy())
        super().__init__(dtype=policy.variable_dtype, **kwargs)
        if min(axes, channels, num_classes, dim, depth, inner_steps, blocks, mlp_ratio) < 1:
            raise ValueError("axes, channels, num_classes, dim, depth, inner_steps, blocks, mlp_ratio: at least 1")
        if dim > 64 and dim % 64:
            raise ValueError(f"dim must be a multiple of 64, or at most 64, for attention heads of 64; it is {dim}")
        if not 0 < subsample <= 1:
            raise ValueError(f"subsample, a fraction of the points, must be above 0 and at most 1; it is {subsample}")
        self.config, self.task_weight = {**config, "dtype": policy.name}, task_weight
        self.every_step, self.sequential = every_step, sequential
        self.siren = MetaSiren(axes, channels, dim, depth, omega, inner_steps, inner_steps_test, shared_step_sizes,
                               subsample, dtype=policy.variable_dtype)
        self.classifier = weight_transformer(num_classes, dim, depth, blocks, mlp_ratio, token_scale, policy)
        self.trackers = [keras.metrics.Mean(name=name) for name in ("loss", "mse", "psnr" if axes == 2 else "mae")]
        self.trackers.append(keras.metrics.SparseCategoricalAccuracy(name="accuracy"))
        self.built = True

    def call(self, images, training=False):
        return self.classifier(self.siren(images, training=training)[0], training=training)

    def reconstruct(self, images, steps=None, size=None):
        """Reconstructions of images (N, H, W, C) in [-1, 1], or of points, before the first inner step and after each.

        steps: number of inner steps; None uses inner_steps_test. More than inner_steps need shared step sizes.
        size: of the grid on [-1, 1] along each axis, at which the SIREN is sampled; None uses (H, W) of the images, and
        64 along each axis for points.
        Returns a `float32` array (N, steps+1, *size, C). Raises ValueError if there are no step sizes.
        """
        siren = self.siren
        size = size or ((64,) * siren.axes if isinstance(images, (tuple, list)) else images.shape[1:3])
        with torch.no_grad():
            images = keras.tree.map_structure(lambda part: ops.convert_to_tensor(part, siren.dtype), images)
            samples, grid = siren.sample_points(images, training=False), coordinates(size, siren.dtype)
            weights, head, rates = siren.parameters_for(siren.inner_steps_test if steps is None else steps)
            stages = [ops.repeat(render(weights, head, grid)[None], len(samples[0][1]), axis=0)]
            for rate, sample in zip(rates, samples * len(rates)):
                weights, _ = inner_step(weights, rate, head, *sample)
                stages.append(render(weights, head, grid))
            stages = ops.cast(ops.stack(stages, axis=1), "float32")
            return ops.convert_to_numpy(ops.reshape(stages, (*stages.shape[:2], *size, -1)))

    def compile(self, total_steps, siren_rate=1e-4, step_size_rate=1e-2, classifier_rate=1e-4, warmup=0.05,
                beta_2=0.999, weight_decay=1e-4, clip_norm=1.0, jit_compile=False):
        """One AdamW for each group of trainable variables, with the one-cycle schedule over total_steps training steps.

        total_steps: epochs times batches; at the end the rates are nearly 0 and stay there. With `sequential` each
        group has half of the steps. jit_compile uses `torch.compile` for the inner loop in training: slow to start,
        shorter steps. `HYPERPARAMETERS` explains the rest. Raises ValueError unless 0 <= warmup <= 1, 0 <= beta_2 < 1.
        """
        if not (0 <= warmup <= 1 and 0 <= beta_2 < 1):
            raise ValueError(f"warmup must be between 0 and 1, beta_2 at least 0 and below 1; got {warmup}, {beta_2}")
        self.compile_config = {name: value for name, value in locals().items()
                               if name in {*PAPER, "total_steps"}}  # without jit_compile, which is not saved
        super().compile(optimizer=None, jit_compile=False)
        self.siren.inner_loop = torch.compile(inner_loop, fullgraph=True) if jit_compile else inner_loop
        self.peak_rates = siren_rate, step_size_rate, classifier_rate
        self.steps = total_steps // 2 if self.sequential else total_steps  # of each group
        self.warmup = max(warmup, min(0.2, 200 / max(1, self.steps)))  # with 50, training can become unstable
        same = dict(beta_2=beta_2, weight_decay=weight_decay, global_clipnorm=clip_norm)
        self.optimizers = [keras.optimizers.AdamW(rate, **same) for rate in self.peak_rates]  # saved with the model
        for optimizer, variables in zip(self.optimizers, self.variable_groups()):
            optimizer.build(variables)

    def variable_groups(self):
        """Trained variables of the SIREN, the step sizes and the classifier, in the order of the optimizers."""
        siren = self.siren
        groups = [*siren.initial, *siren.head, siren.head_scale], siren.step_sizes, self.classifier.variables
        return [[variable for variable in group if variable.trainable] for group in groups]

    def losses(self, images, labels, sample_weight=None, training=False):
        """Logits (N, num_classes), residuals (K+1, N, P, C) as from `inner_loop`, and the mean cross entropy.
        sample_weight (N,) applies to the cross entropy only."""
        tokens, residuals = self.siren(images, training=training)
        # The classifier's gradient reaches the SIREN multiplied by task_weight, and the classifier unchanged.
        tokens = self.task_weight * tokens + (1 - self.task_weight) * ops.stop_gradient(tokens)
        logits = self.classifier(tokens, training=training)
        cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(labels, logits, sample_weight)
        return logits, residuals, cross_entropy

    def train_step(self, data):
        images, labels, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        logits, residuals, cross_entropy = self.losses(images, labels, sample_weight, training=True)
        mse, step = residuals[1 if self.every_step else -1:].square().mean(), int(self.optimizers[0].iterations)
        learning, loss = slice(0, 3), mse + cross_entropy
        if self.sequential and step < self.steps:
            learning, loss = slice(0, 2), mse
        elif self.sequential:
            step, learning, loss = int(self.optimizers[2].iterations), slice(2, 3), cross_entropy
        self.zero_grad()
        loss.backward()
        rate, beta_1 = one_cycle(step, self.steps, self.warmup)
        groups = [*zip(self.optimizers, self.peak_rates, self.variable_groups())]
        with torch.no_grad():
            for optimizer, peak_rate, variables in groups[learning]:
                optimizer.learning_rate, optimizer.beta_1 = rate * peak_rate, beta_1
                # Keras adds epsilon before it corrects the bias of the second moment, PyTorch (as published) after it.
                optimizer.epsilon = 1e-8 * math.sqrt(1 - optimizer.beta_2 ** (step + 1))
                optimizer.apply([variable.value.grad for variable in variables], variables)
            return self.update_metrics(labels, logits, residuals, cross_entropy, sample_weight)

    def test_step(self, data):
        images, labels, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        return self.update_metrics(labels, *self.losses(images, labels, sample_weight), sample_weight)

    def update_metrics(self, labels, logits, residuals, cross_entropy, sample_weight):
        loss, mse, psnr_or_mae, accuracy = self.trackers
        errors = residuals[-1].square().mean(dim=(1, 2))  # of each image
        loss.update_state(ops.mean(errors) + cross_entropy, sample_weight=len(errors))
        mse.update_state(errors)
        psnr_or_mae.update_state(10 * ops.log10(4 / errors) if self.siren.axes == 2 else ops.abs(residuals[-1]))
        accuracy.update_state(labels, logits, sample_weight)
        return self.get_metrics_result()

    metrics = property(lambda self: self.trackers)  # without Keras's own loss tracker

    def get_config(self):
        return {"name": self.name, **self.config}

    def get_compile_config(self):
        return self.compile_config if self.compiled else {}

    def compile_from_config(self, config):
        self.compile(**config)


# ---- What train.py asks for ----


def build(options, dataset, steps_per_epoch):
    """The models of a run: [(subfolder, compiled model, epochs)]."""
    model = MWT(dataset.image_shape[-1], len(dataset.class_names), options.dim, options.depth, options.omega,
                options.inner_steps, options.inner_steps_test, options.shared_step_sizes, options.subsample,
                options.blocks, options.mlp_ratio, options.token_scale, options.task_weight, options.every_step,
                options.sequential, dataset.axes)
    model.compile(options.epochs * steps_per_epoch, options.siren_rate, options.step_size_rate, options.classifier_rate,
                  options.warmup, options.beta_2, options.weight_decay, options.clip_norm, options.compile)
    return [("", model, options.epochs)]


def report(models, images, labels, class_names, finer):
    """A figure of the first images and their reconstructions before and after each inner step. For 3-D shapes: sections
    y = 0 of the distances, views of the surfaces, and the mean absolute error at each step as a further result."""
    model = models["mwt"]
    if not isinstance(images, tuple):
        return {}, {"reconstructions": [
            [(image, "input"), *((picture, f"step {step}\n{float(ops.psnr(image, picture, 2.0)):.1f} dB")
                                 for step, picture in enumerate(stages))]
            for image, stages in zip(images, model.reconstruct(images[:8]))]}
    with torch.no_grad():
        _, residuals = model.siren(images)
    errors = {f"step {step}": float(ops.mean(ops.abs(residual))) for step, residual in enumerate(residuals)}
    titles = ["true", *(f"{step}\nerror {error:.3f}" for step, error in errors.items())]
    stages = model.reconstruct([part[:4] for part in images])                      # (4, K+1, 64, 64, 64, 1)
    rows = [[*zip(row, titles)] for shape in np.concatenate([finer(len(stages), 64)[:, None], stages], axis=1)
            for row in (shape[:, :, 32, ::-1].swapaxes(1, 2) / 0.3 - 1, shape)]
    return {"mean absolute error": errors}, {"reconstructions": rows}


ABLATIONS = {"task_weight": [{"task_weight": weight} for weight in (0.0, 0.01, 0.1, 1.0)]}
TASKS = {"classify": types.SimpleNamespace(presets=PRESETS, hyperparameters=HYPERPARAMETERS, build=build, report=report,
                                           ablations=ABLATIONS, points=lambda options: (  # in training, and otherwise
    (options.inner_steps + 1, options.subsample), ((options.inner_steps_test or options.inner_steps) + 1, 1.0)))}
