"""Datasets by name. `load("shapes")` computes ten classes of analytic shapes; TensorFlow Datasets (TFDS) loads all
other names, and downloads what is not on disk. `load_frames` reads a picture or a video to fit, `load_objects` images
with the boxes and masks of objects ("scenes" are drawn, "coco" is read), and `load_surfaces` distances from surfaces in
space, which are computed ("solids") or read from mesh files ("modelnet10", "modelnet40").
Images stay `uint8`, `(N, H, W, C)`, until `examples` converts them to the `float32` in [-1, 1] that the models take.
"""

import collections.abc
import concurrent.futures
import contextlib
import dataclasses
import functools
import gc
import glob
import hashlib
import itertools
import os
import re
import sys
import tempfile

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import torch
from PIL import Image, ImageOps


class DataError(ValueError):
    """The data is unavailable or unsuitable; the message is one line that says what to do."""


@contextlib.contextmanager
def explained(problem, advice="", errors=Exception):
    """Turns exceptions of the given types, but not a DataError, into one with the problem, the cause and the advice."""
    try:
        yield
    except DataError:
        raise
    except errors as error:
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise DataError(f"{problem} ({cause})" + (advice and f": {advice}")) from error


class Split:
    """The examples of one split. They are read when they are used, and kept while there is room for them in memory.

    count: number of examples. read: (n,) indices -> images `uint8` (n, H, W, C) and labels (n,). first: the index for
    `read` of the first example.
    """

    room = 2**30  # bytes of images that a split keeps

    def __init__(self, count, read, first=0):
        self.count, self.read, self.first, self.kept = count, read, first, {}

    def __len__(self):
        return self.count

    def __getitem__(self, indices):
        """Images and labels at an integer array of indices below the count."""
        indices = indices.tolist()
        found = {index: self.kept[index] for index in indices if index in self.kept}
        if missing := [index for index in dict.fromkeys(indices) if index not in found]:
            images, labels = self.read(self.first + np.array(missing))
            new = dict(zip(missing, zip(images, labels)))
            found |= new
            if images.nbytes <= self.room:
                self.room -= images.nbytes
                self.kept |= new
        images, labels = zip(*[found[index] for index in indices])
        return np.stack(images), np.array(labels)

    def examples(self, indices, rng=None, augmented=False, flip=False, share=slice(None)):
        """Inputs as the models take them, and labels, of the `share` of the indices. rng: given in training; augmented,
        flip: as in Batches. What is drawn for an example does not depend on the share."""
        images, labels = self[indices[share]]
        if augmented:
            draws, large = rng.random((len(indices), 6))[share], augmented == "crop" or min(images.shape[1:3]) >= 128
            images = augment_large(images, draws, flip, augmented == "crop") if large else augment(images, draws, flip)
        return scale(images), labels


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The splits of one dataset; all images have the same shape (H, W, C), with C 1 or 3. For surfaces, axes is 3 and
    image_shape is that of the distances of one example outside of training, (sets, P, 1).

    class_names: one string per label; empty for frames. flip: whether a mirrored image keeps its label. validation: if
    None, validation images are held out of the training split. finer: for images that are known at every resolution,
    (count, factor) -> the first `count` test images, `float32` in [-1, 1], on a `factor` times finer grid; for surfaces
    `Surfaces.volumes` of the test split; else None.
    """

    train: Split
    test: Split
    image_shape: tuple
    class_names: tuple = ()
    flip: bool = False
    validation: Split | None = None
    finer: collections.abc.Callable | None = None
    axes: int = 2


def load(name, data_dir=None, image_size=None, seed=0, points=None, squash=False):
    """Loads the dataset `name`: "shapes", or the TFDS name of an image classification dataset ("mnist", "cifar10", …).
    For "solids", "modelnet10" and "modelnet40", which alone use points, see `load_surfaces`.

    data_dir: TFDS data folder; None: $TFDS_DATA_DIR, else ~/tensorflow_datasets. image_size: height and width in
    pixels, to which other images are scaled and center-cropped, or with squash scaled in each direction; None: the
    dataset's own (28 for shapes). seed: of shapes and solids. Images are read when they are used.

    Raises DataError for an unknown name, a dataset without one image and one label per example or without training and
    test splits, images of different sizes without image_size, and a failed download.
    """
    if name in SURFACES:
        return load_surfaces(name, data_dir, image_size, seed, points)
    if name != "shapes":
        return _load_tfds(name, data_dir, image_size, squash)
    size = image_size or 28
    read = lambda indices, factor=1: shapes(indices, factor * size, seed=seed)
    finer = lambda count, factor: scale(read(range(10_000, 10_000 + count), factor)[0])
    return Dataset(Split(10_000, read), Split(2_000, read, 10_000), (size, size, 1), SHAPES, flip=True, finer=finer)


def load_frames(name, data_dir=None, image_size=None, seed=0, points=None, squash=False):
    """Loads a picture or a video to fit: the images of the Dataset are frames (H, W, 3), the labels are their times,
    from -1 to 1 (0 for a picture). All splits hold the same frames.

    name: an image file, a folder of image files in the order of their names and numbers, "shapes" (a picture of sixteen
    shapes) or "shapes-video". image_size: the longest side, to which larger pictures are scaled down (default: 320;
    "shapes-video": 64). Ignores the other arguments but seed. Frames are read when they are used, and once before, to
    compare their sizes. Raises DataError for no images, incomplete images and images of different sizes.
    """
    if name in ("shapes", "shapes-video"):
        frames = (shapes_mosaic(image_size or 320, seed)[None] if name == "shapes" else
                  shapes_video(image_size or 64, seed=seed))
        count, read = len(frames), frames.__getitem__
    else:
        numbered = lambda file: re.sub("[0-9]+", lambda digits: digits[0].zfill(20), file)  # 2.png before 10.png
        paths = [name] if not os.path.isdir(name) else [
            os.path.join(name, file) for file in sorted(glob.glob("*", root_dir=name), key=numbered)
            if os.path.splitext(file)[1].lower() in Image.registered_extensions()]
        if not paths:
            raise DataError(f"{name} has no image files: use the folder that holds the frames of a video")
        sizes = {_open(path, "RGB", image_size or 320).size: path for path in paths}
        if len(sizes) > 1:
            found = ", ".join(f"{path} is {width}×{height}" for (width, height), path in [*sizes.items()][:2])
            raise DataError(f"frames differ in size: {found}: use the frames of one video")
        count = len(paths)
        read = lambda indices: np.stack([_open(paths[index], "RGB", image_size or 320) for index in indices])
    times = np.linspace(-1 if count > 1 else 0, 1, count, dtype=np.float32)
    every = Split(count, lambda indices: (read(indices), times[indices]))
    return Dataset(every, every, read(np.arange(1)).shape[1:], validation=every)


SCENES = 10_000, 500  # for training and for testing


def load_objects(name, data_dir=None, image_size=None, seed=0, points=None, squash=False, masks=False):
    """Loads images with objects in them: "scenes", pictures of several shapes, or "coco", the folder data_dir of COCO
    2017 as downloaded. The images (size, size, 3) are scaled to fit and padded with grey on the right or at the bottom.

    image_size: default 128 for scenes; COCO needs one. masks: whether the labels contain them. Ignores the other
    arguments but seed. Raises DataError for other names, COCO without image_size or with different categories in its
    parts, and as `open_coco` does.
    """
    if name == "scenes":
        size, names = image_size or 128, SHAPES
        read = lambda indices: scenes(indices, size, seed, masks)
        splits = Objects(SCENES[0], read), Objects(SCENES[1], read, SCENES[0])
    elif name == "coco":
        if not image_size:
            raise DataError("the images of coco differ in size: set one size for all, for example --image-size 640")
        size, parts = image_size, ("train2017", "val2017")
        splits, (names, other), dropped = zip(*[open_coco(data_dir or ".", part, size, masks) for part in parts])
        if names != other:
            raise DataError("the categories of train2017 and val2017 differ: restore the annotations of COCO 2017")
        if any(dropped):
            print(f"{name}: {sum(dropped):,} boxes have no area and are left out", flush=True)
    else:
        raise DataError(f"{name} has no objects with boxes: use --dataset scenes or coco")
    return Dataset(*splits, (size, size, 3), tuple(names), flip=True)


LOADERS = {"classify": load, "fit": load_frames, "detect": load_objects,
           "segment": functools.partial(load_objects, masks=True)}  # by task
BUILT_IN = {"detect": "scenes", "segment": "scenes"}  # other tasks: shapes


# ---- shapes: ten classes drawn from signed-distance functions ----


def shapes(indices, size=28, channels=1, seed=0):
    """Renders samples of the built-in dataset; sample i depends on (seed, i) alone, and its label is i % 10.

    A sample is a function on [-1, 1]²: the same index at another `size` is the same picture on another grid, the ground
    truth for super-resolution. Position, size, rotation, foreground and background are random; edges are soft.

    indices: integers ≥ 0 (N,). size: height and width in pixels. channels: 1 (grey) or 3 (colour).
    Returns images `uint8` (N, size, size, channels) and labels `int64` (N,).
    """
    labels = np.asarray(indices, dtype=np.int64) % len(SHAPES)
    uniform = _uniform(indices, 10, seed)
    radius = 0.5 + 0.25 * uniform[:, 0]                                 # (N,) half the extent; the image has 1
    center = 0.25 * (2 * uniform[:, 1:3] - 1)                           # (N, 2) up to 3.4 of 28 pixels
    angle = np.pi / 6 * (2 * uniform[:, 3] - 1)                         # up to 30 degrees
    background = 0.35 * uniform[:, 4:7][:, :channels]                   # (N, C)
    foreground = 0.6 + 0.4 * uniform[:, 7:10][:, :channels]             # (N, C) brighter by at least 0.25

    axis = np.linspace(-1, 1, size, dtype=np.float32)                   # pixel centres, like the models' coordinates
    images = np.empty((len(labels), size, size, channels), np.uint8)
    for i, label in enumerate(labels):
        distance = _distance(label, axis, center[i], radius[i], angle[i])
        inside = np.clip(0.5 - distance / 0.1, 0, 1)[:, :, None]        # edges 0.1 wide: 1.4 pixels of 28
        images[i] = np.rint(255 * (background[i] + (foreground[i] - background[i]) * inside))
    return images, labels


def _distance(label, axis, center, radius, angle):
    """Signed distance from the edge of a shape at the points axis × axis: (size, size)."""
    x, y = axis - np.float32(center[0]), axis[:, None] - np.float32(center[1])
    cos, sin = np.float32(np.cos(angle) / radius), np.float32(np.sin(angle) / radius)
    return _DISTANCES[SHAPES[label]](cos * x + sin * y, cos * y - sin * x) * radius


def scenes(indices, size=128, seed=0, masks=False):
    """Renders pictures of up to eight shapes, nearer ones in front of others, in all colours and directions; scene i
    depends on (seed, i) alone. A shape of which at most half would be visible is left out.

    Returns images `uint8` (N, size, size, 3) and a list of dicts, as `Objects` reads them, of what is visible.
    """
    images, targets = [], []
    axis = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1              # pixel centres
    for count, *numbers in _uniform(indices, 7 + 8 * 8, seed):
        below, above, *objects = np.split(np.array(numbers), [3, 6, *range(14, 70, 8)])
        free, image = np.ones((size, size)), np.zeros((size, size, 3))             # share of each pixel not yet drawn
        labels, visible = [], []
        for kind, x, y, extent, angle, *color in objects[:2 + int(7 * count)]:
            radius = 0.15 + 0.3 * extent ** 2                                      # the picture has 1
            center = (2 * np.array([x, y]) - 1) * (1 - 0.7 * radius)
            distance = _distance(int(10 * kind), axis, center, radius, 2 * np.pi * angle)
            mask = (distance < 0) & (free > 0.5)
            if mask.sum() <= 0.5 * (distance < 0).sum():
                continue
            share = free * np.clip(0.5 - distance * size / 4, 0, 1)                # edges two pixels wide
            image += share[:, :, None] * color
            free -= share
            labels.append(int(10 * kind))
            visible.append(mask)
        ramp = (axis[:, None, None] + 1) / 2                                       # the background changes downwards
        image += free[:, :, None] * (below * ramp + above * (1 - ramp))
        images.append(np.rint(255 * image).astype(np.uint8))
        boxes = [Image.fromarray(mask).getbbox() for mask in visible]
        targets.append(_target(size, boxes, labels, [0] * len(labels), visible if masks else None))
    return np.stack(images), targets


def _uniform(indices, count, seed):
    """Random numbers (N, count) in [0, 1); row i depends on (seed, indices[i]) alone."""
    # Philox computes random numbers from (key, counter) directly, so any sample costs the same.
    return np.array([np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, i])).random(count)
                     for i in indices]).reshape(len(indices), count)


def shapes_mosaic(size=256, seed=0):
    """Sixteen samples in one picture, four by four: `uint8` (size, size, 3), size rounded down to a multiple of 4."""
    tiles = shapes(range(16), size // 4, channels=3, seed=seed)[0].reshape(4, 4, size // 4, size // 4, 3)
    return tiles.transpose(0, 2, 1, 3, 4).reshape(size // 4 * 4, size // 4 * 4, 3)


def shapes_video(size=64, count=16, seed=0):
    """A view that moves in a circle over `shapes_mosaic`: frames `uint8` (count, size, size, 3)."""
    mosaic, angles = shapes_mosaic(4 * size, seed), 2 * np.pi * np.arange(count) / count
    starts = np.rint(1.5 * size * (1 + np.stack([np.sin(angles), np.cos(angles)], axis=1))).astype(int)
    return np.stack([mosaic[row:row + size, column:column + size] for row, column in starts])


def _corner(dx, dy):
    """Signed distance from a region that is bounded along two axes by distances that are measured separately."""
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)


def _box(x, y, half_width, half_height):
    return _corner(np.abs(x) - half_width, np.abs(y) - half_height)


def _star(x, y):
    """Ten mirrored wedges; the edge runs from the tip (1, 0) to the notch at 36 degrees and radius 0.42."""
    wedge = np.abs((np.arctan2(y, x) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    notch = 0.42 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)], np.float32)
    normal = np.array([notch[1], 1 - notch[0]]) / np.hypot(notch[1], 1 - notch[0])
    return (np.hypot(x, y) * np.cos(wedge) - 1) * normal[0] + np.hypot(x, y) * np.sin(wedge) * normal[1]


def _heart(x, y):
    """A square standing on a corner, with a half-disk on each of its upper sides."""
    u, v = (x + y + 0.25) / np.sqrt(2), (y - x + 0.25) / np.sqrt(2)
    return np.minimum(_box(u, v, 0.52, 0.52), np.minimum(np.hypot(u - 0.52, v), np.hypot(u, v - 0.52)) - 0.52)


# Signed distance from (x, y) to the edge of each shape of about unit radius: negative inside, exact near the edge.
_DISTANCES = {
    "disk": lambda x, y: np.hypot(x, y) - 0.9,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.75) - 0.2,
    "half-disk": lambda x, y: np.maximum(np.hypot(x, y) - 1, -0.4 - y),
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 1, 0.8 - np.hypot(x - 0.5, y)),
    "triangle": lambda x, y: np.hypot(x, y) * np.cos(np.abs(np.arctan2(y, x)) % (2 * np.pi / 3) - np.pi / 3) - 0.5,
    "square": lambda x, y: _box(x, y, 0.75, 0.75),
    "bar": lambda x, y: _box(x, y, 1.0, 0.3),
    "cross": lambda x, y: np.minimum(_box(x, y, 1.0, 0.27), _box(x, y, 0.27, 1.0)),
    "star": _star,
    "heart": _heart,
}
SHAPES = tuple(_DISTANCES)


# ---- TensorFlow Datasets ----

# Datasets of characters: mirrored characters are invalid or change their class.
NO_FLIP = {"mnist", "mnist_corrupted", "emnist", "kmnist", "cmaterdb", "svhn_cropped", "omniglot", "quickdraw_bitmap"}


@functools.lru_cache(maxsize=1)  # the runs of an ablation share the images
def _load_tfds(name, data_dir, image_size, squash):
    import absl.logging  # imported here, because `shapes` and `--help` do not need them
    import requests  # what TFDS downloads with
    import tensorflow_datasets as tfds

    absl.logging.set_verbosity(absl.logging.ERROR)  # no advice to install OpenCV
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        if not builder.is_prepared():
            # TFDS reads ArrayRecord without TensorFlow; its default is TFRecord.
            builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except (ValueError, AssertionError, ImportError) as error:  # for the name, its configuration, version or packages
        raise DataError(f"unknown dataset {name!r}: use shapes, mnist, fashion_mnist, cifar10, cifar100, "
                        "imagenette/320px-v2 or another image classification dataset of TFDS") from error
    features = dict(builder.info.features) if isinstance(builder.info.features, tfds.features.FeaturesDict) else {}
    if not (isinstance(features.get("image"), tfds.features.Image)
            and isinstance(features.get("label"), tfds.features.ClassLabel)):
        raise DataError(f"{name} is not an image classification dataset: its examples have the features "
                        f"{', '.join(features) or '(none)'}; one image and one label are required")
    height, width, channels = features["image"].shape
    if image_size is None and None in (height, width):
        raise DataError(f"the images of {name} differ in size: set one size for all, for example --image-size 64")
    if not builder.is_prepared():
        folder = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
        with explained(f"{name} is not prepared in {folder} and could not be downloaded", "set --data-dir or "
                       "TFDS_DATA_DIR to a folder that holds it, or use --dataset shapes"):
            if builder.url_infos and not builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
                requests.head(next(iter(builder.url_infos)), timeout=5)  # TFDS retries an unreachable host for minutes
            builder.download_and_prepare()
    splits = builder.info.splits
    test = "test" if "test" in splits and builder.name != "imagenet2012" else "validation"  # its test has no labels
    if not {"train", test} <= {*splits}:
        raise DataError(f"{name} has the splits {', '.join(splits)}; train and test (or validation) are required")
    parts = [Split(splits[part].num_examples, _reader(builder, part, image_size, squash)) for part in ("train", test)]
    return Dataset(*parts, (image_size or height, image_size or width, channels), tuple(features["label"].names),
                   flip=builder.name not in NO_FLIP)


def _reader(builder, split, image_size, squash):
    """The argument `read` of `Split`. Files of type TFRecord have no random access, so all their examples are kept."""
    def finish(example):
        image = example["image"]
        if image_size:
            picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
            image = _cover(picture, image_size, image_size, squash)
        return image, example["label"]

    random_access = "array_record" in [file_format.value for file_format in builder.info.available_file_formats()]
    source = functools.cache(lambda: builder.as_data_source(split) if random_access else
                             [finish(example) for example in builder.as_dataset(split).as_numpy_iterator()])

    def read(indices):
        try:  # __getitems__ decodes many examples together in half the time
            examples = ([finish(example) for example in source().__getitems__(indices.tolist())] if random_access else
                        [source()[index] for index in indices])
        except Exception:  # one at a time, to find the broken one
            examples = []
            for index in indices:
                with explained(f"cannot read example {index} of the split {split!r} in {builder.data_path}",
                               "restore its files, or prepare it again"):
                    examples.append(finish(source()[index]) if random_access else source()[index])
        images, labels = zip(*examples)
        if min(labels) < 0:
            raise DataError(f"the split {split!r} of {builder.name} has no labels: use another dataset")
        return np.stack(images), np.array(labels, np.int64)

    return read


# ---- Objects in images ----


class Objects(Split):
    """Images and the objects in them. The labels of n examples are a dict of arrays, padded to the largest number M of
    objects: boxes `float32` (n, M, 4), left, top, right and bottom in pixels; labels (n, M), -1 where there is no
    object; crowd (n, M), 1 for a region of several objects; and, where they are read, masks `uint8` (n, M, H, W).

    read: indices -> square images `uint8`, and for each a dict of arrays of its own m objects, with packed masks (m, H,
    W/8 rounded up): a byte has eight pixels of a row. Masks are kept in addition to the `room` for images.
    """

    def examples(self, indices, rng=None, augmented=False, flip=False, share=slice(None)):
        """With augmented, images with their padding are scaled by 0.1 to 2, cropped or padded, and with `flip`
        mirrored, like in the large-scale jittering of torchvision's reference recipes (Ghiasi et al., CVPR 2021)."""
        images, targets = self[indices[share]]
        if "masks" in targets[0]:
            targets = [target | {"masks": np.unpackbits(target["masks"], axis=-1, count=images.shape[2])}
                       for target in targets]
        if augmented:
            draws = rng.random((len(indices), 4))[share]
            images, targets = zip(*[_jitter(*one, flip) for one in zip(images, targets, draws)])
        labels = {name: torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(target[name]) for target in targets], batch_first=True,
            padding_value=-1 if name == "labels" else 0).numpy() for name in targets[0]}
        return scale(np.stack(images)), labels


