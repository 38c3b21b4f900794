"""HyperINR: hypernetworks predict the weights of a SIREN for each image, and a classifier uses the image's latent.

Egri, "Hyper-network based Implicit Neural Representations for Image Classification".

An encoder maps an image to a latent v, hypernetworks map v to the parameters theta of a SIREN, and the SIREN maps
coordinates to colours. Encoder and hypernetworks are trained to reconstruct images; theta is predicted, never trained.
The latent contains what is needed to reconstruct the image, so it can be classified. The SIREN is a continuous function,
and the networks that predict it have been trained on typical images, so the model can upsample, inpaint and denoise.

    image (N, H, W, C) -> encoder -> latent v -> hypernetworks -> theta; coords -> SIREN with theta -> pixels (N, P, C)
                                     latent v, or theta* -> classifier -> logits

    symbol    shape                      meaning
    N P C     -                          images, points (pixels) per image, colour channels
    V D L     -                          width of the latent, width of the SIREN, number of its hidden layers D -> D
    coords    (P, 2)                     row and column, each from -1 to 1
    v         (N, V)                     latent
    theta     L+2 pairs                  kernel (N, in, out) and bias (N, 1, out) of each layer of the SIREN
    theta*    (N, L+2, D, D)             the kernels of all layers, stacked like the channels of an image

The paper's four experiments, and one to compare them with, differ in the classifier's input and the order of training:

    joint       v, classified by an MLP; all parts are trained together (section 5)
    latent      v, classified by an MLP that is trained after the other parts, which are then frozen (section 4.1)
    weights     theta*, classified by a CNN that is trained after the other parts, which are then frozen (section 4.1)
    pretrained  v, the hidden layer of an MLP pixel classifier that is trained before the hypernetworks (section 4.2)
    pixels      v, classified by an MLP; the encoder is trained for this only, and nothing is reconstructed (ours)

Example:

```python
import numpy as np
import hyperinr

images = np.random.uniform(-1, 1, (64, 28, 28, 1)).astype("float32")  # (N, H, W, C) in [-1, 1]
labels = np.random.randint(0, 10, 64)

model = hyperinr.HyperINR(image_size=28, channels=1, num_classes=10, encoder_width=16, dim=64)
model.compile(total_steps=2 * 4, hyper_rate=2e-4, classifier_rate=1e-3)  # epochs times batches
model.fit(images, labels, batch_size=16, epochs=2)
print(model.evaluate(images, labels, return_dict=True))  # loss, mse, psnr, accuracy
print(model.upsample(images[:1], 10).shape, model.denoise(images[:1]).shape)  # (1, 280, 280, 1) and (1, 28, 28, 1)
print(model.inpaint(images[:1], mask=np.eye(28, dtype=bool)).shape)  # fills the diagonal: (1, 28, 28, 1)
```
"""

import functools
import math
import os
import time
import types

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import torch
from keras import ops

if keras.backend.backend() != "torch":
    raise ImportError("this file needs Keras on PyTorch: set KERAS_BACKEND=torch before importing keras")

# Name: (the paper's value, description). Where the paper gives no value, it is taken from the hypernetworks of Sitzmann
# et al. (NeurIPS 2020), on which the paper builds, or marked as our choice.
HYPERPARAMETERS = {
    "classifier": ("joint", "experiment: joint, latent, weights, pretrained, or, for comparison, pixels"),
    "latent_dim": (256, "width of the latent, the hypernetworks and the MLP classifier"),
    "encoder_width": (32, "channels of the encoder's first layer, doubled 3 times; unused in pretrained (our choice)"),
    "dim": (256, "width of the SIREN"),
    "depth": (3, "number of the SIREN's hidden layers that map dim to dim"),
    "omega": (30.0, "frequency factor of the SIREN's sine layers"),
    "latent_penalty": (0.1, "weight of the mean square of the latent in the loss (alpha_1)"),
    "weight_penalty": (100.0, "weight of the mean square of the SIREN's parameters in the loss (alpha_2)"),
    "task_weight": (0.1, "weight of the cross entropy in the loss"),
    "hyper_rate": (5e-5, "learning rate of the hypernetworks and, except in pretrained, of the encoder"),
    "classifier_rate": (1e-2, "learning rate of the classifier in joint"),
    "separate_rate": (1e-3, "learning rate of the classifier in the other experiments"),
    "classifier_epochs": (3, "further epochs for the classifier in latent, weights (our choice) and pretrained"),
    "freeze_encoder": (True, "in pretrained, keep the encoder as it is after its training as a classifier"),
    "final_rate": (1.0, "final learning rates as a fraction of the initial ones, with cosine decay; 1: constant rates"),
    "batch_size": (64, "number of images per training step (our choice)"),
    "epochs": (50, "number of passes over the training images (our choice)"),
}
PAPER = {name: value for name, (value, _) in HYPERPARAMETERS.items()}
PRESETS = {
    # A tenth of the paper's parameters and time per step. Values chosen on held-out training images of MNIST.
    "quick": {**PAPER, "latent_dim": 192, "encoder_width": 16, "dim": 64, "task_weight": 1.0, "hyper_rate": 2e-4,
              "classifier_rate": 1e-3, "final_rate": 0.01, "epochs": 3},
    "paper": PAPER,
}


