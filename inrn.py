"""INRN: blocks that compress and expand fit a picture from its coordinates and, taught by another network, classify it.

Song, Zhou & Ma, "Rethinking Implicit Neural Representations for Vision Learners".

The paper calls every network an implicit neural representation that maps a fixed domain to a fixed range: the points of
one picture to their colours, or the pictures of a dataset to their classes. One block, INRe, serves both. Stacked in a
single stage it fits one picture (equation 1). Stacked in four stages it classifies pictures, and learns from labels and
from what a teacher's layers say at the same resolutions (equations 2 to 4).

    single stage   coords (N, H, W, 2) -> Fourier features -> INRe blocks -> colours (N, H, W, 3)
    four stages    images (N, H, W, C) -> stem -> stage1 ... stage4, each half the resolution -> mean -> logits
    distillation   stage outputs -> 1×1 convolutions -> compared with the teacher's outputs

    symbol    shape          meaning
    N H W C   -              pictures (or frames), height, width, channels
    D, D/c    -              width of a block, its hidden width; c is the compression coefficient
    coords    (N, H, W, 2)   row and column, each from -1 to 1; with a frame's time t, (N, H, W, 3)
    O_s O_t   (N, h, w, D)   outputs of one stage of the student, of one layer of the teacher

The paper leaves the inside of a block to a figure that its text does not describe. Our reading: the two layers of the MLP
map D to D/c and back, and the 3×3 convolution works where the block is narrow, so between the two if c is above 1, and
before them if it is below. In a row of blocks convolution, layer up and layer down then follow each other in the same
order for every c. What speaks for it are the parameters of Table 2 (millions, flat and with coefficient c):

    size, c       paper             ours              ours, if c acted on the MLP alone
    S, 0.5        2.5    2.86       2.51   2.86       2.51   2.86
    M, 2          14     5.7        14.1   5.7        14.1   12.4
    L, 2          57     21         57.0   20.9       57.0   49.4

Halving the MLP's hidden width takes a tenth from a block (11 D² to 10 D²); from 14 to 5.7 million it has to be the
convolution that shrinks. Convolutions that halve the resolution, beside the first block of a stage, keep their width.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import torch
from keras import ops

if keras.backend.backend() != "torch":
    raise ImportError("this file needs Keras on PyTorch: set KERAS_BACKEND=torch before keras is imported")

# Hyperparameters of classification. The paper gives the coefficients of Table 2, four stages with more blocks in the
# middle, and nothing else; all other values are ours.
SMALL = dict(
    widths="32,64,96,128",  # D of each stage
    blocks="1,3,16,3",      # of each stage
    stem_stride=1,          # the first convolution divides the resolution by that
    compression=0.5,        # c; 1: flat; below 1: expands first
    activation="gelu",      # or relu
    hybrid="interleaved",   # where the convolution stands: interleaved, front, post; mlp: nowhere
    task_weight=1.0,        # lambda_1, of the cross entropy
    feature_weight=1.0,     # lambda_2, of the sum of mean squared errors over the stages
    logits_weight=0.0,      # of the Kullback-Leibler divergence from the teacher's probabilities
    temperature=4.0,        # at which these are compared
    rate=2e-3,              # learning rate of AdamW: rises over 5 % of the steps, falls to 0 along half a cosine
    weight_decay=0.05,
    batch_size=64,
    epochs=50,
    teacher_epochs=30,      # of --teacher train
)
# quick is for a CPU and small pictures; it was found on held-out training images of MNIST.
PRESETS = {
    "quick": {**SMALL, "widths": "64,128,256,256", "blocks": "1,1,2,1", "stem_stride": 2, "compression": 2.0, "epochs": 3,
              "teacher_epochs": 2},
    "small": SMALL,
    "medium": {**SMALL, "widths": "88,176,352,352", "blocks": "1,3,6,2", "stem_stride": 4, "compression": 2.0},
    "large": {**SMALL, "widths": "128,256,512,768", "blocks": "2,5,12,2", "stem_stride": 4, "compression": 2.0},
}
# Hyperparameters of fitting a picture, found on `shapes`; all ours.
FIT_PRESETS = {
    "quick": dict(
        width=48, blocks=4, compression=2.0, activation="gelu", hybrid="interleaved",
        patch=2,              # one coordinate stands for so many pixels squared
        features=128,         # sines and as many cosines of the coordinates
        feature_scale=15.0,   # standard deviation of their frequencies, in radians per unit
        alpha=0.7,            # of the squared error; the rest is of 1 - SSIM
        rate=1e-2,            # learning rate of INRN
        siren_rate=1e-3,      # of the SIREN beside it
        relu_rate=3e-3,       # of the ReLU MLP beside it
        batch_size=4,         # frames
        steps=300,
    ),
}

# The paper's ablations: what is changed in each variant. Its Table 3 compares unnamed numbers of blocks "before" and
# "after" more of them went to the middle; ours are eight each.
ABLATIONS = {
    "architecture": [{"hybrid": hybrid} for hybrid in ("mlp", "front", "post", "interleaved")],   # Table 1
    "compression": [{"compression": coefficient} for coefficient in (0.5, 1.0, 2.0, 4.0)],        # Table 2
    "activation": [{"activation": activation} for activation in ("relu", "gelu")],                # section 3.1
    "stages": [{"blocks": blocks} for blocks in ("2,2,2,2", "1,2,4,1", "1,3,3,1")],               # Table 3
    "distillation": [{"teacher": "none"}, {"teacher": "train"},
                     {"teacher": "train", "feature_weight": 0.0, "logits_weight": 1.0}],
}


# ---- The block ----


def small_uniform():
    """U(±1 / sqrt(inputs)): half of what keeps the variance. Fits of pictures gain 2 dB by it."""
    return keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform")


def dense(inputs, outputs, initializer=None, **options):
    """Dense layer over channels, built at once: an MLP's layer, or a 1×1 convolution."""
    layer = keras.layers.Dense(outputs, kernel_initializer=initializer or small_uniform(), **options)
    layer.build((None, None, None, inputs))
    return layer


