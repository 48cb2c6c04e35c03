"""Models that transformers lacks, in plain PyTorch: what the families of the same name are held against.

Written from the papers and from what the hub's own code computes, with its names of weights and settings; they import
nothing of megapatch. Importing this package makes them known to AutoConfig and AutoModelForCausalLM.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from references.baichuan import Baichuan, BaichuanConfig
from references.chatglm import ChatGlm, ChatGlmConfig
from references.deepseek_moe import DeepseekConfig, DeepseekMoe
from references.qwen1 import Qwen, QwenConfig

MODELS = {BaichuanConfig: Baichuan, ChatGlmConfig: ChatGlm, DeepseekConfig: DeepseekMoe, QwenConfig: Qwen}
for _config, _model in MODELS.items():
    AutoConfig.register(_config.model_type, _config)
    AutoModelForCausalLM.register(_config, _model)
