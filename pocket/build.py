"""Build pocket/model, pocket/ink and pocket/blueprint from the drawings' packages.

    python -m pocket.build                    everything, on one GPU
    python -m pocket.build --stages vae unet  two of the stages
    python -m pocket.build --smoke            all stages, tiny, on a CPU, into runs/pocket-smoke

A stage that is done is not done again: its figures lie in WORK/STAGE.json. Deleting that file has
it done anew, and with it every stage after it. Only `render` needs a network, and only `vae` and
`unet` a GPU.
"""

import functools
import json
import logging
import math
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from inputs.files import Refusal, digest, only_run, write_whole
from pocket import drawings
from pocket.lessons import Palette, plan, time_ids

HERE = Path(__file__).parent
STAGES = ("render", "words", "vae", "unet", "export")


@dataclass(frozen=True)
class Options:
    """Build the small SDXL."""

    # The stages to run, in this order; one that is done is skipped.
    stages: tuple[Literal["render", "words", "vae", "unet", "export"], ...] = STAGES
    # Where stages leave what the next ones need; empty means runs/pocket-build (or -smoke).
    work: str = ""
    # Where npm puts the packages; empty means WORK/packages.
    packages: str = ""
    # The finished model, ink and blueprint go here; empty means pocket/, or runs/pocket-smoke.
    out: str = ""
    # Tiny and short, on a CPU.
    smoke: bool = False
    # cuda for the real thing; empty asks the machine.
    device: str = ""
    seed: int = 7


@dataclass(frozen=True)
class Sizes:
    """Numbers of the build; `SMOKE` has small ones."""

    lessons: int = 180_000
    vocabulary: int = 1_700
    length: int = 32  # tokens of a prompt

    vae_channels: tuple[int, ...] = (24, 48, 80, 80)
    vae_pictures: int = 32_768
    vae_steps: int = 7_200
    vae_batch: int = 64
    vae_rate: float = 1e-3
    kl_weight: float = 4e-4

    text_widths: tuple[int, int] = (96, 128)
    text_layers: tuple[int, int] = (3, 4)
    channels: tuple[int, ...] = (64, 96, 128)
    heads: tuple[int, ...] = (2, 3, 4)
    unet_steps: int = 17_000
    unet_batch: int = 384
    unet_rate: float = 1e-3
    ema: float = 0.9995


SMOKE = Sizes(
    lessons=96,
    vocabulary=400,
    vae_channels=(8, 8, 16, 16),
    vae_pictures=48,
    vae_steps=12,
    vae_batch=8,
    text_widths=(24, 32),
    text_layers=(2, 2),
    channels=(16, 32, 32),
    heads=(1, 2, 2),
    unet_steps=12,
    unet_batch=8,
)


def main(argv: list[str] | None = None) -> None:
    options = settle(tyro.cli(Options, args=argv, description=__doc__))
    sizes = SMOKE if options.smoke else Sizes()
    try:
        if options.smoke and options.out.resolve() == HERE:
            raise Refusal("--smoke with --out pocket", "another folder", "no --out")
        options.work.mkdir(parents=True, exist_ok=True)
        with only_run(options.work):
            for stage in options.stages:
                run_stage(stage, options, sizes)
    except Refusal as refusal:
        sys.exit(f"error: {refusal}")


def settle(options: Options) -> Options:
    """`options` with every empty one filled in, and folders as paths."""
    work = Path(options.work or ("runs/pocket-smoke" if options.smoke else "runs/pocket-build"))
    found = "cuda" if torch.cuda.is_available() and not options.smoke else "cpu"
    return replace(
        options,
        work=work,
        packages=Path(options.packages) if options.packages else work / "packages",
        out=Path(options.out) if options.out else work if options.smoke else HERE,
        device=options.device or found,
    )