def convolution(inputs, outputs, size=3, stride=1, initializer=None, **options):
    """Convolution over (N, H, W, inputs), padded, built at once."""
    layer = keras.layers.Conv2D(outputs, size, stride, "same", data_format="channels_last",
                                kernel_initializer=initializer or small_uniform(), **options)
    layer.build((None, None, None, inputs))
    return layer


@keras.saving.register_keras_serializable("inrn")
class INReBlock(keras.layers.Layer):
    """(N, H, W, inputs) -> (N, H/stride, W/stride, width), rounded up. (Section 2.2.)

    A convolution and two layers of an MLP, with an activation between them, beside a shortcut: the identity where the
    shape stays, else a strided convolution. The last layer starts at zero, so the block starts as its shortcut.

    compression: c; the MLP's hidden width is width / c. 1 is flat, below 1 the block expands first.
    activation: "gelu" (the exact one) or "relu".
    hybrid: "interleaved", the convolution at the narrower width, between the layers or (c < 1) before them; "front" or
    "post", at full width before or after them (so c < 1 makes "front" of "interleaved"); "mlp", none, and strides take
    means. (Table 1.)
    Raises ValueError for other values. Normalization and shortcut are ours.
    """

    def __init__(self, inputs, width, compression=2.0, stride=1, activation="gelu", hybrid="interleaved", **kwargs):
        super().__init__(**kwargs)
        if activation not in ("gelu", "relu"):
            raise ValueError(f"activation must be gelu or relu; it is {activation}")
        if hybrid not in ("interleaved", "front", "post", "mlp"):
            raise ValueError(f"hybrid must be interleaved, front, post or mlp; it is {hybrid}")
        if not 0 < compression <= width:
            raise ValueError(f"compression must be above 0 and at most the width, {width}; it is {compression}")
        self.config = dict(inputs=inputs, width=width, compression=compression, stride=stride, activation=activation,
                           hybrid=hybrid)
        options, hidden = {"dtype": self.dtype_policy}, round(width / compression)
        self.activation, self.pool = keras.activations.get(activation), stride if hybrid == "mlp" else 1
        self.norm = keras.layers.LayerNormalization(epsilon=1e-5, dtype=self.dtype_policy)
        self.norm.build((None, None, None, inputs))
        if hybrid == "mlp":
            self.steps = [dense(inputs, hidden, **options), dense(hidden, width, "zeros", **options)]
        elif hybrid == "post":
            self.steps = [dense(inputs, hidden, **options), dense(hidden, width, **options),
                          convolution(width, width, stride=stride, initializer="zeros", **options)]
        elif hybrid == "interleaved" and compression >= 1:
            self.steps = [dense(inputs, hidden, **options), convolution(hidden, hidden, stride=stride, **options),
                          dense(hidden, width, "zeros", **options)]
        else:
            self.steps = [convolution(inputs, width, stride=stride, **options), dense(width, hidden, **options),
                          dense(hidden, width, "zeros", **options)]
        self.shortcut = None
        if hybrid == "mlp" and inputs != width:
            self.shortcut = dense(inputs, width, **options)
        elif hybrid != "mlp" and (stride > 1 or inputs != width):
            self.shortcut = convolution(inputs, width, stride=stride, **options)
        self.built = True

    def call(self, x):
        if self.pool > 1:
            x = ops.average_pool(x, self.pool, padding="same", data_format="channels_last")
        y = self.steps[0](self.norm(x))
        for step in self.steps[1:]:
            y = step(self.activation(y))
        return y + (x if self.shortcut is None else self.shortcut(x))

    def get_config(self):
        return {**super().get_config(), **self.config}