def _target(size, boxes, labels, crowd, masks=None):
    """One example's target as `Objects` reads it. masks: arrays (size, size) of 0 and 1."""
    target = {"boxes": np.array(boxes, np.float32).reshape(-1, 4), "labels": np.array(labels, np.int64),
              "crowd": np.array(crowd, np.int64)}
    if masks is not None:
        target["masks"] = np.packbits(np.array(masks, bool).reshape(-1, size, size), axis=-1)
    return target


def _jitter(image, target, draw, flip):
    """One image (size, size, 3) and its target with decoded masks, scaled, moved and mirrored as `draw` (4,) says."""
    size, (factor, left, top, mirror) = len(image), draw
    side = max(1, round((0.1 + 1.9 * factor) * size))
    left, top = int(left * max(0, side - size + 1)), int(top * max(0, side - size + 1))
    step = -1 if flip and mirror < 0.5 else 1

    def place(picture, filter, fill):
        canvas = Image.new("L" if picture.ndim == 2 else "RGB", (size, size), fill)
        canvas.paste(Image.fromarray(picture).resize((side, side), filter), (-left, -top))
        return np.asarray(canvas)[:, ::step]

    boxes = (target["boxes"] * (side / size) - np.float32([left, top, left, top])).clip(0, size)
    if step < 0:
        boxes[:, [0, 2]] = size - boxes[:, [2, 0]]
    target = target | {"boxes": boxes}
    if "masks" in target:
        target["masks"] = np.uint8([place(mask, Image.NEAREST, 0) for mask in target["masks"]]).reshape(-1, size, size)
    kept = (boxes[:, 2:] - boxes[:, :2]).min(axis=1) >= 1
    return place(image, Image.BILINEAR, (128,) * 3), {name: values[kept] for name, values in target.items()}


