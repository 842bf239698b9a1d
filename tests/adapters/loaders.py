"""What other programs take for a LoRA of SDXL's attention: facts read in their code at a commit.

A key is a stem and an end: lora_unet_<module> and lora_down.weight. Each program has a rule that
says which module of its UNet a stem means ("": none). Modules have diffusers' names or "sgm", those
of Stability's own checkpoint. An address is `source`, a slash and a place.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

# SDXL's eleven blocks with attention, in both spellings.
SGM = {f"down_blocks_{n // 3}_attentions_{n % 3}": f"input_blocks_{n + 1}_1" for n in (3, 4, 6, 7)}
SGM |= {f"up_blocks_{n // 3}_attentions_{n % 3}": f"output_blocks_{n}_1" for n in range(6)}
SGM |= {"mid_block_attentions_0": "middle_block_1"}
KOHYA = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha"}
BOTH = KOHYA | {"lora_A.weight": "down", "lora_B.weight": "up"}  # and PEFT's
PREFIX = "lora_unet_"


def own_names(stem: str) -> str:
    """The program's own module names, with underscores for dots."""
    return stem.removeprefix(PREFIX) if stem.startswith(PREFIX) else ""


def by_table(stem: str) -> str:
    """Either spelling. With dots only as diffusers once wrote it: unet.a.attn1.processor.to_q."""
    name = own_names(stem)
    if old := re.fullmatch(r"(?:unet\.)?(.+)\.processor\.(to_[qkv]|to_out)", stem):
        name = f"{old[1]}.{old[2]}".replace(".", "_") + "_0" * (old[2] == "to_out")
    block = next((block for block in SGM if name.startswith(f"{block}_")), "")
    return SGM.get(block, "") + name.removeprefix(block)


def by_pattern(stem: str) -> str:
    """An SGM block's number is computed: three blocks a level, on the way down one more."""
    if found := re.match(PREFIX + r"(down|up)_blocks_(\d+)_attentions_(\d+)_(.+)", stem):
        way, number = found[1], 3 * int(found[2]) + int(found[3])
        block = f"input_blocks_{1 + number}" if way == "down" else f"output_blocks_{number}"
        return f"{block}_1_{found[4]}"
    found = re.match(PREFIX + r"mid_block_attentions_\d+_(.+)", stem)
    return f"middle_block_1_{found[1]}" if found else own_names(stem)


def by_table_back(stem: str) -> str:
    """The same table, read from SGM's spelling to diffusers'."""
    name = own_names(stem)
    block = next((block for block, sgm in SGM.items() if name.startswith(f"{sgm}_")), "")
    return block + name.removeprefix(SGM.get(block, ""))


def by_words(stem: str) -> str:
    """SGM's block numbers are divided by three. Underscores become dots, then words get theirs
    back. PEFT's stems name the module itself.
    """
    name = own_names(stem)
    if found := re.match(r"(input|output)_blocks_(\d+)_1_(.+)", name):
        number = int(found[2]) - (found[1] == "input")
        way = "down" if found[1] == "input" else "up"
        name = f"{way}_blocks_{number // 3}_attentions_{number % 3}_{found[3]}"
    name = name.replace("middle_block_1_", "mid_block_attentions_0_").replace("_", ".")
    for word in "down_blocks mid_block up_blocks transformer_blocks to_q to_k to_v to_out".split():
        name = name.replace(word.replace("_", "."), word)
    return stem.removeprefix("unet.") if stem.startswith("unet.") else name


@dataclass(frozen=True)
class Loader:
    """The scale is alpha / the down matrix's rows in every one of them."""

    name: str
    source: str
    places: str  # where it maps keys, scales, and refuses or hides a file
    unet: str  # how its own modules are spelt
    rule: Callable[[str], str]
    left: str  # what becomes of keys that it does not know
    ends: dict[str, str] = field(default_factory=lambda: KOHYA)
    header: dict[str, str] = field(default_factory=dict)  # how a value must begin; "": no such key
    without_alpha: float | None = 1  # the scale then; None: it fails
    old: int = 560  # how many modules it reads of our file under diffusers' names, of 560
    kohya: int = 560  # of our kohya file, which has SGM's
    peft: int = 0