# ---- Single stage: from the coordinates of a picture to its colours (section 2.3) ----


def coordinates(height, width, times=None):
    """Grid of the centres of height × width cells that fill [-1, 1]²: (1, height, width, 2), each (row, column). With
    times (N,), a third number, the time of a frame: (N, height, width, 3)."""
    rows, columns = ((ops.arange(side, dtype="float32") + 0.5) * (2 / side) - 1 for side in (height, width))
    grid = ops.stack(ops.meshgrid(rows, columns, indexing="ij"), axis=-1)[None]
    if times is None:
        return grid
    times = ops.reshape(ops.cast(times, "float32"), (-1, 1, 1, 1))
    return ops.concatenate([ops.broadcast_to(grid, (len(times), height, width, 2)),
                            ops.broadcast_to(times, (len(times), height, width, 1))], axis=-1)


class FourierFeatures(keras.layers.Layer):
    """Sines and cosines of `features` random directions: (N, H, W, inputs) -> (N, H, W, 2 features), the embedding E of
    section 2.1, for which we take that of Tancik et al. (NeurIPS 2020).

    scale: standard deviation of the frequencies, in radians per unit, of the two coordinates; time gets 3, about one
    period from the first frame to the last.
    """

    def __init__(self, inputs, features, scale, **kwargs):
        super().__init__(**kwargs)
        self.scales = [scale, scale, 3.0][:inputs]
        self.directions = self.add_weight(shape=(inputs, features), trainable=False, name="directions",
                                          initializer=keras.initializers.RandomNormal(stddev=1.0))
        self.built = True

    def call(self, coords):
        angles = (coords * ops.convert_to_tensor(self.scales, coords.dtype)) @ self.directions
        return ops.concatenate([ops.sin(angles), ops.cos(angles)], axis=-1)


def single_stage(inputs, width, blocks, compression, activation, hybrid, patch, features, feature_scale):
    """Layers of INRN for one picture: coords (N, H/patch, W/patch, inputs) -> colours (N, H/patch, W/patch, 3 patch²)."""
    return [
        FourierFeatures(inputs, features, feature_scale, dtype="float32"),
        dense(2 * features, width, dtype="float32"),
        *[INReBlock(width, width, compression, 1, activation, hybrid, dtype="float32") for _ in range(blocks)],
        dense(width, 3 * patch**2, dtype="float32"),
    ]


def sine(x):
    """SIREN's activation, with its omega of 30."""
    return ops.sin(30.0 * x)


