"""INRN: blocks that compress and expand draw a picture or a video, or classify images with a teacher's help.

Song, Zhou & Ma ("Rethinking Implicit Neural Representations for Vision Learners") define an implicit neural
representation as a network from a fixed domain to a fixed range: from the points of a picture or the times of a video
to colours, or from the images of a dataset to classes. All use the same block, INRe. One stage of blocks fits a picture
or a video (equation 1). Four stages classify images, or find the objects in them; they learn from labels and from the
layers of a teacher (equations 2 to 4).

    single stage   learned maps (1, h, w, D), or for a video those of its times t (N,): (N, h, w, D)
                   -> INRe blocks, of which the first double the resolution -> dense (pictures) -> pixels (N, H, W, 3)
    four stages    images (N, H, W, C) -> stem -> stage1 -> ... -> stage4, 1/8 the resolution -> mean -> logits
    distillation   stage outputs -> 1×1 convolutions -> compared with the teacher's outputs
    detection      stage1 ... stage4 -> feature pyramid -> regions -> classes, boxes and masks of objects

    symbol    shape          meaning
    N H W C   -              number of images (or frames), height, width, channels
    D, D/c    -              width of a block, its hidden width; c is the compression coefficient
    t         (N,)           times of the frames of a video, from -1 to 1
    O_s O_t   (N, h, w, D)   outputs of one stage of the student, of one layer of the teacher

The paper shows the inside of a block only in a figure. Our reading: the two layers of the MLP map D to D/c and back,
and the 3×3 convolution is placed where the block is narrow: between the layers if c is above 1, before them if c is
below 1. In a sequence of blocks, convolution, expanding layer and compressing layer then have the same order for every
c. The parameter counts of Table 2 (millions, flat and with c) support this reading:

    size, c       paper             ours              ours, if c acted on the MLP alone
    S, 0.5        2.5    2.86       2.51   2.86       2.51   2.86
    M, 2          14     5.7        14.1   5.7        14.1   12.4
    L, 2          57     21         57.0   20.9       57.0   49.4

Halving the MLP's hidden width removes only a tenth of a block (11 D² to 10 D²); 5.7 million require a narrower
convolution. The strided convolutions in the shortcuts of the stages' first blocks keep their full width.

Example:

```python
import numpy as np
import inrn

images = np.random.uniform(-1, 1, (64, 28, 28, 1)).astype("float32")  # (N, H, W, C) in [-1, 1]
labels = np.random.randint(0, 10, 64)
teacher = inrn.residual_cnn((28, 28, 1), num_classes=10)              # untrained here: use one that you trained
student = inrn.INRN(channels=1, num_classes=10, widths="16,32,64,64", blocks="1,1,2,1", compression=2.0)
distiller = inrn.Distiller(student, teacher, image_shape=(28, 28, 1))
distiller.compile(total_steps=2 * 4)                                  # epochs × batches
distiller.fit(images, labels, batch_size=16, epochs=2)
print(student.evaluate(images, labels, return_dict=True))             # loss and accuracy

picture = np.random.uniform(-1, 1, (1, 32, 32, 3)).astype("float32")
model = inrn.PictureFit(size=(32, 32), parameters=600)
model.compile(total_steps=20)
model.fit(picture, np.zeros(1), epochs=20)                            # a single picture has time 0
print(model.render(times=[0.0], height=64, width=64).shape)           # interpolated: (1, 64, 64, 3)
```
"""

import bisect
import copy
import functools
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

# Hyperparameters of classification: value in the preset `small`, help. The paper gives only the coefficients of Table 2
# and four stages with more blocks in the middle; all other values are ours.
HYPERPARAMETERS = {
    "widths": ("32,64,96,128", "width of each of the four stages"),
    "blocks": ("1,3,16,3", "number of blocks in each of the four stages"),
    "stem_stride": (1, "stride of the first convolution"),
    "compression": (0.5, "compression coefficient: above 1 blocks compress first, below 1 they expand first, 1: flat"),
    "activation": ("gelu", "activation function: gelu or relu"),
    "hybrid": ("interleaved", "position of the convolution in a block: interleaved, front, post, or mlp for none"),
    "teacher": ("train", "train (a small residual CNN) or resnet56 (as for CIFAR), trained first on the same images; "
                "none; resnet101, of ImageNet, downloaded; or a .keras file: a classifier for images in [-1, 1]"),
    "teacher_layers": ("", "names of the teacher's layers for the four stages, A,B,C,D (empty: matched by resolution)"),
    "teacher_epochs": (30, "epochs for training the teacher, with --teacher train or resnet56"),
    "task_weight": (1.0, "weight of the cross-entropy (lambda_1)"),
    "feature_weight": (1.0, "weight of the mean squared errors between student and teacher features (lambda_2)"),
    "logits_weight": (0.0, "weight of the Kullback-Leibler divergence from the teacher's probabilities"),
    "temperature": (4.0, "temperature of the Kullback-Leibler divergence"),
    "rate": (2e-3, "peak learning rate of AdamW: warm-up over a twentieth of the steps, then cosine decay to 0"),
    "weight_decay": (0.05, "weight decay of AdamW"),
    "batch_size": (64, "images per training step"),
    "epochs": (50, "epochs for training INRN"),
}
BACKBONE = ("widths", "blocks", "stem_stride", "compression", "activation", "hybrid")  # arguments of an INRN
SMALL = {name: value for name, (value, _) in HYPERPARAMETERS.items()}
MEDIUM = dict(widths="88,176,352,352", blocks="1,3,6,2", stem_stride=4, compression=2.0)
PRESETS = {
    # For a CPU and small images; tuned on held-out training images of MNIST.
    "quick": SMALL | dict(widths="64,128,256,256", blocks="1,1,2,1", stem_stride=2, compression=2.0, rate=5e-3,
                          batch_size=96, epochs=2, teacher_epochs=1),
    "small": SMALL,
    "medium": SMALL | MEDIUM,
    "large": SMALL | dict(widths="128,256,512,768", blocks="2,5,12,2", stem_stride=4, compression=2.0),
    # The paper's teacher on ImageNet is a ResNet-101; it names none for CIFAR-100. The ResNet-56 and the numbers of
    # epochs are those of the methods that Table 4 compares INRN with (Tian et al., ICLR 2020).
    "cifar100": SMALL | dict(teacher="resnet56", epochs=240, teacher_epochs=240),
    "imagenet": SMALL | MEDIUM | dict(teacher="resnet101", epochs=100, batch_size=256),
}
# Hyperparameters of detection and segmentation: those of Mask R-CNN (He et al., ICCV 2017), and ours.
DETECTION_HYPERPARAMETERS = {
    "backbone": ("inrn", "inrn, or a ResNet with group normalization: resnet18, resnet34, resnet50 or resnet101"),
    **{name: HYPERPARAMETERS[name] for name in BACKBONE},
    "pyramid_width": (256, "channels of each level of the feature pyramid"),
    "head_width": (1024, "width of the layers that classify regions"),
    "anchor_size": (32, "side of the smallest anchors in pixels; each level of the pyramid doubles it"),
    "proposals": (1000, "regions that are classified in each image, at most"),
    "samples": (512, "regions of each image that the loss is computed from"),
    "teacher": ("none", "none; the name of a detector of torchvision, which is downloaded; or a run's .keras file"),
    "feature_weight": (1.0, "weight of the mean squared errors between features of INRN and of the teacher's pyramid"),
    "rate": (1e-3, HYPERPARAMETERS["rate"][1]),
    "weight_decay": HYPERPARAMETERS["weight_decay"],
    "batch_size": (16, "images per training step"),
    "epochs": (24, "number of epochs"),
}
DETECTION = {name: value for name, (value, _) in DETECTION_HYPERPARAMETERS.items()}
DETECTION_PRESETS = {  # quick is for a CPU and images of 128×128
    "quick": DETECTION | dict(widths="32,64,128,128", blocks="1,1,2,1", stem_stride=4, compression=2.0, rate=2e-3,
                              pyramid_width=64, head_width=256, anchor_size=16, proposals=100, samples=64,
                              batch_size=8, epochs=1),
    "medium": DETECTION | MEDIUM,
}
# Hyperparameters of fitting a picture or a video. All values are ours.
FIT_HYPERPARAMETERS = {
    "compare": (False, "also fit networks of no more parameters: a SIREN and a ReLU MLP; for a video NeRV's blocks"),
    "parameters": (40_000, "largest number of parameters; it determines the maps' size and the blocks' width"),
    "width": (0, "width of the blocks, whatever the number of parameters (0: the largest that it allows)"),
    "blocks": (3, "smallest number of blocks for a picture; a video has one for each doubling of the resolution"),
    "compression": (2.0, HYPERPARAMETERS["compression"][1]),
    **{name: HYPERPARAMETERS[name] for name in ("activation", "hybrid")},
    "alpha": (0.7, "weight of the squared error in the loss; 1 - SSIM has weight 1 - alpha"),
    "rate": (0.0, "initial learning rate of INRN (0: 8e-3 for 100,000 parameters; it falls with the square root of "
             "--parameters, and is at most 1e-2)"),
    "siren_rate": (1e-3, "initial learning rate of the SIREN"),
    "relu_rate": (3e-3, "initial learning rate of the ReLU MLP"),
    "nerv_rate": (5e-3, "initial learning rate of the network of NeRV's blocks"),
    "batch_size": (4, "frames per training step"),
    "epochs": (20, "number of epochs; an epoch shows each frame equally often, at least 200 frames in all"),
}
FIT_QUICK = {name: value for name, (value, _) in FIT_HYPERPARAMETERS.items()}
FIT_PRESETS = {"quick": FIT_QUICK, "video": FIT_QUICK | dict(parameters=200_000, batch_size=2)}


