"""HyperINR: one network predicts the weights of the small network that represents an image; its latent classifies it.

Egri, "Hyper-network based Implicit Neural Representations for Image Classification".

An encoder maps an image to a latent v, hypernetworks map v to the parameters theta of a SIREN, and the SIREN maps any
coordinate to a colour. Encoder and hypernetworks are shared by all images and learn by reconstructing them; theta is
different for every image, comes from one forward pass, and is never trained itself. Because v has to tell everything
about the image, it can be classified; because the SIREN is a continuous function, and what predicts it has learned what
images look like, it upsamples, inpaints and denoises.

    image (N, H, W, C) -> encoder -> latent v -> hypernetworks -> theta; coords -> SIREN with theta -> pixels (N, P, C)
                                     latent v, or theta* -> classifier -> logits

    symbol    shape                      meaning
    N P C     -                          images, points (pixels) of one image, colour channels
    V D L     -                          width of the latent, width of the SIREN, its hidden layers D -> D
    coords    (P, 2)                     row and column, each from -1 to 1
    v         (N, V)                     latent
    theta     L+2 pairs                  kernel (N, in, out) and bias (N, 1, out) of each layer of the SIREN
    theta*    (N, L+2, D, D)             all kernels as the channels of one picture

The paper's four experiments (`classifier`) differ in what is classified and what learns when:

    joint       v, by an MLP; everything learns at once (section 5)
    latent      v, by an MLP that learns after the rest, which then stays as it is (section 4.1)
    weights     theta*, by a CNN that learns after the rest (section 4.1)
    pretrained  v, the hidden layer of an MLP on pixels that learns first; the hypernetworks follow (section 4.2)
"""

import math
import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import torch
from keras import ops

if keras.backend.backend() != "torch":
    raise ImportError("this file needs Keras on PyTorch: set KERAS_BACKEND=torch before keras is imported")

# Hyperparameters of the paper. Where it is silent: the hypernetworks of Sitzmann et al. (NeurIPS 2020), which it builds
# on, and, marked "ours", what we chose.
PAPER = dict(
    classifier="joint",    # joint, latent, weights or pretrained
    latent_dim=256,        # V, also the width of the hypernetworks and of the MLP classifier
    encoder_width=32,      # channels of the encoder's first convolution, doubled three times; not in pretrained; ours
    dim=256,               # D
    depth=3,               # L
    omega=30.0,            # frequency factor of every sine layer
    latent_penalty=0.1,    # alpha_1, of the mean square of v
    weight_penalty=100.0,  # alpha_2, of the mean square of theta
    task_weight=0.1,       # of the cross entropy
    hyper_rate=5e-5,       # learning rate of encoder and hypernetworks
    classifier_rate=1e-2,  # of the classifier, joint
    separate_rate=1e-3,    # of the classifier that learns by itself: latent, weights, pretrained
    classifier_part=0.2,   # part of all steps in which it does; ours
    final_rate=1.0,        # the rates fall to this part of themselves, along half a cosine; 1: constant
    batch_size=64,         # ours
    epochs=50,             # ours
)
PRESETS = {
    # A tenth of the paper's parameters and of its time a step; found on held-out training images of MNIST.
    "quick": {**PAPER, "encoder_width": 16, "dim": 64, "hyper_rate": 2e-4, "classifier_rate": 1e-3, "final_rate": 0.01,
              "epochs": 5},
    "paper": PAPER,
}


# ---- The SIREN ----


def coordinates(height, width, dtype="float32"):
    """Grid of pixel centres on [-1, 1]², rows first: (height * width, 2), each point (row, column)."""
    rows, columns = ops.linspace(-1.0, 1.0, height, dtype=dtype), ops.linspace(-1.0, 1.0, width, dtype=dtype)
    return ops.reshape(ops.stack(ops.meshgrid(rows, columns, indexing="ij"), axis=-1), (-1, 2))