def compared(network, inputs, parameters, features, feature_scale):
    """Layers of what Figure 2 compares with, three hidden layers D -> D and the largest D that makes at most that many
    parameters: coords (N, H, W, inputs) -> colours (N, H, W, 3). (The smallest INRN allows D = 1.)

    network: "siren" (Sitzmann et al., NeurIPS 2020), or "relu", an MLP on Fourier features like INRN's.
    """
    embedding = [] if network == "siren" else [FourierFeatures(inputs, features, feature_scale, dtype="float32")]
    parameters -= sum(layer.count_params() for layer in embedding)
    inputs, width = 2 * features if embedding else inputs, 0
    while (inputs + 1) * (width + 1) + 3 * (width + 2) * (width + 1) + 3 * (width + 2) <= parameters:
        width += 1
    layers = []
    for number, before in enumerate([inputs, width, width, width]):
        limit = 1 / before if number == 0 else (6 / before) ** 0.5 / 30
        start = keras.initializers.RandomUniform(-limit, limit) if network == "siren" else "he_normal"
        layers.append(dense(before, width, start, activation=sine if network == "siren" else "relu", dtype="float32"))
    limit = (6 / width) ** 0.5 / 30
    start = keras.initializers.RandomUniform(-limit, limit) if network == "siren" else None
    return [*embedding, *layers, dense(width, 3, start, dtype="float32")]


def similarity(pictures, others):
    """SSIM of each picture (N, H, W, 3) in [-1, 1] with the other: (N,). Windows of 11, or as large as fit."""
    size = min(11, *pictures.shape[1:3])
    return ops.image.ssim(pictures + 1, others + 1, max_val=2.0,  # it is defined on intensities from 0 up
                          filter_size=size - (size + 1) % 2, data_format="channels_last")


def fitting_loss(pictures, targets, alpha):
    """alpha L2 + (1 - alpha) (1 - SSIM) of each picture (N, H, W, 3) in [-1, 1], L2 being the mean squared error; that
    error; SSIM: three times (N,). (Equation 1.)"""
    squared = ops.mean(ops.square(pictures - targets), axis=(1, 2, 3))
    ssim = similarity(pictures, targets)
    return alpha * squared + (1 - alpha) * (1 - ssim), squared, ssim


@keras.saving.register_keras_serializable("inrn")
class PictureFit(keras.Model):
    """A network that is a picture, or a video: `fit` wants frames (N, H, W, 3) in [-1, 1] and their times (N,).

    network: "inrn", or what Figure 2 compares with, "siren" or "relu", of three hidden layers and at most as many
    parameters as the INRN of the same arguments; these are explained in `FIT_PRESETS`. time: whether the frames' time
    counts, as it has to for a video. The paper feeds the time alone; convolutions need a grid, so that of the frame, the
    same for all, goes with it: a frame is still a function of its time. Everything is computed in `float32`.

    Metrics: loss (equation 1); psnr, the mean over frames of 10 log10(4 / mse), in dB; ssim, the mean over frames.
    """

    def __init__(self, network="inrn", time=False, width=48, blocks=4, compression=2.0, activation="gelu",
                 hybrid="interleaved", patch=2, features=128, feature_scale=15.0, alpha=0.7, **kwargs):
        config = {name: value for name, value in locals().items()
                  if name in {*FIT_PRESETS["quick"], "network", "time"}}
        super().__init__(dtype="float32", **kwargs)
        if network not in ("inrn", "siren", "relu"):
            raise ValueError(f"network must be inrn, siren or relu; it is {network}")
        if min(width, blocks, patch, features) < 1 or not 0 <= alpha <= 1:
            raise ValueError("width, blocks, patch and features must be at least 1, and alpha between 0 and 1")
        self.config, self.time, self.alpha, self.patch = config, time, alpha, patch
        inputs = 3 if time else 2
        layers = single_stage(inputs, width, blocks, compression, activation, hybrid, patch, features, feature_scale)
        if network != "inrn":
            parameters, self.patch = sum(layer.count_params() for layer in layers), 1
            layers = compared(network, inputs, parameters, features, feature_scale)
        self.network = layers  # once: Keras keeps what an attribute has held before
        self.trackers = [keras.metrics.Mean(name=name) for name in ("loss", "psnr", "ssim")]
        self.built = True

    def call(self, times, size):
        """Frames (N, height, width, 3) of that size, (height, width), at times (N,)."""
        height, width = size
        rows, columns = -(-height // self.patch), -(-width // self.patch)
        x = coordinates(rows, columns, times if self.time else None)
        for layer in self.network:
            x = layer(x)
        if self.patch > 1:
            x = ops.depth_to_space(x, self.patch, data_format="channels_last")[:, :height, :width]
        return ops.broadcast_to(x, (len(times), height, width, 3))

    def render(self, times, height, width):
        """As `call`, one frame after the other: a `float32` array in [-1, 1]."""
        times = ops.convert_to_tensor(times, "float32")
        with torch.no_grad():
            frames = [self(times[i:i + 1], size=(height, width)) for i in range(len(times))]
        return ops.convert_to_numpy(ops.clip(ops.concatenate(frames), -1, 1))

    def compile(self, total_steps, rate=1e-2, siren_rate=1e-3, relu_rate=3e-3):
        """Adam, its rate falling to 0 over total_steps along half a cosine; each network has a rate of its own.

        Its second moment forgets ten times as fast as usual (beta_2 0.9): gradients shrink by orders of magnitude during
        a fit, and at 0.999 SIREN ended 3 dB and INRN 8 dB lower (of the squared error alone, 150 and 300 steps).
        """
        self.compile_config = {name: value for name, value in locals().items() if name in {
            *FIT_PRESETS["quick"], "total_steps"}}
        super().compile(optimizer=None, jit_compile=False)
        peak = {"inrn": rate, "siren": siren_rate, "relu": relu_rate}[self.config["network"]]
        self.optimizers = [keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(peak, max(1, total_steps)),
                                                 beta_2=0.9, epsilon=1e-8)]
        self.optimizers[0].build(self.trainable_variables)

    def train_step(self, data):
        frames, times, _ = keras.utils.unpack_x_y_sample_weight(data)
        losses = fitting_loss(self(times, size=frames.shape[1:3]), frames, self.alpha)
        self.zero_grad()
        ops.mean(losses[0]).backward()
        with torch.no_grad():
            self.optimizers[0].apply([variable.value.grad for variable in self.trainable_variables],
                                     self.trainable_variables)
            return self.update_metrics(*losses)

    def test_step(self, data):
        frames, times, _ = keras.utils.unpack_x_y_sample_weight(data)
        pictures = ops.clip(self(times, size=frames.shape[1:3]), -1, 1)
        return self.update_metrics(*fitting_loss(pictures, frames, self.alpha))

    def update_metrics(self, losses, squared, similarities):
        loss, psnr, ssim = self.trackers
        loss.update_state(losses)
        psnr.update_state(10 * ops.log10(4 / squared))
        ssim.update_state(similarities)
        return self.get_metrics_result()

    @property
    def metrics(self):
        return self.trackers

    def get_config(self):
        return {"name": self.name, **self.config}

    def get_compile_config(self):
        return self.compile_config if self.compiled else {}

    def compile_from_config(self, config):
        self.compile(**config)