def open_coco(folder, part, size, masks):
    """The `Objects` of a part of COCO 2017, "train2017" or "val2017", as its folder is downloaded, the names of its
    classes, and the number of boxes without area, which are left out. So are training images without objects. Raises
    DataError for missing files, unreadable annotations, and annotations of unknown images or classes."""
    with explained("coco needs pycocotools", "pip install torchvision==0.28.0 torchmetrics==1.9.0 pycocotools==2.0.11"):
        import pycocotools.coco
    file, pictures = os.path.join(folder, "annotations", f"instances_{part}.json"), os.path.join(folder, part)
    with explained(f"cannot use {file}", "set --data-dir to the folder of COCO 2017 with annotations, train2017 and "
                   "val2017 (https://cocodataset.org)"):
        with contextlib.redirect_stdout(None):
            index = pycocotools.coco.COCO(file)
        if absent := {image["file_name"] for image in index.imgs.values()} - {*os.listdir(pictures)}:
            raise ValueError(f"{len(absent)} images, such as {min(absent)}, are not in {part}")
        sides = {image: np.array([index.imgs[image][side] for side in ("width", "height")]) for image in index.imgs}
        numbers = {number: i for i, number in enumerate(sorted(index.cats))}
        names = [index.cats[number]["name"] for number in numbers]
        for one in index.dataset["annotations"]:
            if not (one["image_id"] in index.imgs and one["category_id"] in numbers and one["iscrowd"] in (0, 1)
                    and (one["segmentation"] or not masks)):
                raise ValueError(f"annotation {one['id']} is of image {one['image_id']} and category "
                                 f"{one['category_id']}, which are not both listed, or its mask or iscrowd is invalid")
        objects = {image: [one for one in index.imgToAnns[image] if min(one["bbox"][2:]) > 0] for image in index.imgs}
        images = [i for i in sorted(objects) if part == "val2017" or not all(one["iscrowd"] for one in objects[i])]
        if not images:
            raise ValueError("there are no images with objects")

    def pad(picture, method, color=0):
        """A Pillow image, scaled to fit into size × size and padded on the right or at the bottom."""
        return np.asarray(ImageOps.pad(picture, (size, size), method, color, centering=(0, 0)))

    def read(indices):
        padded, targets = [], []
        for image in [images[index] for index in indices]:
            found = objects[image]
            picture = _open(os.path.join(pictures, index.imgs[image]["file_name"]), "RGB", turn=False)
            padded.append(pad(picture, Image.BILINEAR, (128,) * 3))
            factors = np.rint(size * sides[image] / sides[image].max()) / sides[image]  # of a file of another size, too
            boxes = np.reshape([one["bbox"] for one in found], (-1, 2, 2)).cumsum(axis=1) * factors
            drawn = [pad(Image.fromarray(index.annToMask(one)), Image.NEAREST) for one in found] if masks else None
            targets.append(_target(size, boxes, [numbers[one["category_id"]] for one in found],
                                   [one["iscrowd"] for one in found], drawn))
        return np.stack(padded), targets

    return Objects(len(images), read), names, len(index.anns) - sum(map(len, objects.values()))


