"""Datasets for all methods: a name becomes arrays of images and labels.

`load("shapes")` computes ten classes of analytic shapes and needs no download. Every other name is looked up in
TensorFlow Datasets (TFDS): what is prepared on disk is read without TensorFlow, what is not is downloaded first.
Images stay `uint8`, `(N, H, W, C)`; `Batches` turns them into the `float32` in [-1, 1] that the models see.
"""

import collections.abc
import dataclasses
import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np

SHAPES = ("disk", "ring", "half-disk", "crescent", "triangle", "square", "bar", "cross", "star", "heart")


class DataError(ValueError):
    """A dataset that cannot be had; the message is one line that says what to do."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Two splits of one dataset; every image has the same size.

    train_images, test_images: `uint8`, (N, H, W, C) with C 1 or 3. train_labels, test_labels: `int64`, (N,).
    class_names: one string per label. flip: whether a mirrored image keeps its label.
    finer: where the pictures are known at every resolution, a function (count, factor) -> the first `count` test images
    on a grid of `factor` times as many rows and columns; else None.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple
    flip: bool
    finer: collections.abc.Callable | None = None


def load(name, data_dir=None, image_size=None, seed=0):
    """Loads the dataset `name`: "shapes" or the TFDS name of an image classification dataset ("mnist", "cifar10", …).

    data_dir: where TFDS keeps its datasets; None means $TFDS_DATA_DIR, else ~/tensorflow_datasets.
    image_size: height and width in pixels; None keeps the dataset's own (28 for shapes). Other images are scaled so
    that they cover the square, then cropped to it about their middle.
    seed: of "shapes", which other datasets ignore.

    Raises DataError for an unknown name, for a dataset without one image and one label per example or without training
    and test split, for images that differ in size without image_size, and where neither disk nor network has it.
    """
    if name == "shapes":
        size = image_size or 28
        return Dataset(*shapes(range(10_000), size, seed=seed), *shapes(range(10_000, 12_000), size, seed=seed),
                       class_names=SHAPES, flip=True, finer=lambda count, factor:
                       shapes(range(10_000, 10_000 + count), factor * size, seed=seed)[0])
    return _load_tfds(name, data_dir, image_size)


# ---- shapes: ten classes drawn from signed-distance functions ----


def shapes(indices, size=28, channels=1, noise=0.0, seed=0):
    """Renders samples of the built-in dataset; sample i depends on (seed, i) alone, and its label is i % 10.

    A sample is a function on [-1, 1]², so asking for the same index at another `size` shows the same picture, sampled
    more finely: the ground truth of super-resolution. Position, size, rotation, foreground and background are random,
    edges are soft.

    indices: integers ≥ 0, N of them. size: height and width in pixels. channels: 1 (grey) or 3 (colour).
    noise: standard deviation of Gaussian noise, on the scale of intensities in [0, 1].
    Returns images `uint8` (N, size, size, channels) and labels `int64` (N,).
    """
    indices = np.asarray(indices, dtype=np.int64)
    labels = indices % len(SHAPES)
    # Philox maps (key, counter) to random numbers directly: sample i costs the same wherever it stands.
    generators = [np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, i])) for i in indices]
    uniform = np.array([g.random(10) for g in generators]).reshape(len(indices), 10)
    radius = 0.5 + 0.25 * uniform[:, 0]                                 # (N,) half the shape's extent; the image's is 1
    center = 0.25 * (2 * uniform[:, 1:3] - 1)                           # (N, 2) 3.4 pixels of 28 to each side
    angle = np.pi / 6 * (2 * uniform[:, 3] - 1)                         # 30 degrees to each side
    background = 0.35 * uniform[:, 4:7][:, :channels]                   # (N, C)
    foreground = 0.6 + 0.4 * uniform[:, 7:10][:, :channels]             # (N, C) at least 0.25 brighter

    axis = np.linspace(-1, 1, size, dtype=np.float32)                   # pixel centres, like the models' coordinates
    images = np.empty((len(indices), size, size, channels), np.uint8)
    for i, label in enumerate(labels):
        x, y = axis - np.float32(center[i, 0]), axis[:, None] - np.float32(center[i, 1])
        cos, sin = np.float32(np.cos(angle[i]) / radius[i]), np.float32(np.sin(angle[i]) / radius[i])
        distance = _signed_distance(SHAPES[label], cos * x + sin * y, cos * y - sin * x) * radius[i]
        inside = np.clip(0.5 - distance / 0.1, 0, 1)[:, :, None]        # edges 0.1 wide: 1.4 pixels of 28
        image = background[i] + (foreground[i] - background[i]) * inside
        if noise:
            image = image + noise * generators[i].standard_normal(image.shape)
        images[i] = np.rint(255 * np.clip(image, 0, 1))
    return images, labels


def shapes_mosaic(size=256, seed=0):
    """Sixteen colourful samples, four by four, as one picture: `uint8` (size, size, 3), size rounded down to fours."""
    return shapes(range(16), size // 4, channels=3, seed=seed)[0].reshape(4, 4, size // 4, size // 4, 3).transpose(
        0, 2, 1, 3, 4).reshape(size // 4 * 4, size // 4 * 4, 3)


def shapes_video(size=64, count=16, seed=0):
    """A camera that moves in a circle over `shapes_mosaic`: `count` frames, `uint8` (count, size, size, 3)."""
    mosaic, angles = shapes_mosaic(4 * size, seed), 2 * np.pi * np.arange(count) / count
    starts = np.rint(1.5 * size * (1 + np.stack([np.sin(angles), np.cos(angles)], axis=1))).astype(int)
    return np.stack([mosaic[row:row + size, column:column + size] for row, column in starts])


def _signed_distance(shape, x, y):
    """Distance to the edge of a shape of about unit radius at (x, y), negative inside. (Exact near the edge.)"""
    r = np.hypot(x, y)
    if shape == "disk":
        return r - 0.9
    if shape == "ring":
        return np.abs(r - 0.75) - 0.2
    if shape == "half-disk":
        return np.maximum(r - 1, -0.4 - y)  # the part of a disk above a chord
    if shape == "crescent":
        return np.maximum(r - 1, 0.8 - np.hypot(x - 0.5, y))  # a disk less another disk
    if shape == "triangle":
        return _polygon(x, y, 3, 1.0)
    if shape == "square":
        return _box(x, y, 0.75, 0.75)
    if shape == "bar":
        return _box(x, y, 1.0, 0.3)
    if shape == "cross":
        return np.minimum(_box(x, y, 1.0, 0.27), _box(x, y, 0.27, 1.0))
    if shape == "star":
        # One of ten mirrored wedges; the edge runs from the tip (1, 0) to the notch at 36 degrees and radius 0.42.
        wedge = np.abs((np.arctan2(y, x) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
        notch = 0.42 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)], np.float32)
        normal = np.array([notch[1], 1 - notch[0]]) / np.hypot(notch[1], 1 - notch[0])
        return (r * np.cos(wedge) - 1) * normal[0] + r * np.sin(wedge) * normal[1]
    # A heart is a square on its corner with a half-disk on each of its two upper sides.
    u, v = (x + y + 0.25) / np.sqrt(2), (y - x + 0.25) / np.sqrt(2)
    return np.minimum(_box(u, v, 0.52, 0.52), np.minimum(np.hypot(u - 0.52, v), np.hypot(u, v - 0.52)) - 0.52)


def _box(x, y, half_width, half_height):
    dx, dy = np.abs(x) - half_width, np.abs(y) - half_height
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)


def _polygon(x, y, sides, radius):
    wedge = np.abs(np.arctan2(y, x)) % (2 * np.pi / sides) - np.pi / sides
    return np.hypot(x, y) * np.cos(wedge) - radius * np.cos(np.pi / sides)


# ---- TensorFlow Datasets ----

# Datasets of characters: mirrored, most of them are none, or others.
NO_FLIP = {"mnist", "emnist", "kmnist", "binarized_mnist", "svhn_cropped", "omniglot", "quickdraw_bitmap"}


def _load_tfds(name, data_dir, image_size):
    import tensorflow_datasets as tfds  # here, because `shapes` and `--help` need none of it

    where = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        if not builder.is_prepared():
            # ArrayRecord is the format that TFDS reads without TensorFlow; it is not its default.
            builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except (ValueError, AssertionError) as error:  # of the name, of its configuration, of its version
        raise DataError(f"unknown dataset {name!r}: use shapes, mnist, fashion_mnist, cifar10, cifar100, "
                        "imagenette/320px-v2 or another image classification dataset of TFDS") from error
    features = builder.info.features
    features = dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}
    if not (isinstance(features.get("image"), tfds.features.Image)
            and isinstance(features.get("label"), tfds.features.ClassLabel)):
        raise DataError(f"{name} is not an image classification dataset: its examples hold "
                        f"{', '.join(features) or 'no named features'} where one image and one label are needed")
    if image_size is None and None in features["image"].shape[:2]:
        raise DataError(f"the images of {name} differ in size: give one with --image-size, for example --image-size 64")
    if not builder.is_prepared():
        try:
            builder.download_and_prepare()
        except Exception as error:  # network, disk, checksum, a dataset that wants files put there by hand, …
            raise DataError(f"{name} is not prepared in {where} and could not be downloaded "
                            f"({type(error).__name__}: {' '.join(str(error).split())[:120]}): point --data-dir or "
                            "TFDS_DATA_DIR to a folder that holds it, or use --dataset shapes") from error
    splits = list(builder.info.splits)
    test = "test" if "test" in splits else "validation"
    if not {"train", test} <= {*splits}:
        raise DataError(f"{name} has the splits {', '.join(splits)}, where train and test (or validation) are needed")
    return Dataset(*_read_split(tfds, builder, "train", image_size), *_read_split(tfds, builder, test, image_size),
                   class_names=tuple(features["label"].names), flip=builder.name not in NO_FLIP)


def _read_split(tfds, builder, split, image_size):
    """One split as images and labels. A dataset that was prepared as TFRecord is read with TensorFlow."""
    if "array_record" in [file_format.value for file_format in builder.info.available_file_formats()]:
        source = builder.as_data_source(split)
    else:
        source = list(tfds.as_numpy(builder.as_dataset(split=split)))
    images, labels = [], []
    for start in range(0, len(source), 1000):  # in parts: only resized images are kept
        part = range(start, min(start + 1000, len(source)))
        examples = source.__getitems__(part) if hasattr(source, "__getitems__") else [source[i] for i in part]
        images += [_resize(example["image"], image_size) for example in examples]
        labels += [example["label"] for example in examples]
    images, labels = np.stack(images), np.array(labels, np.int64)
    if labels.min() < 0:
        raise DataError(f"split {split!r} of {builder.info.name} has no labels")
    return images, labels


def _resize(image, size):
    if size is None or image.shape[:2] == (size, size):
        return image
    from PIL import Image

    return _fit(Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image), size, size)


def _fit(picture, height, width):
    """A Pillow image, scaled so that it covers height × width and cropped to it about its middle: (H, W, C)."""
    from PIL import Image, ImageOps

    return np.asarray(ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)).reshape(height, width, -1)


def read_image(path, height, width, channels):
    """An image file of any size and mode as `uint8` (height, width, channels), scaled and cropped like a dataset's.

    Transparent parts become black, like the ground of most datasets. Raises DataError for what is no whole image.
    """
    return _read(path, "L" if channels == 1 else "RGB", lambda picture: _fit(picture, height, width))


def read_picture(path, longest):
    """An image file as `uint8` (H, W, 3), scaled down until no side is longer than that. Raises as `read_image` does."""
    def shrink(picture):
        picture.thumbnail((longest, longest))
        return np.asarray(picture)
    return _read(path, "RGB", shrink)


def read_frames(folder, longest):
    """The image files of a folder, in the order of their names, as `read_picture` gives them: (T, H, W, 3).

    Raises DataError for a folder that cannot be read or has no images, and for images of different sizes.
    """
    from PIL import Image

    Image.init()
    try:
        paths = sorted(os.path.join(folder, name) for name in os.listdir(folder)
                       if os.path.splitext(name)[1].lower() in Image.EXTENSION)
    except OSError as error:
        raise DataError(f"cannot read {folder} ({error.strerror}): give a folder of image files") from error
    if not paths:
        raise DataError(f"{folder} has no image files: give the folder that holds the video's frames")
    frames = [read_picture(path, longest) for path in paths]
    for path, frame in zip(paths, frames):
        if frame.shape != frames[0].shape:
            raise DataError(f"frames differ in size: {paths[0]} is {frames[0].shape[1]}×{frames[0].shape[0]}, {path} "
                            f"{frame.shape[1]}×{frame.shape[0]}: give frames of one video")
    return np.stack(frames)


def _read(path, mode, finish):
    from PIL import Image, ImageOps

    Image.MAX_IMAGE_PIXELS = None  # the file is the user's own, however large
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode.startswith("I"):  # 16 bits, which Pillow would clip
                picture = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
            elif picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, (0, 0, 0, 255)), picture)
            return finish(picture.convert(mode))
    except Exception as error:  # Pillow's decoders raise nearly anything: OSError, SyntaxError, ValueError, struct.error
        raise DataError(f"cannot read {path} as an image ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
                        ) from error


# ---- Batches ----


def scale(images):
    """`uint8` images as the models see them, `float32` in [-1, 1]."""
    return images.astype("float32") / 127.5 - 1


class Batches(keras.utils.PyDataset):
    """Batches for `fit` and `evaluate`: images `float32` in [-1, 1], (n, H, W, C), and labels (n,).

    With a `seed` the order is random, and the rest that does not fill a batch is left out; order and augmentation follow
    from (seed, epoch, batch) alone: `begin` says where to start. Without one the order is kept and nothing is left out.

    augment: reflect-pad by 4 pixels and crop at random; with `flip` also mirror every other image (MWT's augmentation).
    """

    def __init__(self, images, labels, batch_size, seed=None, augment=False, flip=False):
        super().__init__()
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.seed, self.augment, self.flip = seed, augment, flip
        self.steps = len(images) // batch_size if seed is not None else -(-len(images) // batch_size)  # of a whole epoch
        self.begin(epoch=1)

    def begin(self, epoch, first=0):
        """What comes next are the batches of this epoch, counted from 1, without so many at its beginning."""
        self.epoch, self.first = epoch, first
        self.order = np.arange(len(self.images))
        if self.seed is not None:
            np.random.default_rng((self.seed, epoch)).shuffle(self.order)

    def __len__(self):
        return self.steps - self.first

    def __getitem__(self, index):
        index += self.first
        chosen = self.order[index * self.batch_size:(index + 1) * self.batch_size]
        images = scale(self.images[chosen])
        if self.augment:
            images = augment(images, np.random.default_rng((self.seed, self.epoch, index)), self.flip)
        return images, self.labels[chosen]


def augment(images, rng, flip):
    """images (N, H, W, C) -> the same shape, shifted by up to 4 pixels over the reflection, and mirrored or not."""
    count, height, width, _ = images.shape
    padded = keras.ops.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="reflect")
    rows = rng.integers(0, 9, count)[:, None] + np.arange(height)          # (N, H)
    columns = rng.integers(0, 9, count)[:, None] + np.arange(width)        # (N, W)
    if flip:
        columns = np.where(rng.random(count)[:, None] < 0.5, columns[:, ::-1], columns)
    return padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