# ---- Four stages: from images to logits (section 2.3) ----


def numbers(text, name):
    """Four positive whole numbers from a text such as "32,64,96,128". Raises ValueError for anything else."""
    parts = str(text).split(",")
    if len(parts) != 4 or not all(part.strip().isdigit() and int(part) for part in parts):
        raise ValueError(f"{name} must be four whole numbers from 1 up, such as {SMALL[name]}; it is {text}")
    return [int(part) for part in parts]


@keras.saving.register_keras_serializable("inrn")
class INRN(keras.Model):
    """Images (N, H, W, C), `float32` in [-1, 1], any H and W -> logits (N, num_classes).

    The arguments are explained in `SMALL`. `stage_outputs` has what a detector or a segmenter builds on. An ordinary Keras
    model: compile it with a loss of its own to train without a teacher, or give it to a `Distiller`. Raises ValueError
    for arguments that make no sense.
    """

    def __init__(self, channels=1, num_classes=10, widths="32,64,96,128", blocks="1,3,16,3", stem_stride=1,
                 compression=0.5, activation="gelu", hybrid="interleaved", dtype=None, **kwargs):
        config = {name: value for name, value in locals().items() if name in {*SMALL, "channels", "num_classes"}}
        policy = keras.dtype_policies.get(dtype or keras.config.dtype_policy())
        super().__init__(dtype=policy, **kwargs)
        if min(channels, num_classes, stem_stride) < 1:
            raise ValueError("channels, num_classes and stem_stride must be at least 1")
        self.config, self.channels = {**config, "dtype": policy.name}, channels
        widths, blocks = numbers(widths, "widths"), numbers(blocks, "blocks")
        self.stem = convolution(channels, widths[0], max(3, stem_stride), stem_stride, dtype=policy)
        self.stages = []
        for stage, (before, width, count) in enumerate(zip([widths[0], *widths], widths, blocks), 1):
            self.stages.append([
                INReBlock(before if block == 0 else width, width, compression, 2 if stage > 1 and block == 0 else 1,
                          activation, hybrid, dtype=policy, name=f"stage{stage}_block{block + 1}")
                for block in range(count)])
        self.norm = keras.layers.LayerNormalization(epsilon=1e-5, dtype=policy)
        self.norm.build((None, widths[-1]))
        self.head = dense(widths[-1], num_classes, dtype=policy.variable_dtype)  # logits in full precision
        self.built = True

    def stage_outputs(self, images):
        """{"stage1": (N, H/s, W/s, D1), …, "stage4": (N, H/8s, W/8s, D4)}, sides rounded up; s is stem_stride. (Equation
        2.) Raises ValueError for a wrong number of channels."""
        if len(images.shape) != 4 or images.shape[-1] != self.channels:
            raise ValueError(f"images must be (N, H, W, {self.channels}); got {tuple(images.shape)}")
        x, outputs = self.stem(images), {}
        for number, stage in enumerate(self.stages, 1):
            for block in stage:
                x = block(x)
            outputs[f"stage{number}"] = x
        return outputs

    def classify(self, stage4):
        """Logits from the last stage's output."""
        return self.head(self.norm(ops.mean(stage4, axis=(1, 2))))

    def call(self, images):
        return self.classify(self.stage_outputs(images)["stage4"])

    def get_config(self):
        return {"name": self.name, **self.config}