# ---- The SIREN ----


def coordinates(height, width, dtype="float32"):
    """Grid of pixel centres on [-1, 1]², row by row: (height * width, 2), each point (row, column)."""
    rows, columns = ops.linspace(-1.0, 1.0, height, dtype=dtype), ops.linspace(-1.0, 1.0, width, dtype=dtype)
    return ops.reshape(ops.stack(ops.meshgrid(rows, columns, indexing="ij"), axis=-1), (-1, 2))


def render(theta, coords, omega):
    """Evaluates each image's SIREN: theta and coords (P, 2) -> colours (N, P, C). A layer is sin(omega * (h W + b));
    the last is linear. omega multiplies the parameters because there are fewer parameters than activations."""
    *sine_layers, (kernel, bias) = theta
    hidden = coords
    for sine_kernel, sine_bias in sine_layers:
        hidden = ops.sin(hidden @ (omega * sine_kernel) + omega * sine_bias)                # (N, P, D)
    return hidden @ kernel + bias


@torch.enable_grad()
def descend(tensors, predict, pixels, rate, steps):
    """Changes tensors by `steps` steps of Adam that reduce the squared errors of predict(), (N, P, C) like pixels.
    Returns the mean squared errors before each step: (steps, N)."""
    optimizer, errors = torch.optim.Adam(tensors, rate), []
    for _ in range(steps):
        errors.append(ops.mean(ops.square(predict() - pixels), axis=(1, 2)))
        for tensor, gradient in zip(tensors, torch.autograd.grad(ops.sum(errors[-1]), tensors)):
            tensor.grad = gradient
        optimizer.step()
    return ops.convert_to_numpy(ops.stack(errors).detach()) if errors else []


def fit_each(images, dim, depth, omega, steps):
    """Fits a SIREN to each of the images (N, H, W, C), as in Sitzmann et al. (NeurIPS 2020): the alternative to
    hypernetworks. Returns the mean squared errors before each step: (steps, N)."""
    theta, widths, seed = [], [2, *[dim] * (depth + 1), images.shape[-1]], keras.random.SeedGenerator(0)
    for inputs, outputs in zip(widths, widths[1:]):
        for size, limit in ((inputs, math.sqrt(6 / inputs) / omega if theta else 1 / inputs), (1, inputs**-0.5)):
            start = keras.random.uniform((len(images), size, outputs), -limit, limit, seed=seed)
            theta.append(torch.nn.Parameter(start))
    coords, pixels = coordinates(*images.shape[1:3]), ops.reshape(images, (len(images), -1, images.shape[-1]))
    return descend(theta, lambda: render(list(zip(theta[::2], theta[1::2])), coords, omega), pixels, 1e-3, steps)


# ---- From an image to the parameters of its SIREN ----


def resize(images, size):
    """Samples images (N, H, W, C) bilinearly on a grid of `size`, (height, width). As in `coordinates`, and unlike in
    `keras.ops.image.resize`, the centres of the corner pixels stay in the corners."""
    images = ops.transpose(ops.convert_to_tensor(images), (0, 3, 1, 2))
    resized = torch.nn.functional.interpolate(images, tuple(size), mode="bilinear", align_corners=True)
    return ops.transpose(resized, (0, 2, 3, 1))