AT = "https://github.com/"
COMFYUI = AT + "Comfy-Org/ComfyUI/blob/a125cd84b054a57729b5eecab930ca9408719832"
FORGE = AT + "lllyasviel/stable-diffusion-webui-forge/blob/dfdcbab685e57677014f05a3309b48cc87383167"
CLASSIC = AT + "Haoming02/sd-webui-forge-classic/blob/1f95d7170189cf93952aca122c1ee2f306a07e4c"
FOOOCUS = AT + "lllyasviel/Fooocus/blob/59f183ab9b8e4a4bbf0fb8bc43886e19e8dfdfae"
A1111 = AT + "AUTOMATIC1111/stable-diffusion-webui/blob/bef51aed032c0aaa5cfd80445bc4cf0d85b408b5"
SD_SCRIPTS = AT + "kohya-ss/sd-scripts/blob/48d368fa557731ad0488c07304dfeba8c07910eb"
LYCORIS = AT + "KohakuBlueleaf/LyCORIS/blob/f49d30d670591ec8841d241d79aaa8449b30a715"
INVOKEAI = AT + "invoke-ai/InvokeAI/blob/8e71a8a519399d6db32054ae9afc7c6c4e2355af"
DIFFUSERS = AT + "huggingface/diffusers/blob/58eb52c0803ea9af3abec60841c2a093bdf1f951"
SHOWN = {"ss_base_model_version": "sdxl_"}  # else its list hides a file whose header is not empty
LABEL = {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}  # its list says SDXL by it
OUT = "over 12 of them: leaves the file out"
LOADERS = (
    Loader("ComfyUI", COMFYUI, """comfy/lora.py#L37-L95 comfy/lora.py#L175-L201
        comfy/utils.py#L265-L329 comfy/weight_adapter/lora.py#L92-L177""",
        "sgm", by_table, "warns of each", BOTH),
    Loader("Forge", FORGE, """packages_3rdparty/comfyui_lora_collection/lora.py#L46-L312
        backend/patcher/lora.py#L145-L177 extensions-builtin/sd_forge_lora/networks.py#L15-L53
        extensions-builtin/sd_forge_lora/network.py#L54-L68""", "sgm", by_table, OUT, BOTH, LABEL),
    Loader("Forge classic", CLASSIC, """ldm_patched/modules/lora.py#L17-L283
        ldm_patched/modules/model_patcher.py#L332-L370 ldm_patched/modules/sd.py#L66-L128
        extensions-builtin/Lora/network.py#L75-L83
        extensions-builtin/Lora/ui_extra_networks_lora.py#L75-L94""",
        "sgm", by_table, OUT, header=SHOWN),
    Loader("Fooocus", FOOOCUS, """modules/lora.py#L1-L42 modules/core.py#L95-L114
        ldm_patched/modules/lora.py#L203-L224 modules/patch.py#L77-L91""", "sgm", by_table, OUT),
    Loader("A1111", A1111, """extensions-builtin/Lora/networks.py#L54-L226
        extensions-builtin/Lora/network.py#L61-L161 extensions-builtin/Lora/network_lora.py#L8-L24
        extensions-builtin/Lora/ui_extra_networks_lora.py#L63-L74""",
        "sgm", by_pattern, "a line in the debug log", header=SHOWN),
    Loader("sd-scripts: drawing, --base_weights", SD_SCRIPTS, """networks/lora.py#L758-L858
        networks/lora.py#L69-L72 networks/lora.py#L1102-L1125 train_network.py#L646-L661
        library/sdxl_model_util.py#L299-L341""", "sgm", by_table, "ignores them"),
    Loader("LyCORIS: merge", LYCORIS, """lycoris/utils/__init__.py#L372-L483
        lycoris/modules/locon.py#L138-L182""", "sgm", by_pattern, "prints", without_alpha=None),
    Loader("InvokeAI", INVOKEAI, """invokeai/backend/model_manager/configs/lora.py#L529-L669
        invokeai/backend/patches/lora_conversions/sdxl_lora_conversion_utils.py#L31-L62
        invokeai/backend/patches/layer_patcher.py#L334-L373
        invokeai/backend/patches/layers/lora_layer_base.py#L49-L53
        invokeai/backend/model_manager/util/model_util.py#L86-L162""",
        "diffusers", by_table_back, "warns, stops", header={"ot_branch": ""}),
    Loader("diffusers", DIFFUSERS, """src/diffusers/loaders/lora_conversion_utils.py#L30-L333
        src/diffusers/loaders/lora_pipeline.py#L745-L766 src/diffusers/loaders/peft.py#L189-L251
        src/diffusers/utils/state_dict_utils.py#L45-L57 src/diffusers/utils/peft_utils.py#L153-L208
        """, "diffusers", by_words, "warns, stops", BOTH, {"lora_adapter_metadata": ""}, peft=560),
    # Parts of these programs that know SGM names only.
    Loader("sd-scripts: --network_weights", SD_SCRIPTS, """train_network.py#L711-L714
        networks/lora.py#L1071-L1080""", "sgm", own_names, "prints, trains a new LoRA", old=0),
    Loader("sd-scripts: sdxl_merge_lora.py", SD_SCRIPTS, "networks/sdxl_merge_lora.py#L92-L133",
        "sgm", own_names, "logs each", old=0),
    Loader("LyCORIS in sd-scripts", LYCORIS, "lycoris/kohya.py#L166-L217",
        "sgm", own_names, "ignores them", without_alpha=None, old=0),
)  # fmt: skip