# ---- Teachers ----


def residual_cnn(image_shape, num_classes, stem_stride=1, width=32):
    """A small residual network with batch normalization, He et al. (CVPR 2016): images -> logits. Its layers `stage1` to
    `stage4` have the resolutions of an INRN with the same stem_stride."""
    options = dict(padding="same", use_bias=False, data_format="channels_last", kernel_initializer="he_normal")
    inputs = keras.Input(image_shape)
    x = keras.layers.Conv2D(width, 3, stem_stride, **options)(inputs)
    x = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
    for stage in range(4):
        filters, stride = width * min(4, 2**stage), 2 if stage else 1
        y = keras.layers.Conv2D(filters, 3, stride, **options)(x)
        y = keras.layers.ReLU()(keras.layers.BatchNormalization()(y))
        y = keras.layers.BatchNormalization()(keras.layers.Conv2D(filters, 3, **options)(y))
        if stage:
            x = keras.layers.BatchNormalization()(keras.layers.Conv2D(filters, 1, stride, **options)(x))
        x = keras.layers.ReLU(name=f"stage{stage + 1}")(keras.layers.Add()([x, y]))
    x = keras.layers.GlobalAveragePooling2D("channels_last")(x)
    return keras.Model(inputs, keras.layers.Dense(num_classes, dtype=keras.config.floatx())(x), name="teacher")


def resnet101(image_shape, weights="imagenet"):
    """The paper's teacher on ImageNet: `keras.applications.ResNet101` without its classifier, for images in [-1, 1] of
    that shape (H, W, C), at least 32×32. With weights it needs a network, or Keras's cache of an earlier download."""
    inputs = keras.Input(image_shape)
    x = inputs if image_shape[-1] == 3 else keras.layers.Concatenate()([inputs] * 3)
    x = keras.applications.resnet.preprocess_input(127.5 * (x + 1), data_format="channels_last")
    return keras.applications.ResNet101(include_top=False, weights=weights, input_tensor=x)


