"""The demo's processor: a tokenizer of whole words, an image processor, and the template that joins them.

One conversation reads `<bos> <image>... <q> question answer <eos> <q> ...`; `<image>` becomes nine visual tokens.
An answer follows the question's last word directly: the word that says where to look is then the one that looks.
"""

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from grace.demo.images import CELL, SIDE
from grace.demo.vocabulary import SPECIAL, words

TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{% generation %}{% if message.content is string %} {{ message.content | trim }}{% else %}
{%- for part in message.content %} {{ part.text | trim }}{% endfor %}{% endif %}{{ eos_token }}{% endgeneration %}
{%- elif message.content is string -%}
<q> {{ message.content | replace('<image>', '') | trim }}
{%- else -%}
{%- for part in message.content if part.type == 'image' -%}<image>{%- endfor -%}
<q>{% for part in message.content if part.type == 'text' %} {{ part.text | replace('<image>', '') | trim }}{% endfor %}
{%- endif -%}
{%- endfor -%}
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Lower-cased words and single digits; anything else is `<unk>`."""
    vocabulary = {word: index for index, word in enumerate(words())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[^a-z0-9\- ]"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens={"image_token": "<image>", "question_token": "<q>"},
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> LlavaProcessor:
    """The processor of the demo's models; `save_pretrained` writes it, `AutoProcessor.from_pretrained` reads it."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=CELL,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=TEMPLATE,
    )
