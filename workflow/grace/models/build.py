"""A LLaVA made from scratch: a pretrained vision tower, a new projector and a new Llama decoder."""

from pathlib import Path
from typing import cast

import torch
from transformers import AutoModel, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from grace.config.schema import Architecture

LONGEST = 1024  # positions; the demo's conversations have at most a few hundred tokens


def build_llava(shape: Architecture, processor, tower: str | Path, seed: int) -> LlavaForConditionalGeneration:
    """Build the demo's model in fp32: `shape`'s decoder, random from `seed`, behind the tower in folder `tower`.

    The head is not tied to the embeddings, as in LLaVA-1.5.
    """
    vision = AutoModel.from_pretrained(tower, dtype=torch.float32, local_files_only=True)
    tokenizer = processor.tokenizer
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=LONGEST,
        initializer_range=shape.init_std,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    side = vision.config.image_size // vision.config.patch_size
    config = LlavaConfig(
        vision_config=vision.config,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(processor.image_token),
        image_seq_length=side * side,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    config.initializer_range = shape.init_std
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        # Beside visual tokens a word of the other weights' size would drown in the first attention layer's output.
        torch.nn.init.normal_(cast(torch.Tensor, model.get_input_embeddings().weight), std=shape.embedding_std)
    model.model.vision_tower.load_state_dict(vision.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model
