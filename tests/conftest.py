"""What every test gets: one thread, no network for the hub, and the shared folder where there is one."""

import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any


# Before torch, transformers and onnxruntime are imported by any test.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel of vlprune-edge and what it asks for; its bin folder."""
    folder = tmp_path_factory.mktemp("edge")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(folder), str(ROOT / "edge")], check=True)
    (wheel,) = folder.glob("vlprune_edge-*.whl")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv/bin/python"
    subprocess.run([*pip, "--python", str(python), "install", str(wheel)], check=True)
    return python.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the repository; tests that need it are skipped without it."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"no reference data: {folder.name}/ is not beside the repository")
    return folder


@contextmanager
def _ordinary_user() -> Iterator[None]:
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def ordinary_user() -> Callable[[], AbstractContextManager[None]]:
    """Permission bits do not bind root: be somebody else meanwhile."""
    return _ordinary_user


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that an ordinary user may enter, as tmp_path is not."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


# --- small checkpoints and data, for tests of the whole pipeline ------------------------------------------------------

TEXT = "a picture of the red green blue small large circle square left right above below what color is it yes no"
WORDS = TEXT.split()
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SIDE = 32  # pixels


def _blip_config(vocabulary: int, dec: int, sep: int) -> Any:
    from transformers import BlipConfig

    return BlipConfig(
        vision_config={**SIZES, "patch_size": 16, "image_size": SIDE},
        text_config={
            **SIZES,
            "vocab_size": vocabulary,
            "max_position_embeddings": 40,
            "encoder_hidden_size": SIZES["hidden_size"],
            "bos_token_id": dec,
            "sep_token_id": sep,
            "eos_token_id": sep,
            "pad_token_id": 0,
        },
        image_text_hidden_size=16,
    )


def _spread(model: Any) -> None:
    """Make weights so large that scores differ by more than rounding does."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "temp":
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.15)


def _pretraining(folder: Path, random_weights: bool = False) -> None:
    """A task-agnostic model as vlprune saves it."""
    from vlprune.models.blip import new
    from vlprune.models.family import Source
    from vlprune.models.processor import Processor, word_tokenizer

    tokenizer = word_tokenizer(WORDS)
    dec, enc, sep = tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]", "[SEP]"])
    processor = Processor(tokenizer, SIDE, dec, enc)
    source = Source("small", "made", random_weights=random_weights)
    model = new(_blip_config(len(tokenizer), dec, sep), processor, source, seed=0)
    _spread(model)
    model.save(folder)


def _hugging_face(folder: Path, task: str) -> None:
    """A model of one task as transformers saves it."""
    import transformers

    from vlprune.models.processor import word_tokenizer

    names = {"retrieval": "ImageTextRetrieval", "captioning": "ConditionalGeneration", "vqa": "QuestionAnswering"}
    tokenizer = word_tokenizer(WORDS)
    dec, sep = tokenizer.convert_tokens_to_ids(["[DEC]", "[SEP]"])
    model = getattr(transformers, f"BlipFor{names[task]}")(_blip_config(len(tokenizer), dec, sep))
    _spread(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _original(folder: Path) -> None:
    """A model as the BLIP authors save it: their names, momentum copies, queues; [DEC] and [ENC] end the vocabulary."""
    import torch
    from transformers import BertTokenizerFast

    from vlprune.models.blip import new
    from vlprune.models.family import Source
    from vlprune.models.processor import Processor

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    tokenizer = BertTokenizerFast(folder / "vocab.txt")
    dec = len(vocabulary)
    config = _blip_config(dec + 2, dec, tokenizer.sep_token_id)
    for tower in (config.vision_config, config.text_config):
        tower.num_attention_heads = 1  # the authors' heads are 64 wide
    model = new(config, Processor(tokenizer, SIDE, dec, dec + 1), Source("small", "made"), seed=0)
    _spread(model)
    state = {}
    for key, tensor in model.state_dict().items():
        if key.startswith("vision_model."):
            for ours, theirs in (
                ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
                ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
                ("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj"),
                ("vision_model.post_layernorm", "visual_encoder.norm"),
                ("vision_model.encoder.layers", "visual_encoder.blocks"),
                ("layer_norm", "norm"),
                ("self_attn.projection", "attn.proj"),
                ("self_attn", "attn"),
            ):
                key = key.replace(ours, theirs)
        state[key] = tensor
        part, _, rest = key.partition(".")
        if part in ("visual_encoder", "text_encoder", "vision_proj", "text_proj"):
            state[f"{part}_m.{rest}"] = torch.randn_like(tensor)
    state["text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    state |= {"image_queue": torch.randn(16, 8), "text_queue": torch.randn(16, 8), "queue_ptr": torch.zeros(1).long()}
    torch.save({"model": state, "epoch": 19}, folder / "model_base.pth")


@pytest.fixture(scope="session")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of vlprune ("pretraining", "random"), of transformers (by task), and the authors' file ("original")."""
    root = tmp_path_factory.mktemp("small_models")
    made = {name: root / name for name in ("pretraining", "random", "retrieval", "captioning", "vqa", "original")}
    for folder in made.values():
        folder.mkdir()
    _pretraining(made["pretraining"])
    _pretraining(made["random"], random_weights=True)
    for task in ("retrieval", "captioning", "vqa"):
        _hugging_face(made[task], task)
    _original(made["original"])
    return made | {"original": made["original"] / "model_base.pth"}