# ---- Image files ----


def _cover(picture, height, width, squash):
    """A Pillow image, scaled to cover height × width and cropped at its center, or squashed: (H, W, C)."""
    size = width, height
    picture = picture.resize(size, Image.BILINEAR) if squash else ImageOps.fit(picture, size, Image.BICUBIC)
    return np.asarray(picture).reshape(height, width, -1)


def _open(path, mode, longest=2**31, turn=True):
    """A Pillow image, read from a file of any size and mode, and scaled down if a side exceeds `longest`. Transparent
    parts become black, the background of most datasets. Raises DataError for unreadable and incomplete files."""
    Image.MAX_IMAGE_PIXELS = None  # no limit: the file is the user's own
    with explained(f"cannot read {path} as an image"), Image.open(path) as file:
        picture = ImageOps.exif_transpose(file) if turn else file
        if picture.mode == "F" or picture.mode == "I" and np.max(picture) >= 2**16:
            raise DataError(f"{path} has values of 32 bits: save it with 8 or 16")
        if picture.mode.startswith("I"):  # 16 bits; Pillow's own conversion clips them
            picture = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
        elif picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, (0, 0, 0, 255)), picture)
        picture = picture.convert(mode)  # decodes all of the file
    picture.thumbnail((longest, longest))
    return picture


