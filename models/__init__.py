"""Models. They import only one another, and shared modules of components/.

llama.py                [model]: the keys of a Llama
presets.py              the shapes of the named models
shape_checks.py         what a shape may be
decoder.py              the decoder: blocks, feed-forward, initial std of each matrix
attention.py            attention and its variants
attention_backends.py   the attention of each layer: whole sequences, documents, or chunks of them
compilation.py          what torch.compile needs on a GPU, and how many variants it may compile
flex_attention.py       fused attention with masks and softcaps on GPUs
norm.py                 RMSNorm
lm_head.py              output projection, with the loss inside
random_weights.py       random weights from (seed, name), equal with every sharding
mup.py                  muP: RULES for initial weights, learning rates and multipliers
rope.py                 rotary position embedding
document_attention.py   attention within documents
context_parallel.py     attention of the chunks that a context-parallel rank has
moe.py                  mixture of experts
grouped_linear.py       one matrix product for all experts
recompute.py            element-wise functions that keep only their inputs for the backward pass
router_loss.py          auxiliary losses of the routers
z_loss.py               z-loss of the output logits
loss.py                 cross-entropy in chunks of tokens
parallel_plan.py        tensor-parallel styles and FSDP groups, by module name
kv_cache.py             key-value cache of generation
sharded_kv_cache.py     the same of a context-parallel rank
mkldnn_linear.py        fast linear layers for generation on CPUs (oneDNN, formerly MKL-DNN)
hf/                     architectures.py (one row each), weights.py (names), config.py and rope.py (config.json)
"""
