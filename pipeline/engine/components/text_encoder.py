"""Text encoders from a folder: Gemma 3 (LTX-2), which can also rewrite a prompt, and T5 (LTX-Video).

Which one a folder holds shows in its layout. What turns their states into the denoiser's context is in `connectors.py`.

Shapes: B batch, S text tokens, D width, L hidden states of the encoder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3ForConditionalGeneration, T5EncoderModel
from transformers.utils import logging as transformers_logging

from pipeline.engine.components.quantise import quantise_weights
from pipeline.engine.components.sentencepiece import t5_tokenizer
from pipeline.engine.components.text import NUM_REGISTERS, TextStates
from pipeline.errors import CheckpointMismatch, UsageError
from pipeline.model.checkpoint import TensorFile

# For `TextEncoder.rewrite`: what the models were shown in training are captions of this kind.
REWRITE_INSTRUCTIONS = """\
You are a cinematographer. You are given a short idea for a clip of a few seconds that has picture and sound.
Rewrite it as the description of one continuous shot, in English, in the present tense.
Write a single flowing paragraph of 80 to 200 words: no title, no list, no line breaks, no remarks to the reader.
Keep every fact of the idea: who and what is there, how many, what they do, where, and in which style. Contradict none.
Begin at once with the main action, then tell what happens in the order in which it is seen and heard.
Describe each subject so that it could be recognised: age, build, hair, clothes, colours, materials, expression.
Describe motion exactly: who moves, in which direction, how fast, and how it ends. Nothing may happen that takes longer.
Say what the camera does: the framing, the angle, the lens, and whether it stands still, pans, tilts or follows.
Say how the place is lit: the source, direction, colour and softness of the light, the time of day, the weather.
Weave in the sound as it happens: noises of the action, the surroundings, music if there is any, and what is silent.
Put spoken words in double quotes, in their own language, with who says them and in what voice. Invent no long speeches.
Name what can be seen or heard, not what it means or how it feels. Answer with the paragraph and nothing else.
"""


class TextEncoder:
    """Prompts to hidden states. Gemma also writes: `rewrite` turns an idea into a prompt."""

    def __init__(
        self,
        read: Callable[[Tensor, Tensor], Tensor],
        tokenizer: Any,
        *,
        max_tokens: int,
        device: str,
        module: nn.Module,
        writer: Any = None,
    ) -> None:
        """`read` takes token ids and mask (B,S) and gives hidden states (B,S,D,L), with the weights of `module`.

        `writer` is Gemma with its head.
        """
        self.module = module
        self._read = read
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._device = device
        self._writer = writer

    def encode(self, prompts: list[str]) -> TextStates:
        """Hidden states (B,S,D,L), padded to `max_tokens`; longer prompts are cut.

        Gemma gives the embedding and every layer and pads on the left, T5 the last layer and pads on the right.
        """
        tokens = self._tokenizer(
            [prompt.strip() for prompt in prompts],
            padding="max_length",
            max_length=self._max_tokens,
            truncation=True,
            return_tensors="pt",
        ).to(self._device)
        with _without_gradients():
            return TextStates(self._read(tokens.input_ids, tokens.attention_mask), tokens.attention_mask)

    def rewrite(
        self, instructions: str, prompt: str, *, seed: int, max_new_tokens: int = 512, temperature: float = 0.7
    ) -> str:
        """What the language model makes of `prompt` under `instructions`, in one line; the prompt itself if nothing.

        The same seed gives the same text on the same device; `temperature` 0 takes the likeliest word each time.
        UsageError if the encoder cannot write (T5).
        """
        if self._writer is None:
            raise UsageError(
                "this model's text encoder cannot rewrite prompts, only Gemma can; set enhance_prompt=false"
            )
        ids_BS = self._tokenizer(
            self._conversation(instructions, prompt.strip()), return_tensors="pt", add_special_tokens=False
        ).input_ids.to(self._device)
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature}
        # The library draws from the global generators only.
        devices = [torch.device(self._device)] if self._device.startswith("cuda") else []
        with torch.random.fork_rng(devices=devices), _without_gradients():
            torch.manual_seed(seed % 2**63)
            written_BS = self._writer.generate(
                ids_BS,
                attention_mask=torch.ones_like(ids_BS),
                max_new_tokens=max_new_tokens,
                pad_token_id=self._tokenizer.pad_token_id,
                **sampling,
            )
        text = self._tokenizer.decode(written_BS[0, ids_BS.shape[1] :], skip_special_tokens=True)
        return " ".join(text.split()) or prompt

    def _conversation(self, instructions: str, prompt: str) -> str:
        if self._tokenizer.chat_template is None:
            return f"{self._tokenizer.bos_token}{instructions}\nIdea: {prompt}\nParagraph:"
        messages = [{"role": "system", "content": instructions}, {"role": "user", "content": prompt}]
        text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text


def load_text_encoder(
    folder: Path, *, max_tokens: int, device: str, dtype: torch.dtype | None, bits: int = 16
) -> TextEncoder:
    """The text encoder of `folder`: T5 if it has a subfolder `text_encoder`, else Gemma 3.

    `dtype` None keeps the stored one; `bits` 8 or 4 makes its linear weights smaller before they go to `device`.
    UsageError if the folder or the bits cannot be used, CheckpointMismatch if tensors lack.
    """
    transformers_logging.disable_progress_bar()
    load = _load_t5 if (folder / "text_encoder").is_dir() else _load_gemma
    return load(folder, max_tokens=max_tokens, device=device, dtype=dtype, bits=bits)


def _load_gemma(folder: Path, *, max_tokens: int, device: str, dtype: torch.dtype | None, bits: int) -> TextEncoder:
    if max_tokens % NUM_REGISTERS:
        raise UsageError(f"model.size.text_tokens must be a multiple of {NUM_REGISTERS}, got {max_tokens}; use 1024")
    # Without tokenizer.json the library makes up an empty vocabulary and says nothing.
    _require_files(folder, "config.json", "tokenizer.json", "tokenizer_config.json", "*.safetensors")
    model = _pretrained(Gemma3ForConditionalGeneration, folder, dtype, "Gemma 3")
    tokenizer = _tokenizer(folder, "left")
    language_model = model.model.language_model.eval().requires_grad_(False)
    _send(language_model, folder, "language_model.model.", device=device, bits=bits)

    def read(ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        states = language_model(
            input_ids=ids_BS, attention_mask=mask_BS, output_hidden_states=True, use_cache=False
        ).hidden_states
        return torch.stack(states, dim=-1)

    writer = _writer(model, language_model, device)
    return TextEncoder(read, tokenizer, max_tokens=max_tokens, device=device, module=writer, writer=writer)


def _writer(model: Any, language_model: nn.Module, device: str) -> Gemma3ForCausalLM:
    """The language model with its head, without the eyes that the folder also holds."""
    with torch.device("meta"):
        writer = Gemma3ForCausalLM(model.config.text_config)
    writer.model, writer.lm_head = language_model, model.lm_head.to(device)
    writer.generation_config = model.generation_config
    return writer.eval()


def _load_t5(folder: Path, *, max_tokens: int, device: str, dtype: torch.dtype | None, bits: int) -> TextEncoder:
    _require_files(folder / "text_encoder", "config.json", "*.safetensors")
    model = _pretrained(T5EncoderModel, folder / "text_encoder", dtype, "T5")
    words = folder / "tokenizer"
    tokenizer = _tokenizer(words, "right") if (words / "tokenizer.json").is_file() else t5_tokenizer(words)
    encoder = model.eval().requires_grad_(False)
    _send(encoder, folder / "text_encoder", "", device=device, bits=bits)

    def read(ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        states: Tensor = encoder(input_ids=ids_BS, attention_mask=mask_BS).last_hidden_state
        return states[..., None]

    return TextEncoder(read, tokenizer, max_tokens=max_tokens, device=device, module=encoder)


@contextmanager
def _without_gradients() -> Iterator[None]:
    # Weights in 4 bits cannot compute in inference mode, which callers are in.
    with torch.inference_mode(False), torch.no_grad():
        yield


def _require_files(folder: Path, *patterns: str) -> None:
    missing = [pattern for pattern in patterns if not any(folder.glob(pattern))]
    if missing:
        raise UsageError(f"text encoder folder {folder} lacks {', '.join(missing)}; stage the model's files again")


def _pretrained(kind: Any, folder: Path, dtype: torch.dtype | None, name: str) -> Any:
    try:
        model, report = kind.from_pretrained(
            folder, local_files_only=True, dtype=dtype or "auto", output_loading_info=True
        )
    except Exception as error:  # whatever its readers of JSON and tensors raise
        raise UsageError(f"text encoder folder {folder} cannot be read as {name}: {_first_line(error)}") from error
    if lacking := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        raise CheckpointMismatch(f"text encoder folder {folder} lacks {len(lacking)} tensors, such as {lacking[0]}")
    return model


def _send(module: nn.Module, folder: Path, prefix: str, *, device: str, bits: int) -> None:
    """Bring a model that the library has opened on the host to `device`; its names in the files begin with `prefix`."""
    quantise_weights(module, bits=bits)
    if bits == 16 and torch.device(device).type == "cuda":
        # What the library opened are windows on mapped files, which take no time until somebody looks through them.
        fill_from_files(module, folder, prefix, device)
    module.to(device)


def fill_from_files(module: nn.Module, folder: Path, prefix: str, device: str) -> None:
    """Put parameters on `device` straight from the files of `folder`; those that have other names there stay."""
    places = {prefix + name: parameter for name, parameter in module.named_parameters()}
    for path in _weight_files(folder):
        file = TensorFile(path, "text encoder")
        stored = [name for name in file.tensor_specs() if name in places]
        with file.reading_ahead(dict.fromkeys(stored, ()), device):
            for name in stored:
                places[name].data = file.read(name, device, places[name].dtype)


def _weight_files(folder: Path) -> list[Path]:
    """Those that the library reads: a single one, or those that an index names."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    names = json.loads(index.read_text())["weight_map"].values() if index.is_file() else ()
    return [folder / name for name in sorted(set(names))]


def _tokenizer(folder: Path, padding_side: str) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side=padding_side)
    except Exception as error:  # whatever its readers of JSON and vocabularies raise
        raise UsageError(f"tokenizer of {folder} cannot be read: {_first_line(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