# --- small vision transformers ----------------------------------------------------------------------------------------

CLASSES = ["cat", "dog", "eel", "fox", "gnu"]


def _vision_transformer(kind: str) -> tuple[Any, Any]:
    """A random model of transformers that shows every parameter in its output, and its image processor."""
    import torch
    import transformers as t

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": SIDE, "patch_size": 8}
    labels = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
    square, larger = {"height": SIDE, "width": SIDE}, {"height": 40, "width": 40}
    if kind == "vit":
        model = t.ViTForImageClassification(t.ViTConfig(**sizes, **labels, intermediate_size=48))
        processor = t.ViTImageProcessor(size=square)
    elif kind == "deit":
        config = t.DeiTConfig(**sizes, **labels, intermediate_size=48, qkv_bias=False)
        model, processor = t.DeiTForImageClassification(config), t.DeiTImageProcessor(size=larger, crop_size=square)
    elif kind == "teacher":
        config = t.DeiTConfig(**sizes, **labels, intermediate_size=48)
        model = t.DeiTForImageClassificationWithTeacher(config)
        processor = t.DeiTImageProcessor(size=40, crop_size=SIDE)
    else:
        more = {"image_size": 48} if kind == "dinov2" else {"use_swiglu_ffn": True}
        model = t.Dinov2ForImageClassification(t.Dinov2Config(**sizes | more, **labels, mlp_ratio=2))
        processor = t.BitImageProcessor(size={"shortest_edge": 36}, crop_size=SIDE)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter.normal_(0.0, 0.3, generator=generator)
            if parameter.ndim == 1 and name.endswith(("weight", "lambda1")):
                parameter.add_(1.0)
    return model.eval(), processor