def render(theta, coords, omega):
    """The SIREN of each image: theta and coords (P, 2) -> colours (N, P, C).

    sin(omega * (h W + b)) per layer but the last, which is linear. omega multiplies the parameters, of which there are
    fewer than of activations.
    """
    *sine_layers, (kernel, bias) = theta
    hidden = coords
    for sine_kernel, sine_bias in sine_layers:
        hidden = ops.sin(hidden @ (omega * sine_kernel) + omega * sine_bias)                # (N, P, D)
    return hidden @ kernel + bias


# ---- From an image to the parameters of its SIREN ----


def resize(images, size):
    """Samples images (N, H, W, C) on the grid of `size`, (height, width), bilinearly. Like `coordinates`, and unlike
    `keras.ops.image.resize`, it keeps the middle of a corner pixel in the corner."""
    images = ops.transpose(ops.convert_to_tensor(images), (0, 3, 1, 2))
    resized = torch.nn.functional.interpolate(images, tuple(size), mode="bilinear", align_corners=True)
    return ops.transpose(resized, (0, 2, 3, 1))


@keras.saving.register_keras_serializable("hyperinr")
class ResidualBlock(keras.layers.Layer):
    """Two 3×3 convolutions beside a 1×1 one: (N, H, W, inputs) -> (N, H/2, W/2, width), rounded up."""

    def __init__(self, inputs, width, **kwargs):
        super().__init__(**kwargs)
        options = dict(padding="same", data_format="channels_last", kernel_initializer="he_normal",
                       dtype=self.dtype_policy)
        self.reduce = keras.layers.Conv2D(width, 3, strides=2, activation="relu", **options)
        self.refine = keras.layers.Conv2D(width, 3, **options)
        self.shortcut = keras.layers.Conv2D(width, 1, strides=2, **options)
        for layer, channels in ((self.reduce, inputs), (self.refine, width), (self.shortcut, inputs)):
            layer.build((None, None, None, channels))
        self.built = True

    def call(self, x):
        return ops.relu(self.refine(self.reduce(x)) + self.shortcut(x))


def image_encoder(image_size, channels, latent_dim, width, dtype):
    """Residual convolutional encoder: images (N, S, S, C) -> latents (N, V). (Section 3.2; the layout is ours.)"""
    return keras.Sequential([
        keras.Input((image_size, image_size, channels)),
        keras.layers.Conv2D(width, 3, padding="same", activation="relu", kernel_initializer="he_normal",
                            data_format="channels_last", dtype=dtype),
        *[ResidualBlock(width << block, width << block + 1, dtype=dtype) for block in range(3)],
        keras.layers.Flatten("channels_last", dtype=dtype),
        # Latents start near 0.1, for the reason that HyperNetwork gives; ours.
        keras.layers.Dense(latent_dim, dtype=dtype,
                           kernel_initializer=keras.initializers.VarianceScaling(2e-3, "fan_in", "untruncated_normal")),
    ], name="encoder")


def pixel_encoder(image_size, channels, latent_dim, dtype):
    """First layer of the two-layer MLP that classifies pixels: images (N, S, S, C) -> (N, V). (Section 4.2.)"""
    return keras.Sequential([
        keras.Input((image_size, image_size, channels)),
        keras.layers.Flatten("channels_last", dtype=dtype),
        keras.layers.Dense(latent_dim, activation="relu", dtype=dtype),
    ], name="encoder")