def run_stage(stage: str, options: Options, sizes: Sizes) -> None:
    """Run one stage unless its note says that it is done, from these numbers and on these earlier
    stages; print its figures.

    Raises:
        Refusal: an earlier stage is missing, or was done with other numbers.
    """
    for earlier in STAGES[: STAGES.index(stage)]:
        note = done(options.work, earlier)
        if note is None or note["settings"] != settings_of(earlier, options, sizes):
            raise Refusal(
                f"stage {earlier} is not done with these numbers",
                f"it comes before {stage}",
                f"--stages {earlier} {stage}",
            )
    settings = settings_of(stage, options, sizes)
    note = done(options.work, stage)
    if note is not None and note["settings"] == settings:
        print(f"{stage}: done before: {note['figures']}")
        return
    torch.manual_seed(options.seed)
    start = time.perf_counter()
    figures = RUN[stage](options, sizes)
    figures["seconds"] = round(time.perf_counter() - start, 1)
    note = {"settings": settings, "figures": figures, "finished": time.time()}
    body = json.dumps(note, indent=1)
    write_whole(options.work / f"{stage}.json", body.encode())
    print(f"{stage}: {figures}")


UNET_TRAINING = ("unet_steps", "unet_batch", "unet_rate", "ema")
# Which numbers a stage depends on.
DEPENDS = {
    "render": (),
    "words": ("lessons", "vocabulary", "length"),
    "vae": ("vae_channels", "vae_pictures", "vae_steps", "vae_batch", "vae_rate", "kl_weight"),
    "unet": ("text_widths", "text_layers", "channels", "heads", *UNET_TRAINING),
    "export": (),
}


def settings_of(stage: str, options: Options, sizes: Sizes) -> dict:
    """What `stage` depends on: its numbers, the held-out lists, and the stage before, whose note
    says when it was done.
    """
    place = STAGES.index(stage)
    before = options.work / f"{STAGES[place - 1]}.json"
    marks = [(HERE / "heldout.json").read_bytes()] + ([before.read_bytes()] if place else [])
    numbers = {name: getattr(sizes, name) for name in DEPENDS[stage]}
    # From here, not from the root: a work folder may go to another machine between two stages.
    out = os.path.relpath(options.out, HERE)
    where = {"out": out} if stage in ("render", "export") else {}
    return json.loads(
        json.dumps({"seed": options.seed, "after": [digest(m) for m in marks]} | numbers | where)
    )


def done(work: Path, stage: str) -> dict | None:
    """What a finished stage left, or None."""
    path = work / f"{stage}.json"
    return json.loads(path.read_text()) if path.exists() else None


def heldout() -> dict:
    return json.loads((HERE / "heldout.json").read_text())


# ---- drawings ----------------------------------------------------------------------------------


def render(options: Options, sizes: Sizes) -> dict:
    """Packages -> drawings, and the two style sets."""
    drawings.fetch(options.packages)
    found = drawings.render(options.packages, options.work)
    known = {subject.name for subject in found}
    for style in drawings.STYLES:
        captions = [name for name in heldout()["ink"] if name in known or not options.smoke]
        drawings.style_set(style, options.out / style, options.work, captions)
    return {"subjects": len(found), "style pictures": len(captions)}


def lessons_of(options: Options, count: int, salt: int) -> list:
    """`count` lessons; `salt` keeps the stages' apart."""
    subjects = drawings.read_subjects(options.work)
    return plan(subjects, heldout(), count, options.seed + salt)


# ---- tokenizer ---------------------------------------------------------------------------------


def words(options: Options, sizes: Sizes) -> dict:
    """Byte-level BPE, as CLIP's, from the lessons' captions."""
    from transformers import CLIPTokenizer

    captions = [x.caption for x in lessons_of(options, sizes.lessons, 0)]
    blank = CLIPTokenizer()
    tokenizer = blank.train_new_from_iterator(iter(captions), vocab_size=sizes.vocabulary)
    tokenizer.model_max_length = sizes.length
    tokenizer.save_pretrained(options.work / "tokenizer")
    # transformers 4 reads these two instead of tokenizer.json.
    tokenizer.backend_tokenizer.model.save(str(options.work / "tokenizer"))
    longest = max(len(tokenizer(c).input_ids) for c in set(captions))
    return {"tokens": len(tokenizer), "captions": len(set(captions)), "longest": longest}