@pytest.fixture(scope="session")
def vits(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Kind ("vit", "deit", "teacher", "dinov2", "gated") -> folder, transformers' model and processor, to be kept."""
    made: dict[str, Any] = {}

    def make(kind: str) -> Any:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            model, processor = _vision_transformer(kind)
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            made[kind] = SimpleNamespace(folder=folder, model=model, processor=processor)
        return made[kind]

    return make


@pytest.fixture(scope="session")
def animals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images by class, three to train and two to test of each; a colour tells the class."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("animals")
    rng = np.random.default_rng(0)
    colors = rng.integers(0, 256, (len(CLASSES), 3))
    for split, count in (("train", 3), ("test", 2)):
        for name, color in zip(CLASSES, colors, strict=True):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = (color + rng.normal(0, 20, (40, 50, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images, 8 to train and 4 to test: captions.jsonl, a pair of VQA files, answer_list.json."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    captions, questions = [], {"train": [], "test": []}
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        split = "train" if i < 8 else "test"
        texts = [" ".join(rng.choice(WORDS, 5)) for _ in range(2)]
        captions.append({"file_name": f"{i}.png", "captions": texts, "split": split})
        for k in range(3):
            question = {"question_id": 10 * i + k, "image": f"{i}.png", "question": f"what {WORDS[3 + k]} is it"}
            answers = [WORDS[4 + (i + k) % 7], WORDS[4 + (i + k) % 7], WORDS[4 + k]]
            questions[split].append(question | {"answer": answers})
    (folder / "captions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in captions))
    for split, records in questions.items():
        (folder / f"vqa_{split}.json").write_text(json.dumps(records))
    (folder / "answer_list.json").write_text(json.dumps(WORDS[4:11]))
    return folder


# --- small checkpoints with two encoders, as transformers writes them -------------------------------------------------

DUAL_TEXT = "a the small large red green circle square cross left right of on above"
DUAL_WORDS = DUAL_TEXT.split()
DUAL_SIZE, DUAL_LENGTH = 32, 16


def _siglip_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: number for number, word in enumerate(("<unk>", "</s>", *DUAL_WORDS))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", unk_token="<unk>", model_max_length=DUAL_LENGTH
    )


def write_dual(folder: Path, kind: str, seed: int = 0) -> Any:
    """Save transformers' own model with its tokenizer and image processor; "legacy" is what OpenAI's look like."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, SiglipConfig, SiglipImageProcessor, SiglipModel

    from vlprune.models.text_processor import learn_clip_tokenizer

    siglip = kind == "siglip"
    tokenizer = _siglip_tokenizer() if siglip else learn_clip_tokenizer(DUAL_WORDS, 600, DUAL_LENGTH)
    sizes = {"intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": DUAL_LENGTH}
    vision = {**sizes, "hidden_size": 48, "image_size": DUAL_SIZE, "patch_size": 8}
    if siglip:
        config = SiglipConfig(text_config={**text, "hidden_size": 32, "projection_size": 48}, vision_config=vision)
        model: Any = SiglipModel(config).eval()
        images: Any = SiglipImageProcessor(size={"height": DUAL_SIZE, "width": DUAL_SIZE})
    else:
        act = "quick_gelu" if kind == "legacy" else "gelu"
        end = 2 if kind == "legacy" else tokenizer.eos_token_id
        text |= {"hidden_size": 32, "hidden_act": act, "bos_token_id": 0, "eos_token_id": end}
        config = CLIPConfig(text_config=text, vision_config={**vision, "hidden_act": act}, projection_dim=24)
        model = CLIPModel(config).eval()
        images = CLIPImageProcessor(size={"shortest_edge": DUAL_SIZE}, crop_size=DUAL_SIZE)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter.normal_(0.0, 0.2, generator=generator)
            if name.endswith("weight") and parameter.ndim == 1:
                parameter.add_(1.0)
        model.logit_scale.fill_(1.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    images.save_pretrained(folder)
    return SimpleNamespace(folder=folder, model=model, tokenizer=tokenizer, processor=images, kind=kind)


@pytest.fixture(scope="session")
def duals(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Kind ("clip", "legacy", "siglip") -> folder, model, tokenizer and processor; made once, not to be changed."""
    made: dict[str, Any] = {}

    def make(kind: str) -> Any:
        if kind not in made:
            made[kind] = write_dual(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    make.write = write_dual  # type: ignore[attr-defined]
    return make


# --- runs to make bundles of ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def bundle_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(model, task, options of `bundle_runs.write_run`) -> run; each is made once and not to be changed."""
    from bundle_runs import write_run

    made: dict[str, Any] = {}

    def make(model: str, task: str, **options: Any) -> Any:
        key = repr((model, task, sorted(options.items())))
        if key not in made:
            made[key] = write_run(tmp_path_factory.mktemp("run"), model, task, **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def small_bundle(bundle_run: Any, small_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed bundle of a very small model for retrieval; not to be changed."""
    from vlprune.bundle.make import make_bundle

    run = bundle_run(str(small_models["pretraining"]), "retrieval", pack="fp16")
    path = tmp_path_factory.mktemp("bundle") / "small.vlp.tar.zst"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlprune.bundle.make.SMALLEST", 64)  # so that it has tensors of every kind
        make_bundle(run.folder, "retrieval", path)
    return path