@keras.saving.register_keras_serializable("hyperinr")
class HyperNetwork(keras.layers.Layer):
    """Latents (N, V) -> theta: for each kernel and each bias of the SIREN an MLP V -> V -> V -> numel. (Section 3.2.)

    The last layers' kernels start He-normal divided by 100, their biases U(±1/inputs) where they become a kernel with
    that many inputs, U(±1/V) where they become a bias (as in the hypernetworks of Sitzmann et al.). So for small v all
    images start with nearly the same SIREN, of small values. With latents 25 times larger, as a Glorot start of the
    encoder gives them, `quick` has 13.0 dB on MNIST after 300 steps, with these 18.6.
    """

    def __init__(self, latent_dim, dim, depth, channels, **kwargs):
        super().__init__(**kwargs)
        widths = [2, *[dim] * (depth + 1), channels]
        self.shapes, self.mlps = [], []
        for inputs, outputs in zip(widths, widths[1:]):
            for shape, limit in (((inputs, outputs), 1 / inputs), ((1, outputs), 1 / latent_dim)):
                self.shapes.append(shape)
                self.mlps.append(keras.Sequential([
                    keras.Input((latent_dim,)),
                    *[keras.layers.Dense(latent_dim, "relu", kernel_initializer="he_normal", dtype=self.dtype_policy)
                      for _ in range(2)],
                    keras.layers.Dense(  # scale 2 would be He-normal
                        math.prod(shape), dtype=self.dtype_policy,
                        kernel_initializer=keras.initializers.VarianceScaling(2e-4, "fan_in", "untruncated_normal"),
                        bias_initializer=keras.initializers.RandomUniform(-limit, limit)),
                ]))
        self.built = True

    def call(self, latents):
        tensors = [ops.cast(ops.reshape(mlp(latents), (-1, *shape)), self.variable_dtype)
                   for mlp, shape in zip(self.mlps, self.shapes)]
        return list(zip(tensors[::2], tensors[1::2]))


# ---- Classifiers ----