def image_encoder(image_size, channels, latent_dim, width, dtype):
    """Residual convolutional encoder: images (N, S, S, C) -> latents (N, V) (section 3.2; the layout is our choice).
    Each of its three blocks halves the height and width of its input (rounded up) and doubles the channels."""
    conv = functools.partial(keras.layers.Conv2D, padding="same", data_format="channels_last", dtype=dtype,
                             kernel_initializer="he_normal")
    images = keras.Input((image_size, image_size, channels))
    x = conv(width, 3, activation="relu")(images)
    for block in range(1, 4):
        y = conv(width << block, 3, 2, activation="relu")(x)
        y = conv(width << block, 3)(y)
        x = ops.relu(y + conv(width << block, 1, 2)(x))
    # Initial latents are near 0.1. The scale is our choice; `HyperNetwork` gives the reason.
    start = keras.initializers.VarianceScaling(2e-3, "fan_in", "untruncated_normal")
    x = keras.layers.Flatten("channels_last", dtype=dtype)(x)
    return keras.Model(images, keras.layers.Dense(latent_dim, kernel_initializer=start, dtype=dtype)(x), name="encoder")


def pixel_encoder(image_size, channels, latent_dim, dtype):
    """First layer of the two-layer MLP that classifies pixels: images (N, S, S, C) -> latents (N, V) (section 4.2).
    The latents of each image are centred and scaled to 0.1, for which `HyperNetwork` is made (our choice)."""
    return keras.Sequential([
        keras.Input((image_size, image_size, channels)),
        keras.layers.Flatten("channels_last", dtype=dtype),
        keras.layers.Dense(latent_dim, activation="relu", dtype=dtype),
        keras.layers.LayerNormalization(center=False, gamma_initializer=keras.initializers.Constant(0.1),
                                        dtype=dtype.variable_dtype),
    ], name="encoder")


@keras.saving.register_keras_serializable("hyperinr")
class HyperNetwork(keras.layers.Layer):
    """Latents (N, V) -> theta: one MLP V -> V -> V -> numel for each kernel and each bias of the SIREN (section 3.2).

    The kernel of an MLP's last layer starts as He-normal divided by 100. Its bias starts as U(±1/inputs) if the MLP
    predicts a kernel with `inputs` inputs, and as U(±1/V) if it predicts a bias (as in the hypernetworks of Sitzmann et
    al.). With small latents, all images therefore start with nearly the same SIREN, whose output is small. `quick`
    reaches 17.7 dB on MNIST after 250 steps, but 11.2 dB with the 25 times larger latents of a Glorot-uniform encoder.
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
                    keras.layers.Dense(  # a scale of 2 would be He-normal
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


@keras.saving.register_keras_serializable("hyperinr")
class Standardize(keras.layers.BatchNormalization):
    """Batch normalization of what a separately trained classifier sees (our choice). Latents that are trained for
    reconstruction have a common offset and differ by 0.04 only (MNIST), some of the SIRENs' parameters by 0.0002.
    Keras's own variance, the mean square minus the squared mean, can then be negative in float32."""

    def _moments(self, inputs, mask):
        mean = ops.mean(inputs, axis=0)
        return mean, ops.mean(ops.square(inputs - mean), axis=0)


standardize = functools.partial(Standardize, center=False, scale=False, momentum=0.9, epsilon=1e-8)