@keras.saving.register_keras_serializable("inrn")
class WarmupCosine(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that rises linearly to `rate` in the first twentieth of the steps and then falls to 0 along half
    a cosine. (Keras's CosineDecay reads the step back from a GPU if it has a warm-up.)"""

    def __init__(self, rate, total_steps):
        self.rate, self.total_steps = rate, total_steps

    def __call__(self, step):
        step, warm = ops.cast(step, "float32"), self.total_steps // 20
        progress = ops.clip((step - warm) / max(1, self.total_steps - warm), 0.0, 1.0)
        return self.rate * ops.minimum(step / warm if warm else 1.0, (1 + ops.cos(math.pi * progress)) / 2)

    def get_config(self):
        return {"rate": self.rate, "total_steps": self.total_steps}


class GroupTrained(keras.Model):
    """Base of models with an optimizer for each group of their variables.

    A subclass defines score(data, training), which returns the loss of a batch, a scalar, and updates the metrics, and
    `trackers`, its metrics. With a teacher, `teach` is a function that returns its features, and `alignment` are the
    1×1 convolutions that only the training needs (equation 3)."""

    # Keras records a layer's constructor arguments (numbers, strings, lists) as its config, but not a model's.
    __new__ = keras.Layer.__new__
    alignment, teach = (), None

    def variable_groups(self):
        """The variables of each optimizer: the model's own and, if there are any, those of the 1×1 convolutions."""
        added = [variable for layer in self.alignment for variable in layer.trainable_variables]
        own = [variable for variable in self.trainable_variables if all(variable is not other for other in added)]
        return [own, added] if added else [own]

    def compile(self, total_steps, rate=1e-3, weight_decay=0.05):
        """AdamW with `WarmupCosine` for each group of variables. total_steps: epochs × batches. Gradients are clipped
        to norm 1. Biases and normalization, all of one axis, have no weight decay."""
        self.compile_config = dict(total_steps=total_steps, rate=rate, weight_decay=weight_decay)
        super().compile(optimizer=None, jit_compile=False)
        options, groups = dict(weight_decay=weight_decay, global_clipnorm=1.0), self.variable_groups()
        self.optimizers = [keras.optimizers.AdamW(WarmupCosine(rate, total_steps), **options) for _ in groups]
        for optimizer, variables in zip(self.optimizers, groups):
            optimizer.exclude_from_weight_decay([variable for variable in variables if len(variable.shape) == 1])
            optimizer.build(variables)

    def train_step(self, data):
        loss = self.score(data, training=True)
        self.zero_grad()
        loss.backward()
        with torch.no_grad():
            for optimizer, variables in zip(self.optimizers, self.variable_groups()):
                optimizer.apply([variable.value.grad for variable in variables], variables)
        return self.get_metrics_result()

    def test_step(self, data):
        self.score(data, training=False)
        return self.get_metrics_result()

    metrics = property(lambda self: self.trackers)  # without Keras's own loss tracker

    def get_compile_config(self):
        return self.compile_config if self.compiled else {}

    def compile_from_config(self, config):
        self.compile(**config)


# ---- The block ----


@keras.saving.register_keras_serializable("inrn")
class Conv2D(keras.layers.Conv2D):
    """`keras.layers.Conv2D` for channels_last. Keras 3.15 copies such inputs to channels_first and back before each
    convolution; here, both are views of the same memory."""

    def convolution_op(self, inputs, kernel):
        inputs = ops.transpose(inputs, (0, 3, 1, 2))
        outputs = ops.conv(inputs, kernel, self.strides, self.padding, "channels_first", self.dilation_rate)
        return ops.transpose(outputs, (0, 2, 3, 1))


def built(kind, inputs, outputs, initializer=None, dtype="float32", **options):
    """A Keras layer of class `kind`, built for (N, H, W, inputs). The default initializer is U(±1 / sqrt(fan_in)),
    a third of the variance that preserves the signal's; the default dtype is not Keras's global one."""
    initializer = initializer or keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform")
    layer = kind(outputs, kernel_initializer=initializer, dtype=dtype, **options)
    layer.build((None, None, None, inputs))
    return layer


dense = functools.partial(built, keras.layers.Dense)  # over channels: a layer of an MLP
convolution = functools.partial(built, Conv2D, kernel_size=3, padding="same", data_format="channels_last")


def pixels(x, scale):
    """The channels of each position become scale × scale pixels: (N, H, W, scale² C) -> (N, scale H, scale W, C)."""
    return ops.depth_to_space(x, scale, data_format="channels_last") if scale > 1 else x


@keras.saving.register_keras_serializable("inrn")
class INReBlock(keras.layers.Layer):
    """(N, H, W, inputs) -> (N, H/stride, W/stride, width), sides rounded up. (Section 2.2.)

    Layer normalization, then a convolution and the two layers of an MLP with activations in between. A shortcut is
    added: the identity if the shape does not change, otherwise a convolution with this stride ("mlp": pooling, a dense
    layer). The last layer starts at zero, so a new block equals its shortcut. Normalization and shortcut are ours.

    upscale: s; above 1 the block returns (N, s H, s W, width); stride must be 1, the last layer does not start at zero,
    and its layers are as wide as its inputs. The last, or a convolution between the others, computes s² pixels for each
    position. The shortcut is a dense layer, then bilinear interpolation.
    compression: c; the MLP's hidden width is width / c. At 1 the block is flat; below 1 it expands first.
    activation: "gelu" (exact, not approximated) or "relu".
    hybrid (Table 1): "interleaved": the convolution has the narrower width, between the layers or, for c < 1, before
    them; "front", "post": it has full width, before or after them (so for c < 1 "interleaved" is "front"); "mlp": no
    convolution, and strides become average pooling. Raises ValueError for other values."""

    def __init__(self, inputs, width, compression=2.0, stride=1, activation="gelu", hybrid="interleaved", upscale=1,
                 **kwargs):
        super().__init__(**kwargs)
        if activation not in ("gelu", "relu"):
            raise ValueError(f"activation must be gelu or relu; it is {activation}")
        if hybrid not in ("interleaved", "front", "post", "mlp"):
            raise ValueError(f"hybrid must be interleaved, front, post or mlp; it is {hybrid}")
        middle = inputs if upscale > 1 else width
        if not 0 < compression <= middle:
            raise ValueError(f"compression must be above 0 and at most the width, {middle}; it is {compression}")
        self.upscale, hidden, out = upscale, round(middle / compression), width * upscale**2
        self.activation, self.pool = keras.activations.get(activation), stride if hybrid == "mlp" else 1
        self.norm = keras.layers.LayerNormalization(epsilon=1e-5, dtype=self.dtype_policy)
        self.norm.build((None, None, None, inputs))
        linear = functools.partial(dense, dtype=self.dtype_policy)
        conv = functools.partial(convolution, strides=stride, dtype=self.dtype_policy)
        start = None if upscale > 1 else "zeros"
        if hybrid == "mlp":
            self.steps = [linear(inputs, hidden), linear(hidden, out, start)]
        elif hybrid == "post":
            self.steps = [linear(inputs, hidden), linear(hidden, middle), conv(middle, out, start)]
        elif hybrid == "interleaved" and compression >= 1:
            self.steps = [linear(inputs, hidden), conv(hidden, hidden * upscale**2), linear(hidden, width, start)]
        else:
            self.steps = [conv(inputs, middle), linear(middle, hidden), linear(hidden, out, start)]
        same_shape = inputs == width and upscale == 1 and (stride == 1 or hybrid == "mlp")  # after pooling
        self.shortcut = None if same_shape else (linear if hybrid == "mlp" or upscale > 1 else conv)(inputs, width)
        self.built = True

    def call(self, x):
        if self.pool > 1:
            x = ops.average_pool(x, self.pool, padding="same", data_format="channels_last")
        y = self.steps[0](self.norm(x))
        for step in self.steps[1:]:
            y, channels = self.activation(y), step.kernel.shape[-2]
            several = y.shape[-1] > channels  # those of s² pixels: the layer is the same for each
            y = step(ops.reshape(y, (*y.shape[:3], -1, channels)) if several else y)
            y = ops.reshape(y, (*y.shape[:3], -1)) if several else y
        x, y = x if self.shortcut is None else self.shortcut(x), pixels(y, self.upscale)
        return y + (x if x.shape == y.shape else ops.image.resize(x, y.shape[1:3], data_format="channels_last"))


# ---- Single stage: from an embedding to a picture, or from its time to a frame (section 2.3) ----


class LearnedMaps(keras.layers.Layer):
    """Learned features of a picture (count 1) or of a video: maps (count, h, w, channels) at equally spaced times,
    interpolated linearly between them: times (N,) -> (N, h, w, channels). If features (N, H, W, D) are given, the maps
    are interpolated to H × W (bilinear) and appended: (N, H, W, D + channels)."""

    def __init__(self, count, height, width, channels, **kwargs):
        super().__init__(**kwargs)
        self.maps = self.add_weight((count, height, width, channels), keras.initializers.RandomNormal(stddev=0.1))
        self.built = True

    def call(self, times, features=None):
        steps = self.maps.shape[0] - 1
        distances = ops.abs((times[:, None] + 1) / 2 * steps - ops.arange(steps + 1, dtype="float32"))  # in steps
        maps = ops.tensordot(ops.relu(1 - distances), self.maps, 1)
        if features is None:
            return maps
        if maps.shape[1:3] != features.shape[1:3]:
            maps = ops.image.resize(maps, features.shape[1:3], data_format="channels_last")
        return ops.concatenate([features, maps], axis=-1)


def sines_and_cosines(angles):
    """Of angles (..., D), in radians: (..., 2D)."""
    return ops.concatenate([ops.sin(angles), ops.cos(angles)], axis=-1)


def single_stage(size, frames, parameters, width, blocks, compression, activation, hybrid, nerv=False):
    """Layers of INRN: times (N,) -> colours (1, H/p, W/p, 3p²) of a picture, or (N, H, W, 3) of a video of `frames`. H
    and W are the size, rounded up to whole cells: a position of the first features stands for a cell of pixels.

    Blocks double the resolution. The features of a picture are `LearnedMaps` at three resolutions, with about half of
    the parameters: coarse ones hold what neighbours have in common. Further blocks keep the resolution, and a last
    layer draws p² pixels for each position (p ≤ 2). In a video, each block has 0.8 times the width of the previous, and
    maps of its resolution with up to a tenth of the parameters, for 20 times (or each frame) if that leaves four
    channels or more, otherwise for fewer; with a single one, at high resolutions, they hold what all frames share.
    nerv: as NeRV (Chen et al., NeurIPS 2021), two dense layers compute the features from sines and cosines of the time;
    the blocks are 3×3 convolution, GELU and `depth_to_space`, and a convolution is the last layer."""
    time, inputs, layers = frames > 1, 0, []
    # Of the first features. For a picture, 7/4 × 2 channels at each of them have half of the parameters.
    positions = min(80, parameters / 2500) if time else parameters / 7
    cell = 2 ** max(int(time), round(math.log2(math.prod(size) / positions) / 2))
    grid, patch = [-(-side // cell) for side in size], 1 if time else min(cell, 2)
    if nerv:
        inputs, shape = 16, (*grid, 16)
        layers = [lambda times: sines_and_cosines(times[:, None] * (math.pi * 1.25 ** ops.arange(16, dtype="float32"))),
                  dense(32, 32, activation="gelu"), dense(32, math.prod(shape)),
                  lambda x: ops.reshape(x, (-1, *shape))]
    elif not time:
        inputs, channels = width, max(1, round(parameters / 3.5 / math.prod(grid)))
        layers = [LearnedMaps(1, *[-(-side // scale) for side in grid], scale * channels, dtype="float32")
                  for scale in (1, 2, 4)] + [dense(7 * channels, width)]
    doublings = round(math.log2(cell / patch))
    for number in range(doublings if time else max(blocks, doublings + 1)):
        double, (height, breadth) = number < doublings, (side * 2**number for side in grid)
        if nerv:
            layers += [convolution(inputs, 4 * width, activation="gelu"), lambda x: pixels(x, 2)]
        else:
            values = int(parameters / 10 / (height * breadth)) if time else 0  # for each position
            if values:
                # The block has ten times the square of its channels as parameters, at most a quarter of all.
                channels = min(values, max(4, min(values // min(frames, 20), math.isqrt(parameters // 40))))
                layers.append(LearnedMaps(min(frames, values // channels), height, breadth, channels, dtype="float32"))
                inputs += channels
            outputs = 3 if time and number == doublings - 1 else width
            layers.append(INReBlock(inputs, outputs, compression, 1, activation, hybrid, 1 + double, dtype="float32"))
        inputs, width = width, max(math.ceil(compression), round(0.8 * width)) if time else width
    return layers if time and not nerv else [*layers, (convolution if nerv else dense)(inputs, 3 * patch**2)]


def coordinate_network(size, width, siren):
    """Layers of a network with four hidden layers: times -> coordinates (1, H, W, 2), the centres of H × W cells that
    fill [-1, 1]² -> colours (1, H, W, 3). A SIREN (Sitzmann et al., NeurIPS 2020; omega 30; biases start at 0), or an
    MLP with ReLU on random Fourier features (Tancik et al., NeurIPS 2020)."""
    axes = [(ops.arange(side, dtype="float32") + 0.5) * (2 / side) - 1 for side in size]
    coordinates = ops.stack(ops.meshgrid(*axes, indexing="ij"), axis=-1)[None]
    layers, widths = [lambda times: coordinates], [2 if siren else 256, *[width] * 4, 3]
    if not siren:
        layers.append(dense(2, 128, keras.initializers.RandomNormal(stddev=15.0), use_bias=False, trainable=False,
                            activation=sines_and_cosines))
    for number, (before, after) in enumerate(zip(widths, widths[1:])):
        limit = (6 / before) ** 0.5 / 30 if number else 1 / before
        start = keras.initializers.RandomUniform(-limit, limit) if siren else "he_normal" if number < 4 else None
        activation = None if number == 4 else (lambda x: ops.sin(30.0 * x)) if siren else "relu"
        layers.append(dense(before, after, start, activation=activation))
    return layers


def similarity(pictures, others):
    """SSIM per pair of pictures (N, H, W, 3) in [-1, 1]: (N,). (Wang et al., 2004.) As `keras.ops.image.ssim`, whose
    square window takes many times as long as these two one-dimensional ones and most of the time of a fit. They have 11
    weights, or the largest odd number that fits."""
    side = (min(11, *pictures.shape[1:3]) + 1) // 2 * 2 - 1
    window = ops.exp(-ops.square(ops.arange(side, dtype="float32") - side // 2) / (2 * 1.5**2))
    window = ops.broadcast_to(ops.reshape(window / ops.sum(window), (1, side, 1, 1)), (1, side, 12, 1))
    x, y = pictures + 1, others + 1                                                # intensities from 0 to 2
    moments = ops.concatenate([x, y, x * x + y * y, x * y], axis=-1)
    moments = ops.transpose(moments, (0, 3, 1, 2))                                 # (N, 12, H, W), a view: see `Conv2D`
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):               # variances need all digits
        for kernel in (window, ops.transpose(window, (1, 0, 2, 3))):
            moments = ops.depthwise_conv(moments, kernel, data_format="channels_first")
    x, y, squares, products = ops.split(moments, 4, axis=1)                        # local means
    means, product = x * x + y * y, x * y
    similar = (2 * product + 4e-4) * (2 * (products - product) + 36e-4)            # 0.01² and 0.03² of the range, 2
    return ops.mean(similar / ((means + 4e-4) * (squares - means + 36e-4)), axis=(1, 2, 3))


@keras.saving.register_keras_serializable("inrn")
class PictureFit(GroupTrained):
    """A network that represents a picture or a video. `fit` takes frames (N, H, W, 3) in [-1, 1] and their times (N,).

    network: "inrn", or, to compare it with, "siren" or "relu" for a picture and "nerv" for a video. size: (H, W).
    frames: their number in a video; with 1 all frames are copies of one picture, and a step computes only the first of
    its batch. width: of the layers; 0: the largest with which there are at most `parameters`. The other arguments are
    explained in `FIT_HYPERPARAMETERS`. Everything is computed in `float32`. Raises ValueError for invalid arguments.

    Metrics: loss (equation 1); psnr, the mean over frames of 10 log10(4 / mse), in dB; ssim, the mean over frames."""

    def __init__(self, network="inrn", size=(256, 256), frames=1, parameters=40_000, width=0, blocks=3,
                 compression=2.0, activation="gelu", hybrid="interleaved", alpha=0.7, **kwargs):
        super().__init__(**kwargs | {"dtype": "float32"})
        if network not in (("inrn", "nerv") if frames > 1 else ("inrn", "siren", "relu")):
            raise ValueError(f"network must be inrn, siren or relu, or for a video inrn or nerv; it is {network}")
        if min(*size, frames, parameters, blocks) < 1 or not 0 <= alpha <= 1:
            raise ValueError("size, frames, parameters and blocks must be at least 1, and alpha between 0 and 1")
        self.size, self.frames, self.alpha = size, frames, alpha

        def layers(width):
            if network in ("siren", "relu"):
                return coordinate_network(size, width, network == "siren")
            return single_stage(size, frames, parameters, width, blocks, compression, activation, hybrid,
                                network == "nerv")

        def count(width):
            with keras.device("meta"):  # without memory for the weights
                return sum(layer.count_params() for layer in layers(width) if isinstance(layer, keras.Layer))

        if not width:
            widths = range(max(1, math.ceil(compression)), parameters + 1)
            fitting = bisect.bisect(widths, parameters, key=count)
            if not fitting:
                raise ValueError(f"{parameters} parameters are too few for {network}: use more, or smaller pictures")
            width = widths[fitting - 1]
        self.network = layers(width)  # assigned once: Keras would also keep the layers of an earlier value
        self.trackers = [keras.metrics.Mean(name=name) for name in ("loss", "psnr", "ssim")]
        self.built = True

    def call(self, times):
        """Frames (N, H, W, 3) at times (N,)."""
        count, (first, *layers) = len(times), self.network
        times = times if self.frames > 1 else times[:1]  # all are the same picture
        x = first(times)
        for layer in layers:
            x = layer(times, x) if isinstance(layer, LearnedMaps) else layer(x)
        x = pixels(x, math.isqrt(x.shape[-1] // 3))[:, :self.size[0], :self.size[1]]
        return ops.broadcast_to(x, (count, *x.shape[1:]))

    def render(self, times, height, width):
        """Frames (N, height, width, 3) at times (N,), computed one by one: a `float32` array in [-1, 1]. Other sizes
        than the model's are interpolated (bicubic)."""
        with torch.no_grad():
            frames = ops.concatenate([self(time[None]) for time in ops.convert_to_tensor(times, "float32")])
        if (height, width) != tuple(self.size):
            frames = ops.image.resize(frames, (height, width), "bicubic", antialias=True, data_format="channels_last")
        return ops.convert_to_numpy(ops.clip(frames, -1, 1))

    def compile(self, total_steps, rate=1e-2):
        """Adam, whose learning rate decays from `rate` to 0 over total_steps along half a cosine. beta_2 is 0.9, not
        0.999: gradients shrink by orders of magnitude during a fit."""
        self.compile_config = dict(total_steps=total_steps, rate=rate)
        keras.Model.compile(self, optimizer=None, jit_compile=False)
        self.optimizers = [keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, max(1, total_steps)),
                                                 beta_2=0.9, epsilon=1e-8)]
        self.optimizers[0].build(self.trainable_variables)

    def score(self, data, training):
        """Equation 1: the mean over frames of alpha L2 + (1 - alpha) (1 - SSIM), where L2 is the mean squared error.
        Pictures are clipped to [-1, 1] except in training."""
        shown = slice(1 if self.frames == 1 else None)  # of copies of one picture, the first
        frames, times = (ops.cast(x[shown], "float32") for x in keras.utils.unpack_x_y_sample_weight(data)[:2])
        pictures = self(times) if training else ops.clip(self(times), -1, 1)
        if pictures.shape != frames.shape:
            raise ValueError(f"frames must be (N, {self.size[0]}, {self.size[1]}, 3); got {tuple(frames.shape)}")
        squared, ssim = ops.mean(ops.square(pictures - frames), axis=(1, 2, 3)), similarity(pictures, frames)
        loss = self.alpha * squared + (1 - self.alpha) * (1 - ssim)
        with torch.no_grad():
            for tracker, values in zip(self.trackers, (loss, 10 * ops.log10(4 / squared), ssim)):
                tracker.update_state(values)
        return ops.mean(loss)


# ---- Four stages: from images to logits (section 2.3) ----


def numbers(text, name):
    """Four positive whole numbers from a text such as "32,64,96,128". Raises ValueError for anything else."""
    parts = str(text).split(",")
    if len(parts) != 4 or not all(part.strip().isdigit() and int(part) for part in parts):
        raise ValueError(f"{name} must be four whole numbers, at least 1, such as {SMALL[name]}; it is {text}")
    return [int(part) for part in parts]


@keras.saving.register_keras_serializable("inrn")
class INRN(keras.Model):
    """Images (N, H, W, C), `float32` in [-1, 1], of any H and W -> logits (N, num_classes).

    The arguments are explained in `HYPERPARAMETERS`. Without a teacher, compile and train it like any Keras model; with
    one, use a `Distiller`. `stage_outputs` returns the features for a detector or a segmentation network. Raises
    ValueError for invalid arguments."""

    __new__ = keras.Layer.__new__  # makes the arguments the config, as in `GroupTrained`

    def __init__(self, channels=1, num_classes=10, widths="32,64,96,128", blocks="1,3,16,3", stem_stride=1,
                 compression=0.5, activation="gelu", hybrid="interleaved", **kwargs):
        super().__init__(**kwargs)
        if min(channels, num_classes, stem_stride) < 1:
            raise ValueError("channels, num_classes and stem_stride must be at least 1")
        widths, blocks, dtype = numbers(widths, "widths"), numbers(blocks, "blocks"), self.dtype_policy.name
        self.channels, self.widths, self.stages = channels, widths, []
        self.stem = convolution(channels, widths[0], kernel_size=max(3, stem_stride), strides=stem_stride, dtype=dtype)
        for stage, (before, width, count) in enumerate(zip([widths[0], *widths], widths, blocks), 1):
            self.stages.append([INReBlock(width if i else before, width, compression, 1 if i else min(stage, 2),
                                          activation, hybrid, name=f"stage{stage}_block{i + 1}", dtype=dtype)
                                for i in range(count)])
        self.norm = keras.layers.LayerNormalization(epsilon=1e-5, dtype=dtype)
        self.norm.build((None, widths[-1]))
        self.head = dense(widths[-1], num_classes, dtype=self.variable_dtype)  # logits in full precision
        self.built = True

    def stage_outputs(self, images):
        """Equation 2: {"stage1": (N, H/s, W/s, D1), …, "stage4": (N, H/8s, W/8s, D4)}, sides rounded up; s is
        stem_stride. Raises ValueError for a wrong number of channels."""
        if len(images.shape) != 4 or images.shape[-1] != self.channels:
            raise ValueError(f"images must be (N, H, W, {self.channels}); got {tuple(images.shape)}")
        x, outputs = self.stem(images), {}
        for number, stage in enumerate(self.stages, 1):
            for block in stage:
                x = block(x)
            outputs[f"stage{number}"] = x
        return outputs

    def classify(self, stage4):
        """Output of the last stage (N, h, w, D4) -> logits (N, num_classes)."""
        return self.head(self.norm(ops.mean(stage4, axis=(1, 2))))

    def call(self, images):
        return self.classify(self.stage_outputs(images)["stage4"])


# ---- Teachers ----


def residual_cnn(image_shape, num_classes, stem_stride=1, widths=(32, 64, 128, 128), blocks=1):
    """A residual network with batch normalization (He et al., CVPR 2016): images -> logits. Its layers `stage1`,
    `stage2`, … have the resolutions of an INRN with the same stem_stride. widths: of each stage. blocks: in each stage;
    with widths 16, 32, 64 and 9 blocks it is the ResNet-56 of the literature on CIFAR."""

    def conv(x, filters, size=3, stride=1):
        x = convolution(x.shape[-1], filters, "he_normal", kernel_size=size, strides=stride, use_bias=False,
                        dtype=keras.config.dtype_policy())(x)
        return keras.layers.BatchNormalization()(x)

    inputs = keras.Input(image_shape)
    x = keras.layers.ReLU()(conv(inputs, widths[0], stride=stem_stride))
    for stage, width in enumerate(widths, 1):
        for block in range(blocks):
            stride = 2 if stage > 1 and block == 0 else 1
            y = conv(keras.layers.ReLU()(conv(x, width, stride=stride)), width)
            x = keras.layers.Add()([conv(x, width, 1, stride) if stride > 1 else x, y])
            x = keras.layers.ReLU(name=f"stage{stage}" if block == blocks - 1 else None)(x)
    x = keras.layers.GlobalAveragePooling2D("channels_last")(x)
    return keras.Model(inputs, keras.layers.Dense(num_classes, dtype=keras.config.floatx())(x), name="teacher")


def resnet101(image_shape, weights="imagenet"):
    """The paper's teacher on ImageNet: `keras.applications.ResNet101` without its classifier, for images (H, W, C) in
    [-1, 1], at least 32×32, where C is 1 or 3. Keras downloads the weights if they are not in its cache. Raises
    ValueError if Keras's image data format is not channels_last."""
    if keras.config.image_data_format() != "channels_last":
        raise ValueError('this teacher needs keras.config.set_image_data_format("channels_last")')
    inputs = keras.Input(image_shape)
    x = inputs if image_shape[-1] == 3 else keras.layers.Concatenate()([inputs] * 3)
    x = keras.applications.resnet.preprocess_input(127.5 * (x + 1), data_format="channels_last")
    return keras.applications.ResNet101(include_top=False, weights=weights, input_tensor=x)


def match_layers(teacher, student, image_shape, names=()):
    """The teacher's layer that each stage of the student learns from: {"stage1": layer, …}.

    names: one layer per stage. Without names, a stage learns from the layer of its resolution that has its name, or
    from the last one of its resolution, if any. Raises ValueError if the teacher is not a graph of layers, takes other
    images or has no such layers."""
    if not getattr(teacher, "inputs", None):
        raise ValueError("the teacher must be a functional or sequential Keras model, whose layers have outputs")
    # Layers before the first one with weights only scale or repeat the image.
    first = next((i for i, layer in enumerate(teacher.layers)
                  if layer.weights and not isinstance(layer, keras.layers.Normalization)), 0)
    layers = {layer.name: layer for layer in teacher.layers[first:] if len(getattr(layer.output, "shape", ())) == 4}
    if not layers:
        raise ValueError("the teacher has no layer with an output (N, h, w, D): use a convolutional one, or none")
    image, matched = ops.zeros((1, *image_shape)), {}
    with torch.no_grad():
        stages = student.stage_outputs(image)
        try:
            outputs = keras.Model(teacher.inputs, {name: layer.output for name, layer in layers.items()})(image)
        except (RuntimeError, ValueError) as error:
            shapes = ", ".join(str(tuple(x.shape[1:])) for x in teacher.inputs)
            raise ValueError(f"the teacher takes {shapes}, the images are {tuple(image_shape)}: use another teacher or "
                             f"larger images ({' '.join(str(error).split())[:120]})") from error
    if names:
        if len(names) != 4 or not {*names} <= {*layers}:
            raise ValueError(f"the teacher's layers must be four of {', '.join(layers)}; they are {', '.join(names)}")
        return dict(zip(stages, (layers[name] for name in names)))
    for stage, output in stages.items():
        fitting = [name for name in layers if outputs[name].shape[1:3] == output.shape[1:3]]  # from first to last
        if fitting:
            matched[stage] = layers[stage if stage in fitting else fitting[-1]]
    if not matched:
        raise ValueError(f"no layer of the teacher has the resolution of a stage: name four of {', '.join(layers)}")
    return matched


# ---- Distillation ----


def feature_loss(alignment, outputs, features):
    """The sum over stages of equation 3, a scalar: the mean squared error between the 1×1 convolution of a stage's
    output (N, h, w, D) and the teacher's features, to whose resolution it is interpolated. The features are scaled to
    mean 0 and variance 1 per image, so that the teacher's scale does not matter: its transformation in equation 3."""
    total = 0.0
    for align, output, feature in zip(alignment, outputs, features):
        target = ops.layer_normalization(ops.cast(feature, "float32"), axis=(1, 2, 3), epsilon=1e-6)
        aligned = ops.image.resize(ops.cast(align(output), "float32"), target.shape[1:3], data_format="channels_last")
        total = total + ops.mean(ops.square(aligned - target))
    return total


@keras.saving.register_keras_serializable("inrn")
def top5_accuracy(labels, logits):
    """Whether the label is among the five likeliest classes, or among all if there are fewer: (N,)."""
    return keras.metrics.sparse_top_k_categorical_accuracy(labels, logits, min(5, logits.shape[-1]))


class Distiller(GroupTrained):
    """Trains a student: an INRN or, without a teacher, any Keras classifier that returns logits. `save` saves it alone.

    The loss is lambda_1 CE + lambda_2 `feature_loss` (equation 4) and, if logits_weight is above 0, the divergence from
    the teacher's probabilities at a temperature (Hinton et al., 2015).

    teacher: a functional or sequential Keras classifier for images of image_shape (H, W, C) in [-1, 1], which returns
    logits or probabilities, or features if logits_weight is 0; it is frozen. None: the loss is lambda_1 CE. layers:
    see `match_layers`. Raises ValueError as `match_layers` does, and for a teacher of other classes or outputs.

    Metrics: loss; accuracy; top5_accuracy; with a teacher distillation, the part of the loss that comes from it."""

    def __init__(self, student, teacher=None, image_shape=None, layers=(), task_weight=1.0, feature_weight=1.0,
                 logits_weight=0.0, temperature=4.0, **kwargs):
        super().__init__(**kwargs)
        self.student, self.task_weight = student, task_weight
        self.feature_weight, self.logits_weight = feature_weight, logits_weight
        self.cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.trackers = [keras.metrics.Mean(name="loss"), keras.metrics.SparseCategoricalAccuracy(name="accuracy"),
                         keras.metrics.MeanMetricWrapper(top5_accuracy, "top5_accuracy")]
        if teacher is not None:
            matched = match_layers(teacher, student, image_shape, layers)
            shape, num_classes = teacher.outputs[0].shape, student.head.units
            if len(teacher.outputs) != 1 or len(shape) not in (2, 4):
                raise ValueError("the teacher must have one output: logits, probabilities or features")
            if len(shape) == 2 and shape[-1] != num_classes:
                raise ValueError(f"the teacher has {shape[-1]} classes, the dataset has {num_classes}")
            if len(shape) == 4 and logits_weight:
                raise ValueError("this teacher has no logits: leave logits_weight at 0")
            features = keras.Model(teacher.inputs, [*(target.output for target in matched.values()), *teacher.outputs])
            # In a function, so that Keras does not make the teacher a part of this model.
            self.teach, self.matched = torch.no_grad()(lambda images: features(images, training=False)), [*matched]
            *targets, taught = self.teach(ops.zeros((1, *image_shape)))
            widths = [student.widths[int(stage[-1]) - 1] for stage in matched]
            self.alignment = [convolution(width, target.shape[-1], kernel_size=1, dtype=student.dtype_policy)
                              for width, target in zip(widths, targets)]
            # Most Keras classifiers return probabilities, whose logarithms are logits.
            self.probabilities = bool(ops.all(taught >= 0)) and abs(float(ops.sum(taught)) - 1) < 0.02
            # A loss object: Keras 3.15 leaves out the softmax if the loss is given by its name, as by default.
            self.divergence = keras.distillation.LogitsDistillation(temperature, keras.losses.KLDivergence())
            self.trackers.append(keras.metrics.Mean(name="distillation"))
        self.built = True

    def call(self, images, training=False):
        return self.student(images, training=training)

    def compile(self, total_steps, rate=1e-3, weight_decay=0.05):
        """As `GroupTrained.compile`. The student is compiled too: saved and loaded, it can be evaluated, or trained
        further with the same optimizer, whose weight decay then applies to all variables."""
        super().compile(total_steps, rate, weight_decay)
        self.student.compile(self.optimizers[0], self.cross_entropy, metrics=["accuracy", top5_accuracy],
                             jit_compile=False)

    def score(self, data, training):
        images, labels, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if self.teach:
            outputs, (*features, taught) = self.student.stage_outputs(images), self.teach(images)
            logits, outputs = self.student.classify(outputs["stage4"]), [outputs[name] for name in self.matched]
            added = self.feature_weight * feature_loss(self.alignment, outputs, features)
            if self.logits_weight:
                taught = ops.cast(taught, "float32")
                taught = ops.log(ops.maximum(taught, 1e-7)) if self.probabilities else taught
                added = added + self.logits_weight * self.divergence.compute_loss(taught, logits)
        else:
            logits, added = self.student(images, training=training), 0.0
        loss = self.task_weight * self.cross_entropy(labels, logits, sample_weight) + added
        with torch.no_grad():
            count, classes = len(labels), (labels, logits, sample_weight)
            for metric, values in zip(self.trackers, ((loss, count), classes, classes, (added, count))):
                metric.update_state(*values)
        return loss

    def save(self, *arguments, **options):
        """Saves the student alone: as `keras.Model.save`."""
        self.student.save(*arguments, **options)


# ---- Detection and segmentation: INRN's stages in Faster R-CNN and Mask R-CNN (section 3.2) ----


def torchvision_detection():
    """torchvision's module of detectors. Raises ImportError if it cannot be imported."""
    try:
        import torchmetrics.detection
        import torchvision.models.detection
    except (ImportError, RuntimeError) as error:  # RuntimeError: it was built for another torch
        raise ImportError("detection needs packages: pip install torchvision==0.28.0 torchmetrics==1.9.0 "
                          "pycocotools==2.0.11, torchvision from the same index as torch "
                          f"({' '.join(str(error).split())[:120]})") from error
    return torchvision.models.detection


class AveragePrecision(keras.metrics.Metric):
    """COCO's mean average precisions: map over the thresholds 0.5 to 0.95 of the overlap, map_50 at 0.5 and map_75 at
    0.75; with masks bbox_map, … of the boxes and segm_map, … of the masks. In several processes, `result` covers the
    images of all of them."""

    def __init__(self, masks, **kwargs):
        super().__init__(**kwargs)
        from torchmetrics.detection import MeanAveragePrecision  # which uses pycocotools

        self.total = MeanAveragePrecision(iou_type=("bbox", "segm") if masks else "bbox", sync_on_compute=False)
        self.names = [f"{kind}map{threshold}" for kind in (("bbox_", "segm_") if masks else ("",))
                      for threshold in ("", "_50", "_75")]

    def reset_state(self):
        self.total.reset()

    def update_state(self, targets, detections):
        """A list of dicts each, one per image: boxes (n, 4) and labels (n,); of targets iscrowd (n,), of detections
        scores (n,); with masks boolean masks (n, H, W)."""
        self.total.update(detections, targets)

    def result(self):
        total = self.total
        if torch.distributed.is_initialized():
            total, parts = copy.deepcopy(total), [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, self.total.metric_state)
            for name in parts[0]:
                setattr(total, name, [value for part in parts for value in part[name]])
        results = total.compute()
        return {name: float(results[name]) for name in self.names}


def unpad(targets, chosen):
    """Targets of a `Detector` as a list of one dict per image, with the chosen objects, a boolean array (N, M)."""
    return [{name: values[i][chosen[i]] for name, values in targets.items()} for i in range(len(chosen))]


@keras.saving.register_keras_serializable("inrn")
class Detector(GroupTrained):
    """Faster R-CNN, or with masks Mask R-CNN, of torchvision: stages of a backbone -> feature pyramid -> proposed
    regions -> their classes, boxes and masks.

    Images (N, H, W, 3), `float32` in [-1, 1], are scaled to fit into size × size pixels. Targets are a dict of arrays,
    padded to M objects: boxes (N, M, 4), left, top, right and bottom in pixels; labels (N, M), -1 where there is no
    object; crowd (N, M), 1 for a region of several objects, which is not learned; with `masks` masks (N, M, H, W), 0 or
    1. Called with images, it returns a dict for each: boxes (n, 4), labels (n,), scores (n,) and masks (n, H, W) from 0
    to 1, in the images' own pixels.

    The other arguments are explained in `DETECTION_HYPERPARAMETERS`; those of an INRN as backbone are `options`. Raises
    ValueError for invalid arguments, and ImportError without torchvision, torchmetrics and pycocotools, which nothing
    else here needs.

    Metrics: in training loss, its parts, named as by torchvision but without loss_, and, with a teacher, distillation;
    otherwise `AveragePrecision`. A training step sets PyTorch's global seed, from `seed` and its number."""

    def __init__(self, num_classes=10, size=128, masks=False, backbone="inrn", pyramid_width=64, head_width=256,
                 anchor_size=16, proposals=100, samples=64, seed=0, name=None, dtype=None, **options):
        detection = torchvision_detection()
        from torchvision.ops import FeaturePyramidNetwork, feature_pyramid_network, poolers

        super().__init__(name=name, dtype=dtype, autocast=False)
        if backbone == "inrn":
            self.body = INRN(3, 1, dtype=dtype, **options)
            self.body.norm.trainable = self.body.head.trainable = False  # they only classify
            widths, finest = self.body.widths, math.log2(self.body.stem.strides[0])
            if finest % 1:
                raise ValueError("stem_stride must be a power of two")
        else:
            if backbone not in ("resnet18", "resnet34", "resnet50", "resnet101"):
                raise ValueError(f"backbone must be inrn, resnet18, resnet34, resnet50 or resnet101; it is {backbone}")
            utils, norm = detection.backbone_utils, functools.partial(torch.nn.GroupNorm, 32)
            resnet = utils.resnet.__dict__[backbone](norm_layer=norm)
            widths, finest = [resnet.inplanes // 8 * 2**i for i in range(4)], 2
            stages = utils.IntermediateLayerGetter(resnet, {f"layer{i}": f"stage{i}" for i in range(1, 5)})
            self.body = keras.layers.TorchModuleWrapper(stages, dtype="float32")
        pyramid = FeaturePyramidNetwork(widths, pyramid_width, feature_pyramid_network.LastLevelMaxPool())
        pyramid.out_channels = pyramid_width
        sides, outputs = [(anchor_size * 2**i,) for i in range(5)], num_classes + 1  # class 0 is the background
        heads = dict(box_head=detection.faster_rcnn.TwoMLPHead(49 * pyramid_width, head_width),
                     box_predictor=detection.faster_rcnn.FastRCNNPredictor(head_width, outputs))
        if masks:
            heads |= dict(mask_head=detection.mask_rcnn.MaskRCNNHeads(pyramid_width, [pyramid_width] * 4, 1),
                          mask_predictor=detection.mask_rcnn.MaskRCNNPredictor(pyramid_width, pyramid_width, outputs))
        counts = {f"rpn_{when}_nms_top_n_{mode}": proposals for when in ("pre", "post") for mode in ("train", "test")}
        rcnn = (detection.MaskRCNN if masks else detection.FasterRCNN)(
            pyramid, rpn_anchor_generator=detection.anchor_utils.AnchorGenerator(sides, [(0.5, 1.0, 2.0)] * 5),
            min_size=size, max_size=size, image_mean=[0.0] * 3, image_std=[1.0] * 3, rpn_batch_size_per_image=samples,
            box_batch_size_per_image=samples, **counts, **heads)
        # torchvision would derive the levels' scales from its first images, wrongly if they are flat.
        for pool in (rcnn.roi_heads.box_roi_pool, *([rcnn.roi_heads.mask_roi_pool] if masks else [])):
            pool.scales = [2 ** -(finest + i) for i in range(4)]
            pool.map_levels = poolers.initLevelMapper(int(finest), int(finest) + 3)
        self.rcnn = keras.layers.TorchModuleWrapper(rcnn, dtype="float32")
        self.seeds = keras.random.SeedGenerator(seed)
        names = ["loss", "classifier", "box_reg", *(["mask"] if masks else []), "objectness", "rpn_box_reg"]
        self.trackers = {name: keras.metrics.Mean(name=name) for name in names}
        self.precision = AveragePrecision(masks, name="precision")
        self.size, self.masks, self.built = size, masks, True

    def learn_from(self, teacher, feature_weight=1.0):
        """Before `compile`: the stages will also learn the four finest levels of a teacher's pyramid (equation 3).
        teacher: a `Detector`, the path of one, or the name of one of torchvision's, which is downloaded; it does not
        become a part of this model. Raises ValueError for others."""
        image = ops.zeros((1, self.size, self.size, 3))
        try:
            if isinstance(teacher, str) and not teacher.endswith(".keras"):
                model = torchvision_detection().__dict__[teacher](weights="DEFAULT").eval().to(image.device)
                pyramid = lambda images: model.backbone(model.transform.normalize((images.permute(0, 3, 1, 2) + 1) / 2))
            else:
                model = keras.saving.load_model(teacher, compile=False) if isinstance(teacher, str) else teacher
                pyramid = lambda images: model.pyramid(model.stages(images))
            levels = lambda images: [x.permute(0, 2, 3, 1) for x in list(pyramid(images).values())[:4]]
            self.teach = torch.no_grad()(levels)
            taught = self.teach(image)
        except Exception as error:  # no network, no such file, no detector: of many types
            raise ValueError(f"cannot load the teacher {teacher} ({type(error).__name__}: {str(error)[:160]}): use "
                             "none, a detector of torchvision.models.detection or the .keras file of one") from error
        stages = self.stages(image)
        if [x.shape[1:3] for x in taught] != [x.shape[1:3] for x in stages]:
            raise ValueError("the levels of the teacher's pyramid must have the resolutions of the four stages")
        self.feature_weight, self.trackers["distillation"] = feature_weight, keras.metrics.Mean(name="distillation")
        self.alignment = [convolution(x.shape[-1], y.shape[-1], kernel_size=1) for x, y in zip(stages, taught)]

    def stages(self, images):
        """Outputs of the backbone's stages: [(N, H/s, W/s, D1), …, (N, H/8s, W/8s, D4)]; s is 4 for a ResNet."""
        if isinstance(self.body, INRN):
            return [ops.cast(x, "float32") for x in self.body.stage_outputs(images).values()]
        return [x.permute(0, 2, 3, 1) for x in self.body(images.permute(0, 3, 1, 2)).values()]

    def pyramid(self, stages):
        """The levels of the feature pyramid: {"0": (N, pyramid_width, H/s, W/s), …, "3": …, "pool": …}."""
        return self.rcnn.module.backbone({str(i): x.permute(0, 3, 1, 2) for i, x in enumerate(stages)})

    def detect(self, images, targets=None):
        """Detections as torchvision returns them; in training its losses, and what the teacher adds: a dict each."""
        rcnn, sizes = self.rcnn.module, [tuple(images.shape[1:3])] * len(images)
        rcnn.train(targets is not None)
        images, targets = rcnn.transform(list(images.permute(0, 3, 1, 2)), targets)
        scaled = images.tensors.permute(0, 2, 3, 1)                       # (N, h, w, 3), multiples of 32
        stages = self.stages(scaled)
        pyramid = self.pyramid(stages)
        regions, losses = rcnn.rpn(images, pyramid, targets)
        found, more = rcnn.roi_heads(pyramid, regions, images.image_sizes, targets)
        if targets is None:
            return rcnn.transform.postprocess(found, images.image_sizes, sizes)
        losses = {name.removeprefix("loss_"): loss for name, loss in (losses | more).items()}
        if self.teach:
            losses["distillation"] = self.feature_weight * feature_loss(self.alignment, stages, self.teach(scaled))
        return losses

    def call(self, images):
        with torch.no_grad():
            found = self.detect(ops.convert_to_tensor(images))
        return [{name: x[:, 0] if name == "masks" else x - 1 if name == "labels" else x for name, x in one.items()}
                for one in found]

    def score(self, data, training):
        images, targets, _ = keras.utils.unpack_x_y_sample_weight(data)
        chosen = (targets["labels"] >= 0) & (targets["crowd"] == 0)
        seed, step = self.seeds.next().tolist()
        torch.manual_seed(2**32 * seed + step)  # torchvision samples regions by PyTorch's own generator
        losses = self.detect(images, unpad(targets | {"labels": targets["labels"] + 1}, chosen))  # 0: the background
        losses["loss"] = sum(losses.values())
        with torch.no_grad():
            for name, value in losses.items():
                self.trackers[name].update_state(value)
        return losses["loss"]

    def test_step(self, data):
        images, targets, _ = keras.utils.unpack_x_y_sample_weight(data)
        found, there = self(images), unpad(targets, targets["labels"] >= 0)
        for one in found + there if self.masks else ():
            one["masks"] = one["masks"] > 0.5
        self.precision.update_state([one | {"iscrowd": one["crowd"]} for one in there], found)
        return dict.fromkeys(self.precision.names, 0.0)  # Keras asks for the metrics after the last batch

    def predict_step(self, data):
        raise ValueError("numbers of objects differ, so batches cannot be joined: call the model")

    metrics = property(lambda self: [*self.trackers.values(), self.precision])

    def get_metrics_result(self):
        if self.precision.total.update_called:
            return self.precision.result()
        return {name: tracker.result() for name, tracker in self.trackers.items()}


# ---- What train.py asks for ----


def build(options, dataset, steps_per_epoch):
    """The models of a classification, in the order of training: the teacher if it is to be trained, and the student."""
    if options.compile:
        raise ValueError("inrn has no separate INR to compile: leave out --compile")
    image_shape, num_classes, name = dataset.image_shape, len(dataset.class_names), options.teacher
    teacher, models = None, []
    if name in ("train", "resnet56"):
        size = {} if name == "train" else {"widths": (16, 32, 64), "blocks": 9}
        teacher = residual_cnn(image_shape, num_classes, options.stem_stride, **size)
        models.append(("teacher", Distiller(teacher), options.teacher_epochs))
    elif name != "none":
        try:
            teacher = resnet101(image_shape) if name == "resnet101" else keras.saving.load_model(name, compile=False)
        except Exception as error:  # no network, images too small, no such file, not a Keras file: of many types
            raise ValueError(f"cannot load the teacher {name} ({type(error).__name__}: {str(error)[:160]}): use train, "
                             "resnet56, none, resnet101 or a Keras classifier's .keras file") from error
    keras.utils.set_random_seed(options.seed)  # the same initial weights with every teacher
    student = INRN(image_shape[-1], num_classes, **{name: getattr(options, name) for name in BACKBONE})
    distiller = Distiller(student, teacher, image_shape, [name for name in options.teacher_layers.split(",") if name],
                          options.task_weight, options.feature_weight, options.logits_weight, options.temperature)
    models.append(("", distiller, options.epochs))
    for _, model, epochs in models:
        model.compile(epochs * steps_per_epoch, options.rate, options.weight_decay)
    return models


def report(models, images, labels, class_names, finer):
    """Figure "stages": images, their predicted classes, and the strength of each stage's output (its root mean square
    over channels), from black where it is weakest to white where it is strongest."""
    model, images = models["inrn"], images[:8]
    with torch.no_grad():
        outputs = model.stage_outputs(ops.convert_to_tensor(images))
        classes = ops.convert_to_numpy(ops.argmax(model.classify(outputs["stage4"]), axis=-1))
    rows = [[(image, f"predicted\n{class_names[label]}")] for image, label in zip(images, classes)]
    for stage, output in outputs.items():
        strength = ops.convert_to_numpy(ops.cast(output, "float32") ** 2).mean(-1) ** 0.5              # (N, h, w)
        for row, picture in zip(rows, strength):
            picture, size = picture - picture.min(), "{} × {}".format(*picture.shape)
            row.append((2 * picture / max(picture.max(), 1e-12) - 1, f"{stage}\n{size}"))
    return {}, {"stages": rows}


def build_fits(options, dataset, steps_per_epoch):
    """The models of a fit: INRN and, with options.compare, the networks to compare it with."""
    if options.compile or keras.config.dtype_policy().name != "float32":
        raise ValueError("fits use float32 and have no separate INR to compile: leave out --precision and --compile")
    frames, models, parameters, width = len(dataset.test), [], options.parameters, options.width
    for network in ["", *(["nerv"] if frames > 1 else ["siren", "relu"])] if options.compare else [""]:
        keras.utils.set_random_seed(options.seed)  # the same initial weights beside other networks
        model = PictureFit(network or "inrn", dataset.image_shape[:2], frames, parameters, width, options.blocks,
                           options.compression, options.activation, options.hybrid, options.alpha)
        # On the video in the README, 8e-3 was better than 4e-3 with 100,000 parameters at 160×90, and 4e-3 better than
        # 2e-3 and 8e-3 with 400,000 at 320×180 (one seed).
        automatic = min(1e-2, 8e-3 * (100_000 / options.parameters) ** 0.5)
        rate = getattr(options, f"{network}_rate") if network else options.rate or automatic
        model.compile(options.epochs * steps_per_epoch, rate)
        models.append((network, model, options.epochs))
        parameters, width = models[0][1].count_params(), 0  # the others have at most as many as INRN
    return models


def report_fits(models, frames, times, class_names, finer):
    """Figure "fit": frames, the models' frames and their errors."""
    rows = []
    for frame, time in zip(frames, times):
        pictures, errors = [(frame, "ground truth")], [(0 * frame - 1, "error\nwhite: 10 %")]
        for name, model in models.items():
            picture = model.render([time], *frame.shape[:2])[0]
            pictures.append((picture, f"{name}\n{float(ops.psnr(frame, picture, 2.0)):.1f} dB"))
            errors.append((abs(picture - frame).mean(-1) / 0.1 - 1, ""))
        rows += [pictures, errors]
    return {}, {"fit": rows}


def build_detector(options, dataset, steps_per_epoch):
    """The detector, as a list of one model."""
    if options.compile:
        raise ValueError("inrn has no separate INR to compile: leave out --compile")
    names = DETECTION.keys() - {"teacher", "feature_weight", "rate", "weight_decay", "batch_size", "epochs"}
    model = Detector(len(dataset.class_names), dataset.image_shape[0], options.task == "segment", seed=options.seed,
                     **{name: getattr(options, name) for name in names})
    if options.teacher != "none":
        model.learn_from(options.teacher, options.feature_weight)
    model.compile(options.epochs * steps_per_epoch, options.rate, options.weight_decay)
    return [("", model, options.epochs)]


def likely_objects(model, image):
    """The objects in an image (1, H, W, 3) with a score of at least 0.5: NumPy arrays, as a `Detector` returns them."""
    found = keras.tree.map_structure(ops.convert_to_numpy, model(image)[0])
    return {name: values[found["scores"] >= 0.5] for name, values in found.items()}


def report_detections(models, images, labels, class_names, finer):
    """Figure "detections": images with their likely objects, and with the true ones."""
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

    def draw(image, objects):
        factor = 400 / max(image.shape[:2])  # where lines and text are readable
        size = [round(factor * side) for side in image.shape[:2]]
        enlarged = lambda x: torch.nn.functional.interpolate(torch.tensor(x)[None], size)[0]  # (C, H, W)
        picture = (127.5 * enlarged(image.transpose(2, 0, 1)) + 127.5).round().to(torch.uint8)
        colors = [f"hsv({222 * label % 360}, 100%, 100%)" for label in objects["labels"]]
        for mask, color in zip(objects.get("masks", ()), colors):  # one by one: together, overlaps would be black
            mask = enlarged(np.float32(mask[None] > 0.5))[0].bool()
            picture = draw_segmentation_masks(picture, mask, 0.5, color)
        if colors:
            names = [class_names[label] for label in objects["labels"]]
            picture = draw_bounding_boxes(picture, torch.tensor(objects["boxes"] * factor), names, colors, width=2)
        return picture.permute(1, 2, 0).numpy() / 127.5 - 1

    found = [likely_objects(models["inrn"], image[None]) for image in images[:4]]
    rows = [[(draw(image, objects), f"{len(objects['labels'])} found") for image, objects in zip(images, found)]]
    if labels is not None:
        there = unpad(labels, labels["labels"][:4] >= 0)
        rows.append([(draw(image, objects), "ground truth") for image, objects in zip(images, there)])
    return {}, {"detections": rows}


def describe_detections(model, image, class_names):
    """The likely objects in an image (1, H, W, 3), as text."""
    found = likely_objects(model, image)
    return ", ".join(f"{class_names[label]} {score:.1%} at {', '.join(f'{x:.0f}' for x in box)}" for label, score, box
                     in zip(found["labels"], found["scores"], found["boxes"])) or "nothing found"


# The changes of each variant. Table 3 does not give the numbers of blocks "before" and "after" more of them are moved
# to the middle; ours are eight in all. Only the ablation of distillation has a teacher.
ABLATIONS = {
    "compression": [{"compression": c, "teacher": "none"} for c in (0.5, 1.0, 2.0, 4.0)],               # Table 2
    "activation": [{"activation": name, "teacher": "none"} for name in ("relu", "gelu")],               # section 3.1
    "stages": [{"blocks": blocks, "teacher": "none"} for blocks in ("2,2,2,2", "1,2,4,1", "1,3,3,1")],  # Table 3
    "distillation": [{"teacher": "none"}, {"teacher": "train"},
                     {"teacher": "train", "feature_weight": 0.0, "logits_weight": 1.0}],
}
FIT_ABLATIONS = {
    "architecture": [{"hybrid": name} for name in ("mlp", "front", "post", "interleaved")],             # Table 1
    "activation": [{"activation": name} for name in ("relu", "gelu")],
}
OBJECTS = types.SimpleNamespace(presets=DETECTION_PRESETS, hyperparameters=DETECTION_HYPERPARAMETERS,
                                build=build_detector, report=report_detections, describe=describe_detections,
                                ablations={"backbone": [{"backbone": name} for name in ("inrn", "resnet18")]})
TASKS = {
    "classify": types.SimpleNamespace(presets=PRESETS, hyperparameters=HYPERPARAMETERS, build=build, report=report,
                                      ablations=ABLATIONS),
    "fit": types.SimpleNamespace(presets=FIT_PRESETS, hyperparameters=FIT_HYPERPARAMETERS, build=build_fits,
                                 report=report_fits, ablations=FIT_ABLATIONS),
    "detect": OBJECTS, "segment": OBJECTS,
}