def weight_tensor(theta):
    """theta* (N, L+2, D, D): the kernels of all layers, each (outputs, inputs); the first is repeated along its inputs,
    the last along its outputs, until they fill a square. (Section 4.1.)"""
    dim = theta[0][0].shape[-1]
    squares = []
    for kernel, _ in theta:
        _, inputs, outputs = kernel.shape
        tiled = ops.tile(ops.swapaxes(kernel, 1, 2), (1, -(-dim // outputs), -(-dim // inputs)))
        squares.append(tiled[:, :dim, :dim])
    return ops.stack(squares, axis=1)


def latent_classifier(num_classes, latent_dim, hidden_layers, dtype):
    """MLP: latents (N, V) -> logits (N, num_classes). One hidden layer (sections 4.1 and 5); none where `pixel_encoder`
    is the hidden layer (section 4.2)."""
    return keras.Sequential([
        keras.Input((latent_dim,)),
        *[keras.layers.Dense(latent_dim, "relu", dtype=dtype) for _ in range(hidden_layers)],
        keras.layers.Dense(num_classes, dtype=dtype.variable_dtype),  # logits in full precision
    ], name="classifier")


@keras.saving.register_keras_serializable("hyperinr")
class ToPicture(keras.layers.Layer):
    """theta* (N, L+2, D, D) -> (N, D, D, L+2), each kernel times its number of inputs, since it starts as U(±1/inputs).
    (The scale is ours. Keras's Permute and Rescaling would do it, but Rescaling looks for TensorFlow.)"""

    def call(self, tensor):
        layers, dim = tensor.shape[1:3]
        return ops.transpose(tensor, (0, 2, 3, 1)) * ops.convert_to_tensor([2] + [dim] * (layers - 1), tensor.dtype)


def weight_classifier(num_classes, dim, depth, dtype):
    """Four convolutions, three dense layers: theta* -> logits (N, num_classes). (Section 4.1; the widths are ours.)"""
    return keras.Sequential([
        keras.Input((depth + 2, dim, dim)),
        ToPicture(dtype=dtype),
        *[keras.layers.Conv2D(width, 3, strides=2, padding="same", activation="relu", kernel_initializer="he_normal",
                              data_format="channels_last", dtype=dtype) for width in (16, 32, 64, 64)],
        keras.layers.Flatten("channels_last", dtype=dtype),
        keras.layers.Dense(128, "relu", dtype=dtype),
        keras.layers.Dense(64, "relu", dtype=dtype),
        keras.layers.Dense(num_classes, dtype=dtype.variable_dtype),
    ], name="classifier")


# ---- The model ----


def fill_with_mean(images, mask):
    """Images (N, H, W, C) with the mean of each one's other pixels where the boolean mask, (H, W) or (N, H, W), is
    true. Raises ValueError for a mask of another shape or type, or one that leaves no pixel."""
    images, mask = ops.convert_to_numpy(images), ops.convert_to_numpy(mask)
    if mask.dtype != bool or mask.shape not in (images.shape[1:3], images.shape[:3]):
        raise ValueError(f"mask must be boolean, of shape {images.shape[1:3]} or {images.shape[:3]}; got {mask.dtype}, "
                         f"{mask.shape}")
    hole = np.broadcast_to(mask, images.shape[:3])[..., None]
    if hole.all(axis=(1, 2)).any():
        raise ValueError("mask must leave some pixels of every image")
    return np.where(hole, images.mean(axis=(1, 2), where=~hole, keepdims=True), images)


@keras.saving.register_keras_serializable("hyperinr")
class HyperINR(keras.Model):
    """Images (N, H, W, C), `float32` in [-1, 1] -> logits (N, num_classes).

    The arguments are explained in `PAPER`. image_size: height and width S that the encoder sees; images of another size
    are sampled at that one first. `dtype` is the policy of encoder, hypernetworks and classifier ("mixed_bfloat16" is
    fine: parameters then arrive rounded); the SIREN computes in the variables' type. Raises ValueError for arguments
    that make no sense.

    Metrics: loss, that of section 5, in all four experiments; mse, the reconstruction's mean squared error on the scale
    of [-1, 1]; psnr, the mean over images of 10 log10(4 / mse), in dB; accuracy.
    """

    def __init__(self, image_size=28, channels=1, num_classes=10, classifier="joint", latent_dim=256, encoder_width=32,
                 dim=256, depth=3, omega=30.0, latent_penalty=0.1, weight_penalty=100.0, task_weight=0.1, dtype=None,
                 **kwargs):
        config = {name: value for name, value in locals().items()
                  if name in {*PAPER, "image_size", "channels", "num_classes"}}
        policy = keras.dtype_policies.get(dtype or keras.config.dtype_policy())
        super().__init__(dtype=policy.variable_dtype, **kwargs)
        if classifier not in ("joint", "latent", "weights", "pretrained"):
            raise ValueError(f"classifier must be joint, latent, weights or pretrained; it is {classifier}")
        if min(image_size, channels, num_classes, latent_dim, encoder_width, dim, depth) < 1:
            raise ValueError("image_size, channels, num_classes, latent_dim, encoder_width, dim and depth must be at "
                             "least 1")
        self.config, self.experiment, self.omega = {**config, "dtype": policy.name}, classifier, omega
        self.image_size, self.channels = image_size, channels
        self.latent_penalty, self.weight_penalty, self.task_weight = latent_penalty, weight_penalty, task_weight
        if classifier == "pretrained":
            self.encoder = pixel_encoder(image_size, channels, latent_dim, policy)
        else:
            self.encoder = image_encoder(image_size, channels, latent_dim, encoder_width, policy)
        if classifier == "weights":
            self.classifier = weight_classifier(num_classes, dim, depth, policy)
        else:
            self.classifier = latent_classifier(num_classes, latent_dim, 0 if classifier == "pretrained" else 1, policy)
        self.hypernetwork = HyperNetwork(latent_dim, dim, depth, channels, dtype=policy)
        self.render = render  # or its compiled form
        self.trackers = [keras.metrics.Mean(name=name) for name in ("loss", "mse", "psnr")]
        self.trackers.append(keras.metrics.SparseCategoricalAccuracy(name="accuracy"))
        self.built = True

    def encode(self, images):
        """Latents v (N, V) of images (N, H, W, C) in [-1, 1]. Raises ValueError for a wrong number of channels."""
        if len(images.shape) != 4 or images.shape[-1] != self.channels:
            raise ValueError(f"images must be (N, H, W, {self.channels}); got {tuple(images.shape)}")
        if tuple(images.shape[1:3]) != (self.image_size, self.image_size):
            images = resize(images, (self.image_size, self.image_size))
        return self.encoder(images)

    def classify(self, latents, theta):
        """Logits, from theta* or from v."""
        return self.classifier(weight_tensor(theta) if self.experiment == "weights" else latents)

    def call(self, images, training=False):
        latents = self.encode(images)
        return self.classify(latents, self.hypernetwork(latents) if self.experiment == "weights" else None)

    # ---- Image operations (section 3.3, appendix A). Each encodes what it gets and asks the SIREN for a picture. ----

    def reconstruct(self, images, size=None):
        """The SIREN's picture of images (N, H, W, C) in [-1, 1]: a `float32` array (N, height, width, C).

        size: (height, width), any, since the SIREN is a function of continuous coordinates; None: H, W.
        """
        images = ops.convert_to_tensor(images, self.dtype)
        height, width = size or images.shape[1:-1]
        grid, rows = coordinates(height, width, self.dtype), []
        with torch.no_grad():
            for batch in torch.split(images, 64):  # parts, to bound the memory: 64 images, 65,536 pixels at a time
                theta = self.hypernetwork(self.encode(batch))
                parts = [render(theta, coords, self.omega) for coords in torch.split(grid, 65_536 // len(batch))]
                rows.append(ops.concatenate(parts, axis=1))
        pictures = ops.reshape(ops.concatenate(rows), (len(images), height, width, self.channels))
        return ops.convert_to_numpy(ops.cast(pictures, "float32"))

    def upsample(self, images, factor):
        """Images (N, H, W, C) -> (N, factor*H, factor*W, C), rounded: the SIREN on a denser grid. Raises ValueError for
        a factor below 1."""
        if not factor >= 1:
            raise ValueError(f"factor must be at least 1; it is {factor}")
        return self.reconstruct(images, [round(factor * side) for side in images.shape[1:3]])

    def inpaint(self, images, mask, steps=8):
        """Fills holes: images (N, H, W, C) -> the same shape, as they were but where mask is true.

        mask: boolean, (H, W) or (N, H, W). The hole's own pixels have no influence: the encoder first sees the mean of
        the image's others there, and then, steps - 1 times, what the SIREN drew in the hole the time before. (The
        paper takes one step; eight gained 1.7 dB on MNIST.) Raises ValueError as `fill_with_mean` does.
        """
        filled, hole = fill_with_mean(images, mask), ops.convert_to_numpy(mask)[..., None]
        for _ in range(steps):
            filled = np.where(hole, self.reconstruct(filled), filled)
        return filled

    def denoise(self, images):
        """Noisy images (N, H, W, C) -> the same shape: the reconstruction, in which noise, unlike all that the training
        images had in common, finds no place."""
        return self.reconstruct(images)

    # ---- Training ----

    def compile(self, total_steps, hyper_rate=5e-5, classifier_rate=1e-2, separate_rate=1e-3, classifier_part=0.2,
                final_rate=1.0, jit_compile=False):
        """Two Adam optimizers: of the hypernetworks (and the encoder), and of the classifier.

        total_steps: epochs times batches of the training to come. `joint` uses both optimizers in all of them;
        `latent` and `weights` the second in the last classifier_part of them, `pretrained` in the first, and the other
        in the rest. Over its steps each rate falls to final_rate of itself. jit_compile compiles the SIREN, a pure
        function, with `torch.compile`. Raises ValueError where a part is not between 0 and 1.
        """
        if not 0 < classifier_part < 1 or not 0 <= final_rate <= 1:
            raise ValueError("classifier_part, a part of the steps, and final_rate, a part of the learning rates, must "
                             f"be between 0 and 1; they are {classifier_part} and {final_rate}")
        self.compile_config = {name: value for name, value in locals().items()
                               if name in {*PAPER, "total_steps"}}  # not jit_compile: that is this process's choice
        super().compile(optimizer=None, jit_compile=False)
        self.render = torch.compile(render, fullgraph=True) if jit_compile else render
        if self.experiment == "joint":
            rates, self.steps = (hyper_rate, classifier_rate), (total_steps, total_steps)
        else:
            part = min(max(1, round(classifier_part * total_steps)), total_steps - 1)
            rates, self.steps = (hyper_rate, separate_rate), (total_steps - part, part)
        self.optimizers = [  # an attribute of the model, so saved and restored with it
            keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, max(1, steps), final_rate), epsilon=1e-8)
            for rate, steps in zip(rates, self.steps)]
        for optimizer, variables in zip(self.optimizers, self.variable_groups()):
            optimizer.build(variables)

    def variable_groups(self):
        """Variables that learn to reconstruct, variables that learn to classify: two lists, in the optimizers' order."""
        encoder, hyper, classifier = (part.trainable_variables
                                      for part in (self.encoder, self.hypernetwork, self.classifier))
        return (hyper, encoder + classifier) if self.experiment == "pretrained" else (encoder + hyper, classifier)

    def learning(self):
        """Which of the two groups learn in the coming step, told by the steps that the first to learn has made."""
        if self.experiment == "joint":
            return True, True
        first = 1 if self.experiment == "pretrained" else 0
        begins = int(self.optimizers[first].iterations) < self.steps[first]
        return begins == (first == 0), begins == (first == 1)

    def losses(self, images, labels, sample_weight=None):
        """Logits (N, num_classes), reconstruction errors (N,), and the two parts of the loss: reconstruction with both
        penalties; cross entropy, to which alone sample_weight (N,) applies, times task_weight. (Section 5, with means
        for its norms, as Sitzmann et al. have them.)"""
        latents = self.encode(images)
        # Where the parts learn one after the other, no gradient is computed for the one that does not.
        theta = self.hypernetwork(ops.stop_gradient(latents) if self.experiment == "pretrained" else latents)
        rendered = self.render(theta, coordinates(*images.shape[1:3], self.dtype), self.omega)
        errors = ops.mean(ops.square(rendered - ops.reshape(images, rendered.shape)), axis=(1, 2))
        numbers = [tensor for pair in theta for tensor in pair]
        mean_square_theta = (sum(ops.sum(ops.square(tensor)) for tensor in numbers)
                             / sum(math.prod(tensor.shape) for tensor in numbers))
        reconstruction = (ops.mean(errors) + self.latent_penalty * ops.mean(ops.square(latents))
                          + self.weight_penalty * mean_square_theta)
        if self.experiment in ("latent", "weights"):
            latents, theta = ops.stop_gradient(latents), [tuple(map(ops.stop_gradient, pair)) for pair in theta]
        logits = self.classify(latents, theta)
        cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(labels, logits, sample_weight)
        return logits, errors, reconstruction, self.task_weight * cross_entropy

    def train_step(self, data):
        images, labels, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        logits, errors, *parts = self.losses(images, labels, sample_weight)
        learning = self.learning()
        self.zero_grad()
        sum(part for part, learns in zip(parts, learning) if learns).backward()
        with torch.no_grad():
            for optimizer, variables, learns in zip(self.optimizers, self.variable_groups(), learning):
                if learns:
                    optimizer.apply([variable.value.grad for variable in variables], variables)
            return self.update_metrics(labels, logits, errors, sum(parts), sample_weight)

    def test_step(self, data):
        images, labels, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        logits, errors, *parts = self.losses(images, labels, sample_weight)
        return self.update_metrics(labels, logits, errors, sum(parts), sample_weight)

    def update_metrics(self, labels, logits, errors, total, sample_weight):
        loss, mse, psnr, accuracy = self.trackers
        loss.update_state(total, sample_weight=len(errors))
        mse.update_state(errors)
        psnr.update_state(10 * ops.log10(4 / errors))
        accuracy.update_state(labels, logits, sample_weight)
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