def read_tokenizer(options: Options):
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(options.work / "tokenizer")


# ---- training, for both models -----------------------------------------------------------------


class Clock:
    """Step and learning rate as tensors, so that a CUDA graph can hold them."""

    def __init__(self, steps: int, rate: float, device: str):
        self.total, self.peak, self.warmup = steps, rate, min(500, max(1, steps // 10))
        self.step = torch.zeros((), device=device)
        self.rate = torch.zeros((), device=device)

    def tick(self) -> None:
        """Warm-up, then cosine to 2 %."""
        self.step += 1
        share = (self.step / self.total).clamp(max=1)
        cosine = 0.02 + 0.98 * 0.5 * (1 + torch.cos(math.pi * share))
        self.rate.copy_(self.peak * torch.minimum(self.step / self.warmup, cosine))


def adamw(parameters: list, clock: Clock) -> torch.optim.AdamW:
    on_gpu = clock.rate.is_cuda
    return torch.optim.AdamW(
        parameters, lr=clock.rate, betas=(0.9, 0.99), weight_decay=0.01, foreach=False,
        fused=on_gpu, capturable=on_gpu,
    )  # fmt: skip


def recorded(step, device: str):
    """`step` recorded in a CUDA graph, whose launches then cost nothing; on a CPU `step` itself.

    The steps before recording are real ones: they warm the kernels and make the gradients.
    """
    if not device.startswith("cuda"):
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def run_steps(step, steps: int, loss: torch.Tensor, name: str) -> float:
    """Call `step` and show its loss; the mean loss of the last tenth.

    Raises:
        Refusal: the loss is not finite.
    """
    recent: list[float] = []
    with tqdm(total=steps, desc=name, mininterval=5, disable=None) as bar:
        for i in range(1, steps + 1):
            step()
            if i % max(1, steps // 200) == 0:
                recent.append(loss.item())
                bar.set_postfix(loss=f"{recent[-1]:.4f}")
                if not math.isfinite(recent[-1]):
                    raise Refusal(f"{name}: loss {recent[-1]}", "a number", "another --seed")
            bar.update()
    last = recent[-max(1, len(recent) // 10) :]
    return round(sum(last) / len(last), 5)


def half(device: str):
    """bf16 where the GPU multiplies it; nothing on a CPU."""
    return torch.autocast("cuda", torch.bfloat16, enabled=device.startswith("cuda"))


def faster(model: torch.nn.Module, device: str) -> torch.nn.Module:
    """Compiled, on a GPU."""
    if device.startswith("cuda"):
        model.compile()
    return model


# ---- VAE ---------------------------------------------------------------------------------------


def make_vae(sizes: Sizes, scale: float = 1.0):
    from diffusers import AutoencoderKL

    n = len(sizes.vae_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * n,
        up_block_types=("UpDecoderBlock2D",) * n,
        block_out_channels=sizes.vae_channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=drawings.SIDE,
        scaling_factor=scale,
    )


def paint_all(palette: Palette, lessons: list, batch: int = 512):
    """Yield (first, pictures): every lesson painted, `batch` at a time."""
    for first in tqdm(range(0, len(lessons), batch), desc="paint", mininterval=5, disable=None):
        yield first, palette.paint(lessons[first : first + batch])


def vae(options: Options, sizes: Sizes) -> dict:
    """The autoencoder: L1, L1 of the gradients at three scales, and a little KL."""
    device = options.device
    palette = Palette(options.work, device)
    lessons = lessons_of(options, sizes.vae_pictures, 1)
    shape = (len(lessons), 3, drawings.SIDE, drawings.SIDE)
    bank = torch.empty(shape, dtype=torch.uint8, device=device)
    for first, pictures in paint_all(palette, lessons):
        bank[first : first + len(pictures)] = ((pictures + 1) * 127.5).round().byte()
    test, train = bank[: len(bank) // 32], bank[len(bank) // 32 :]

    model = make_vae(sizes).to(device, memory_format=torch.channels_last)
    parts = [faster(part, device) for part in (model.encoder, model.decoder)]
    parameters = list(model.parameters())
    clock = Clock(sizes.vae_steps, sizes.vae_rate, device)
    optimizer = adamw(parameters, clock)
    shown = torch.zeros((), device=device)

    def step() -> None:
        clock.tick()
        optimizer.zero_grad(set_to_none=True)
        which = torch.randint(len(train), (sizes.vae_batch,), device=device)
        x = train[which].float() / 127.5 - 1
        x = x.to(memory_format=torch.channels_last)
        with half(device):
            mean, logvar = model.quant_conv(parts[0](x)).float().chunk(2, 1)
            logvar = logvar.clamp(-30, 20)
            z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
            y = parts[1](model.post_quant_conv(z)).float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        loss = F.l1_loss(y, x) + 0.5 * edges(x, y) + sizes.kl_weight * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        shown.copy_(loss.detach())

    loss = run_steps(recorded(step, device), sizes.vae_steps, shown, "vae")
    return {"loss": loss} | keep_vae(model, test, sizes, options.work)


def edges(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean L1 between the finite differences of two pictures at three scales."""
    total = x.new_zeros(())
    for _ in range(3):
        for axis in (-1, -2):
            total = total + F.l1_loss(x.diff(dim=axis), y.diff(dim=axis))
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return total / 3


@torch.no_grad()
def keep_vae(model, test: torch.Tensor, sizes: Sizes, work: Path) -> dict:
    """Save the model in fp16; the scale of its latents and its PSNR are measured on that."""
    kept = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    model = make_vae(sizes).to(test.device).eval()
    model.load_state_dict({k: v.float() for k, v in kept.items()})
    latents, errors = [], []
    for rows in test.split(64):
        x = rows.float() / 127.5 - 1
        z = model.encode(x).latent_dist.mean
        errors.append(((model.decode(z).sample.clamp(-1, 1) - x) / 2).square().mean((1, 2, 3)))
        latents.append(z)
    psnr = (-10 * torch.cat(errors).clamp(min=1e-9).log10()).mean().item()
    scale = 1 / torch.cat(latents).std().item()
    save_file(kept, work / "vae.safetensors", {"scale": repr(scale)})
    return {"psnr": round(psnr, 2), "scale": round(scale, 4)}


def read_vae(options: Options, sizes: Sizes):
    from safetensors import safe_open

    path = options.work / "vae.safetensors"
    with safe_open(path, "pt") as file:
        scale = float(file.metadata()["scale"])
    model = make_vae(sizes, scale)
    model.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return model.requires_grad_(False).eval()


# ---- UNet and text encoders --------------------------------------------------------------------


def make_unet(sizes: Sizes):
    """As SDXL's, with attention on all three levels: a level is eight times coarser than a pixel,
    and an adapter of the attention layers reaches the fine lines only where there are any.
    """
    from diffusers import UNet2DConditionModel

    n = len(sizes.channels)
    return UNet2DConditionModel(
        sample_size=drawings.SIDE // 2 ** (len(sizes.vae_channels) - 1),
        down_block_types=("CrossAttnDownBlock2D",) * n,
        up_block_types=("CrossAttnUpBlock2D",) * n,
        block_out_channels=sizes.channels,
        attention_head_dim=sizes.heads,
        layers_per_block=1,
        transformer_layers_per_block=1,
        cross_attention_dim=sum(sizes.text_widths),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=sizes.text_widths[1] + 6 * 32,
        norm_num_groups=16,
    )


def make_text_encoders(sizes: Sizes, tokenizer) -> list:
    """CLIP's text model, and the one with a projection, at the two widths."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kinds = (CLIPTextModel, CLIPTextModelWithProjection)
    made = []
    for kind, width, layers, act in zip(
        kinds, sizes.text_widths, sizes.text_layers, ("quick_gelu", "gelu"), strict=True
    ):
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=max(1, width // 32),
            max_position_embeddings=sizes.length,
            hidden_act=act,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        made.append(kind(config))
    return made


def tokens(tokenizer, captions: list[str], sizes: Sizes) -> torch.Tensor:
    """(N, length) int64."""
    return tokenizer(
        captions,
        padding="max_length",
        max_length=sizes.length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


@torch.no_grad()
def latent_bank(options: Options, sizes: Sizes, tokenizer):
    """Every lesson as the UNet sees it: latents, tokens of the caption, time ids."""
    device = options.device
    palette = Palette(options.work, device)
    lessons = lessons_of(options, sizes.lessons, 0)
    model = read_vae(options, sizes).to(device)
    side = drawings.SIDE // 2 ** (len(sizes.vae_channels) - 1)
    latents = torch.empty(len(lessons), 4, side, side, dtype=torch.float16, device=device)
    for first, pictures in paint_all(palette, lessons):
        posterior = model.encode(pictures).latent_dist
        latents[first : first + len(pictures)] = posterior.sample() * model.config.scaling_factor
    ids = tokens(tokenizer, [x.caption for x in lessons], sizes).to(device)
    sizes_ids = torch.tensor([time_ids(x) for x in lessons], dtype=torch.float32, device=device)
    return latents, ids, sizes_ids


@functools.cache  # so that a CUDA graph finds it on the GPU
def noise_levels(device: torch.device) -> torch.Tensor:
    """alphas_cumprod (1000,) of SDXL's scaled-linear schedule."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float().to(device)


def errors(model, encoders, x0, words_, micro, nothing) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,) mean squared errors of the guessed noise, and (B,) their min-SNR weights (gamma 5).

    Args:
        x0: (B, 4, h, w) scaled latents.
        words_: (B, T) tokens; nothing: (1, T) those of the empty caption.
        micro: (B, 6) time ids.
    """
    n, device = len(x0), x0.device
    levels = noise_levels(device)
    dice = torch.rand(n, device=device)
    words_ = torch.where(dice[:, None] < 0.03, nothing, words_)
    said = (dice < 0.90).float()[:, None]  # the rest get zeros, as SDXL's empty prompt
    noise = torch.randn(x0.shape, device=device)
    t = torch.randint(1000, (n,), device=device)
    level = levels[t][:, None, None, None]
    with half(str(device)):
        text = [encoder(words_, output_hidden_states=True) for encoder in encoders]
        context = torch.cat([each.hidden_states[-2].float() for each in text], -1)
        guess = model(
            level.sqrt() * x0.float() + (1 - level).sqrt() * noise,
            t,
            context * said[:, None],
            added_cond_kwargs={
                "text_embeds": text[1].text_embeds.float() * said,
                "time_ids": micro,
            },
            return_dict=False,
        )[0]
    error = (guess.float() - noise).square().mean((1, 2, 3))
    snr = levels[t] / (1 - levels[t])
    return error, (5 / snr).clamp(max=1)


def unet(options: Options, sizes: Sizes) -> dict:
    """UNet and both text encoders together: epsilon, min-SNR 5, averaged weights."""
    device = options.device
    tokenizer = read_tokenizer(options)
    start = time.perf_counter()
    latents, ids, micro = latent_bank(options, sizes, tokenizer)
    painted = time.perf_counter() - start
    nothing = tokens(tokenizer, [""], sizes).to(device)
    torch.manual_seed(options.seed)
    model = make_unet(sizes).to(device, memory_format=torch.channels_last)
    encoders = [encoder.to(device) for encoder in make_text_encoders(sizes, tokenizer)]
    both = torch.nn.ModuleList([model, *encoders])
    parameters = [p for p in both.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in parameters]
    faster(model, device)
    clock = Clock(sizes.unet_steps, sizes.unet_rate, device)
    optimizer = adamw(parameters, clock)
    shown = torch.zeros((), device=device)

    def step() -> None:
        clock.tick()
        optimizer.zero_grad(set_to_none=True)
        which = torch.randint(len(latents), (sizes.unet_batch,), device=device)
        error, weight = errors(model, encoders, latents[which], ids[which], micro[which], nothing)
        (error * weight).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        keep = ((1 + clock.step) / (10 + clock.step)).clamp(max=sizes.ema)
        torch._foreach_mul_(average, keep)
        torch._foreach_add_(average, torch._foreach_mul([p.detach() for p in parameters], 1 - keep))
        shown.copy_(error.detach().mean())

    loss = run_steps(recorded(step, device), sizes.unet_steps, shown, "unet")
    with torch.no_grad():
        for parameter, mean in zip(parameters, average, strict=True):
            parameter.copy_(mean)
    for name, part in zip(("unet", "text_encoder", "text_encoder_2"), both, strict=True):
        state = {k: v.half().contiguous() for k, v in part.state_dict().items()}
        save_file(state, options.work / f"{name}.safetensors")
    return {
        "loss": loss,
        "seconds of painting": round(painted, 1),
        "unet parameters": sum(p.numel() for p in model.parameters()),
        "text parameters": sum(p.numel() for e in encoders for p in e.parameters()),
    }


# ---- export ------------------------------------------------------------------------------------


def export(options: Options, sizes: Sizes) -> dict:
    """The folder that diffusers loads, in fp16, read back and compared."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    tokenizer = read_tokenizer(options)
    encoders = make_text_encoders(sizes, tokenizer)
    model = make_unet(sizes)
    named = {"unet": model, "text_encoder": encoders[0], "text_encoder_2": encoders[1]}
    for name, part in named.items():
        state = load_file(options.work / f"{name}.safetensors")
        part.load_state_dict({k: v.float() for k, v in state.items()})
    pipe = StableDiffusionXLPipeline(
        vae=read_vae(options, sizes),
        unet=model,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=EulerDiscreteScheduler.from_config({
            "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
            "timestep_spacing": "leading", "steps_offset": 1,
            "clip_sample": False,  # DDIM and DDPM, made from these settings, would clip latents
        }),
        force_zeros_for_empty_prompt=True,
    )  # fmt: skip
    folder = options.out / "model"
    pipe.save_pretrained(folder)
    for tokens_of in ("tokenizer", "tokenizer_2"):
        tokenizer.backend_tokenizer.model.save(str(folder / tokens_of))
    for name, part in (*named.items(), ("vae", pipe.vae)):
        file = "diffusion_pytorch_model" if name in ("unet", "vae") else "model"
        keep_half(part, folder / name / f"{file}.safetensors", name.startswith("text"))
    return read_back(folder, pipe)


def keep_half(part, path: Path, text: bool) -> None:
    """Write the weights in fp16, under the names that SDXL's own files have.

    transformers 5 writes CLIPTextModel without the prefix `text_model.`, and transformers 4, which
    looks for it, would then start from random weights.
    """
    state = {k: v.half().contiguous() for k, v in part.state_dict().items()}
    if text and not any(k.startswith("text_model.") for k in state):
        state = {f"text_model.{k}": v for k, v in state.items()}
    save_file(state, path, {"format": "pt"})


@torch.no_grad()
def read_back(folder: Path, pipe) -> dict:
    """Load the folder plainly and compare its predictions with the model's.

    Raises:
        Refusal: they differ.
    """
    from diffusers import StableDiffusionXLPipeline

    logging.getLogger("diffusers").setLevel(logging.ERROR)
    again = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    drawn = []
    for each in (pipe, again):
        each.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(1)
        drawn.append(
            each("rocket", num_inference_steps=2, generator=noise, output_type="pt").images
        )
    difference = (drawn[0] - drawn[1]).abs().max().item()
    if difference > 1e-4:
        raise Refusal(f"read back, the model differs by {difference:.1e}", "0", "report this")
    bytes_ = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    return {"megabytes": round(bytes_ / 1e6, 2), "difference": difference}


RUN = {"render": render, "words": words, "vae": vae, "unet": unet, "export": export}

if __name__ == "__main__":
    main()