def weight_tensor(theta):
    """theta* (N, L+2, D, D): the kernels of all layers, transposed to (outputs, inputs). The first is repeated along
    its inputs and the last along its outputs to fill a square (section 4.1)."""
    dim = theta[0][0].shape[-1]
    tiled = [ops.tile(ops.swapaxes(kernel, 1, 2), (1, -(-dim // kernel.shape[2]), -(-dim // kernel.shape[1])))
             for kernel, _ in theta]
    return ops.stack([kernel[:, :dim, :dim] for kernel in tiled], axis=1)


def latent_classifier(num_classes, latent_dim, experiment, dtype):
    """MLP: latents (N, V) -> logits (N, num_classes). It has one hidden layer (sections 4.1 and 5), or none if
    `pixel_encoder` is the hidden layer (section 4.2)."""
    return keras.Sequential([
        keras.Input((latent_dim,)),
        *([] if experiment in ("joint", "pixels") else [standardize(dtype=dtype.variable_dtype)]),
        *[keras.layers.Dense(latent_dim, "relu", dtype=dtype) for _ in range(experiment != "pretrained")],
        keras.layers.Dense(num_classes, dtype=dtype.variable_dtype),  # logits in full precision
    ], name="classifier")


def weight_classifier(num_classes, dim, depth, dtype):
    """Four convolutions, three dense layers: theta* -> logits (N, num_classes) (section 4.1; our choice of widths). Each
    parameter is standardized first (our choice)."""
    return keras.Sequential([
        keras.Input((depth + 2, dim, dim)),
        keras.layers.Flatten("channels_last", dtype=dtype.variable_dtype),
        standardize(dtype=dtype.variable_dtype),
        keras.layers.Reshape((depth + 2, dim, dim), dtype=dtype),
        keras.layers.Permute((2, 3, 1), dtype=dtype),  # the layers are the channels
        *[keras.layers.Conv2D(width, 3, 2, "same", "channels_last", activation="relu", dtype=dtype,
                              kernel_initializer="he_normal") for width in (16, 32, 64, 64)],
        keras.layers.Flatten("channels_last", dtype=dtype),
        keras.layers.Dense(128, "relu", dtype=dtype),
        keras.layers.Dense(64, "relu", dtype=dtype),
        keras.layers.Dense(num_classes, dtype=dtype.variable_dtype),
    ], name="classifier")


# ---- The model ----


def fill_with_mean(images, mask):
    """Images (N, H, W, C) where each pixel at which mask is true is replaced with the mean of its image's other pixels.
    mask: boolean, (H, W) or (N, H, W). Raises ValueError if it has another type or shape, or covers a whole image."""
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

    `HYPERPARAMETERS` describes the arguments. image_size: height and width S of the encoder's input; images of another
    size are resized for the encoder. dtype: policy of the encoder, the hypernetworks and the classifier. With
    "mixed_bfloat16" the predicted parameters are rounded; the SIREN always computes in the type of the variables.
    Raises ValueError for an unknown classifier.

    Metrics: loss (of section 5, in all four experiments); mse, the mean squared error of the reconstruction for values
    in [-1, 1]; psnr, the mean over images of 10 log10(4 / mse), in dB; accuracy.
    """

    def __init__(self, image_size=28, channels=1, num_classes=10, classifier="joint", latent_dim=256, encoder_width=32,
                 dim=256, depth=3, omega=30.0, latent_penalty=0.1, weight_penalty=100.0, task_weight=0.1,
                 freeze_encoder=True, dtype=None, **kwargs):
        config = {name: value for name, value in dict(locals()).items()
                  if name in {*PAPER, "image_size", "channels", "num_classes"}}
        policy = keras.dtype_policies.get(dtype or keras.config.dtype_policy())
        super().__init__(dtype=policy.variable_dtype, **kwargs)
        if classifier not in ("joint", "latent", "weights", "pretrained", "pixels"):
            raise ValueError(f"classifier must be joint, latent, weights, pretrained or pixels; got {classifier}")
        self.config, self.experiment, self.omega = {**config, "dtype": policy.name}, classifier, omega
        self.image_size, self.channels = image_size, channels
        self.latent_penalty, self.weight_penalty, self.task_weight = latent_penalty, weight_penalty, task_weight
        pretrained = classifier == "pretrained"
        self.frozen = pretrained and freeze_encoder
        self.encoder = (pixel_encoder(image_size, channels, latent_dim, policy) if pretrained else
                        image_encoder(image_size, channels, latent_dim, encoder_width, policy))
        self.classifier = (weight_classifier(num_classes, dim, depth, policy) if classifier == "weights" else
                           latent_classifier(num_classes, latent_dim, classifier, policy))
        self.hypernetwork = HyperNetwork(latent_dim, dim, depth, channels, dtype=policy)
        self.render = render  # compile() may replace it with a compiled version
        self.trackers = [keras.metrics.Mean(name=name) for name in ("loss", "mse", "psnr")]
        self.trackers.append(keras.metrics.SparseCategoricalAccuracy(name="accuracy"))
        self.built = True

    def encode(self, images):
        """Latents v (N, V) of images (N, H, W, C) in [-1, 1]. Raises ValueError for images of another shape."""
        if len(images.shape) != 4 or images.shape[-1] != self.channels:
            raise ValueError(f"images must be (N, H, W, {self.channels}); got {tuple(images.shape)}")
        if tuple(images.shape[1:3]) != (self.image_size, self.image_size):
            images = resize(images, (self.image_size, self.image_size))
        return self.encoder(images)

    def call(self, images, training=False):
        latents = self.encode(images)
        return self.classifier(weight_tensor(self.hypernetwork(latents)) if self.experiment == "weights" else latents)

    # ---- Image operations (section 3.3, appendix A): encode the images, then render their SIRENs ----

    def reconstruct(self, images, size=None, steps=0):
        """Renders the SIRENs of images (N, H, W, C) in [-1, 1]: a `float32` array (N, height, width, C). size: (height,
        width), the images' own by default; the SIREN is a continuous function. steps: number of steps of `refine`."""
        images = ops.convert_to_tensor(images, self.dtype)
        height, width = size or images.shape[1:3]
        grid, rows = coordinates(height, width, self.dtype), []
        with torch.no_grad():
            for batch in torch.split(images, 64):  # 64 images and 65,536 pixels at a time, to limit memory use
                theta = self.hypernetwork(self.refine(self.encode(batch), batch, steps))
                parts = [render(theta, coords, self.omega) for coords in torch.split(grid, 65_536 // len(batch))]
                rows.append(ops.concatenate(parts, axis=1))
        pictures = ops.reshape(ops.concatenate(rows), (len(images), height, width, self.channels))
        return ops.convert_to_numpy(ops.cast(pictures, "float32"))

    def refine(self, latents, images, steps):
        """`steps` steps of Adam on the latents (N, V), which reduce the error of the reconstruction (our choice)."""
        latents, grid = torch.nn.Parameter(latents.detach()), coordinates(*images.shape[1:3], self.dtype)
        pixels = ops.reshape(images, (len(images), -1, self.channels))
        descend([latents], lambda: render(self.hypernetwork(latents), grid, self.omega), pixels, 2e-3, steps)
        return latents

    def upsample(self, images, factor):
        """Renders the SIRENs on a denser grid: images (N, H, W, C) -> (N, factor*H, factor*W, C), sizes rounded."""
        return self.reconstruct(images, [round(factor * side) for side in images.shape[1:3]])

    def inpaint(self, images, mask, steps=8):
        """Fills holes: images (N, H, W, C) -> the same shape, unchanged except where mask is true.

        mask: boolean, (H, W) or (N, H, W). The masked pixels have no influence on the result: they are replaced first
        with the mean of the other pixels and then, `steps` times, with the reconstruction of the image so far. (The
        paper uses one step; eight steps gain 1.7 dB on MNIST.) Raises ValueError as `fill_with_mean` does.
        """
        filled, hole = fill_with_mean(images, mask), ops.convert_to_numpy(mask)[..., None]
        for _ in range(steps):
            filled = np.where(hole, self.reconstruct(filled), filled)
        return filled

    def denoise(self, images, steps=12):
        """Noisy images (N, H, W, C) -> the same shape. The latents of noisy images are unusual, so they are refined
        first; few steps do not reproduce the noise. (The paper uses none; twelve steps gain 6 dB on MNIST.)"""
        return self.reconstruct(images, steps=steps)

    # ---- Training ----

    def compile(self, total_steps, classifier_steps=0, hyper_rate=5e-5, classifier_rate=1e-2, separate_rate=1e-3,
                final_rate=1.0, jit_compile=False):
        """Creates two Adam optimizers, one for reconstruction and one for classification (see `variable_groups`).

        total_steps: epochs times batches. `joint` uses both optimizers in every step, `pixels` the second one. In the
        other experiments, classifier_steps of them train the classifier: the last steps in `latent` and `weights`, the
        first in `pretrained`. The remaining steps train the reconstruction. Each learning rate falls along a cosine to
        final_rate times its initial value over the steps of its optimizer. jit_compile: compile the SIREN, a pure
        function, with `torch.compile`. Raises ValueError unless 0 <= final_rate <= 1.
        """
        if not 0 <= final_rate <= 1:
            raise ValueError(f"final_rate, a fraction of the rates, must be between 0 and 1; got {final_rate}")
        self.compile_config = {name: value for name, value in dict(locals()).items()
                               if name in {*PAPER, "total_steps", "classifier_steps"}}  # without jit_compile
        super().compile(optimizer=None, jit_compile=False)
        self.render = torch.compile(render, fullgraph=True) if jit_compile else render
        rates, self.steps = (hyper_rate, classifier_rate), (total_steps, total_steps)
        if self.experiment != "joint":
            classifier_steps = total_steps if self.experiment == "pixels" else classifier_steps
            rates, self.steps = (hyper_rate, separate_rate), (total_steps - classifier_steps, classifier_steps)
        self.optimizers = [  # an attribute of the model, so Keras saves and restores it
            keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, max(1, steps), final_rate), epsilon=1e-8)
            for rate, steps in zip(rates, self.steps)]
        for optimizer, variables in zip(self.optimizers, self.variable_groups()):
            optimizer.build(variables)

    def variable_groups(self):
        """Two lists in the order of `optimizers`: the variables trained for reconstruction and for classification."""
        encoder, hyper, classifier = (x.trainable_variables for x in (self.encoder, self.hypernetwork, self.classifier))
        return (hyper if self.frozen else encoder + hyper,
                encoder + classifier if self.experiment in ("pretrained", "pixels") else classifier)

    def learning(self):
        """For each of the two groups, whether the next step trains it. The first optimizer's step count decides."""
        if self.experiment == "joint":
            return True, True
        first = 1 if self.experiment == "pretrained" else 0
        begins = int(self.optimizers[first].iterations) < self.steps[first]
        return begins == (first == 0), begins == (first == 1)

    def losses(self, images, labels, sample_weight=None, training=False):
        """Logits (N, num_classes), reconstruction errors (N,), and the two terms of the loss (section 5).

        The terms are the reconstruction error with both penalties, and the cross entropy times task_weight.
        sample_weight (N,) applies to the cross entropy only. Means replace the paper's norms, as in Sitzmann et al.
        """
        latents = self.encode(images)
        # Except in `joint`, backpropagation stops between the two groups of variables.
        theta = self.hypernetwork(ops.stop_gradient(latents) if self.frozen else latents)
        rendered = self.render(theta, coordinates(*images.shape[1:3], self.dtype), self.omega)
        errors = ops.mean(ops.square(rendered - ops.reshape(images, rendered.shape)), axis=(1, 2))
        tensors = [tensor for pair in theta for tensor in pair]
        mean_square_theta = sum(ops.sum(ops.square(x)) for x in tensors) / sum(math.prod(x.shape) for x in tensors)
        reconstruction = (ops.mean(errors) + self.latent_penalty * ops.mean(ops.square(latents))
                          + self.weight_penalty * mean_square_theta)
        if self.experiment in ("latent", "weights"):
            latents, theta = ops.stop_gradient(latents), [tuple(map(ops.stop_gradient, pair)) for pair in theta]
        logits = self.classifier(weight_tensor(theta) if self.experiment == "weights" else latents, training=training)
        cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(labels, logits, sample_weight)
        return logits, errors, reconstruction, self.task_weight * cross_entropy

    def train_step(self, data):
        return self.step(data, self.learning())

    def test_step(self, data):
        return self.step(data, (False, False))

    def step(self, data, learning):
        """Trains the groups for which `learning` is true on one batch and updates the metrics; returns them by name."""
        images, labels, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        logits, errors, *terms = self.losses(images, labels, sample_weight, any(learning))
        if any(learning):
            self.zero_grad()
            sum(term for term, learns in zip(terms, learning) if learns).backward()
        with torch.no_grad():
            for optimizer, variables, learns in zip(self.optimizers, self.variable_groups(), learning):
                if learns:
                    optimizer.apply([variable.value.grad for variable in variables], variables)
            loss, mse, psnr, accuracy = self.trackers
            loss.update_state(sum(terms), sample_weight=len(errors))
            mse.update_state(errors)
            psnr.update_state(10 * ops.log10(4 / errors))
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
    """The models of a run: [("", compiled model, epochs)]. Raises ValueError as `HyperINR` and its `compile` do."""
    (size, _, channels), separate = dataset.image_shape, options.classifier not in ("joint", "pixels")
    further = options.classifier_epochs if separate else 0
    model = HyperINR(size, channels, len(dataset.class_names), options.classifier, options.latent_dim,
                     options.encoder_width, options.dim, options.depth, options.omega, options.latent_penalty,
                     options.weight_penalty, options.task_weight, options.freeze_encoder)
    epochs = options.epochs + further
    model.compile(epochs * steps_per_epoch, further * steps_per_epoch, options.hyper_rate, options.classifier_rate,
                  options.separate_rate, options.final_rate, options.compile)
    return [("", model, epochs)]


def report(models, images, labels, class_names, finer):
    """Mean PSNR in dB of the reconstruction, of each image operation and of a baseline without a model; a figure. Images
    are upsampled by 4 if finer provides the ground truth, and otherwise from half their size. A hole has a third of the
    height and of the width. The noise is Gaussian with a standard deviation of 0.5; the noisy images are clipped to
    [-1, 1]. With labels, also the mean PSNR of a SIREN that is fitted to each image, over the steps of the fit."""
    def psnr(mse):  # at most 100 dB because JSON has no infinity
        return 10 * np.log10(4 / np.maximum(mse, 4e-10))

    model, rng, (height, width) = models["hyperinr"], np.random.default_rng(0), images.shape[1:3]
    half = ops.convert_to_numpy(resize(images, (max(1, height // 2), max(1, width // 2))))
    coarse, fine = (images, finer(len(images), 4)) if finer else (half, images)
    top, left = (rng.integers(0, side - side // 3, (len(images), 1, 1)) for side in (height, width))
    rows, columns = np.arange(height)[:, None] - top, np.arange(width) - left
    hole = (0 <= rows) & (rows < height // 3) & (0 <= columns) & (columns < width // 3)      # (N, H, W)
    noisy = np.clip(images + rng.normal(0, 0.5, images.shape), -1, 1).astype("float32")
    results, figure = {"psnr": {}}, [[(picture, "image") for picture in fine[:4]]]
    for name, truth, pictures in (
            ("INR", images, model.reconstruct(images)),
            ("bilinear", fine, ops.convert_to_numpy(resize(coarse, fine.shape[1:3]))),
            ("upsample", fine, model.reconstruct(coarse, fine.shape[1:3])),
            ("mean-filled", images, fill_with_mean(images, hole)), ("inpaint", images, model.inpaint(images, hole)),
            ("noisy", images, noisy), ("denoise", images, model.denoise(noisy))):
        values = psnr(np.square(truth - pictures).mean(axis=(1, 2, 3)))
        results["psnr"][name] = float(values.mean())
        figure.append([(picture, f"{name}\n{value:.1f} dB") for picture, value in zip(pictures[:4], values)])
    if labels is not None:
        images, begin = ops.convert_to_tensor(images[:max(1, 100 * 28**2 // (height * width))]), time.perf_counter()
        values = psnr(fit_each(images, model.config["dim"], model.config["depth"], model.omega, 51)).mean(axis=1)
        seconds, steps = time.perf_counter() - begin, int((values < results["psnr"]["INR"]).sum())
        results[f"a SIREN for each of {len(images)} images"] = {
            "steps to the psnr of INR (at most 51)": steps, "seconds for these steps": seconds * steps / len(values),
            **{f"psnr after {step} steps": float(values[step]) for step in (5, 10, 20, 50)}}
    return results, {"reconstructions": [*zip(*figure)]}


TASKS = {"classify": types.SimpleNamespace(
    presets=PRESETS, hyperparameters=HYPERPARAMETERS, build=build, report=report,
    ablations={"classifier": [{"classifier": name} for name in ("joint", "latent", "weights", "pretrained")]})}