def match_layers(teacher, student, image_shape, names=()):
    """For each stage of the student the teacher's layer to learn from: {"stage1": layer, …}.

    names: those layers, one a stage; without, each stage gets the teacher's last layer of the same resolution, or the one
    of its own name among them, if there is one. Raises ValueError where the teacher is no graph of layers, sees other images, or has no such layers.
    """
    if not getattr(teacher, "inputs", None):
        raise ValueError("the teacher must be a functional or sequential Keras model, whose layers have outputs")
    sees = [tuple(x.shape[1:]) for x in teacher.inputs]
    if len(sees) != 1 or len(sees[0]) != 3 or any(side not in (None, wanted)
                                                  for side, wanted in zip(sees[0], image_shape)):
        raise ValueError(f"the teacher sees inputs of {', '.join(map(str, sees))}, the images are {tuple(image_shape)}")
    # What stands before the first layer that learns is the image, scaled or repeated.
    first = next((i for i, layer in enumerate(teacher.layers) if layer.trainable_weights), 0)
    layers = {layer.name: layer for layer in teacher.layers[first:] if len(getattr(layer.output, "shape", ())) == 4}
    if names:
        if len(names) != 4 or not {*names} <= {*layers}:
            raise ValueError(f"the teacher's layers, one for each stage, must be four of {', '.join(layers)}; they are "
                             f"{', '.join(names)}")
        return {f"stage{number}": layers[name] for number, name in enumerate(names, 1)}
    image, matched = ops.zeros((1, *image_shape)), {}
    with torch.no_grad():
        try:
            outputs = keras.Model(teacher.inputs, {name: layer.output for name, layer in layers.items()})(image)
        except RuntimeError as error:
            raise ValueError(f"the teacher cannot see images of {tuple(image_shape)}: {error}") from error
        for stage, output in student.stage_outputs(image).items():
            fitting = [name for name, x in outputs.items() if x.shape[1:3] == output.shape[1:3]]
            if fitting:
                matched[stage] = layers[stage if stage in fitting else fitting[-1]]
    if not matched:
        raise ValueError(f"no layer of the teacher has the resolution of a stage: name four of {', '.join(layers)}")
    return matched


# ---- Distillation ----


def standardize(x):
    """Outputs of a layer (N, h, w, D) with mean 0 and variance 1 in each image, so that teachers of any scale teach alike:
    the teacher's transformation in equation 3."""
    x = ops.cast(x, "float32")
    mean, variance = ops.moments(x, axes=(1, 2, 3), keepdims=True)
    return (x - mean) * ops.rsqrt(variance + 1e-6)