# ---- Surfaces in space: examples are coordinates and their distances from a surface ----

SURFACES = ("solids", "modelnet10", "modelnet40")
POINTS = 32_768  # that represent a mesh (MWT)


class Surfaces(Split):
    """Surfaces in the cube [-1, 1]³. The input of an example is a pair: coords (sets, P, 3), uniform in the cube, and
    their distances (sets, P, 1) from the surface in the same unit, both `float32`.

    read: indices -> an array of surfaces, and labels. measure: (surface, label, coords (P, 3), rng) -> distances (P,),
    of the augmented surface if rng is given. sizes: (sets, P) in training, and (sets, P) otherwise.
    """

    def __init__(self, count, read, measure, sizes, first=0):
        super().__init__(count, read, first)
        self.measure, self.sizes = measure, sizes

    def examples(self, indices, rng=None, augmented=False, flip=False, share=slice(None)):
        """The coords are drawn anew in training; otherwise they are the same for all examples."""
        sets, points = self.sizes[rng is None]
        drawn = (rng or np.random.default_rng(0)).random((len(indices) if rng else 1, sets, points, 3), np.float32)
        rngs = rng.spawn(len(indices)) if augmented else [None] * len(indices)
        coords = np.repeat(2 * drawn - 1, len(indices) // len(drawn), axis=0)[share]
        surfaces, labels = self[indices[share]]
        queries = coords.reshape(len(coords), -1, 3)
        distances = [self.measure(*surface) for surface in zip(surfaces, labels, queries, rngs[share])]
        return (coords, np.reshape(distances, (*coords.shape[:3], 1))), labels

    def volumes(self, count, size):
        """Distances (count, size, size, size, 1) of the first `count` surfaces on a grid with the axes x, y, z."""
        ticks = np.linspace(-1, 1, size, dtype=np.float32)
        grid = np.stack(np.meshgrid(ticks, ticks, ticks, indexing="ij"), axis=-1).reshape(-1, 3)
        distances = [self.measure(*surface, grid) for surface in zip(*self[np.arange(count)])]
        return np.reshape(distances, (count, size, size, size, 1))


def load_surfaces(name, data_dir=None, image_size=None, seed=0, points=None):
    """Loads "solids", or "modelnet10" or "modelnet40" from the mesh files CLASS/{train,test}/*.off in data_dir.

    points: ((sets, fraction) in training, (sets, fraction) otherwise), the number of sets of points in an example, and
    the size of a set as a fraction of 1,024 points (ModelNet: 32,768). seed: for "solids" only. Raises DataError for
    missing or unsuitable files, for image_size, and without points.
    """
    if image_size or not points:
        raise DataError(f"{name} has surfaces, not images: remove --image-size, and use --method mwt")
    sizes = [(sets, max(1, int(fraction * (1024 if name == "solids" else POINTS)))) for sets, fraction in points]
    if name == "solids":
        read, measure = functools.partial(solids, seed=seed), solid_distances
        counts, names = (30_000, 2_000), SOLIDS
    else:
        folder = data_dir or "."
        parts = [sorted(glob.glob(os.path.join("*", split, "*.off"), root_dir=folder)) for split in ("train", "test")]
        if not all(parts):
            raise DataError(f"{folder} has no files CLASS/{{train,test}}/*.off: set --data-dir to the folder of {name} "
                            "from https://modelnet.cs.princeton.edu")
        paths, counts = sum(parts, []), [*map(len, parts)]
        names, labels = np.unique([path.split(os.sep)[0] for path in paths], return_inverse=True)
        meshes = functools.cache(lambda: _read_meshes(folder, paths))
        read, measure = (lambda indices: (meshes()[indices], labels[indices])), point_distances
    train, test = (Surfaces(count, read, measure, sizes, first) for first, count in zip((0, counts[0]), counts))
    return Dataset(train, test, (*sizes[1], 1), tuple(map(str, names)), finer=test.volumes, axes=3)


def read_example(task, name, path, image_shape, squash=False):
    """Reads a file for a model that was trained on the dataset `name` with this image_shape: an image, for detectors of
    its own size or at most 1,024 pixels, or for surfaces a mesh. Returns a batch of one input, and `Dataset.finer` for
    it. Raises DataError for an unsuitable file."""
    if task in ("detect", "segment"):
        return scale(np.asarray(_open(path, "RGB", 1024))[None]), None
    if name not in SURFACES:
        return scale(_cover(_open(path, "L" if image_shape[2] == 1 else "RGB"), *image_shape[:2], squash)[None]), None
    points = mesh_points(*read_off(path), 0.65 if name == "solids" else 1.0)  # as large as the surfaces of the dataset
    split = Surfaces(1, lambda indices: (points[None], np.zeros(1, int)), point_distances, [image_shape[:2]] * 2)
    return split.examples(np.arange(1))[0], split.volumes


def solids(indices, seed=0):
    """Ten classes of random surfaces; surface i depends on (seed, i) alone, and its label is i % 10. Returns parameters
    `float32` (N, 8) and labels `int64` (N,). The parameters are the center (3), the size, the angle about the vertical
    axis z, and three proportions from 0 to 1."""
    least, span = [-0.2, -0.2, -0.2, 0.5, 0, 0, 0, 0], [0.4, 0.4, 0.4, 0.3, 2 * np.pi, 1, 1, 1]
    return (least + span * _uniform(indices, 8, seed)).astype(np.float32), np.asarray(indices, np.int64) % len(SOLIDS)


def solid_distances(parameters, label, coords, rng=None):
    """Distances (P,) of coords (P, 3) from one surface of `solids`. With rng, the surface is scaled by 0.9 to 1.1."""
    factor = np.float32(rng.uniform(0.9, 1.1) if rng else 1)
    size, cos, sin = factor * parameters[3], np.cos(parameters[4]), np.sin(parameters[4])
    x, y, z = ((coords - factor * parameters[:3]) / size).T
    x, y = cos * x + sin * y, cos * y - sin * x
    return size * np.abs(_SOLIDS[SOLIDS[label]](x, y, z, np.hypot(x, y), *parameters[5:]))


def _segment(r, z, r0, z0, r1, z1):
    """Distance from a line in the half-plane (r, z), which is a frustum, a disk or a cylinder in space."""
    along = np.clip(((r - r0) * (r1 - r0) + (z - z0) * (z1 - z0)) / ((r1 - r0) ** 2 + (z1 - z0) ** 2), 0, 1)
    return np.hypot(r - r0 - along * (r1 - r0), z - z0 - along * (z1 - z0))


def _block(x, y, z, half_x, half_y, bottom, top):
    """Distance from the surface of a box."""
    return np.abs(_corner(_box(x, y, half_x, half_y), np.abs(z - (bottom + top) / 2) - (top - bottom) / 2))


def _table(x, y, z, half_x, half_y, bottom, top):
    """A board on four legs; all faces of these five boxes count, also where they touch, as in meshes of ModelNet."""
    legs = _block(np.abs(x) - half_x + 0.07, np.abs(y) - half_y + 0.07, z, 0.07, 0.07, bottom, top - 0.14)
    return np.minimum(legs, _block(x, y, z, half_x, half_y, top - 0.14, top))


# Distance, up to its sign, of (x, y, z) from surfaces that reach about as far as the unit sphere. r is the distance
# from the vertical axis; a, b and c are proportions from 0 to 1.
_SOLIDS = {
    "torus": lambda x, y, z, r, a, b, c: np.hypot(r - 0.5 - 0.2 * a, z) - 0.15 - 0.15 * b,
    "chair": lambda x, y, z, r, a, b, c: np.minimum(
        _table(x, y, z, 0.35 + 0.15 * a, 0.35 + 0.15 * a, -0.85, 0.3 * b - 0.2),
        _block(x + 0.28 + 0.15 * a, y, z, 0.07, 0.35 + 0.15 * a, 0.3 * b - 0.2, 0.65 + 0.25 * c)),
    "cone": lambda x, y, z, r, a, b, c: np.minimum(
        _segment(r, z, 0, -0.6, 0.5 + 0.4 * a, -0.6), _segment(r, z, 0.5 + 0.4 * a, -0.6, 0, 0.5 + 0.4 * b)),
    "table": lambda x, y, z, r, a, b, c: _table(x, y, z, 0.6 + 0.3 * a, 0.4 + 0.3 * b, -0.4 - 0.3 * c, 0.4 + 0.3 * c),
    "sphere": lambda x, y, z, r, a, b, c: np.hypot(r, z) - 0.6 - 0.3 * a,
    "tube": lambda x, y, z, r, a, b, c: _corner(np.abs(r - 0.5 - 0.2 * a) - 0.08 - 0.12 * c, np.abs(z) - 0.3 - 0.4 * b),
    "box": lambda x, y, z, r, a, b, c: _block(x, y, z, 0.35 + 0.4 * a, 0.35 + 0.4 * b, -0.35 - 0.4 * c, 0.35 + 0.4 * c),
    "dome": lambda x, y, z, r, a, b, c: np.minimum(
        _segment(r, z, 0, -0.4, 0.6 + 0.3 * a, -0.4),
        np.where(z > -0.4, np.abs(np.hypot(r, z + 0.4) - 0.6 - 0.3 * a), np.hypot(r - 0.6 - 0.3 * a, z + 0.4))),
    "cylinder": lambda x, y, z, r, a, b, c: _corner(r - 0.35 - 0.35 * a, np.abs(z) - 0.4 - 0.4 * b),
    "capsule": lambda x, y, z, r, a, b, c: np.hypot(r, z - np.clip(z, -0.3 - 0.3 * b, 0.3 + 0.3 * b)) - 0.25 - 0.25 * a,
}
SOLIDS = tuple(_SOLIDS)


def read_off(path):
    """Reads a mesh in the Object File Format: vertices (V, 3) and triangles (T, 3); faces of more corners are split.
    The counts may follow "OFF" at once; comments and colours are ignored. Raises DataError for unreadable, incomplete
    and other files, coordinates that are not finite, and a mesh without area."""
    with explained(f"cannot read {path} as a mesh in the Object File Format"), open(path, errors="replace") as file:
        text = file.read()
        if not text.startswith("OFF"):
            raise ValueError("it does not start with OFF")
        lines = [words for line in text[3:].splitlines() if (words := line.partition("#")[0].split())]
        count, faces = int(lines[0][0]), int(lines[0][1])
        vertices = [line[:3] for line in lines[1:count + 1] if len(line) > 2]
        lines = [line for line in lines[count + 1:count + 1 + faces] if len(line) > int(line[0])]
        if (len(vertices), len(lines)) != (count, faces):
            raise ValueError(f"it does not have {count} vertices and {faces} faces")
        triangles = [(line[1], *line[i:i + 2]) for line in lines for i in range(2, int(line[0]))]
        vertices, triangles = np.array(vertices, float), np.array(triangles, int)
        if not (np.isfinite(vertices).all() and 0 <= triangles.min() and _areas(vertices, triangles).sum() > 0):
            raise ValueError("a coordinate is not finite, a corner is not a vertex, or there is no area")
        return vertices, triangles


def _areas(vertices, triangles):
    a, b, c = vertices[triangles].swapaxes(0, 1)
    return np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2


def mesh_points(vertices, triangles, largest=1.0):
    """32,768 points of a mesh, uniform by area, centered, scaled to `largest` as the largest absolute coordinate (MWT);
    in units of 1/32767: `int16` (32768, 3)."""
    rng, areas = np.random.default_rng(0), _areas(vertices, triangles)
    corners = vertices[triangles[rng.choice(len(areas), POINTS, p=areas / areas.sum())]]                # (POINTS, 3, 3)
    points = (rng.dirichlet([1, 1, 1], POINTS)[:, :, None] * corners).sum(axis=1)  # uniform in each triangle
    points -= points.mean(axis=0)
    return np.rint(points / np.abs(points).max() * largest * 32767).astype(np.int16)


def _read_meshes(folder, paths):
    """`mesh_points` of all files, (N, 32768, 3), which are read once and then kept in one file in the folder."""
    listing = "".join(f"{path} {os.path.getsize(os.path.join(folder, path))}\n" for path in paths)
    cache = os.path.join(folder, f"points-{hashlib.sha256(listing.encode()).hexdigest()[:16]}.int16")
    if not os.path.exists(cache):
        gc.freeze()  # otherwise the garbage collector searches all of Keras's objects, for half of the time
        progress = keras.utils.Progbar(len(paths), interval=0.2 if sys.stdout.isatty() else 30, unit_name="mesh")
        with (explained(f"cannot write {cache}", f"{len(paths) * 197e-6:.2f} GB needed", OSError),
              tempfile.TemporaryDirectory(dir=folder) as temporary):
            with open(os.path.join(temporary, "points"), "wb") as file:
                for count, path in enumerate(paths, 1):
                    file.write(mesh_points(*read_off(os.path.join(folder, path))).tobytes())
                    progress.update(count)
                os.fsync(file.fileno())
            os.replace(file.name, cache)
    with explained(f"cannot read {cache}", "delete it, so that it is written again"):
        return np.memmap(cache, np.int16, "r", shape=(len(paths), POINTS, 3))


def point_distances(points, label, coords, rng=None):
    """Distances (P,) of coords (P, 3) from the nearest of the points of `mesh_points`. With rng, the points are scaled
    by 0.9 to 1.1, and noise of standard deviation 0.01 is added to them. (MWT)"""
    import scipy.spatial  # imported here, because images and solids do not need it

    points = points / np.float32(32767)
    if rng:
        points = rng.uniform(0.9, 1.1) * points + rng.normal(0, 0.01, points.shape)
    tree = scipy.spatial.cKDTree(points, 32, balanced_tree=False, compact_nodes=False)  # faster than the defaults
    order = np.argsort(np.floor(8 * coords) @ [4096, 64, 1])  # neighbouring queries visit the same parts of the tree
    distances = np.empty(len(coords), np.float32)
    distances[order] = tree.query(coords[order], workers=-1)[0]
    return distances


# ---- Batches ----


def scale(images):
    """`uint8` images as the models take them: `float32` in [-1, 1]."""
    return images.astype("float32") / 127.5 - 1


class Batches(keras.utils.PyDataset):
    """Batches of a split's examples: images `float32` in [-1, 1], (n, H, W, C), and labels (n,).

    indices: the examples to use; None: all. seed: shuffles them and drops the rest that does not fill a batch; order
    and augmentation depend only on (seed, epoch, index of the batch). None keeps the order and drops nothing.
    augment: pads by 4 pixels (reflection) and crops at random; with `flip` also mirrors half of the images. "crop", and
    images of 128×128 and more: see `augment_large`; objects and surfaces: see `Objects.examples`, `solid_distances` and
    `point_distances`. share: the part of each batch that this process gets.
    """

    def __init__(self, split, indices, batch_size, seed=None, augment=False, flip=False, share=slice(None)):
        super().__init__()
        self.indices = np.arange(len(split)) if indices is None else indices
        self.split, self.batch_size, self.seed = split, batch_size, seed
        self.augment, self.flip, self.share = augment, flip, share
        self.begin(1)

    def begin(self, epoch):
        """Selects the order of an epoch, counted from 1."""
        self.epoch, self.order = epoch, self.indices
        if self.seed is not None:
            self.order = np.random.default_rng((self.seed, epoch)).permutation(self.indices)
            self.order = self.order[:len(self.order) // self.batch_size * self.batch_size]

    def __len__(self):
        return -(-len(self.order) // self.batch_size)

    def __getitem__(self, index):
        indices = self.order[index * self.batch_size:(index + 1) * self.batch_size]
        rng = None if self.seed is None else np.random.default_rng((self.seed, self.epoch, index))
        return self.split.examples(indices, rng, self.augment, self.flip, self.share)

    def ahead(self, first, convert):
        """Yields convert(batch) of the batches from index `first` on. Two threads prepare them while others are used,
        unless all examples are images in memory, where threads would slow down the training step."""
        if type(self.split) is Split and {*self.order.tolist()} <= self.split.kept.keys():
            yield from (convert(self[index]) for index in range(first, len(self)))
            return
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            started = (threads.submit(lambda index: convert(self[index]), index) for index in range(first, len(self)))
            waiting = [*itertools.islice(started, 3)]
            while waiting:
                yield waiting.pop(0).result()
                waiting += itertools.islice(started, 1)


def augment(images, draws, flip):
    """images (N, H, W, C) -> the same shape, shifted by up to 4 pixels and, with `flip`, mirrored at random. (MWT)
    draws: random numbers in [0, 1), at least three for each image."""
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="reflect")
    rows, columns = (np.arange(images.shape[i]) + (9 * draws[:, i, None]).astype(int) for i in (1, 2))
    if flip:
        columns = np.where(draws[:, :1] < 0.5, columns[:, ::-1], columns)                                # (N, W)
    return padded[np.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]]


def augment_large(images, draws, flip, crop=False):
    """`uint8` images (N, H, W, C) -> the same shape, changed as those of Imagenette by MWT: padded by an eighth of each
    side (reflection), rotated by up to 30 degrees (corners become black), cropped to 0.8 to 1 of the area with an
    aspect ratio of 3/4 to 4/3, scaled to the old size, and with `flip` mirrored at random. crop: without padding and
    rotation, to 0.08 to 1 of the area (Szegedy et al., 2015). draws: random numbers in [0, 1), six for each image."""
    height, width, channels = images.shape[1:]
    pads, augmented = [(0 if crop else side // 8,) * 2 for side in (height, width, 0)], []
    least, turn = (0.08, 0) if crop else (0.8, 60)
    for image, (angle, area, ratio, top, left, mirror) in zip(images, draws):
        padded = np.pad(image, pads, mode="reflect")
        picture = Image.fromarray(padded[:, :, 0] if channels == 1 else padded)
        side, aspect = ((least + (1 - least) * area) * picture.height * picture.width) ** 0.5, (3 / 4) ** (ratio - 0.5)
        size = min(picture.width, side / aspect), min(picture.height, side * aspect)
        corner = left * (picture.width - size[0]), top * (picture.height - size[1])
        picture = picture.rotate(turn * (angle - 0.5), Image.BILINEAR).resize(
            (width, height), Image.BILINEAR, box=(*corner, corner[0] + size[0], corner[1] + size[1]))
        augmented.append(np.asarray(picture).reshape(height, width, channels)[:, ::-1 if flip and mirror < 0.5 else 1])
    return np.stack(augmented)