class Distiller(keras.Model):
    """Trains a student, INRN or without a teacher any Keras classifier, and is saved as the student alone.

    lambda_1 CE + lambda_2 sum over stages of MSE(1×1 convolution of O_s, standardized O_t) (equations 3 and 4), and, if
    logits_weight is above 0, the divergence from the teacher's probabilities at a temperature (Hinton et al., 2015).

    teacher: a functional or sequential Keras classifier of images of image_shape (H, W, C) in [-1, 1], returning logits
    or probabilities, whose weights stay as they are; with logits_weight 0 it may lack the classifier; None: cross entropy
    alone. layers: see `match_layers`, whose ValueError passes through; another one is raised for a teacher of other
    classes. Resolutions that differ are interpolated.

    Metrics: loss, the whole in training, the cross entropy in evaluation; accuracy; distillation, all but the cross
    entropy, where there is a teacher.
    """

    def __init__(self, student, teacher=None, image_shape=None, layers=(), task_weight=1.0, feature_weight=1.0,
                 logits_weight=0.0, temperature=4.0, **kwargs):
        super().__init__(**kwargs)
        self.student, self.alignment, self.teach = student, [], None
        self.task_weight, self.feature_weight, self.logits_weight = task_weight, feature_weight, logits_weight
        self.trackers = [keras.metrics.Mean(name="loss"), keras.metrics.SparseCategoricalAccuracy(name="accuracy")]
        if teacher is not None:
            matched = match_layers(teacher, student, image_shape, layers)
            if len(teacher.outputs) != 1 or len(teacher.outputs[0].shape) not in (2, 4):
                raise ValueError("the teacher must have one output: logits, probabilities or features")
            known, wanted = teacher.outputs[0].shape[-1], student.config["num_classes"]
            if len(teacher.outputs[0].shape) == 2 and known != wanted:
                raise ValueError(f"the teacher knows {known} classes, the dataset has {wanted}")
            if len(teacher.outputs[0].shape) == 4 and logits_weight:
                raise ValueError("this teacher has no logits: leave logits_weight at 0")
            features = keras.Model(teacher.inputs, [*(layer.output for layer in matched.values()), *teacher.outputs])

            def teach(images):  # a function, so that Keras does not take the teacher for a part of this model
                with torch.no_grad():
                    return features(images, training=False)

            image = ops.zeros((1, *image_shape))
            *outputs, taught = teach(image)
            with torch.no_grad():
                widths = {stage: x.shape[-1] for stage, x in student.stage_outputs(image).items()}
            self.teach, self.matched = teach, [*matched]
            self.alignment = [convolution(widths[stage], x.shape[-1], 1, dtype=student.dtype_policy)
                              for stage, x in zip(matched, outputs)]
            # Most Keras classifiers return probabilities, whose logarithms are logits.
            self.probabilities = bool(ops.all(taught >= 0)) and abs(float(ops.sum(taught)) - 1) < 0.02
            # With its default, the loss's name, Keras 3.15 leaves the softmax out.
            self.divergence = keras.distillation.LogitsDistillation(temperature, keras.losses.KLDivergence())
            self.trackers.append(keras.metrics.Mean(name="distillation"))
        self.built = True

    def call(self, images, training=False):
        return self.student(images, training=training)

    def compile(self, total_steps, rate=1e-3, weight_decay=0.05):
        """AdamW for the student, and one for the alignment, over total_steps training steps: epochs times batches.

        The rate rises for 5 % of the steps and falls to 0; gradients are clipped to norm 1; biases and normalization do
        not decay. Compiles the student too, so that once saved and loaded it can be evaluated, and trained on with the
        same optimizer, whose decay then spares nothing.
        """
        super().compile(optimizer=None, jit_compile=False)
        warm = total_steps // 20
        self.optimizers = []
        for variables in self.variable_groups():
            schedule = keras.optimizers.schedules.CosineDecay(0.0 if warm else rate, max(1, total_steps - warm),
                                                              warmup_target=rate if warm else None, warmup_steps=warm)
            optimizer = keras.optimizers.AdamW(schedule, weight_decay=weight_decay, global_clipnorm=1.0)
            optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
            optimizer.build(variables)
            self.optimizers.append(optimizer)
        self.student.compile(self.optimizers[0], keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                             metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")], jit_compile=False)

    def variable_groups(self):
        """Variables of the student, and of the alignment where there is a teacher."""
        groups = [self.student.trainable_variables]
        return groups + [[v for layer in self.alignment for v in layer.trainable_variables]] if self.teach else groups

    def distillation(self, images, outputs, logits):
        """What is added to the cross entropy: a scalar. outputs: of the student's stages, by name; logits: its own."""
        *features, taught = self.teach(images)
        total = 0.0
        for stage, align, feature in zip(self.matched, self.alignment, features):
            aligned, target = ops.cast(align(outputs[stage]), "float32"), standardize(feature)
            if aligned.shape[1:3] != target.shape[1:3]:
                aligned = ops.image.resize(aligned, target.shape[1:3], data_format="channels_last")
            total = total + self.feature_weight * ops.mean(ops.square(aligned - target))
        if self.logits_weight:
            taught = ops.cast(taught, "float32")
            taught = ops.log(ops.maximum(taught, 1e-7)) if self.probabilities else taught
            total = total + self.logits_weight * self.divergence.compute_loss(taught, logits)
        return total

    def train_step(self, data):
        images, labels, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if self.teach:
            outputs = self.student.stage_outputs(images)
            logits = self.student.classify(outputs["stage4"])
        else:
            logits = self.student(images, training=True)
        cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(labels, logits, sample_weight)
        loss = self.task_weight * cross_entropy
        if self.teach:
            added = self.distillation(images, outputs, logits)
            loss = loss + added
        self.zero_grad()
        loss.backward()
        with torch.no_grad():
            for optimizer, variables in zip(self.optimizers, self.variable_groups()):
                optimizer.apply([variable.value.grad for variable in variables], variables)
            if self.teach:
                self.trackers[2].update_state(added, sample_weight=len(images))
            return self.update_metrics(images, labels, logits, loss, sample_weight)

    def test_step(self, data):
        images, labels, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        logits = self.student(images, training=False)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(labels, logits, sample_weight)
        results = self.update_metrics(images, labels, logits, loss, sample_weight)
        return {name: results[name] for name in ("loss", "accuracy")}

    def update_metrics(self, images, labels, logits, loss, sample_weight):
        self.trackers[0].update_state(loss, sample_weight=len(images))
        self.trackers[1].update_state(labels, logits, sample_weight)
        return self.get_metrics_result()

    @property
    def metrics(self):
        return self.trackers

    def save(self, *arguments, **options):
        """Saves the student alone: as `keras.Model.save`."""
        self.student.save(*arguments, **options)
